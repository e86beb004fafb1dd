"""The private layer's encrypted query as a crossing: what a vendor's server receives of the user's text."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from splitveil.errors import NonFiniteError
from splitveil.private.layer import PrivateLinear
from splitveil.split import Crossing

RANK = 8
WORDS = 2.0**32


class EncryptedQuery:
    """A device that sends its hidden states to a private linear layer, by the default, secure parameters.

    The layer is published once for each width, with a random private map of rank 8: what is sent depends on it only by
    the size to which a state is scaled before it is masked. Each position crosses as one query row: ``width`` masked
    values, then the pad, together ``width(width)`` words mod 2^32. A word v is shown to attacks as the number
    v/2^32 − 1/2 in float32, which keeps its 24 leading bits: plenty for reading text, too few for a lattice attack,
    whose cost is estimated elsewhere.

    Masks are one-time and come from the operating system's randomness, for every row anew, also when an attacker
    queries the defence itself. There is no seed: a mask that could be repeated would not hide anything.
    """

    name: ClassVar[str] = "encrypted"
    summary: ClassVar[str] = "the private layer's encrypted query: each position under a lattice mask of its own"

    def __init__(self) -> None:
        self._layers: dict[int, PrivateLinear] = {}

    @property
    def params(self) -> Mapping[str, float | int | str]:
        """``rank`` of the private map."""
        return {"rank": RANK}

    def width(self, width: int) -> int:
        """Words of a query row for states of ``width``: the width of what ``protect`` returns."""
        return self._layer(width).publication.parameters.query_width(width)

    def bytes_a_position(self, width: int) -> float:
        """One query row of one layer, in words of 4 bytes; an adapter of n layers sends n of them."""
        return 4.0 * self.width(width)

    def protect(self, crossing: Crossing) -> Crossing:
        """(batch, position, ``width(crossing.width)``) float32 in [−½, ½]; zeros where there is no text.

        Raises ``NonFiniteError`` where a state is NaN or infinite: a client would send the zero query and give up.
        """
        text = crossing.text
        states = crossing.hidden[text].detach().float().cpu()
        if not bool(states.isfinite().all()):
            raise NonFiniteError("a hidden state is NaN or infinite; a private layer has no query for it")
        words = self.width(crossing.width)
        query, _ = self._layer(crossing.width).query(states.numpy())
        rows = np.frombuffer(query, dtype="<u4").reshape(len(states), words) / WORDS - 0.5
        hidden = torch.zeros(*text.shape, words, device=crossing.hidden.device)
        hidden[text] = torch.from_numpy(rows.astype(np.float32)).to(hidden.device)
        return crossing.with_hidden(hidden)

    def _layer(self, width: int) -> PrivateLinear:
        if width not in self._layers:
            a, b = torch.randn(RANK, width), torch.randn(width, RANK)
            _, self._layers[width] = PrivateLinear.publish((a, b))
        return self._layers[width]
