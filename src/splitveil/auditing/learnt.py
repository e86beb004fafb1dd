"""How far each attacker had come when its learning ended: one that was still getting better is no upper bound."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from splitveil.attacks.attack import Attack, learner_of
from splitveil.attacks.knowledge import Access, Knowledge
from splitveil.attacks.learning import CURVE, Curve
from splitveil.auditing.fitted import place, selected
from splitveil.auditing.rows import Row
from splitveil.auditing.setting import Setting
from splitveil.errors import DataError


def facts_of_learning(attack: Attack, known: Knowledge) -> dict[str, str]:
    """What is kept beside what an attack has just learnt: texts it had the device run, and why it ended."""
    facts = {}
    if Access.QUERIES in attack.needs:
        facts["queries"] = str(known.oracle.sequences)
    curve = getattr(attack, "curve", None)
    if isinstance(curve, Curve):
        facts["plateau"] = str(int(curve.plateau))
    return facts


def learning(
    setting: Setting, create: Callable[[str], Attack], folder: Path, rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """For each of ``rows`` whose attacker left facts in ``folder``: how it learnt, as JSON holds it.

    ``steps`` of descent, the best ``validation`` score and that of the first half of them (``halfway``), whether a
    ``plateau`` ended it, whether it was still ``rising``, and the ``queries``, texts that the device ran for it. None
    where there is no such thing, or it was not recorded.
    """
    found = []
    for row in rows:
        learner = learner_of(create(row.attack))
        key = setting.fit_key(row.cut, learner.name, learner.version, row.defence, row.defence_params)
        try:
            kept = selected(place(folder, key), lambda name: name.rpartition(".")[2] == CURVE)
        except DataError:  # damaged since; the row itself was measured before
            continue
        if kept is None:
            continue
        curve = next((Curve.of(tensor) for tensor in kept[0].values()), None)
        queries, plateau = kept[1].get("queries"), kept[1].get("plateau")
        if curve is None and queries is None:
            continue
        entry: dict[str, Any] = {"attack": row.attack, "cut": row.cut, "defence": row.defence}
        entry |= {"seconds": float(kept[1]["seconds"]), "queries": None if queries is None else int(queries)}
        entry |= {"steps": None, "validation": None, "halfway": None, "plateau": None, "rising": None}
        if curve is not None:
            entry["steps"], entry["validation"] = curve.points[-1].step, curve.best
            entry["halfway"] = None if math.isnan(curve.halfway) else curve.halfway
            curve.plateau = plateau == "1"
            entry["plateau"] = None if plateau is None else curve.plateau
            entry["rising"] = curve.rising
        found.append(entry)
    return found
