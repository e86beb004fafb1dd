"""Files that hold a secret: for their owner's eyes alone."""

import os
import stat
from pathlib import Path

from splitveil.errors import ConfigurationError


def require_own(file: Path, what: str) -> None:
    """Raises ``ConfigurationError`` for a file that others than its owner may open; ``what`` it is, for the message.

    ``OSError`` if there is none. Where permissions are not those of POSIX, nothing is asked.
    """
    if os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise ConfigurationError(f"the {what} {file} may be read by others; chmod 600 it")
