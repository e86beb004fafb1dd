"""Bytes to checked messages and back, with every limit of the wire format in one place (docs/protocol.md).

What comes out of ``decode_client`` and ``decode_server`` has the types and sizes that the format promises; whatever
does not is a ``ProtocolError``. The errors name sizes and limits, never contents.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from splitveil.errors import ProtocolError
from splitveil.wire import adapter_pb2 as pb
from splitveil.wire.parsing import MAX_HELLO as MAX_HELLO
from splitveil.wire.parsing import MAX_MESSAGE as MAX_MESSAGE
from splitveil.wire.parsing import MAX_TEXT as MAX_TEXT
from splitveil.wire.parsing import at_most, parse, printable

VERSION = 1
METHOD = "/splitveil.v1.PrivateAdapter/Session"
SERVER = ""
COMMAND = "splitveil serve"

MAX_PUBLICATION = 4 << 30
"""Bytes. Rank 64 on every linear module of a 70B model takes 1.9 GiB; what a server sends, a client holds in memory."""
MAX_KEYS = 64 << 20
"""Bytes of the keys that one session uploads."""
CHUNK = 1 << 20
MAX_ROWS = 1024
MAX_LAYERS_IN_QUERY = 64
MAX_ADAPTER_NAME = 128
DIGEST = 32
_OVERHEAD = 4096  # room for everything in a message that is not ``data``


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
REPLIES = (Answer, Refusal)


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
    parse(parsed, data, limit)
    match parsed.WhichOneof("body"):
        case "hello":
            h = parsed.hello
            at_most("adapter name", len(h.adapter), MAX_ADAPTER_NAME)
            at_most("digest", len(h.have_digest), DIGEST)
            at_most("key", len(h.key), MAX_TEXT)
            return Hello(h.version, h.adapter, h.have_digest, h.key)
        case "keys":
            k = parsed.keys
            if not 0 < len(k.data) <= CHUNK:
                raise ProtocolError(f"a chunk of keys of {len(k.data)} bytes; 1 to {CHUNK} are allowed")
            at_most("keys", k.offset + len(k.data), MAX_KEYS)
            return KeyChunk(k.offset, k.data)
        case "query":
            q = parsed.query
            at_most("rows", q.rows, MAX_ROWS)
            at_most("layers", len(q.layers), MAX_LAYERS_IN_QUERY)
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
    parse(parsed, data, MAX_MESSAGE)
    match parsed.WhichOneof("body"):
        case "answer":
            return Answer(parsed.answer.seq, parsed.answer.data)
        case "refusal":
            r = parsed.refusal
            return Refusal(r.seq, r.code == pb.Refusal.BUDGET, printable(r.message))
        case "chunk":
            c = parsed.chunk
            if not 0 < len(c.data) <= CHUNK:
                raise ProtocolError(f"a publication chunk of {len(c.data)} bytes; 1 to {CHUNK} are allowed")
            return Chunk(c.offset, c.data)
        case "welcome":
            w = parsed.welcome
            if len(w.digest) != DIGEST:
                raise ProtocolError(f"a digest of {len(w.digest)} bytes; expected {DIGEST}")
            at_most("publication size", w.publication_size, MAX_PUBLICATION)
            if not 1 <= w.max_rows <= MAX_ROWS:
                raise ProtocolError(f"a row limit of {w.max_rows}; 1 to {MAX_ROWS} are allowed")
            return Welcome(w.version, w.digest, w.publication_size, w.max_rows)
    raise ProtocolError("a message without a known body; is the other side of another version?")
