"""The vendor's gauge key: the same weights are always published in the same gauge, across restarts.

A publication shows the length of the longest row of each core, which depends on the gauge. Under a fresh gauge at every
start, hundreds of publications of the same weights would give away their singular values (docs/design/reduction.md,
Gaps). The gauge is therefore derived from this key and the weights: other weights, another gauge.
"""

import os
from os import PathLike
from pathlib import Path

from splitveil.errors import ConfigurationError
from splitveil.serving.secret_file import require_own

SIZE = 32


def default_path() -> Path:
    """``gauge.key`` below ``$XDG_STATE_HOME/splitveil``, else below ``~/.local/state/splitveil``.

    Raises ``ConfigurationError`` without a home directory.
    """
    try:
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "splitveil" / "gauge.key"
    except RuntimeError:  # a container's user without an entry in the password file
        raise ConfigurationError("no home directory to keep the gauge key in; name a file with --gauge-key") from None


def gauge_key(path: str | PathLike[str] | None = None) -> bytes:
    """The 32 bytes of the key file, which is made, for its owner alone, if it does not exist.

    Several servers may start at once: all get the same key. Raises ``ConfigurationError`` for a file that is not such
    a key, that others may read, or that can be neither read nor made.
    """
    file = default_path() if path is None else Path(path)
    try:
        if not file.exists():
            _make(file)
        require_own(file, "gauge key")
        key = file.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"the gauge key {file} cannot be read or made ({error.strerror}); name another file with --gauge-key"
        ) from None
    if len(key) != SIZE:
        raise ConfigurationError(
            f"{file} is no gauge key: it has {len(key)} bytes, expected {SIZE}; remove it, and a new one is made"
        )
    return key


def _make(file: Path) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = file.with_name(f"{file.name}.{os.getpid()}.{os.urandom(4).hex()}")
    handle = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(os.urandom(SIZE))
            opened.flush()
            os.fsync(opened.fileno())
        # A link, unlike a rename, leaves what another server has made meanwhile.
        os.link(own, file)
    except FileExistsError:
        pass
    finally:
        own.unlink()
