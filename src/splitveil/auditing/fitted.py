"""What attackers have learnt, kept on disk, so that an interrupted run does not teach them again."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from splitveil.errors import DataError


def place(folder: Path, key: str) -> Path:
    """Where an audit's ``folder`` has what the attacker with that ``fit_key`` learnt."""
    return folder / "fitted" / f"{key}.safetensors"


def keep(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Writes ``path`` as a whole or not at all. Raises ``OSError``."""
    partial = path.with_suffix(".partial")
    # Clones, because tensors that share memory, as tied weights do, are not taken.
    packed = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    try:
        with partial.open("wb") as file:
            file.write(save(packed, dict(facts)))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def kept(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """(tensors, facts) that ``keep`` wrote, or None. Raises ``DataError`` for a file that was damaged since."""
    return selected(path, lambda _: True)


def selected(path: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The same with those of the tensors whose names are ``wanted``; the others are not read."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}); delete it, and it will be made anew"
        ) from None
