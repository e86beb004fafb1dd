"""The embedded default: a small base model and a private clinic adapter, as package data with their cards."""

from pathlib import Path

from splitveil.errors import ConfigurationError

PREFIX = "embedded:"
NAMES = ("base", "clinic")


def folder(name: str) -> Path:
    """The folder of ``base`` or ``clinic``. Raises ``ConfigurationError`` for other names and incomplete installs."""
    path = Path(__file__).parent / name
    if name not in NAMES:
        raise ConfigurationError(f"nothing embedded is called {name!r}; there are {', '.join(NAMES)}")
    if not path.is_dir():
        raise ConfigurationError(f"the embedded {name} is missing from this installation; install splitveil again")
    return path


def resolve(text: str) -> Path:
    """A folder as people write it: a path, or ``embedded:base`` and ``embedded:clinic`` for what comes along."""
    return folder(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else Path(text)
