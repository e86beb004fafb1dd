"""Torch tensors to what travels, and back. Positions without text do not travel: they arrive as zeros.

Nothing is lost by that: no position with text attends to one without.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from splitveil.errors import ConfigurationError, ProtocolError
from splitveil.split import Crossing
from splitveil.wire import split_codec as codec
from splitveil.wire.parsing import MAX_MESSAGE
from splitveil.wire.split_codec import Kind, Request
from splitveil.wire.tensors import DType, Packed, pack, unpack

_DTYPES = {torch.float32: DType.FLOAT32, torch.bfloat16: DType.BFLOAT16, torch.float16: DType.FLOAT16}
_TORCH = {number: dtype for dtype, number in _DTYPES.items()}
_INT32 = torch.iinfo(torch.int32)


def packed(rows: Tensor) -> Packed:
    """(count, width) in their smallest exact form. Raises ``ConfigurationError`` for a dtype that does not travel."""
    if rows.dtype not in _DTYPES:
        raise ConfigurationError(f"{rows.dtype} does not travel; load the model in float32, bfloat16 or float16")
    return pack(rows.detach().float().cpu().numpy(), _DTYPES[rows.dtype])


def unpacked(what: Packed, count: int, width: int, *, finite: bool = True) -> Tensor:
    """(count, width), of the dtype that it had; without ``finite`` also NaN and infinity. Raises ``ProtocolError``."""
    rows = unpack(what, count, width, finite=finite)
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy()).to(_TORCH[DType(what.dtype)])


def scattered(rows: Tensor, text: Tensor) -> Tensor:
    """(batch, position, width): ``rows`` where ``text`` (batch, position) is true, zeros elsewhere."""
    if bool(text.all()):
        return rows.reshape(*text.shape, rows.shape[1])
    full = rows.new_zeros(*text.shape, rows.shape[1])
    full[text.to(rows.device)] = rows
    return full


def request_of(seq: int, kind: Kind, crossing: Crossing, labels: Tensor | None = None, number: float = 0.0) -> Request:
    """A request with a crossing. Raises ``ConfigurationError`` for one that cannot travel."""
    texts, positions, _ = crossing.hidden.shape
    if labels is not None and bool(((labels < _INT32.min) | (labels > _INT32.max)).any()):
        raise ConfigurationError("a label does not fit into 32 bits")
    return Request(
        seq,
        kind,
        packed(crossing.hidden[crossing.text]),
        texts,
        positions,
        crossing.mask.shape[1],
        codec.pack_mask(crossing.mask.bool().cpu().numpy()),
        b"" if labels is None else labels.to(torch.int32).cpu().numpy().tobytes(),
        number,
    )


def crossing_of(request: Request, width: int, states: int) -> Crossing:
    """The crossing of a request; its states may be NaN. Raises ``ProtocolError`` for states that do not fit it.

    ``states`` is the most texts × positions that are taken, those before included.
    """
    if request.tensor is None or request.texts * request.seen > states:
        raise ProtocolError(
            f"{request.texts} texts of {request.seen} positions; at most {states} positions together are taken"
        )
    mask = torch.from_numpy(codec.unpack_mask(request))
    text = mask[:, -request.positions :]
    hidden = scattered(unpacked(request.tensor, int(text.sum()), width, finite=False), text)
    return Crossing(hidden, mask.long())


def labels_of(request: Request) -> Tensor | None:
    """The labels of a request, (texts, positions) of int64, or None."""
    labels = codec.unpack_labels(request)
    return None if labels is None else torch.from_numpy(np.ascontiguousarray(labels))


def fits(rows: int, width: int) -> bool:
    """Whether so many float32 rows, of whatever encoding, fit in one message."""
    return 4 * rows * width <= MAX_MESSAGE - codec.OVERHEAD


def pieces(crossing: Crossing) -> Iterator[Crossing]:
    """The same positions in as few crossings as fit into a message each; every text has begun in the first of them."""
    texts, positions, width = crossing.hidden.shape
    earlier = crossing.mask.shape[1] - positions
    begun = int(crossing.mask.bool().long().argmax(1).max()) + 1 - earlier
    most = max(1, (MAX_MESSAGE - codec.OVERHEAD) // (4 * texts * width))
    first = 0
    while first < positions:
        last = min(positions, max(first + most, begun))
        yield Crossing(crossing.hidden[:, first:last], crossing.mask[:, : earlier + last])
        first = last
