"""Reads the tensors of a safetensors file as float32, bfloat16 included, without torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from splitveil.errors import AdapterError, UnsupportedAdapterError

# safetensors.numpy cannot decode bfloat16. This one gives the bytes, and a type to what safetensors leaves untyped.
_deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = deserialize

_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it lies in the file. Its bytes are the vendor's secret, and not part of its repr."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    _data: bytearray = field(repr=False)

    def matrix(self, where: str) -> NDArray[np.float32]:
        """The values as a read-only float32 matrix of this shape; every float16 and bfloat16 is represented exactly.

        Raises:
            UnsupportedAdapterError: another dtype, or not a matrix (the adapter of a convolution has 3 or 4 axes).
            AdapterError: an axis of length 0, NaN or infinity. The message names the tensor and shows no value.
        """
        if self.dtype not in _STORED:
            raise UnsupportedAdapterError(
                f"{where}: tensor {self.name!r} has dtype {self.dtype}, expected F32, F16 or BF16; "
                "convert the adapter to float32 and save it again"
            )
        if len(self.shape) != 2:
            raise UnsupportedAdapterError(
                f"{where}: tensor {self.name!r} has shape {list(self.shape)}, expected a matrix; "
                "only adapters of linear modules can be served"
            )
        if 0 in self.shape:
            raise AdapterError(
                f"{where}: tensor {self.name!r} has shape {list(self.shape)} and no values; gather the shards "
                "(DeepSpeed ZeRO-3, FSDP) before saving the adapter"
            )
        stored = np.frombuffer(self._data, dtype=_STORED[self.dtype])
        if self.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            values = (stored.astype(np.uint32) << 16).view(np.float32)
        else:
            values = stored.astype(np.float32)
        if not np.isfinite(values).all():
            raise AdapterError(
                f"{where}: tensor {self.name!r} holds NaN or infinity, expected finite numbers; "
                "use a checkpoint from before training diverged"
            )
        matrix = values.reshape(self.shape)
        matrix.setflags(write=False)
        return matrix


def read_tensors(data: bytes, where: str) -> list[RawTensor]:
    """The tensors of a safetensors file in the order of their names; `where` names the file in messages.

    Raises:
        AdapterError: the bytes are not a complete safetensors file.
    """
    try:
        entries = _deserialize(data)
    except SafetensorError as error:
        raise AdapterError(
            f"{where}: not a complete safetensors file ({error}); copy it again, or save the adapter again"
        ) from None
    tensors = [RawTensor(name, entry["dtype"], tuple(entry["shape"]), entry["data"]) for name, entry in entries]
    return sorted(tensors, key=lambda tensor: tensor.name)
