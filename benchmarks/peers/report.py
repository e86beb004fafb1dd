"""The report: medians, whether a result is right, ratios to our lattice engine, as Markdown or JSON."""

import math
from typing import Any

import numpy as np

from peers.catalogue import REFERENCE
from peers.runs import Outcome, Shape

THRESHOLD = 1e-2
"""A result is right if its relative error, ‖y − exact‖ ÷ ‖exact‖ against float64, is at most this, in every round."""
TIMES = ("server ms", "client ms", "offline ms", "setup ms")
SIZES = {"up": "up bytes", "down": "down bytes", "keys": "key bytes, once", "published": "published bytes, once"}
RATIOS = ("÷ lattice, online", "÷ lattice, with offline")
COLUMNS = (
    *("peer", "right", "relative error", *TIMES, *SIZES.values(), *RATIOS),
    "repetitions",
)
FACTS = ("peer", "version, licence", "hides the prompt", "tells of the weights")


def rows(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """One row a peer; a peer without figures has ``skipped``. NaN stands for what a library does not have."""
    made = [_row(outcome) for outcome in outcomes]
    reference = next((row for row in made if row["peer"] == REFERENCE and row["skipped"] is None), None)
    for row in made:
        for name, sum_ in zip(RATIOS, (_online, _all), strict=True):
            comparable = reference is not None and row["skipped"] is None
            row[name] = sum_(row) / sum_(reference) if comparable and reference is not None else math.nan
    return made


def _row(outcome: Outcome) -> dict[str, Any]:
    peer = outcome.peer
    cpu = {name: 1e3 * float(np.median(taken)) for name, taken in outcome.cpu.items()}
    error = max(outcome.errors, default=math.nan)
    return {
        "peer": peer.name,
        "skipped": outcome.reason,
        "right": ("yes" if error <= THRESHOLD else "WRONG") if outcome.errors else "",
        "relative error": error,
        "server ms": cpu.get("server", math.nan),
        "client ms": cpu.get("encrypt", 0.0) + cpu.get("decrypt", 0.0) if "encrypt" in cpu else math.nan,
        "offline ms": cpu.get("offline", math.nan),
        "setup ms": cpu.get("setup", math.nan),
        **{column: outcome.sizes.get(name, math.nan) for name, column in SIZES.items()},
        "hides the prompt": "yes" if peer.hides_prompt else "no",
        "tells of the weights": peer.publishes,
        "repetitions": len(outcome.cpu.get("server", [])),
        "version, licence": f"{peer.package} {outcome.version or peer.pin or ''}, {peer.licence}".replace(" ,", ","),
        "cpu seconds": outcome.cpu,
        "wall seconds": outcome.wall,
    }


def _online(row: dict[str, Any]) -> float:
    return float(row["server ms"] + _or_zero(row["client ms"]))


def _all(row: dict[str, Any]) -> float:
    return _online(row) + _or_zero(row["offline ms"])


def _or_zero(value: float) -> float:
    """What a library does not have takes no time."""
    return 0.0 if math.isnan(value) else value


def markdown(shape: Shape, made: list[dict[str, Any]]) -> str:
    """The figures of one shape; a skipped peer's row has its reason in their place."""
    lines = [f"### {shape.label}: {shape.d_in} → {shape.d_out}, rank {shape.rank}", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in made:
        if row["skipped"] is None:
            lines.append(f"| {' | '.join(_cell(column, row[column]) for column in COLUMNS)} |")
        else:
            reason = str(row["skipped"]).replace("|", "/")
            lines.append(f"| {row['peer']} | skipped: {reason}{' | –' * (len(COLUMNS) - 2)} |")
    return "\n".join(lines)


def facts(made: list[dict[str, Any]]) -> str:
    """What the peers are, and what they hide and tell: the same for every shape."""
    lines = [f"| {' | '.join(FACTS)} |", "|" + "---|" * len(FACTS)]
    return "\n".join(lines + [f"| {' | '.join(row[column] for column in FACTS)} |" for row in made])


def _cell(column: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):
        return "–"
    if column == "relative error":
        return f"{value:.1e}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
