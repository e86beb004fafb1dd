"""The runs: one job a shape, given to every peer in turn, round after round."""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.catalogue import SHAPES, Peer
from peers.environments import Environments, UnavailableError, command

WORKERS = Path(__file__).parent / "workers"
SEED = 7


@dataclass(frozen=True)
class Shape:
    """One layer: ``x ↦ B(Ax)``, A (rank, d_in), B (d_out, rank)."""

    label: str
    d_in: int
    d_out: int
    rank: int

    @staticmethod
    def of(text: str) -> "Shape":
        """A name of ``SHAPES``, or ``IN:OUT:RANK``. Raises ``ValueError``."""
        if text in SHAPES:
            return Shape(*SHAPES[text])
        parts = text.split(":")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"{text!r} is not a shape; expected one of {', '.join(SHAPES)}, or IN:OUT:RANK")
        return Shape("given", *map(int, parts))


@dataclass
class Outcome:
    """What a peer did with one shape."""

    peer: Peer
    reason: str | None = None
    """Why there are no figures."""
    version: str = ""
    cpu: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of every repetition, by step."""
    wall: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    """Relative error of the output, ‖y − exact‖ ÷ ‖exact‖, one a round; infinite where it is no output at all."""
    took: float = 0.0
    """Wall seconds of the last run."""


def write_job(shape: Shape, path: Path) -> NDArray[np.float64]:
    """Writes A, B, x as a worker reads them; returns B(Ax) in float64."""
    rng = np.random.default_rng(SEED)
    A = (rng.normal(size=(shape.rank, shape.d_in)) / shape.d_in**0.5).astype(np.float32)
    B = rng.normal(size=(shape.d_out, shape.rank)).astype(np.float32)
    x = rng.normal(size=shape.d_in).astype(np.float32)
    np.savez(path, A=A, B=B, x=x)
    exact: NDArray[np.float64] = B.astype(np.float64) @ (A.astype(np.float64) @ x.astype(np.float64))
    return exact


def relative_error(output: Any, exact: NDArray[np.float64]) -> float:
    """‖output − exact‖ ÷ ‖exact‖; infinity for another shape or for what is not finite."""
    values = np.asarray(output, dtype=np.float64)
    if values.shape != exact.shape or not np.isfinite(values).all():
        return float("inf")
    return float(np.linalg.norm(values - exact) / np.linalg.norm(exact))


def measure(
    shape: Shape,
    peers: list[Peer],
    environments: Environments,
    folder: Path,
    *,
    rounds: int,
    seconds: float,
    limit: float,
    slow: float,
) -> list[Outcome]:
    """Every peer ``rounds`` times, in turn, each time from another one on; one that took over ``slow`` s only once."""
    job = folder / "job.npz"
    exact = write_job(shape, job)
    outcomes = [Outcome(peer) for peer in peers]
    for number in range(rounds):
        first = number % len(outcomes)
        for outcome in outcomes[first:] + outcomes[:first]:
            if outcome.reason is None and outcome.took <= slow:
                _run(outcome, environments, job, exact, seconds, limit)
                print(
                    f"{shape.label}: {outcome.peer.name}: {outcome.reason or f'{outcome.took:.0f} s'}", file=sys.stderr
                )
    return outcomes


def _run(
    outcome: Outcome, environments: Environments, job: Path, exact: NDArray[np.float64], seconds: float, limit: float
) -> None:
    peer = outcome.peer
    try:
        python = environments.python(peer)
        begun = time.perf_counter()
        words = [str(python), str(WORKERS / peer.worker), str(job), "--seconds", str(seconds)]
        lines = command([*words, "--variant", peer.variant], "failed", limit).splitlines()
        outcome.took = time.perf_counter() - begun
        facts = json.loads(lines[-1])
    except UnavailableError as error:
        outcome.reason = str(error)
        return
    except (IndexError, json.JSONDecodeError):
        outcome.reason = "failed: its worker printed no result"
        return
    outcome.version, outcome.sizes = facts["version"], facts["sizes"]
    outcome.errors.append(relative_error(facts["output"], exact))
    for name in facts["cpu"]:
        outcome.cpu.setdefault(name, []).extend(facts["cpu"][name])
        outcome.wall.setdefault(name, []).extend(facts["wall"][name])
