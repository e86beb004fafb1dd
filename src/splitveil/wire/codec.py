"""Bytes to checked messages and back, with every limit of the wire format in one place (docs/protocol.md).

What comes out of ``decode_client`` and ``decode_server`` has the types and sizes that the format promises; whatever
does not is a ``ProtocolError``. The errors name sizes and limits, never contents.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from google.protobuf.message import DecodeError

from splitveil.errors import ProtocolError
from splitveil.wire import adapter_pb2 as pb

VERSION = 1
METHOD = "/splitveil.v1.PrivateAdapter/Session"

MAX_MESSAGE = 32 << 20
"""Bytes of one gRPC message; gRPC's own limits are set from it."""
MAX_HELLO = 4096
"""Bytes of a client's first message, which is read before anything is known of the client."""
MAX_PUBLICATION = 1 << 30
MAX_KEYS = 64 << 20
"""Bytes of the keys that one session uploads."""
CHUNK = 1 << 20
MAX_ROWS = 1024
MAX_LAYERS_IN_QUERY = 64
MAX_ADAPTER_NAME = 128
MAX_TEXT = 512
DIGEST = 32
_MAX_FIELDS = 8
_LARGE = 1 << 16  # a smaller message has no room for enough fields to do harm
_OVERHEAD = 4096  # room for everything in a message that is not ``data``

GRPC_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
]


@dataclass(frozen=True)
class Hello:
    """The client's first message."""

    version: int
    adapter: str
    have_digest: bytes
    key: str = field(default="", repr=False)


@dataclass(frozen=True)
class KeyChunk:
    """A piece of the client's keys."""

    offset: int
    data: bytes = field(repr=False)


# Queries and answers are not frozen: that would be half of what it takes to make one.
@dataclass(slots=True)
class Query:
    """One site's rows. ``data`` is checked for its fit with layers and rows by the served half."""

    seq: int
    layers: tuple[int, ...]
    rows: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Welcome:
    """The server's first message."""

    version: int
    digest: bytes
    publication_size: int
    max_rows: int


@dataclass(frozen=True)
class Chunk:
    """A piece of the publication."""

    offset: int
    data: bytes = field(repr=False)


@dataclass(slots=True)
class Answer:
    """The answer to the query of the same ``seq``."""

    seq: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Refusal:
    """Why the query of the same ``seq`` was not answered."""

    seq: int
    budget: bool
    message: str


ClientMessage: TypeAlias = Hello | KeyChunk | Query


def max_rows(query_size: int, answer_size: int) -> int:
    """The most rows of these sizes (bytes) that fit in one message, at least 1, at most ``MAX_ROWS``."""
    return max(1, min(MAX_ROWS, (MAX_MESSAGE - _OVERHEAD) // max(query_size, answer_size)))


def key_chunks(keys: bytes) -> Iterator[KeyChunk]:
    """Keys as the messages that carry them, all but the last of them full; none for no keys."""
    for offset in range(0, len(keys), CHUNK):
        yield KeyChunk(offset, keys[offset : offset + CHUNK])


def encode_client(message: ClientMessage) -> bytes:
    """One client message."""
    if isinstance(message, KeyChunk):
        keys = pb.KeyChunk(offset=message.offset, data=message.data)
        return pb.ClientMessage(keys=keys).SerializeToString()
    if isinstance(message, Query):
        # Filled in place: a finished Query would be copied into the message, data and all.
        outer = pb.ClientMessage()
        query = outer.query
        query.seq, query.rows, query.data = message.seq, message.rows, message.data
        query.layers.extend(message.layers)
        return outer.SerializeToString()
    hello = pb.Hello(version=message.version, adapter=message.adapter, have_digest=message.have_digest, key=message.key)
    return pb.ClientMessage(hello=hello).SerializeToString()


def decode_client(data: bytes, limit: int = MAX_MESSAGE) -> ClientMessage:
    """Reads what a client sent, of ``limit`` bytes at most. Raises ``ProtocolError``."""
    parsed = pb.ClientMessage()
    _parse(parsed, data, limit)
    match parsed.WhichOneof("body"):
        case "hello":
            h = parsed.hello
            _limit("adapter name", len(h.adapter), MAX_ADAPTER_NAME)
            _limit("digest", len(h.have_digest), DIGEST)
            _limit("key", len(h.key), MAX_TEXT)
            return Hello(h.version, h.adapter, h.have_digest, h.key)
        case "keys":
            k = parsed.keys
            if not 0 < len(k.data) <= CHUNK:
                raise ProtocolError(f"a chunk of keys of {len(k.data)} bytes; 1 to {CHUNK} are allowed")
            _limit("keys", k.offset + len(k.data), MAX_KEYS)
            return KeyChunk(k.offset, k.data)
        case "query":
            q = parsed.query
            _limit("rows", q.rows, MAX_ROWS)
            _limit("layers", len(q.layers), MAX_LAYERS_IN_QUERY)
            return Query(q.seq, tuple(q.layers), q.rows, q.data)
    raise ProtocolError("a message without a known body; is the other side of another version?")


def encode_server(message: Welcome | Chunk | Answer | Refusal) -> bytes:
    """One server message."""
    match message:
        case Answer():
            body = pb.ServerMessage(answer=pb.Answer(seq=message.seq, data=message.data))
        case Refusal():
            code = pb.Refusal.BUDGET if message.budget else pb.Refusal.MALFORMED
            body = pb.ServerMessage(refusal=pb.Refusal(seq=message.seq, code=code, message=message.message[:MAX_TEXT]))
        case Chunk():
            body = pb.ServerMessage(chunk=pb.PublicationChunk(offset=message.offset, data=message.data))
        case Welcome():
            body = pb.ServerMessage(
                welcome=pb.Welcome(
                    version=message.version,
                    digest=message.digest,
                    publication_size=message.publication_size,
                    max_rows=message.max_rows,
                )
            )
    return body.SerializeToString()


def decode_server(data: bytes) -> Welcome | Chunk | Answer | Refusal:
    """Reads what a server sent. Raises ``ProtocolError``."""
    parsed = pb.ServerMessage()
    _parse(parsed, data, MAX_MESSAGE)
    match parsed.WhichOneof("body"):
        case "answer":
            return Answer(parsed.answer.seq, parsed.answer.data)
        case "refusal":
            r = parsed.refusal
            # Shown on a terminal: only printable characters of a bounded text.
            text = "".join(c if c.isprintable() else "?" for c in r.message[:MAX_TEXT])
            return Refusal(r.seq, r.code == pb.Refusal.BUDGET, text)
        case "chunk":
            c = parsed.chunk
            if not 0 < len(c.data) <= CHUNK:
                raise ProtocolError(f"a publication chunk of {len(c.data)} bytes; 1 to {CHUNK} are allowed")
            return Chunk(c.offset, c.data)
        case "welcome":
            w = parsed.welcome
            if len(w.digest) != DIGEST:
                raise ProtocolError(f"a digest of {len(w.digest)} bytes; expected {DIGEST}")
            _limit("publication size", w.publication_size, MAX_PUBLICATION)
            if not 1 <= w.max_rows <= MAX_ROWS:
                raise ProtocolError(f"a row limit of {w.max_rows}; 1 to {MAX_ROWS} are allowed")
            return Welcome(w.version, w.digest, w.publication_size, w.max_rows)
    raise ProtocolError("a message without a known body; is the other side of another version?")


def _parse(parsed: pb.ClientMessage | pb.ServerMessage, data: bytes, limit: int) -> None:
    _limit("message", len(data), limit)
    if len(data) > _LARGE and not _has_few_fields(data):
        raise ProtocolError(f"a message of more than {_MAX_FIELDS} fields; one is expected")
    try:
        parsed.ParseFromString(data)
    except (DecodeError, ValueError):  # ValueError: a text that is not UTF-8, where protobuf runs without its C part
        raise ProtocolError("a message that is not of the wire format (truncated, or another protocol)") from None


def _has_few_fields(data: bytes) -> bool:
    """Whether there are at most ``_MAX_FIELDS`` at the top: a message has one, and may have some of the future.

    Of a message of millions of bodies protobuf would make millions of objects, one after the other. What is not a field
    at all is left for protobuf to refuse.
    """
    place, end = 0, len(data)
    for _ in range(_MAX_FIELDS):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 2:
            length, place = _varint(data, place)
            place += length
        elif kind == 0:
            _, place = _varint(data, place)
        else:
            place += 8 if kind == 1 else 4
        if place >= end:
            return True
    return False


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """(number, place behind it); beyond the end where there is none."""
    number = shift = 0
    for index in range(place, min(place + 10, len(data))):
        number |= (data[index] & 0x7F) << shift
        if data[index] < 0x80:
            return number, index + 1
        shift += 7
    return 0, len(data)


def _limit(what: str, got: int, limit: int) -> None:
    if got > limit:
        raise ProtocolError(f"{what}: {got} is over the limit of {limit}")
