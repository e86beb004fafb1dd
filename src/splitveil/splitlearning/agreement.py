"""A plan as it travels, and a run's name."""

import hashlib
import secrets

from splitveil.errors import ConfigurationError, ProtocolError
from splitveil.splitlearning.interface import Optimiser, Plan, Shape, Trains
from splitveil.wire import split_codec as codec

_SHAPES = (Shape.STRAIGHT, Shape.U)
_TRAINS = (Trains.NOTHING, Trains.LORA, Trains.FULL)


def new_token() -> str:
    """64 hexadecimal digits that name a run. Whoever has them may resume it."""
    return secrets.token_hex(codec.TOKEN)


def token_bytes(token: str) -> bytes:
    """The same as bytes. Raises ``ConfigurationError`` for what is no token, without repeating it."""
    try:
        data = bytes.fromhex(token)
    except ValueError:
        data = b""
    if len(data) != codec.TOKEN:
        raise ConfigurationError(f"the token of a run has {2 * codec.TOKEN} hexadecimal digits")
    return data


def folder_name(token: bytes) -> str:
    """What a cloud calls the folder of a run: its files do not tell who may resume it."""
    return hashlib.sha256(token).hexdigest()


def shape_number(shape: Shape) -> int:
    """A shape as it travels."""
    return _SHAPES.index(shape)


def sent_plan(plan: Plan) -> codec.Plan:
    """A plan as it travels, without cut and shape, which have places of their own.

    Raises ``ConfigurationError`` for targets that do not travel.
    """
    names_fit = all(0 < len(name) <= codec.MAX_TARGET_NAME and name.isprintable() for name in plan.targets)
    if not names_fit or len(plan.targets) > codec.MAX_TARGETS:
        raise ConfigurationError(
            f"at most {codec.MAX_TARGETS} targets, each of 1 to {codec.MAX_TARGET_NAME} printable characters"
        )
    o = plan.optimiser
    return codec.Plan(
        _TRAINS.index(plan.device),
        _TRAINS.index(plan.cloud),
        o.beta1,
        o.beta2,
        o.epsilon,
        o.weight_decay,
        plan.rank,
        plan.alpha,
        tuple(plan.targets),
        plan.seed,
        plan.freeze_embeddings,
    )


def received_shape(number: int) -> Shape:
    """A shape that was checked when it was decoded."""
    return _SHAPES[number]


def received_plan(hello: codec.Hello) -> Plan | None:
    """The plan of a greeting. Raises ``ProtocolError`` for one that makes no sense."""
    sent = hello.plan
    if sent is None:
        return None
    try:
        return Plan(
            hello.cut,
            received_shape(hello.shape),
            _TRAINS[sent.device],
            _TRAINS[sent.cloud],
            Optimiser(sent.beta1, sent.beta2, sent.epsilon, sent.weight_decay),
            sent.rank,
            sent.alpha,
            sent.targets,
            sent.seed,
            sent.freeze_embeddings,
        )
    except ConfigurationError as error:
        raise ProtocolError(f"a plan that makes no sense: {error}") from None
