"""Seeded noise that is the same for every attacker, whichever of them is measured first."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from splitveil.defences.defence import Defence


@contextmanager
def drawn_again(defence: Defence) -> Iterator[None]:
    """What a seeded defence draws within, it draws again afterwards.

    So an attacker's queries meet the same noise in a run that was interrupted, and on another machine that has not
    measured the attackers before it. Defences without a seed, encryption among them, draw anew all the same.
    """
    held = [value for value in getattr(defence, "__dict__", {}).values() if isinstance(value, torch.Generator)]
    states = [generator.get_state() for generator in held]
    try:
        yield
    finally:
        for generator, state in zip(held, states, strict=True):
            generator.set_state(state)
