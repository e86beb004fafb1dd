"""A run of training from the device's side: steps, held-out windows, checkpoints on both sides, and resuming."""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitveil.errors import ConfigurationError, ConnectionFailedError, DataError, NonFiniteError, RefusedError
from splitveil.split.folders import clear_unfinished
from splitveil.splitlearning.checkpoint import Checkpoints, Facts
from splitveil.splitlearning.course import Course
from splitveil.splitlearning.data import digest_windows, rows_of_step
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.halves import Side
from splitveil.splitlearning.interface import Cloud, Plan
from splitveil.splitlearning.loss import next_tokens

LOSSES, CHECKPOINTS, PERSONAL = "losses.jsonl", "checkpoints", "personal"


@dataclass(frozen=True)
class Progress:
    """One step that was made, or one look at what is held out; numbers that were not measured are NaN."""

    step: int
    """Steps made so far."""
    steps: int
    """Steps that the course has."""
    loss: float = math.nan
    """Of this step, in nats a token."""
    held_out: float = math.nan
    """Of the held-out windows after this step, in nats a token."""
    rate: float = math.nan
    tokens_per_second: float = math.nan
    """Tokens learnt from in this step, by its wall time."""


Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    step: int
    """Steps made in all."""
    resumed: int
    """The step that it went on from; 0 for a new run."""
    loss: float
    """Of the last step, in nats a token; NaN where none was left to be made."""
    held_out_before: float
    """Held-out loss in nats a token where this call began; NaN without held-out windows."""
    held_out: float
    tokens: int
    """Learnt from in this call, on the device side of the cut and above."""
    seconds: float
    """Wall time of this call's steps, without evaluation and checkpoints."""
    personal: Path | None
    """Where the device's personal part is; None where nothing is trained on the device."""
    notes: tuple[str, ...] = field(default=())
    """What a person should know: damaged checkpoints that were passed over."""

    @property
    def tokens_per_second(self) -> float:
        """NaN where no step was made."""
        return self.tokens / self.seconds if self.tokens else math.nan


class DeviceRun:
    """The folder of a run on the device: checkpoints, losses, and at the end the personal part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = Checkpoints(folder / CHECKPOINTS)

    def steps(self) -> tuple[int, ...]:
        """Steps that the device can go on from: tell the cloud these when the session is opened.

        Raises ``DataError`` where there are checkpoints and none of them is whole.
        """
        steps = self.checkpoints.steps()
        if not steps and self.checkpoints.damaged:
            raise DataError(
                f"no checkpoint in {self.checkpoints.folder} can be used: "
                f"{'; '.join(self.checkpoints.damaged.values())}. Bring them back from a copy, or begin a new run in "
                "another folder"
            )
        return steps


def train(
    device: Device,
    cloud: Cloud,
    windows: Tensor,
    held_out: Tensor | None,
    course: Course,
    folder: Path,
    *,
    start: int = 0,
    run: str = "",
    watch: Watch | None = None,
) -> Outcome:
    """Trains on ``windows`` (count, length) until ``course.steps`` steps are made; ``folder`` keeps the device's side.

    ``start`` is the step that the cloud goes on from: what ``LocalCloud.resume(DeviceRun(folder).steps())`` returned,
    or what a server answered to those steps. Interrupted and resumed, the weights are those of a run that was not, bit
    for bit, where the defence draws no noise. Labels are the windows' next tokens; every window is text throughout.
    ``run`` says which run of the cloud's it is: a folder is not gone on with beside another's.

    Raises ``NonFiniteError`` for a loss or gradient that is NaN or infinite, ``DataError`` for a checkpoint that is
    missing or of other data, settings or model, and what the cloud raises. Checkpoints stay as they were.
    """
    if device.plan is None:
        raise ConfigurationError("this device was made without a plan: it does not train")
    _check_windows(windows, held_out, device)
    return _Run(device, cloud, windows, held_out, course, DeviceRun(folder), device.plan, run).go(start, watch)


@dataclass(repr=False)
class _Run:
    device: Device
    cloud: Cloud
    windows: Tensor
    held_out: Tensor | None
    course: Course
    place: DeviceRun
    plan: Plan
    name: str
    saved: int = 0
    """The step of the last checkpoint that both sides have."""

    def go(self, start: int, watch: Watch | None) -> Outcome:
        notes = self._restore(start)
        log = _Log(self.place.folder / LOSSES, start)
        before = after = self._evaluate()
        if start == 0:
            log.add({"step": 0, "held_out": before})
        if watch is not None:
            watch(Progress(start, self.course.steps, held_out=before))
        loss, tokens, seconds, self.saved = math.nan, 0, 0.0, start
        for step in range(start, self.course.steps):
            began = time.perf_counter()
            rate = self.course.rate_of(step)
            loss = self._step(step, rate)
            took = time.perf_counter() - began
            learnt = self.course.batch * self.course.accumulation * self.windows.shape[1]
            tokens, seconds, done = tokens + learnt, seconds + took, step + 1
            last = done == self.course.steps
            looked = last or (self.course.evaluate_every > 0 and done % self.course.evaluate_every == 0)
            after = self._evaluate() if looked else after
            log.add({"step": done, "loss": loss, "rate": rate, "tokens": learnt, "seconds": round(took, 6)})
            if looked:
                log.add({"step": done, "held_out": after})
            if watch is not None:
                watch(Progress(done, self.course.steps, loss, after if looked else math.nan, rate, learnt / took))
            if last or done % self.course.save_every == 0:
                self._save(done)
        # Where no step was left to be made: what is there may be that of an earlier step.
        written = self._save_personal(self.saved)
        return Outcome(
            max(start, self.course.steps), start, loss, before, after, tokens, seconds, written, tuple(notes)
        )

    def _step(self, step: int, rate: float) -> float:
        size = self.course.batch * self.course.accumulation
        rows = self.windows[rows_of_step(len(self.windows), step, size, self.course.seed)]
        normaliser = float(size * (self.windows.shape[1] - 1))
        loss = 0.0
        try:
            for tokens in torch.split(rows, self.course.batch):
                loss += self.device.learn(self.cloud, tokens, next_tokens(tokens), normaliser)
        except (NonFiniteError, RefusedError) as error:
            self.device.discard()
            # Where the connection is gone, too, the first error is the one to tell.
            with contextlib.suppress(ConnectionFailedError):
                self.cloud.discard()
            raise type(error)(f"in step {step + 1}: {error}. Checkpoints are as they were") from None
        self.cloud.step(rate)
        self.device.step(rate)
        return loss

    def _evaluate(self) -> float:
        if self.held_out is None:
            return math.nan
        total = 0.0
        for tokens in torch.split(self.held_out, self.course.batch):
            total += self.device.evaluate(self.cloud, tokens, next_tokens(tokens))
        return total / (len(self.held_out) * (self.held_out.shape[1] - 1))

    def _save(self, step: int) -> None:
        # The cloud first: a run is resumed from a step that both have, and the device's is the one that is told.
        self.cloud.save(step)
        self.place.checkpoints.write(self._facts(step), self.device.own.state(), self.saved)
        self._save_personal(step)
        self.saved = step

    def _save_personal(self, step: int) -> Path | None:
        try:
            return self.device.save_personal(self.place.folder / PERSONAL, step)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DataError(f"the personal part cannot be written to {self.place.folder}: {reason}") from None

    def _facts(self, step: int) -> Facts:
        told = f"{self.course} {self.device.defences} {digest_windows(self.windows)}"
        data = hashlib.sha256(told.encode()).hexdigest()
        return Facts(step, Side.DEVICE, self.plan, self.device.base, data, self.name)

    def _restore(self, start: int) -> list[str]:
        clear_unfinished(self.place.folder)
        steps = self.place.steps()
        notes = [f"passed over: {text}" for text in self.place.checkpoints.damaged.values()]
        if start == 0:
            if steps:
                raise DataError(
                    f"{self.place.folder} holds a run at step {steps[-1]}, and the cloud would begin at 0: it does not "
                    "have that run's checkpoints. Begin a new run in another folder, or give the cloud its folder back"
                )
            return notes
        if steps and start < steps[-1]:
            notes.append(f"goes on from step {start}, not {steps[-1]}: the newest that both sides have whole")
        kept = self.place.checkpoints.read(start)
        told, expected = kept.facts, self._facts(start)
        for name in ("run", "side", "plan", "base", "data"):
            # Runs of an earlier version do not say which they are.
            if getattr(told, name) != getattr(expected, name) and (name != "run" or told.run):
                raise DataError(
                    f"{self.place.folder} was trained with another {_SHOWN[name]}; give the one that it began with, or "
                    "begin a new run in another folder"
                )
        try:
            self.device.own.restore(kept.tensors, start)
        except DataError:
            raise
        except ConfigurationError as error:
            raise DataError(f"{self.place.folder}: {error}") from None
        return notes


_SHOWN = {
    "run": "token, so the cloud's half that it names is another run's",
    "side": "side of the cut",
    "plan": "plan (cut, shape, what is trained, optimiser, adapters or seed)",
    "base": "base model",
    "data": "text, window length, order, batch size, learning rate, schedule (of a cosine the steps, too), defence or "
    "regulariser",
}


class _Log:
    """Lines of losses; those after the step that a run goes on from are taken off first.

    Raises ``DataError`` where the disk refuses.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        fresh = path.with_suffix(".new")
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = []
            if start and path.is_file():
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                    step = _step_of(line)
                    if step is not None and step <= start:
                        kept.append(line)
            try:
                fresh.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                fresh.replace(path)
            except OSError:
                fresh.unlink(missing_ok=True)
                raise

    def add(self, line: dict[str, Any]) -> None:
        shown = {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in line.items()}
        with self._writing(), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(shown) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DataError(
                f"losses cannot be written to {self._path}: {reason}; checkpoints are as they were, and the same "
                "command goes on from the last one"
            ) from None


def _step_of(line: str) -> int | None:
    """The step of a line of losses; None for a torn one, as the last may be after a loss of power."""
    try:
        told = json.loads(line)
    except ValueError:
        return None
    found = told.get("step") if isinstance(told, dict) else None
    return found if isinstance(found, int) else None


def _check_windows(windows: Tensor, held_out: Tensor | None, device: Device) -> None:
    for name, some in (("windows", windows), ("held-out windows", held_out)):
        if some is None:
            continue
        if some.ndim != 2 or some.shape[0] < 1 or some.shape[1] < 2 or some.dtype != torch.int64:
            raise DataError(f"{name} are (count, length) int64 token ids, got {tuple(some.shape)} of {some.dtype}")
        if device.context is not None and some.shape[1] > device.context:
            raise DataError(f"{name} are {some.shape[1]} tokens long, the model's context is {device.context}")
        if int(some.min()) < 0 or int(some.max()) >= device.vocabulary:
            raise DataError(f"{name} hold tokens outside the vocabulary of {device.vocabulary}")
