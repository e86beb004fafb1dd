"""Checkpoints of one side of a run: safetensors and facts in JSON, each whole or not at all, the last two kept."""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from splitveil.errors import ConfigurationError, DataError
from splitveil.split.folders import clear_unfinished, whole_folder
from splitveil.splitlearning.interface import Optimiser, Plan, Shape, Trains

FORMAT = 1
FACTS, TENSORS = "facts.json", "tensors.safetensors"
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError, ConfigurationError)
_NAME = re.compile(r"step-(\d{6}|[1-9]\d{6,11})")


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself; a run is only continued by who has the same ``plan``, ``base`` and ``data``."""

    step: int
    side: str
    plan: Plan
    base: str
    """Fingerprint of the base model."""
    data: str = ""
    """Digest of the windows and of the course; on the device only."""
    run: str = ""
    """Which run it is: what the cloud calls its folder; on the device only, and empty where there is no network."""


@dataclass(frozen=True, repr=False)
class Kept:
    """A checkpoint that was read."""

    facts: Facts
    tensors: dict[str, Tensor]


@dataclass
class Checkpoints:
    """The checkpoints in one folder."""

    folder: Path
    shown: str = ""
    """What errors call the folder; its path where this is empty. A path of the cloud's is none of the device's."""
    damaged: dict[int, str] = field(default_factory=dict)
    """Steps whose checkpoints could not be used when they were last looked at, and why."""

    def any(self) -> bool:
        """Whether there is a checkpoint, whole or not. Raises ``DataError`` where the folder cannot be looked into."""
        return bool(self._named())

    def steps(self) -> tuple[int, ...]:
        """Steps whose checkpoints are whole, in order: every file is read and compared with its digest."""
        self.damaged = {}
        good = []
        for step in self._named():
            try:
                self.read(step)
            except DataError as error:
                self.damaged[step] = str(error)
            else:
                good.append(step)
        return tuple(good)

    def read(self, step: int) -> Kept:
        """Raises ``DataError`` for one that is missing, torn or damaged."""
        folder = self._path(step)
        name = f"step {step} of {self.shown}" if self.shown else str(folder)
        try:
            told = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            content = (folder / TENSORS).read_bytes()
            if told.pop("sha256") != _digest(told, content):
                raise DataError(f"{name} is damaged: {FACTS} and {TENSORS} do not have the digest that they should")
            facts = _facts(told)
            tensors = load(content)
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror or type(error).__name__}") from None
        except DataError:
            raise
        except _DAMAGE as error:
            raise DataError(f"{name} is damaged: {type(error).__name__} in {FACTS} or {TENSORS}") from None
        if facts.step != step:
            raise DataError(f"{name} is damaged: its facts are of step {facts.step}")
        return Kept(facts, tensors)

    def write(self, facts: Facts, tensors: dict[str, Tensor], after: int = 0) -> None:
        """Keeps this checkpoint and that of step ``after``, which the run went on from or came to last: until the other
        side has saved too, it is the one that both have. All others are of courses that were given up, and go.

        On the disk when this returns. Raises ``DataError`` where the disk refuses; what was there is then still there.
        """
        content = save(tensors)
        told: dict[str, Any] = {
            "format": FORMAT,
            "step": facts.step,
            "side": facts.side,
            "plan": dataclasses.asdict(facts.plan),
            "base": facts.base,
            "data": facts.data,
            "run": facts.run,
        }
        told["sha256"] = _digest(told, content)
        try:
            with whole_folder(self._path(facts.step)) as made:
                (made / TENSORS).write_bytes(content)
                (made / FACTS).write_text(json.dumps(told, indent=1), encoding="utf-8")
            self._prune({facts.step, after})
        except OSError as error:
            reason = error.strerror or type(error).__name__
            place = self.shown or self.folder
            raise DataError(f"a checkpoint cannot be written to {place}: {reason}; older ones are kept") from None

    def _prune(self, wanted: Collection[int]) -> None:
        for found in self._named():
            if found not in wanted:
                shutil.rmtree(self._path(found))
        clear_unfinished(self.folder)

    def _named(self) -> list[int]:
        """Raises ``DataError`` for a folder that is there and cannot be looked into."""
        try:
            names = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            place, reason = self.shown or self.folder, error.strerror or type(error).__name__
            raise DataError(f"the checkpoints of {place} cannot be looked at: {reason}") from None
        return sorted(int(found[1]) for found in names if found)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06}"


def _digest(told: dict[str, Any], content: bytes) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode() + content).hexdigest()


def _facts(told: dict[str, Any]) -> Facts:
    if told["format"] != FORMAT:
        raise DataError(f"a checkpoint of format {told['format']!r}, expected {FORMAT}; use the version that wrote it")
    plan = dict(told["plan"])
    plan["shape"], plan["device"], plan["cloud"] = Shape(plan["shape"]), Trains(plan["device"]), Trains(plan["cloud"])
    plan["optimiser"], plan["targets"] = Optimiser(**plan["optimiser"]), tuple(plan["targets"])
    run = str(told.get("run", ""))
    return Facts(int(told["step"]), str(told["side"]), Plan(**plan), str(told["base"]), str(told["data"]), run)
