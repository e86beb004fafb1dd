"""A run of training over a network, from the device's side: its folder, its token, and what goes on from there."""

import contextlib
import dataclasses
import json
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from splitveil.defences.catalogue import create
from splitveil.defences.defence import Defence
from splitveil.defences.permute import Permutation
from splitveil.defences.regularise import create_regulariser
from splitveil.errors import ConfigurationError, DataError
from splitveil.serving.stream import Traffic
from splitveil.serving.tls import ClientTLS
from splitveil.split.folders import held, write_whole
from splitveil.split.personal import personalised, step_of
from splitveil.splitlearning.agreement import folder_name, new_token, token_bytes
from splitveil.splitlearning.connection import RemoteCloud
from splitveil.splitlearning.course import Course
from splitveil.splitlearning.data import hold_out, make_windows
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.splitlearning.training import PERSONAL, DeviceRun, Outcome, Watch, train

FORMAT = 1
RUN, TOKEN, KEY = "run.json", "token", "defence.key"


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
    step: int = 0
    """How many steps of training made it; 0 where that is not known."""
    defence: str = "none"
    """What was done to every state before it left, while it was trained."""
    key: bytes | None = dataclasses.field(default=None, repr=False)
    """Of that defence, where it has one."""


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
    key = _key_for(folder, defence)
    device = Device(
        base,
        cut=plan.cut,
        shape=plan.shape,
        plan=plan,
        defence=_created(defence, key),
        regulariser=None if regulariser is None else create_regulariser(regulariser),
    )
    windows, looked_at = hold_out(make_windows(tokenizer, texts, window, course.seed), held_out)
    if epochs is not None:
        if not (math.isfinite(epochs) and epochs > 0):
            raise ConfigurationError(f"epochs is a positive number, got {epochs}")
        steps = math.ceil(epochs * len(windows) / (course.batch * course.accumulation))
        course = dataclasses.replace(course, steps=steps)
    with _only(folder):
        token = _opened(folder, plan, defence, key)
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
        name = folder_name(token_bytes(token))
        with contextlib.closing(cloud):
            outcome = train(device, cloud, windows, looked_at, course, folder, start=cloud.start, run=name, watch=watch)
    return outcome, cloud.traffic


@contextlib.contextmanager
def _only(folder: Path) -> Iterator[None]:
    """The folder of a run, made where there is none, held against other programs that train in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        ours = lock.enter_context(held(folder))
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {error.strerror or type(error).__name__}") from None
    with lock:
        if not ours:
            raise ConfigurationError(
                f"another `split train` is writing to {folder}; wait for it, or give another --out"
            )
        yield


def open_for_use(
    base: PreTrainedModel, server: Server, told: Told, *, defence: str | None = None
) -> tuple[Device, RemoteCloud]:
    """The device with its personal part in place, and a session with the cloud, to generate with.

    ``defence`` takes the place of the one that the run was trained with. The cloud's trained part is that of the step
    that the personal part is of.

    Raises ``AdapterError`` and ``BaseModelError`` for a personal part that does not fit, and what ``RemoteCloud``
    raises.
    """
    own = base if told.personal is None else personalised(base, told.personal)
    used = _created(told.defence if defence is None else defence, told.key)
    device = Device(own, cut=told.cut, shape=told.shape, defence=used)
    cloud = RemoteCloud(
        base,
        server.address,
        cut=told.cut,
        shape=told.shape,
        token=told.token,
        steps=(told.step,) if told.token is not None and told.step else (),
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
            if not DeviceRun(place).steps():
                raise DataError(f"the run in {place} has not come to a checkpoint; go on with `split train` first")
            return _told(place)
    raise DataError(f"{folder} belongs to no run: expected {RUN}, which `split train` wrote to its --out")


def _told(place: Path, *, used: bool = True) -> Told:
    """``used``: what was trained is needed, and has to be there."""
    try:
        told = json.loads((place / RUN).read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise DataError(f"{place / RUN} is of format {told['format']!r}; use the version that wrote it")
        plan, defence = told["plan"], str(told.get("defence", "none"))
        cut, shape, cloud = int(plan["cut"]), Shape(plan["shape"]), Trains(plan["cloud"])
        here = Trains(plan["device"])
    except OSError as error:
        raise DataError(f"{place / RUN} cannot be read: {error.strerror or type(error).__name__}") from None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise DataError(f"{place / RUN} is damaged: {type(error).__name__} where a plan is read") from None
    personal = place / PERSONAL
    token = _read_token(place / TOKEN) if cloud is not Trains.NOTHING else None
    if not personal.is_dir():
        if used:
            _check_nothing_was_trained(place, here)
        return Told(cut, shape, token, None, 0, defence, _read_key(place))
    return Told(cut, shape, token, personal, step_of(personal), defence, _read_key(place))


def _check_nothing_was_trained(place: Path, here: Trains) -> None:
    """Raises ``DataError`` where a run trained this side, and its personal part is not there."""
    checkpoints = DeviceRun(place).checkpoints
    steps = checkpoints.steps() if here is not Trains.NOTHING else ()
    if steps and checkpoints.read(steps[-1]).tensors:
        raise DataError(
            f"{place / PERSONAL} is missing, and the run trained this side; go on with `split train`, which writes it"
        )


def _opened(folder: Path, plan: Plan, defence: str, key: bytes | None) -> str:
    """The token of the run in ``folder``, which is made where there is none, or none that came to a checkpoint."""
    written = json.loads(json.dumps(dataclasses.asdict(plan)))
    begun = DeviceRun(folder).checkpoints.any()
    if (folder / RUN).exists():
        there, used = _plan_of(folder)
        # Of another defence than before `train` says so itself, as of another text.
        if there == written and (begun or used == defence):
            return _read_token(folder / TOKEN)
        if begun:
            names = sorted(name for name in {*there, *written} if there.get(name) != written.get(name))
            shown = ", ".join(f"{name} {there.get(name)!r} there and {written.get(name)!r} here" for name in names)
            raise ConfigurationError(
                f"{folder} holds a run of another plan ({shown}); give what it began with, or another --out"
            )
    elif begun:
        raise DataError(
            f"{folder} holds checkpoints and no {RUN}, without which a run cannot be gone on with; bring it back from "
            "a copy, or give another --out"
        )
    try:
        token = new_token()
        # The token first, and what a defence keeps secret: a run without them cannot be gone on with.
        write_whole(folder / TOKEN, token, mode=0o600)
        if key is not None:
            write_whole(folder / KEY, key.hex(), mode=0o600)
        told = {"format": FORMAT, "plan": written, "defence": defence}
        write_whole(folder / RUN, json.dumps(told, indent=1))
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {error.strerror or type(error).__name__}") from None
    return token


def _plan_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Plan and defence of the run in ``folder``, as they were written. Raises ``DataError``."""
    _told(folder, used=False)
    told = json.loads((folder / RUN).read_text(encoding="utf-8"))
    return told["plan"], str(told.get("defence", "none"))


def _key_for(folder: Path, defence: str) -> bytes | None:
    """What ``defence`` keeps secret in the run in ``folder``, drawn where there is nothing; None for one without."""
    if not isinstance(create(defence), Permutation):
        return None
    return _read_key(folder) or secrets.token_bytes(Permutation.KEY)


def _created(defence: str, key: bytes | None) -> Defence:
    """The defence that a name describes, with the key that was kept where it takes one."""
    made = create(defence)
    return Permutation(key=key) if isinstance(made, Permutation) and key is not None else made


def _read_key(folder: Path) -> bytes | None:
    """What a run's defence keeps secret; None where there is no such file. Raises ``DataError``."""
    file = folder / KEY
    try:
        key = bytes.fromhex(file.read_text(encoding="ascii").strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        key = b""
    if len(key) != Permutation.KEY:
        raise DataError(f"{file} cannot be read; without it nobody finds the order that this run learnt in")
    return key


def _read_token(file: Path) -> str:
    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        raise DataError(f"{file} cannot be read; without its token a run cannot be gone on with") from None
    token_bytes(token)
    return token
