"""Every attack by its name."""

from collections.abc import Callable

from splitveil.attacks.attack import Attack
from splitveil.attacks.beam import Beam
from splitveil.attacks.control import Ceiling, Commonest, Floor
from splitveil.attacks.gradient import Gradient
from splitveil.attacks.lens import Lens
from splitveil.attacks.mlp import Mlp
from splitveil.attacks.nearest import Nearest
from splitveil.attacks.optimise import Optimise
from splitveil.attacks.pooled import Pooled
from splitveil.attacks.revert import Revert
from splitveil.attacks.ridge import Ridge
from splitveil.attacks.search import Search
from splitveil.errors import ConfigurationError

CONTROLS = ("floor", "floor:commonest", "oracle")
"""Run with every audit; ``oracle`` alone is ever told the prompts."""

_ATTACKS: dict[str, Callable[[], Attack]] = {
    attack.name: attack
    for attack in (
        Floor,
        Commonest,
        Ceiling,
        Lens,
        Nearest,
        Ridge,
        Mlp,
        Pooled,
        Revert,
        Beam,
        Gradient,
        Optimise,
        Search,
    )
}


def names() -> tuple[str, ...]:
    """All attacks, controls first, then from the simplest to the strongest."""
    return tuple(_ATTACKS)


def create(name: str) -> Attack:
    """A fresh attack. Raises ``ConfigurationError`` for an unknown name."""
    if name not in _ATTACKS:
        raise ConfigurationError(f"there is no attack {name!r}; there are {', '.join(_ATTACKS)}")
    return _ATTACKS[name]()
