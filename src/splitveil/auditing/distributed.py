"""A grid's units as Ray tasks. The driver alone writes: what a task measured comes back, is checked, and appended.

A task is one unit. A worker process keeps the grid, which goes to it once, and the last stage it built. Errors of ours
become error rows inside the task, as they do locally. A worker that dies takes its unit with it and nothing else: the
unit is tried again on another, ``TRIES`` times in all, then has an error row that says so.
"""

import json
import os
import secrets
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from splitveil.attacks.attack import Progress, silent
from splitveil.auditing.cluster import Cluster, check_versions, versions
from splitveil.auditing.fitted import kept
from splitveil.auditing.grid import Grid, Step, Unit, Watch
from splitveil.auditing.received import MAX_LEARNT, checked
from splitveil.auditing.rows import Store
from splitveil.auditing.stage import Stage
from splitveil.errors import (
    ConfigurationError,
    ConnectionFailedError,
    DataError,
    ProtocolError,
    SplitveilError,
    VersionError,
)

TRIES = 3
EMPTY_SECONDS = 60.0
"""How long a cluster may have no node that a task fits on."""
_POLL_SECONDS = 1.0

Answer = tuple[bytes, bytes | None]
"""Rows and texts as JSON, and the file of what was learnt if it was learnt now."""


@dataclass(repr=False)
class _Worker:
    """What a worker process keeps between tasks."""

    run: str = ""
    grid: Any = None
    at: tuple[int, str] | None = None
    stage: Any = None

    def of(self, run: str, shared: Sequence[Any], expected: Mapping[str, str]) -> Grid:
        """The grid of that run. Raises ``VersionError`` where this machine has other software than the driver."""
        if self.run != run:
            import ray

            check_versions(expected, versions(), "a worker")
            self.at = self.stage = None
            self.grid, self.run = ray.get(shared[0]), run
        grid: Grid = self.grid
        return grid

    def staged(self, unit: Unit) -> Stage | Exception:
        """What crosses for the unit, made only where the last unit's was another's."""
        if self.at != (unit.cut, unit.spec):
            self.stage, self.at = self.grid.prepared(unit), (unit.cut, unit.spec)
        found: Stage | Exception = self.stage
        return found


_WORKER = _Worker()


def _quietly(doing: str) -> Progress:
    return silent


def measure_unit(
    run: str, shared: Sequence[Any], unit: Unit, learnt: bytes | None, expected: Mapping[str, str], threads: int
) -> Answer:
    """The task. ``shared`` holds the reference of the grid, in a list so that Ray does not fetch it for every task."""
    torch.set_num_threads(threads)
    grid = _WORKER.of(run, shared, expected)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        path = Grid.learnt(store, unit)
        if learnt is not None:
            path.write_bytes(learnt)
        rows, texts = grid.measure(unit, _WORKER.staged(unit), store, _quietly)
        new = path.read_bytes() if learnt is None and path.exists() else None
    if new is not None and len(new) > MAX_LEARNT:
        raise ConfigurationError(f"{unit.label} learnt {len(new)} bytes, more than the {MAX_LEARNT} that may travel")
    found = {"rows": [row.as_dict() for row in rows], "texts": texts}
    return json.dumps(found, ensure_ascii=False, allow_nan=False).encode(), new


@dataclass(repr=False)
class _Run:
    """The driver's side: which units wait, and which are with a worker."""

    grid: Grid
    store: Store
    cluster: Cluster
    waiting: deque[Unit]
    pending: dict[Any, Unit] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    run: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self) -> None:
        ray = self.cluster.ray
        try:
            self.shared = [ray.put(self.grid)]
        except TypeError as error:
            raise ConfigurationError(f"the model or an attack cannot be sent to workers: {error}") from None
        # Lost workers are counted here and not by Ray, whose retries after running out of memory have no end.
        self.task = ray.remote(num_cpus=self.cluster.cpus, max_retries=0)(measure_unit)

    def next(self) -> Unit | None:
        """Takes the next unit that need not wait for another to learn what it uses, too."""
        learning = {unit.learnt_key for unit in self.pending.values()}
        for unit in self.waiting:
            if unit.learnt_key not in learning:
                self.waiting.remove(unit)
                return unit
        return None

    def submit(self, unit: Unit) -> bool:
        """Hands a unit to Ray, and says whether it did: what cannot be read has its error row at once."""
        path = Grid.learnt(self.store, unit)
        try:
            learnt = path.read_bytes() if kept(path) is not None else None
            if learnt is not None and len(learnt) > MAX_LEARNT:
                raise DataError(f"{path} is larger than the {MAX_LEARNT} bytes that may travel to a worker")
        except DataError as error:
            self.store.append([self.grid.failed(unit, error, 0.0)], [])
            return False
        answer = self.task.remote(self.run, self.shared, unit, learnt, self.cluster.versions, self.cluster.cpus)
        self.pending[answer] = unit
        return True

    def collect(self, answer: Any) -> bool:
        """Keeps a unit's rows, and says whether it has some now; otherwise it waits again.

        Raises whatever is a defect, as a local run does.
        """
        ray, unit = self.cluster.ray, self.pending.pop(answer)
        errors = ray.exceptions
        try:
            rows, texts, learnt = checked(self.grid, unit, ray.get(answer))
            if learnt is not None:
                _keep(Grid.learnt(self.store, unit), learnt)
        except errors.RayTaskError as error:
            cause = error.cause
            # Of other software, too: a node that joined after the others were asked. Another may have the right one.
            if isinstance(cause, errors.RayError | MemoryError | OSError | VersionError):
                return self._lost(unit, cause)
            if not isinstance(cause, SplitveilError):
                raise (cause or error) from error
            rows, texts = [self.grid.failed(unit, cause, 0.0)], []
        except errors.RayError as error:
            return self._lost(unit, error)
        except ProtocolError as error:
            rows, texts = [self.grid.failed(unit, error, 0.0)], []
        self.store.append(rows, texts)
        return True

    def _lost(self, unit: Unit, error: BaseException) -> bool:
        self.tries[unit.fit_key] = self.tries.get(unit.fit_key, 0) + 1
        if self.tries[unit.fit_key] < TRIES:
            self.waiting.appendleft(unit)
            return False
        reason = ConnectionFailedError(f"its worker was lost {TRIES} times, last with {type(error).__name__}")
        self.store.append([self.grid.failed(unit, reason, 0.0)], [])
        return True


def run_on(cluster: Cluster, grid: Grid, units: Sequence[Unit], store: Store, watch: Watch) -> None:
    """Measures ``units`` as ``Grid.run`` does, on the cluster, in whatever order they finish.

    Raises ``ConfigurationError`` for a model that is not in main memory, ``ConnectionFailedError`` where no node is
    left. The rows so far stay, then and when it is interrupted.
    """
    if not units:
        return
    if grid.model.device.type != "cpu":
        raise ConfigurationError(f"workers compute on processors, and the model is on {grid.model.device}; move it")
    run = _Run(grid, store, cluster, deque(units))
    done, seen = 0, time.monotonic()
    try:
        while run.waiting or run.pending:
            slots = cluster.slots()
            if slots:
                seen = time.monotonic()
            elif time.monotonic() - seen > EMPTY_SECONDS:
                raise ConnectionFailedError(
                    f"the Ray cluster has had no node with {cluster.cpus} processors for {EMPTY_SECONDS:.0f} s; the "
                    "same command goes on from here"
                )
            # Twice what fits, so that no processor waits for this one.
            while len(run.pending) < 2 * slots and (unit := run.next()) is not None:
                done += not run.submit(unit)
            watch(Step(min(done, len(units) - 1), len(units), "units, measured by Ray", done / len(units), ""))
            if not run.pending and not slots:
                time.sleep(_POLL_SECONDS)  # for a node to come back
                continue
            ready = cluster.ray.wait(list(run.pending), num_returns=1, timeout=_POLL_SECONDS)[0] if run.pending else ()
            for answer in ready:
                done += run.collect(answer)
    finally:
        for answer in run.pending:
            cluster.ray.cancel(answer, force=True)


def _keep(path: Path, content: bytes) -> None:
    """Writes what was learnt as a whole or not at all. Raises ``ProtocolError`` if it cannot be read."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        found = kept(partial)
        float(found[1]["seconds"] if found else "")
    except (DataError, KeyError, ValueError):
        partial.unlink()
        raise ProtocolError("a worker answered with something learnt that cannot be read") from None
    partial.replace(path)
