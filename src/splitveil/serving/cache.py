"""Publications on disk, one for every server and adapter, so that a large one is downloaded once."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from splitveil.wire import codec


def default_folder() -> Path | None:
    """``$SPLITVEIL_CACHE``, else ``$XDG_CACHE_HOME/splitveil``, else ``~/.cache/splitveil``; None without a home."""
    own = os.environ.get("SPLITVEIL_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "splitveil"
    except RuntimeError:  # a container's user without an entry in the password file
        return None


class PublicationCache:
    """A folder of publications. They are public; what is read back is checked like anything from the wire."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or default_folder()

    def load(self, address: str, adapter: str) -> bytes | None:
        """The publication last received from there, or None."""
        if self._folder is None:
            return None
        path = self._folder / _name(address, adapter)
        try:
            return path.read_bytes() if path.stat().st_size <= codec.MAX_PUBLICATION else None
        except OSError:
            return None

    def store(self, address: str, adapter: str, data: bytes) -> None:
        """Keeps a publication; a folder that cannot be written to only means that nothing is kept."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                Path(name).replace(self._folder / _name(address, adapter))
            finally:
                Path(name).unlink(missing_ok=True)


def _name(address: str, adapter: str) -> str:
    return hashlib.sha256(f"{address}\n{adapter}".encode()).hexdigest() + ".safetensors"
