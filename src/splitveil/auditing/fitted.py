"""What attackers have learnt, kept on disk, so that an interrupted run does not teach them again."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from splitveil.errors import DataError


def keep(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Writes ``path`` as a whole or not at all."""
    partial = path.with_suffix(".partial")
    # Clones, because tensors that share memory, as tied weights do, are not taken.
    packed = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(packed, partial, dict(facts))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def kept(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """(tensors, facts) that ``keep`` wrote, or None. Raises ``DataError`` for a file that was damaged since."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}); delete it, and it will be made anew"
        ) from None
