"""A device half that was trained so that what it sends tells less, as a defence among the others."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from splitveil.errors import ConfigurationError
from splitveil.split import Crossing
from splitveil.split.personal import personalised


class Regularised:
    """The defence is in the weights: what this device half sends crosses as it is.

    ``folder`` is the personal part of a run of training with a regulariser. Whoever measures this defence lets the
    victims run ``device``, and an attacker who adapts asks the same: with an attacker who learnt from the public base
    instead, the difference of two device halves would be taken for protection.
    """

    name: ClassVar[str] = "regularised"
    summary: ClassVar[str] = (
        "a device half trained with a penalty on what it tells; the attackers ask that same device half"
    )

    def __init__(self, folder: str | Path) -> None:
        """Raises ``ConfigurationError`` for a folder that is not there or has no weights in it."""
        self.folder = Path(folder)
        self._digest = digest_folder(self.folder)

    @property
    def params(self) -> Mapping[str, float | int | str]:
        """``digest`` of the folder's files."""
        return {"digest": self._digest}

    def width(self, width: int) -> int:
        """How wide the defended crossing of a plain one of ``width`` is: the same."""
        return width

    def bytes_a_position(self, width: int) -> float:
        """Float32 numbers: 4 · width."""
        return 4.0 * width

    def protect(self, crossing: Crossing) -> Crossing:
        """``crossing`` itself: it comes from this device half already."""
        return crossing

    def device(self, base: Any) -> Any:
        """A copy of the public model ``base`` with this device half. Raises as ``personalised`` does."""
        return personalised(base, self.folder)


def digest_folder(folder: Path) -> str:
    """SHA-256, in hexadecimal, of the configuration and the weights in ``folder``.

    Raises ``ConfigurationError`` for a folder that is not there or has no weights in it.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors"})
        stamps = tuple((path, found.st_size, found.st_mtime_ns) for path in files for found in [path.stat()])
        if not any(path.suffix == ".safetensors" for path in files):
            raise ConfigurationError(
                f"{folder} holds no personal part: expected adapter_model.safetensors or device.safetensors, as "
                "`splitveil split train` writes them to OUT/personal"
            )
        return _digest(stamps)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be read: {error.strerror}") from None


@functools.lru_cache(64)
def _digest(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files that are read again once their size or time has changed. A report asks once a row."""
    state = hashlib.sha256()
    for path, _, _ in stamps:
        content = path.read_bytes()
        state.update(f"{path.name} {len(content)}\n".encode())
        state.update(content)
    return state.hexdigest()
