"""What an audit needs before it measures: its sizes, digests and the attacker's text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitveil.attacks.knowledge import Shadow
from splitveil.auditing.data import Text
from splitveil.auditing.device import Devices
from splitveil.auditing.digest import digest, digest_model, digest_tensors
from splitveil.auditing.fitted import keep, kept
from splitveil.auditing.grid import Step, Watch
from splitveil.auditing.setting import Setting
from splitveil.auditing.shadow import given_shadow, sampled_shadow
from splitveil.auditing.windows import Victims
from splitveil.errors import ConfigurationError


@dataclass(frozen=True)
class Sizes:
    """How much is attacked, and what an attacker may spend. Raises ``ConfigurationError`` for what makes no sense."""

    prompts: int = 100
    """Victims."""
    tokens: int = 48
    """Of each prompt, and of each shadow window."""
    windows: int = 6000
    """Shadow windows to learn from; a tenth as many come on top for validation."""
    budget: float = 540.0
    """Seconds of learning, for each attack at each cut and defence."""
    seed: int = 0
    steps: int | None = None
    """Gradient steps after which learning ends even if there is time left."""
    plateau: bool = True
    """Whether an attack may stop learning before, where its validation score has flattened."""

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.windows < 1:
            raise ConfigurationError(
                f"an audit takes at least one prompt and one shadow window, got {self.prompts} and {self.windows}"
            )
        if not (self.budget > 0 and math.isfinite(self.budget)):
            raise ConfigurationError(f"the budget is a positive number of seconds, got {self.budget}")
        if self.steps is not None and self.steps < 1:
            raise ConfigurationError(f"an attacker learns in one step at least, got {self.steps}")
        if not 0 <= self.seed < 2**63:
            raise ConfigurationError(f"the seed is a whole number from 0 to 2^63 - 1, got {self.seed}")


def setting_of(devices: Devices, victims: Victims, name: str, data: str, sizes: Sizes) -> Setting:
    """Names and digests, without the shadow text's yet."""
    spans = [[[span.start, span.end, span.kind] for span in row] for row in victims.spans]
    tensors = {"tokens": victims.tokens, "scored": victims.scored, "personal": victims.personal}
    return Setting(
        model=f"{name}+{devices.folder}" if devices.folder else name,
        data=data,
        model_digest=digest_model(devices.public),
        data_digest=digest([digest_tensors(tensors), spans, victims.marked]),
        shadow_digest="",
        seed=sizes.seed,
        budget=sizes.budget,
        steps=sizes.steps,
        personal=devices.digest,
        knows=devices.knows.value,
        training=devices.training,
        plateau=sizes.plateau,
    )


def attackers_text(
    model: Any,
    tokenizer: Any,
    given: Sequence[Text] | None,
    attacked: Sequence[str],
    setting: Setting,
    sizes: Sizes,
    folder: Path,
    watch: Watch,
) -> Shadow:
    """Shadow text: given, or sampled in an earlier run of the same audit into ``folder``, or sampled now."""
    seed = setting.derived_seed("shadow")
    if given is not None:
        documents = [text.text for text in given]
        return given_shadow(tokenizer, documents, attacked, tokens=sizes.tokens, windows=sizes.windows, seed=seed)
    key = digest([setting.model_digest, setting.data_digest, sizes.tokens, sizes.windows, sizes.seed])
    path = folder / "fitted" / f"shadow-{key}.safetensors"
    found = kept(path)
    if found is not None:
        return Shadow(found[0]["train"], found[0]["validation"], found[1]["origin"])
    made = sampled_shadow(
        model,
        tokenizer,
        attacked,
        tokens=sizes.tokens,
        windows=sizes.windows,
        seed=seed,
        progress=lambda done: watch(Step(0, 1, "shadow text: sampling from the model itself", done, "")),
    )
    keep(path, {"train": made.train, "validation": made.validation}, {"origin": made.origin})
    return made
