"""All defences by name. A new one is a file with a class and a line here."""

from collections.abc import Callable

from splitveil.defences.defence import Defence
from splitveil.defences.encrypted import EncryptedQuery
from splitveil.defences.gaussian import Gaussian
from splitveil.defences.metric_noise import MetricNoise
from splitveil.defences.none import Plain
from splitveil.defences.permute import Permutation
from splitveil.defences.quantise import BFloat16, Int4, Int8
from splitveil.defences.regularised import Regularised
from splitveil.defences.sparsify import TopK
from splitveil.errors import ConfigurationError

_FIXED: dict[str, Callable[[], Defence]] = {c.name: c for c in (Plain, Int8, Int4, BFloat16, EncryptedQuery)}
_WITH_KEY: dict[str, Callable[[int | None], Defence]] = {c.name: c for c in (Permutation,)}
_WITH_NUMBER: dict[str, Callable[[float, int | None], Defence]] = {c.name: c for c in (Gaussian, MetricNoise, TopK)}
_WITH_FOLDER: dict[str, Callable[[str], Defence]] = {c.name: c for c in (Regularised,)}


def names() -> tuple[str, ...]:
    """Names that ``create`` knows of defences that change what crosses; ``regularised:DIR`` changes the device half."""
    return (*_FIXED, *_WITH_KEY, *_WITH_NUMBER)


def create(spec: str, seed: int | None = None) -> Defence:
    """The defence that ``spec`` describes: NAME, or NAME:NUMBER for those that take one, as in ``gaussian:0.1``; for
    ``regularised`` NAME:DIR.

    ``seed`` makes what is random in it repeatable, for an audit; encryption never is. Raises ``ConfigurationError`` for
    an unknown name, for a number that is missing, too much or not in range, and for a folder that cannot be read.
    """
    name, colon, number = spec.strip().partition(":")
    if name in _FIXED or name in _WITH_KEY:
        if colon:
            raise ConfigurationError(f"defence {name!r} takes no number, got {spec!r}; {_known()}")
        return _FIXED[name]() if name in _FIXED else _WITH_KEY[name](seed)
    if name in _WITH_FOLDER:
        if not number:
            raise ConfigurationError(f"defence {name!r} needs a folder, as in {name}:OUT/personal; {_known()}")
        return _WITH_FOLDER[name](number)
    if name not in _WITH_NUMBER:
        raise ConfigurationError(f"unknown defence {spec!r}; {_known()}")
    try:
        value = float(number)
    except ValueError:
        raise ConfigurationError(
            f"defence {name!r} needs a number, as in {name}:0.1, got {spec!r}; {_known()}"
        ) from None
    return _WITH_NUMBER[name](value, seed)


def _known() -> str:
    numbered, folders = (f"{name}:NUMBER" for name in _WITH_NUMBER), (f"{name}:DIR" for name in _WITH_FOLDER)
    return "known: " + ", ".join([*_FIXED, *_WITH_KEY, *numbered, *folders])
