"""Bytes to protocol buffers, bounded: what both wire formats do before they look at a message."""

from google.protobuf.message import DecodeError, Message

from splitveil.errors import ProtocolError

MAX_MESSAGE = 32 << 20
"""Bytes of one gRPC message; gRPC's own limits are set from it."""
MAX_HELLO = 4096
"""Bytes of a client's first message, which is read before anything is known of the client."""
MAX_TEXT = 512
_MAX_FIELDS = 8
_LARGE = 1 << 16  # a smaller message has no room for enough fields to do harm

GRPC_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
]


def parse(parsed: Message, data: bytes, limit: int) -> None:
    """Fills ``parsed`` from ``data``, of ``limit`` bytes at most. Raises ``ProtocolError``."""
    at_most("message", len(data), limit)
    if len(data) > _LARGE and not _has_few_fields(data):
        raise ProtocolError(f"a message of more than {_MAX_FIELDS} fields; one is expected")
    try:
        parsed.ParseFromString(data)
    except (DecodeError, ValueError):  # ValueError: a text that is not UTF-8, where protobuf runs without its C part
        raise ProtocolError("a message that is not of the wire format (truncated, or another protocol)") from None


def at_most(what: str, got: int, limit: int) -> None:
    """Raises ``ProtocolError`` for a size or count over its limit."""
    if got > limit:
        raise ProtocolError(f"{what}: {got} is over the limit of {limit}")


def printable(text: str) -> str:
    """A text from the other side as it may be shown on a terminal: bounded, no control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_TEXT])


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
