"""What a report says besides its rows: names, circumstances, summaries, and why it is invalid if it is."""

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from splitveil.auditing.grid import Grid
from splitveil.auditing.information import Profile
from splitveil.auditing.outcome import invalid_reasons, scores
from splitveil.auditing.prepare import Sizes
from splitveil.auditing.rows import Row


@dataclass(frozen=True)
class Names:
    """What the rows and the report call things."""

    model: str | None = None
    """By default the last part of where the model was loaded from."""
    data: str = "texts"
    command: str = ""

    def of(self, model: Any) -> str:
        """The name of ``model``."""
        where = str(getattr(model.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2]
        return self.model or where or type(model).__name__


def describe(
    grid: Grid, sizes: Sizes, names: Names, blocks: int, rows: Sequence[Row], *, given: int, profile: Profile
) -> dict[str, Any]:
    """The ``meta`` of the report, of which JSON can hold everything. ``given`` texts, of which some were attacked."""
    setting, victims, shadow = grid.setting, grid.victims, grid.shadow
    count = len(victims.tokens)
    attacked = f"{count} of {given} prompts, the first {sizes.tokens} tokens of each ({victims.shortened} were longer)"
    marks = "" if victims.marked else "; no personal data is marked"
    attacks = {row.attack: grid.create_attack(row.attack) for row in scores(rows)}
    defences = {row.defence: grid.create_defence(row.defence, 0).summary for row in scores(rows)}
    known = [] if grid.devices is None else [grid.devices.words(list(defences))]
    return {
        "title": "Inversion audit",
        "model": setting.model,
        "blocks": blocks,
        "data": {setting.data: attacked + marks},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "attackers": " ".join(known),
        "shadow": f"{shadow.origin}; {len(shadow.train)} windows of {sizes.tokens} tokens to learn from, "
        f"{len(shadow.validation)} to validate",
        "command": names.command,
        "versions": versions(),
        "digests": {"model": setting.model_digest, "data": setting.data_digest, "shadow": setting.shadow_digest}
        | ({"personal part": setting.personal} if setting.personal else {}),
        "invalid": invalid_reasons(rows),
        "attacks": {
            name: {
                "summary": attack.summary,
                "needs": sorted(attack.needs),
                "source": attack.source,
                "version": attack.version,
            }
            for name, attack in attacks.items()
        },
        "defences": defences,
        "correlation": list(profile.correlation),
        "estimators": dict(profile.estimators),
        "prompts": count,
        "tokens": sizes.tokens,
        "budget_seconds": sizes.budget,
        "seed": sizes.seed,
    } | ({} if sizes.steps is None else {"budget_steps": sizes.steps})


def versions() -> dict[str, str]:
    """Of what figures may depend on."""
    packages = ("splitveil", "torch", "transformers", "sacrebleu", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
