"""Messages of a split session: bytes to checked messages and back (docs/protocol.md).

What comes out of ``decode_client`` and ``decode_server`` has the types and sizes that the format promises; whatever
does not is a ``ProtocolError``. Whether a message fits the model is for the session to see: it refuses, and goes on.
The errors name sizes and limits, never contents.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ProtocolError
from splitveil.wire import split_pb2 as pb
from splitveil.wire.parsing import MAX_MESSAGE, MAX_TEXT, at_most, parse, printable
from splitveil.wire.tensors import Packed

VERSION = 1
METHOD = "/splitveil.split.v1.Split/Session"
SERVER = " for split sessions"
COMMAND = "splitveil split serve"

FINGERPRINT = 32
TOKEN = 32
MAX_TARGETS = 32
MAX_TARGET_NAME = 64
MAX_STEPS = 16
"""Checkpoints that a device names."""
MAX_TEXTS = 1 << 12
"""Texts in a batch; a server's own limits are lower."""
MAX_SEEN = 1 << 20
"""Positions of a text."""
MAX_MASK = 1 << 24
"""Texts × positions that a mask covers."""
MAX_LABELS = 1 << 22
MAX_WIDTH = 1 << 20
MAX_VOCABULARY = 1 << 22
MAX_NUMBER = 2**53
OVERHEAD = 4096
"""Room for everything in a message that is neither numbers nor mask nor labels."""


class Kind(IntEnum):
    """What a device asks for: the calls of ``splitlearning.interface.Cloud``."""

    EXTEND = 1
    RESTART = 2
    EVALUATE = 3
    FORWARD = 4
    BACKWARD = 5
    STEP = 6
    DISCARD = 7
    SAVE = 8


WITH_CROSSING = frozenset({Kind.EXTEND, Kind.EVALUATE, Kind.FORWARD})
WITH_TENSOR = WITH_CROSSING | {Kind.BACKWARD}
WITH_LABELS = frozenset({Kind.EVALUATE, Kind.FORWARD})


@dataclass(frozen=True)
class Plan:
    """What is to be trained; ``device`` and ``cloud``: 0 nothing, 1 LoRA, 2 all weights."""

    device: int
    cloud: int
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int
    freeze_embeddings: bool


@dataclass(frozen=True)
class Hello:
    """The device's first message. ``shape``: 0 straight, 1 U; ``token`` is as secret as the run."""

    version: int
    base: bytes
    cut: int
    shape: int
    plan: Plan | None = None
    token: bytes = field(default=b"", repr=False)
    steps: tuple[int, ...] = ()
    key: str = field(default="", repr=False)


@dataclass(frozen=True)
class Request:
    """One call. What its kind has no use for is empty or zero."""

    seq: int
    kind: Kind
    tensor: Packed | None = None
    texts: int = 0
    positions: int = 0
    seen: int = 0
    mask: bytes = field(default=b"", repr=False)
    labels: bytes = field(default=b"", repr=False)
    number: float = 0.0
    step: int = 0


@dataclass(frozen=True)
class Welcome:
    """The cloud's first message: the model, its limits, and the step that a run goes on from."""

    version: int
    blocks: int
    width: int
    vocabulary: int
    max_positions: int
    max_texts: int
    max_states: int
    step: int = 0


@dataclass(frozen=True)
class Result:
    """What a call returned."""

    seq: int
    tensor: Packed | None = None
    loss: float = float("nan")


@dataclass(frozen=True)
class Refusal:
    """Why a call was not carried out; the session is as it was before it."""

    seq: int
    message: str


ClientMessage: TypeAlias = Hello | Request
ServerMessage: TypeAlias = Welcome | Result | Refusal
REPLIES = (Result, Refusal)


def encode_client(message: ClientMessage) -> bytes:
    """One message of the device."""
    outer = pb.ClientMessage()
    if isinstance(message, Request):
        request = outer.request
        request.seq, request.kind, request.step = message.seq, message.kind, message.step
        request.texts, request.positions, request.seen = message.texts, message.positions, message.seen
        request.mask, request.labels, request.number = message.mask, message.labels, message.number
        _put(request.tensor if message.tensor is not None else None, message.tensor)
        return outer.SerializeToString()
    hello = outer.hello
    hello.version, hello.base, hello.key, hello.token = message.version, message.base, message.key, message.token
    hello.cut, hello.shape = message.cut, message.shape
    hello.steps = np.array(message.steps, np.uint64).tobytes()
    if message.plan is not None:
        p = message.plan
        hello.plan.CopyFrom(
            pb.Plan(
                device=p.device,
                cloud=p.cloud,
                beta1=p.beta1,
                beta2=p.beta2,
                epsilon=p.epsilon,
                weight_decay=p.weight_decay,
                rank=p.rank,
                alpha=p.alpha,
                targets="\n".join(p.targets),
                seed=p.seed,
                freeze_embeddings=p.freeze_embeddings,
            )
        )
    return outer.SerializeToString()


def decode_client(data: bytes, limit: int = MAX_MESSAGE) -> ClientMessage:
    """Reads what a device sent, of ``limit`` bytes at most. Raises ``ProtocolError``."""
    parsed = pb.ClientMessage()
    parse(parsed, data, limit)
    match parsed.WhichOneof("body"):
        case "hello":
            h = parsed.hello
            _exactly("fingerprint of the base", h.base, FINGERPRINT)
            if h.token:
                _exactly("token of a run", h.token, TOKEN)
            at_most("key", len(h.key), MAX_TEXT)
            at_most("shape", h.shape, 1)
            plan = _plan(h.plan) if h.HasField("plan") else None
            return Hello(h.version, h.base, h.cut, h.shape, plan, h.token, _steps(h.steps), h.key)
        case "request":
            return _request(parsed.request)
    raise ProtocolError("a message without a known body; is the other side of another version?")


def encode_server(message: ServerMessage) -> bytes:
    """One message of the cloud."""
    outer = pb.ServerMessage()
    match message:
        case Result():
            result = outer.result
            result.seq, result.loss = message.seq, message.loss
            _put(result.tensor if message.tensor is not None else None, message.tensor)
        case Refusal():
            outer.refusal.seq, outer.refusal.message = message.seq, message.message[:MAX_TEXT]
        case Welcome():
            w = outer.welcome
            w.version, w.blocks, w.width, w.vocabulary = (
                message.version,
                message.blocks,
                message.width,
                message.vocabulary,
            )
            w.max_positions, w.max_texts, w.max_states = message.max_positions, message.max_texts, message.max_states
            w.step = message.step
    return outer.SerializeToString()


def decode_server(data: bytes) -> ServerMessage:
    """Reads what a cloud sent. Raises ``ProtocolError``."""
    parsed = pb.ServerMessage()
    parse(parsed, data, MAX_MESSAGE)
    match parsed.WhichOneof("body"):
        case "result":
            r = parsed.result
            return Result(r.seq, _packed(r.tensor) if r.HasField("tensor") else None, r.loss)
        case "refusal":
            return Refusal(parsed.refusal.seq, printable(parsed.refusal.message))
        case "welcome":
            w = parsed.welcome
            at_most("step", w.step, MAX_NUMBER)
            sizes = (w.width, w.vocabulary, w.max_positions, w.max_texts, w.max_states)
            if min(sizes) < 1 or w.width > MAX_WIDTH or w.vocabulary > MAX_VOCABULARY:
                raise ProtocolError("a welcome without sensible sizes of the model or its limits")
            return Welcome(w.version, w.blocks, *sizes, w.step)
    raise ProtocolError("a message without a known body; is the other side of another version?")


def pack_mask(mask: NDArray[np.bool_]) -> bytes:
    """(texts, seen) as bits, row after row."""
    return np.packbits(mask, axis=None, bitorder="little").tobytes()


def unpack_mask(request: Request) -> NDArray[np.bool_]:
    """(texts, seen) of a request with a crossing, whose sizes were checked when it was decoded."""
    bits = np.unpackbits(np.frombuffer(request.mask, np.uint8), bitorder="little", count=request.texts * request.seen)
    return bits.astype(bool).reshape(request.texts, request.seen)


def unpack_labels(request: Request) -> NDArray[np.int64] | None:
    """(texts, positions), or None where there are none."""
    if not request.labels:
        return None
    return np.frombuffer(request.labels, np.int32).astype(np.int64).reshape(request.texts, request.positions)


def _request(r: pb.Request) -> Request:
    try:
        kind = Kind(r.kind)
    except ValueError:
        raise ProtocolError(f"a request of the unknown kind {r.kind}; is the other side newer?") from None
    if r.HasField("tensor") != (kind in WITH_TENSOR):
        raise ProtocolError(f"{kind.name.lower()}: numbers are missing, or are none of this request")
    if kind in WITH_CROSSING:
        if not (1 <= r.texts <= MAX_TEXTS and 1 <= r.positions <= r.seen <= MAX_SEEN):
            raise ProtocolError(f"a crossing of {r.texts} texts and {r.positions} of {r.seen} positions")
        at_most("texts × positions", r.texts * r.seen, MAX_MASK)
        _exactly("mask", r.mask, (r.texts * r.seen + 7) // 8)
        if r.labels:
            at_most("labels", r.texts * r.positions, MAX_LABELS)
            _exactly("labels", r.labels, 4 * r.texts * r.positions)
    if (kind not in WITH_CROSSING and (r.texts or r.positions or r.seen or r.mask)) or (
        r.labels and kind not in WITH_LABELS
    ):
        raise ProtocolError(f"{kind.name.lower()}: a mask or labels, which this request has no use for")
    at_most("step", r.step, MAX_NUMBER)
    tensor = _packed(r.tensor) if kind in WITH_TENSOR else None
    return Request(r.seq, kind, tensor, r.texts, r.positions, r.seen, r.mask, r.labels, r.number, r.step)


def _plan(p: pb.Plan) -> Plan:
    at_most("what is trained", max(p.device, p.cloud), 2)
    targets = tuple(p.targets.split("\n", MAX_TARGETS)) if p.targets else ()
    at_most("targets", len(targets), MAX_TARGETS)
    if not all(0 < len(name) <= MAX_TARGET_NAME and name.isprintable() for name in targets):
        raise ProtocolError(f"names of targets are printable and 1 to {MAX_TARGET_NAME} characters long")
    return Plan(
        p.device,
        p.cloud,
        p.beta1,
        p.beta2,
        p.epsilon,
        p.weight_decay,
        p.rank,
        p.alpha,
        targets,
        p.seed,
        p.freeze_embeddings,
    )


def _steps(data: bytes) -> tuple[int, ...]:
    at_most("checkpoints", len(data), 8 * MAX_STEPS)
    _exactly("checkpoints", data, len(data) // 8 * 8)
    steps = tuple(np.frombuffer(data, np.uint64).tolist())
    if list(steps) != sorted(set(steps)) or (steps and not 0 < steps[0] <= steps[-1] <= MAX_NUMBER):
        raise ProtocolError("checkpoints that are not in order")
    return steps


def _put(place: pb.Tensor | None, tensor: Packed | None) -> None:
    if place is None or tensor is None:
        return
    place.encoding, place.dtype = tensor.encoding, tensor.dtype
    place.values, place.scales, place.indices = tensor.values, tensor.scales, tensor.indices
    place.SetInParent()  # also where there are no rows


def _packed(t: pb.Tensor) -> Packed:
    return Packed(t.encoding, t.dtype, t.values, t.scales, t.indices)


def _exactly(what: str, data: bytes, size: int) -> None:
    if len(data) != size:
        raise ProtocolError(f"{what}: {len(data)} bytes where {size} are expected")
