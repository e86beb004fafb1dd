"""What every attack is: a small class that declares what it needs, learns, and recovers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from splitveil.attacks.knowledge import Access, Knowledge
from splitveil.split import Crossing


class Progress(Protocol):
    """Where long work says how far it is; the command line draws a bar, tests pass ``silent``."""

    def __call__(self, done: float, note: str) -> None:
        """``done`` of 1.0, and a few words (a validation score, a loss)."""


def silent(done: float, note: str) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Effort:
    """How much an attacker may spend on learning; the same for all that are compared."""

    seconds: float = 540.0
    """Wall time of ``fit``; early stopping may end it sooner."""
    steps: int | None = None
    """Gradient steps after which learning ends even if there is time left: for runs that must not depend on a clock."""
    seed: int = 0
    plateau: bool = True
    """Whether learning may end early where the validation score has flattened; else all of the time is used."""


@dataclass(frozen=True, repr=False)
class Recovery:
    """What an attack believes the prompts were."""

    tokens: Tensor
    """(prompts, positions) token ids, -1 where the crossing holds no text."""
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    """What the attack knows about its own work, one number a position (NaN where there is none): for ``search`` its
    ``evaluations``, ``distance`` and ``gap``."""


class Attack(Protocol):
    """One attack. A new one is a file with a class like this and a line in ``catalogue.py``.

    ``fit`` sees ``Knowledge`` restricted to ``needs``; ``recover`` sees a ``Crossing`` and nothing else.
    """

    @property
    def name(self) -> str:
        """What the command line and reports call it."""

    @property
    def version(self) -> int:
        """Part of every row's key: a changed attack is measured anew."""

    @property
    def needs(self) -> frozenset[Access]:
        """All that it may ask its ``Knowledge`` for."""

    @property
    def source(self) -> str:
        """Where it was published, or what it stands for."""

    @property
    def summary(self) -> str:
        """One line for people who have never seen it."""

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        """Learns what there is to learn before any victim is seen."""

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        """Turns hidden states back into token ids."""

    def state(self) -> dict[str, Tensor]:
        """What ``fit`` learnt, to be kept on disk."""

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        """Takes the place of ``fit``: ``state`` is from an equal attack with equal knowledge."""


@runtime_checkable
class BuiltOn(Protocol):
    """An attack that learns what another one learns, which is kept as that one's, and makes something else of it."""

    @property
    def learner(self) -> Attack:
        """The other one."""

    def prepare(self, knowledge: Knowledge) -> None:
        """What is to be done before any victim is seen, once the learner has learnt or was restored."""


def learner_of(attack: Attack) -> Attack:
    """The attack under whose name is kept what ``attack`` learns."""
    return attack.learner if isinstance(attack, BuiltOn) else attack
