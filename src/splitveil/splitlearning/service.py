"""The cloud's end of split sessions: a stream each, over one base model that they share."""

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from splitveil.errors import (
    BaseModelError,
    ConfigurationError,
    KeyRejectedError,
    ProtocolError,
    RefusedError,
    SplitveilError,
)
from splitveil.serving.conversation import Conversations
from splitveil.serving.gate import Admitted, Doorkeeper, declined, dismissed, full, identify, other_version
from splitveil.serving.operations.logs import tell
from splitveil.serving.operations.threshold import deadline
from splitveil.serving.operations.visits import Visit, Visits
from splitveil.split import Crossing
from splitveil.split.folders import check_writable
from splitveil.splitlearning.agreement import folder_name, received_plan, received_shape
from splitveil.splitlearning.carrying import crossing_of, fits, labels_of, packed, scattered, unpacked
from splitveil.splitlearning.checks import DEFAULT_LIMITS, Limits
from splitveil.splitlearning.cloud import LocalCloud, trained_cloud
from splitveil.splitlearning.halves import context_of, fingerprint, vocabulary_of, width_of
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.wire import split_codec as codec
from splitveil.wire.parsing import MAX_HELLO
from splitveil.wire.split_codec import Kind, Request
from splitveil.wire.tensors import Packed

log = logging.getLogger(__name__)

SILENT_SECONDS = 900.0
"""A session that asks nothing for so long is ended: a device computes between two requests, but not that long."""
HANDOVER_SECONDS = 20.0
"""How long a device that comes back waits for the end of the session that it left behind."""
DEFAULT_RUNS = 1000
_TRAINING = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.STEP, Kind.DISCARD, Kind.SAVE})


@dataclass(frozen=True, repr=False)
class Offer:
    """What one server holds, and what it lets devices do."""

    base: PreTrainedModel
    name: str
    """What API keys call it."""
    cut: int
    shape: Shape
    blocks: int
    state: Path | None
    """Where checkpoints of runs are kept."""
    trains: frozenset[Trains]
    """What may be trained here."""
    limits: Limits = DEFAULT_LIMITS
    runs: int = DEFAULT_RUNS
    """How many runs are kept in ``state``: each token makes one, and tokens cost nothing."""

    def check_plan(self, plan: Plan, token: bytes) -> None:
        """Raises ``ConfigurationError`` for what is not trained here."""
        if plan.cloud not in self.trains:
            allowed = " or ".join(sorted(self.trains))
            raise ConfigurationError(f"this server trains {allowed} on its side, not {plan.cloud}")
        if not token:
            raise ConfigurationError("a run of training needs a token")

    def check_room(self, folder: Path) -> None:
        """Raises ``ConfigurationError`` where the run in ``folder`` would be one too many, or could not be kept: now,
        and not after the steps until its first checkpoint.
        """
        if self.state is None:
            return
        try:
            if not folder.is_dir() and self.state.is_dir() and sum(1 for _ in self.state.iterdir()) >= self.runs:
                raise ConfigurationError(
                    f"this server keeps {self.runs} runs, and begins no other until one is removed"
                )
            # Not the run's own folder before there is something in it: each would count as a run.
            check_writable(folder if folder.is_dir() else self.state)
        except OSError as error:
            # Whoever runs the server is told where; a device is not.
            tell(log, logging.ERROR, "state_not_writable", run=folder.name, error=str(error))
            raise ConfigurationError(
                f"this server cannot keep checkpoints at the moment: {error.strerror or type(error).__name__}"
            ) from None


class Runs:
    """Which runs are open, so that no two sessions write the checkpoints of one; thread-safe."""

    def __init__(self) -> None:
        self._open: dict[bytes, tuple[Callable[[], object], threading.Event]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def only(self, token: bytes, hang_up: Callable[[], object]) -> Iterator[None]:
        """Within, this session alone has the run. One that has it is hung up: who has the token came back.

        Raises ``ConfigurationError`` where the other session does not end.
        """
        mine = threading.Event()
        while True:
            with self._lock:
                other = self._open.get(token)
                if other is None:
                    self._open[token] = (hang_up, mine)
                    break
            other[0]()
            if not other[1].wait(HANDOVER_SECONDS):
                raise ConfigurationError("this run is open in another session that does not end; try again later")
        try:
            yield
        finally:
            with self._lock:
                del self._open[token]
            mine.set()


class SplitService(Conversations):
    """Split sessions over one base model."""

    def __init__(
        self, offer: Offer, keys: Doorkeeper | None, visits: Visits, silent: int, training: int, silence: float
    ) -> None:
        """``silent`` may be connected and have said nothing; ``training`` sessions train at once.

        ``silence`` is how many seconds a session may ask nothing.
        """
        super().__init__(codec.METHOD, visits, silent)
        self._offer = offer
        self._keys = keys
        self._fingerprint = bytes.fromhex(fingerprint(offer.base))
        self._training = threading.Semaphore(training)
        self._runs = Runs()
        self._silence = silence

    def _serve(
        self, first: bytes, requests: Iterator[bytes], visit: Visit, hang_up: Callable[[], object]
    ) -> Iterator[bytes]:
        hello = codec.decode_client(first, MAX_HELLO)
        if not isinstance(hello, codec.Hello):
            raise ProtocolError("a session begins with Hello")
        if hello.version != codec.VERSION:
            raise other_version(hello.version, codec.VERSION)
        client = identify(self._keys, hello.key, self._offer.name)
        with ExitStack() as stack:
            try:
                plan = self._agreed(hello)
                visit.admitted(client.identity, self._offer.name)
                # The run first: what a device left behind gives its place back before another one is asked for.
                if plan is not None:
                    stack.enter_context(self._runs.only(hello.token, hang_up))
                if hello.token:
                    stack.enter_context(self._place())
                cloud = self._cloud(plan, hello)
                step = 0 if plan is None else cloud.resume(hello.steps)
            except (ConfigurationError, BaseModelError, RefusedError) as error:
                raise declined(str(error)) from None
            stack.callback(cloud.close)
            yield codec.encode_server(self._welcome(step))
            visit.rest()

            def late() -> None:
                visit.overdue = True
                hang_up()

            session, seq = _Session(self._offer, cloud, plan is not None), 0
            while True:
                with deadline(self._silence, late):
                    raw = next(requests, None)
                if raw is None:
                    return
                seq += 1
                begun = visit.asked()
                request = codec.decode_client(raw)
                if not isinstance(request, Request) or request.seq != seq:
                    raise ProtocolError(f"request number {seq} was expected")
                reply = self._reply(session, client, request, visit)
                data = codec.encode_server(reply)
                if isinstance(reply, codec.Result):
                    visit.answered(begun, request.texts * request.positions, len(raw), len(data))
                # Who does not take the answer in is as silent as who asks nothing.
                with deadline(self._silence, late):
                    yield data
                visit.rest()

    def _agreed(self, hello: codec.Hello) -> Plan | None:
        """The plan of a device that fits what is here. Raises ``ConfigurationError`` for one that does not."""
        offer = self._offer
        if hello.base != self._fingerprint:
            raise ConfigurationError(
                "the base model here is another one: other weights, another configuration, or another dtype; both "
                "sides need the same"
            )
        if (hello.cut, received_shape(hello.shape)) != (offer.cut, offer.shape):
            raise ConfigurationError(
                f"this server holds the blocks after cut {offer.cut} in the {offer.shape} shape, and was asked for cut "
                f"{hello.cut} in the {received_shape(hello.shape)} shape; give --cut {offer.cut} --shape {offer.shape}"
            )
        plan = received_plan(hello)
        if hello.token and offer.state is None:
            raise ConfigurationError(
                "this server keeps no checkpoints, and has none of any run: whoever runs it must start it with --state"
            )
        if plan is not None:
            offer.check_plan(plan, hello.token)
        return plan

    def _cloud(self, plan: Plan | None, hello: codec.Hello) -> LocalCloud:
        """Without a plan: the base's own blocks, or those that a run has trained. Raises as ``LocalCloud`` does."""
        offer, token = self._offer, hello.token
        folder = None if offer.state is None or not token else offer.state / folder_name(token)
        if plan is not None and folder is not None:
            offer.check_room(folder)
        if plan is None and folder is not None:
            return trained_cloud(
                offer.base, folder, cut=offer.cut, shape=offer.shape, steps=hello.steps, limits=offer.limits
            )
        return LocalCloud(offer.base, cut=offer.cut, shape=offer.shape, plan=plan, folder=folder, limits=offer.limits)

    def _welcome(self, step: int) -> codec.Welcome:
        offer = self._offer
        return codec.Welcome(
            codec.VERSION,
            offer.blocks,
            width_of(offer.base),
            vocabulary_of(offer.base),
            min(context_of(offer.base) or offer.limits.states, codec.MAX_SEEN),
            offer.limits.batch,
            offer.limits.states,
            step,
        )

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places for training, which takes memory. Raises ``Rejected`` where all are taken."""
        if not self._training.acquire(blocking=False):
            raise full("sessions of training")
        try:
            yield
        finally:
            self._training.release()

    def _reply(
        self, session: "_Session", client: Admitted, request: Request, visit: Visit
    ) -> codec.Result | codec.Refusal:
        """The result, or a refusal that leaves the session open. Raises ``Rejected``."""
        try:
            client.check()
        except KeyRejectedError as error:
            visit.turned_down("key")
            raise dismissed(error) from None
        except RefusedError as error:
            visit.turned_down("database")
            return codec.Refusal(request.seq, str(error))
        try:
            tensor, loss = session.done(request)
        except SplitveilError as error:
            visit.turned_down("malformed")
            return codec.Refusal(request.seq, str(error))
        return codec.Result(request.seq, tensor, loss)


class _Session:
    """Calls that came over the wire, as calls of a ``LocalCloud``."""

    def __init__(self, offer: Offer, cloud: LocalCloud, trains: bool) -> None:
        self._cloud = cloud
        self._trains = trains
        self._width = width_of(offer.base)
        self._answer = vocabulary_of(offer.base) if offer.shape is Shape.STRAIGHT else self._width
        self._states = offer.limits.states
        self._text: Tensor | None = None  # of the forward whose gradient is due

    def done(self, request: Request) -> tuple[Packed | None, float]:
        """What the call returns. Raises what the call raises, and ``ProtocolError``."""
        if request.kind in _TRAINING and not self._trains:
            raise RefusedError("this session was opened without a plan: it does not train")
        match request.kind:
            case Kind.EXTEND:
                if not fits(request.texts, self._answer):
                    raise ProtocolError(f"the answer for {request.texts} texts is larger than a message")
                return packed(self._cloud.extend(self._crossing(request))), math.nan
            case Kind.EVALUATE:
                crossing = self._crossing(request)
                states, loss = self._cloud.evaluate(crossing, labels_of(request))
                return None if states is None else packed(states[crossing.text]), loss
            case Kind.FORWARD:
                crossing = self._crossing(request)
                states, loss = self._cloud.forward(crossing, labels_of(request), request.number)
                self._text = crossing.text
                return packed(states[crossing.text]), loss
            case Kind.BACKWARD:
                return self._backward(request), math.nan
            case Kind.RESTART:
                self._cloud.restart()
            case Kind.STEP:
                self._cloud.step(request.number)
            case Kind.DISCARD:
                self._cloud.discard()
            case Kind.SAVE:
                self._cloud.save(request.step)
        return None, math.nan

    def _backward(self, request: Request) -> Packed:
        text = self._text
        if text is None or request.tensor is None:
            raise RefusedError("a gradient came without a micro-batch that it belongs to; forward comes first")
        gradient = scattered(unpacked(request.tensor, int(text.sum()), self._width, finite=False), text)
        return packed(self._cloud.backward(gradient)[text])

    def _crossing(self, request: Request) -> Crossing:
        """Raises ``ProtocolError`` for one that does not fit, or whose answer would not fit in a message."""
        # First, for few bytes may stand for many numbers.
        if not fits(request.texts * request.positions, self._width):
            raise ProtocolError(f"the answer for {request.texts} texts is larger than a message; use smaller batches")
        return crossing_of(request, self._width, self._states)
