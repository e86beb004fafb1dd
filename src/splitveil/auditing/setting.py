"""What all rows of a run share, and the keys that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from splitveil.attacks.knowledge import Shadow
from splitveil.auditing.device import Knows
from splitveil.auditing.digest import digest, digest_tensors

FORMAT = 1
"""Part of every key: raised when scoring changes, so that old rows do not pass for new ones."""

Params = Mapping[str, float | int | str]


@dataclass(frozen=True)
class Setting:
    """Names for people, and digests of everything that determines a row."""

    model: str
    data: str
    model_digest: str
    data_digest: str
    """Of the victims' token ids and of what is marked in them."""
    shadow_digest: str
    seed: int
    budget: float
    """Seconds that an attack may learn."""
    steps: int | None = None
    """Gradient steps that it may take; None for as many as the time allows."""
    personal: str = ""
    """Digest of the victims' personal part; empty where they run the public model."""
    knows: str = ""
    """What the attackers know of it."""
    training: bool = False
    """Whether the texts are being trained on."""
    plateau: bool = True
    """Whether an attack may stop learning before, where its validation score has flattened."""

    def knowing(self, shadow: Shadow) -> "Setting":
        """The same setting with the digest of the attackers' text."""
        tensors = {"train": shadow.train, "validation": shadow.validation}
        return replace(self, shadow_digest=digest([digest_tensors(tensors), shadow.origin]))

    def fit_key(self, cut: int, attack: str, version: int, defence: str, params: Params) -> str:
        """Of what an attacker learnt. The victims are no part of it: the same attacker may meet several.

        Nor is a personal part that the attacker does not know.
        """
        return digest(
            {
                "format": FORMAT,
                "model": self.model_digest,
                "shadow": self.shadow_digest,
                "seed": self.seed,
                "budget": self.budget,
                "cut": cut,
                "attack": [attack, version],
                "defence": [defence, dict(params)],
            }
            | ({"personal": self.personal} if self.personal and self.knows == Knows.PERSONAL else {})
            | ({"training": True} if self.training else {})
            | ({} if self.plateau else {"plateau": False})
            | ({} if self.steps is None else {"steps": self.steps})
        )

    def row_key(self, fit_key: str, metric: str) -> str:
        """Of one measurement of that attacker on this data."""
        return digest([fit_key, self.data_digest, metric, *self._personal()])

    def information_key(self, block: int, estimator: str, metric: str) -> str:
        """Of one estimate: it needs neither shadow text nor time to learn."""
        about = [FORMAT, self.model_digest, self.data_digest, self.seed, block, estimator, metric]
        return digest([*about, *self._personal()[:1]])

    def _personal(self) -> list[str]:
        """Nothing for the public model, so that its keys do not depend on what else can be audited."""
        return [self.personal, self.knows] if self.personal else []

    def derived_seed(self, *purpose: object) -> int:
        """A seed of its own for each purpose, so that no two draws that should differ are the same."""
        return int(digest([self.seed, *map(str, purpose)])[:15], 16)
