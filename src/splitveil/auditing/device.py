"""Whose device half is attacked, and which one the attackers have: the same, or only the public base."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from splitveil.defences.defence import Defence
from splitveil.defences.regularised import Regularised, digest_folder
from splitveil.errors import ConfigurationError
from splitveil.split.personal import personalised

PART = "personal"
"""What `splitveil split train` calls the personal part within a run's folder."""


class Knows(StrEnum):
    """What attackers know of a personalised device."""

    BASE = "base"
    """The public model it was made from, and nothing of what was personalised."""
    PERSONAL = "personal"
    """Everything about it: an upper bound."""


@dataclass(frozen=True, repr=False)
class Devices:
    """The public model, the victims' and the attackers'."""

    public: Any
    """The base that everyone has: the attackers' embeddings and sampled text are its own in any case."""
    personal: Any = None
    """The personalised model; None where the victims run the public one."""
    folder: str = ""
    """The name of the personal part's folder."""
    digest: str = ""
    """Of what is in it."""
    knows: Knows = Knows.BASE
    training: bool = False
    """Whether the victims' texts are being trained on, in the U shape."""

    @staticmethod
    def of(base: Any, personal: str | Path | None, knows: str, training: bool) -> "Devices":
        """Raises ``ConfigurationError`` for what cannot be, and as ``personalised`` does."""
        if knows not in list(Knows):
            raise ConfigurationError(f"attackers know {' or '.join(repr(one.value) for one in Knows)}, got {knows!r}")
        if personal is None:
            if knows == Knows.PERSONAL:
                raise ConfigurationError("attackers who know the personal part need one: give --personal (personal=)")
            return Devices(base, training=training)
        folder = part_of(Path(personal))
        digest = digest_folder(folder)
        return Devices(base, personalised(base, folder), named(folder), digest, Knows(knows), training)

    def victims(self, defence: Defence) -> Any:
        """The model whose lower blocks the victims run, and whose upper blocks the cloud does."""
        if isinstance(defence, Regularised):
            return defence.device(self.public)
        return self.public if self.personal is None else self.personal

    def attackers(self, defence: Defence, victims: Any) -> Any:
        """The model whose lower blocks and head the attackers have; ``victims`` is the model that they attack."""
        same = isinstance(defence, Regularised) or self.knows is Knows.PERSONAL
        return victims if same else self.public

    def words(self, defences: list[str]) -> str:
        """What the attackers lack, for the report; nothing where they lack nothing."""
        said = []
        if self.personal is not None and self.knows is Knows.BASE:
            said.append(
                f"The victims' device half is personalised ({self.folder}), and the attackers lack that part: the "
                "device half that they ask, its weights, the head, the embeddings and the model that their text may "
                "be sampled from are the public base's."
            )
        elif self.personal is not None:
            said.append(
                f"The victims' device half is personalised ({self.folder}), and the attackers have it with all its "
                "weights, head included: an upper bound. Embeddings and sampled text are the public base's."
            )
        if self.training:
            said.append(
                "The texts are being trained on in the U shape: beside the states the gradient of the loss crosses, by "
                "what the cloud returned. Defences change the states; THE GRADIENT CROSSES UNDEFENDED."
            )
        if any(spec.partition(":")[0] == Regularised.name for spec in defences):
            said.append(
                "Under a regularised defence victims and attackers run the device half that was trained so, in place "
                "of any other personal part."
            )
        return " ".join(said)


def part_of(folder: Path) -> Path:
    """The personal part itself, where ``folder`` is that of the run that trained it."""
    inside = folder / PART
    return inside if inside.is_dir() else folder


def named(folder: Path) -> str:
    """What rows call a personal part: the name of its folder, or of the run around it."""
    whole = folder.resolve()
    return whole.parent.name if whole.name == PART else whole.name
