"""A run of training over a network, from the device's side: its folder, its token, and what goes on from there."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from splitveil.defences.catalogue import create
from splitveil.defences.regularise import create_regulariser
from splitveil.errors import ConfigurationError, DataError
from splitveil.serving.stream import Traffic
from splitveil.serving.tls import ClientTLS
from splitveil.split.personal import personalised
from splitveil.splitlearning.agreement import new_token, token_bytes
from splitveil.splitlearning.connection import RemoteCloud
from splitveil.splitlearning.course import Course
from splitveil.splitlearning.data import hold_out, make_windows
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.splitlearning.training import CHECKPOINTS, PERSONAL, DeviceRun, Outcome, Watch, train

FORMAT = 1
RUN, TOKEN = "run.json", "token"


@dataclass(frozen=True)
class Server:
    """Where the cloud is, and how it is reached."""

    address: str
    api_key: str | None = dataclasses.field(default=None, repr=False)
    tls: ClientTLS | None = None
    allow_plaintext: bool = False


@dataclass(frozen=True)
class Told:
    """What the folder of a run says of it."""

    cut: int
    shape: Shape
    token: str | None = dataclasses.field(repr=False)
    """Where the cloud's part was trained, too."""
    personal: Path | None
    """Where the device's part is; None where it was not trained."""


def train_remotely(
    base: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    server: Server,
    folder: Path,
    plan: Plan,
    course: Course,
    *,
    epochs: float | None = None,
    window: int = 128,
    held_out: float = 0.0,
    defence: str = "none",
    regulariser: str | None = None,
    watch: Watch | None = None,
) -> tuple[Outcome, Traffic]:
    """Begins a run in ``folder``, or goes on with the one that is there.

    ``epochs`` takes the place of ``course.steps``. ``window`` is the length of the texts' pieces in tokens,
    ``held_out`` the share of them that is only looked at.

    Raises what ``RemoteCloud`` and ``train`` raise, and ``ConfigurationError`` for a folder with a run of another plan.
    """
    device = Device(
        base,
        cut=plan.cut,
        shape=plan.shape,
        plan=plan,
        defence=create(defence),
        regulariser=None if regulariser is None else create_regulariser(regulariser),
    )
    windows, looked_at = hold_out(make_windows(tokenizer, texts, window, course.seed), held_out)
    if epochs is not None:
        if not (math.isfinite(epochs) and epochs > 0):
            raise ConfigurationError(f"epochs is a positive number, got {epochs}")
        steps = math.ceil(epochs * len(windows) / (course.batch * course.accumulation))
        course = dataclasses.replace(course, steps=steps)
    token = _opened(folder, plan)
    steps_here = DeviceRun(folder).steps()
    cloud = RemoteCloud(
        base,
        server.address,
        cut=plan.cut,
        shape=plan.shape,
        plan=plan,
        token=token,
        steps=steps_here,
        api_key=server.api_key,
        tls=server.tls,
        allow_plaintext=server.allow_plaintext,
    )
    with contextlib.closing(cloud):
        outcome = train(device, cloud, windows, looked_at, course, folder, start=cloud.start, watch=watch)
    return outcome, cloud.traffic


def open_for_use(
    base: PreTrainedModel, server: Server, told: Told, *, defence: str = "none"
) -> tuple[Device, RemoteCloud]:
    """The device with its personal part in place, and a session with the cloud, to generate with.

    Raises ``AdapterError`` and ``BaseModelError`` for a personal part that does not fit, and what ``RemoteCloud``
    raises.
    """
    own = base if told.personal is None else personalised(base, told.personal)
    device = Device(own, cut=told.cut, shape=told.shape, defence=create(defence))
    cloud = RemoteCloud(
        base,
        server.address,
        cut=told.cut,
        shape=told.shape,
        token=told.token,
        api_key=server.api_key,
        tls=server.tls,
        allow_plaintext=server.allow_plaintext,
    )
    return device, cloud


def read_run(folder: Path) -> Told:
    """What ``folder``, or the folder around it, says of its run.

    Raises ``DataError`` where there is no run, or none that has come to a checkpoint.
    """
    for place in (folder, folder.parent):
        if (place / RUN).is_file():
            if not (place / CHECKPOINTS).is_dir():
                raise DataError(f"the run in {place} has not come to a checkpoint; go on with `split train` first")
            return _told(place)
    raise DataError(f"{folder} belongs to no run: expected {RUN}, which `split train` wrote to its --out")


def _told(place: Path) -> Told:
    try:
        told = json.loads((place / RUN).read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise DataError(f"{place / RUN} is of format {told['format']!r}; use the version that wrote it")
        plan = told["plan"]
        cut, shape, cloud = int(plan["cut"]), Shape(plan["shape"]), Trains(plan["cloud"])
    except OSError as error:
        raise DataError(f"{place / RUN} cannot be read: {error.strerror or type(error).__name__}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{place / RUN} is damaged: {type(error).__name__} where a plan is read") from None
    personal = place / PERSONAL
    token = _read_token(place / TOKEN) if cloud is not Trains.NOTHING else None
    return Told(cut, shape, token, personal if personal.is_dir() else None)


def _opened(folder: Path, plan: Plan) -> str:
    """The token of the run in ``folder``, which is made where there is none."""
    written = json.loads(json.dumps(dataclasses.asdict(plan)))
    if (folder / RUN).exists():
        _told(folder)
        there = json.loads((folder / RUN).read_text(encoding="utf-8"))["plan"]
        if there != written:
            names = sorted(name for name in {*there, *written} if there.get(name) != written.get(name))
            shown = ", ".join(f"{name} {there.get(name)!r} there and {written.get(name)!r} here" for name in names)
            raise ConfigurationError(
                f"{folder} holds a run of another plan ({shown}); give what it began with, or another --out"
            )
        return _read_token(folder / TOKEN)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        token = new_token()
        # The token first: a run without one cannot be gone on with.
        with os.fdopen(os.open(folder / TOKEN, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
        fresh = folder / f"{RUN}.new"
        fresh.write_text(json.dumps({"format": FORMAT, "plan": written}, indent=1), encoding="utf-8")
        fresh.replace(folder / RUN)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {error.strerror or type(error).__name__}") from None
    return token


def _read_token(file: Path) -> str:
    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        raise DataError(f"{file} cannot be read; without its token a run cannot be gone on with") from None
    token_bytes(token)
    return token
