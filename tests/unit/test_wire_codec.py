"""Whatever bytes arrive: a message within the limits, or ``ProtocolError``. What is sent arrives as it was."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitveil.errors import ProtocolError
from splitveil.wire import adapter_pb2 as pb
from splitveil.wire import codec

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))

hellos = st.builds(
    codec.Hello, U32, TEXT.filter(lambda t: len(t) <= 128), st.binary(max_size=32), TEXT.filter(lambda t: len(t) <= 512)
)
queries = st.builds(
    codec.Query, U64, st.lists(U32, max_size=64).map(tuple), st.integers(0, codec.MAX_ROWS), st.binary(max_size=99)
)
keys = st.builds(codec.KeyChunk, st.integers(0, codec.MAX_KEYS - 99), st.binary(min_size=1, max_size=99))
welcomes = st.builds(
    codec.Welcome,
    U32,
    st.binary(min_size=32, max_size=32),
    st.integers(0, codec.MAX_PUBLICATION),
    st.integers(1, codec.MAX_ROWS),
)
chunks = st.builds(codec.Chunk, U64, st.binary(min_size=1, max_size=99))
answers = st.builds(codec.Answer, U64, st.binary(max_size=99))
printable = TEXT.filter(lambda t: t.isprintable() and len(t) <= codec.MAX_TEXT)
refusals = st.builds(codec.Refusal, U64, st.booleans(), printable)

client_messages = st.one_of(hellos, keys, queries)
server_messages = st.one_of(welcomes, chunks, answers, refusals)
many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@many
@given(client_messages)
def test_client_messages_arrive_as_sent(message: codec.Hello | codec.Query) -> None:
    assert codec.decode_client(codec.encode_client(message)) == message


@many
@given(server_messages)
def test_server_messages_arrive_as_sent(message: codec.Answer) -> None:
    assert codec.decode_server(codec.encode_server(message)) == message


def read_both(data: bytes) -> None:
    """Reads ``data`` as either side would: within the limits, or ``ProtocolError``, and nothing else."""
    for decode in (codec.decode_client, codec.decode_server):
        try:
            message = decode(data)
        except ProtocolError:
            continue
        match message:
            case codec.Hello():
                assert max(len(message.adapter), len(message.key)) <= codec.MAX_TEXT
            case codec.KeyChunk():
                assert 0 < len(message.data) <= codec.CHUNK
                assert message.offset + len(message.data) <= codec.MAX_KEYS
            case codec.Query():
                assert message.rows <= codec.MAX_ROWS
                assert len(message.layers) <= codec.MAX_LAYERS_IN_QUERY
            case codec.Welcome():
                assert len(message.digest) == codec.DIGEST
                assert 1 <= message.max_rows <= codec.MAX_ROWS
                assert message.publication_size <= codec.MAX_PUBLICATION
            case codec.Chunk():
                assert 0 < len(message.data) <= codec.CHUNK
            case codec.Refusal():
                assert message.message.isprintable()
                assert len(message.message) <= codec.MAX_TEXT


@many
@given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes) -> None:
    read_both(data)


@many
@given(st.one_of(client_messages.map(codec.encode_client), server_messages.map(codec.encode_server)), st.data())
def test_damaged_messages(data: bytes, draw: st.DataObject) -> None:
    """Cut, extended, or with some bytes replaced."""
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(0, 4))):
        if damaged:
            damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    first, last = sorted(draw.draw(st.integers(0, len(damaged))) for _ in range(2))
    read_both(bytes(damaged[first:last]) + draw.draw(st.binary(max_size=9)))


@many
@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 5), st.binary(max_size=40)), max_size=6))
def test_bytes_that_look_like_protocol_buffers(fields: list[tuple[int, int, bytes]]) -> None:
    """Well-framed fields with arbitrary contents reach deeper than arbitrary bytes."""
    data = b""
    for number, kind, content in fields:
        data += bytes([number << 3 | kind if number < 16 else 0xFA]) + (bytes([len(content)]) if kind == 2 else b"")
        data += content
    read_both(data)


def test_limits_are_inclusive() -> None:
    """The largest that is allowed passes, one more does not."""
    for good, bad in (
        (codec.Hello(1, "n" * 128, b""), codec.Hello(1, "n" * 129, b"")),
        (codec.Hello(1, "", bytes(32)), codec.Hello(1, "", bytes(33))),
        (codec.Hello(1, "", b"", "k" * 512), codec.Hello(1, "", b"", "k" * 513)),
        (codec.KeyChunk(codec.MAX_KEYS - 1, b"k"), codec.KeyChunk(codec.MAX_KEYS, b"k")),
        (codec.Query(1, (0,), 1024, b""), codec.Query(1, (0,), 1025, b"")),
        (codec.Query(1, (0,) * 64, 1, b""), codec.Query(1, (0,) * 65, 1, b"")),
    ):
        assert codec.decode_client(codec.encode_client(good)) == good
        with pytest.raises(ProtocolError, match="over the limit"):
            codec.decode_client(codec.encode_client(bad))
    largest = codec.Chunk(0, bytes(codec.CHUNK))
    assert codec.decode_server(codec.encode_server(largest)) == largest
    for decode in (codec.decode_client, codec.decode_server):
        with pytest.raises(ProtocolError, match="message: 33554433 is over the limit of 33554432"):
            decode(bytes(codec.MAX_MESSAGE + 1))


def test_the_largest_query_and_answer_fit_in_a_message() -> None:
    for query, answer in ((4 * 15360, 4 * 512), (4 * 1216, 4 * 8), (48, 4 * 28672), (1, 1)):
        rows = codec.max_rows(query, answer)
        layers = tuple(range(2**32 - 64, 2**32))
        for sent in (
            codec.encode_client(codec.Query(2**64 - 1, layers, rows, bytes(rows * query))),
            codec.encode_server(codec.Answer(2**64 - 1, bytes(rows * answer))),
        ):
            assert len(sent) <= codec.MAX_MESSAGE
        assert rows == codec.MAX_ROWS or (rows + 1) * max(query, answer) > codec.MAX_MESSAGE - 8192


def test_a_refusals_text_is_cut_and_made_printable() -> None:
    hostile = pb.ServerMessage(refusal=pb.Refusal(seq=1, code=pb.Refusal.BUDGET, message="\x1b[2J\n" + "x" * 9999))
    refusal = codec.decode_server(hostile.SerializeToString())
    assert isinstance(refusal, codec.Refusal)
    assert refusal.message.startswith("?[2J?x")
    assert len(refusal.message) == codec.MAX_TEXT


def test_a_refusal_for_a_reason_of_the_future_is_no_matter_of_budget() -> None:
    future = pb.ServerMessage(refusal=pb.Refusal(seq=1, code=pb.Refusal.BUDGET)).SerializeToString()
    refusal = codec.decode_server(future.replace(b"\x10\x02", b"\x10\x63"))
    assert refusal == codec.Refusal(1, False, "")


def test_nothing_secret_in_a_repr() -> None:
    for message in (codec.Hello(1, "a", b"", "sesame"), codec.Query(1, (0,), 1, b"sesame"), codec.Answer(1, b"sesame")):
        assert "sesame" not in repr(message)


def test_keys_are_sent_in_full_chunks() -> None:
    whole = bytes(range(256)) * 5000
    sent = [codec.decode_client(codec.encode_client(chunk)) for chunk in codec.key_chunks(whole)]
    assert [(chunk.offset, len(chunk.data)) for chunk in sent] == [(0, codec.CHUNK), (codec.CHUNK, 231_424)]
    assert b"".join(chunk.data for chunk in sent) == whole
    assert not list(codec.key_chunks(b""))
    for size in (0, codec.CHUNK + 1):
        raw = pb.ClientMessage(keys=pb.KeyChunk(data=bytes(size))).SerializeToString()
        with pytest.raises(ProtocolError, match="chunk of keys"):
            codec.decode_client(raw)


@pytest.mark.parametrize(
    "unit", [b"\n\0\x12\0", b"\n\0", b"\xfa\x01\0", b"\x08\0", b"\r\0\0\0\0", b"\t\0\0\0\0\0\0\0\0"]
)
def test_a_message_of_millions_of_fields_is_refused_before_it_is_parsed(
    unit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protobuf would make an object for every one of them."""
    data = unit * (codec.MAX_MESSAGE // len(unit))
    for name in ("ClientMessage", "ServerMessage"):
        monkeypatch.setattr(codec.pb, name, lambda: None)  # who parses nothing, needs no parser
    for decode in (codec.decode_client, codec.decode_server):
        with pytest.raises(ProtocolError, match="more than 8 fields"):
            decode(data)


def test_a_first_message_is_short() -> None:
    hello = codec.encode_client(
        codec.Hello(codec.VERSION, "a" * codec.MAX_ADAPTER_NAME, bytes(32), "k" * codec.MAX_TEXT)
    )
    assert len(hello) < codec.MAX_HELLO
    assert isinstance(codec.decode_client(hello, codec.MAX_HELLO), codec.Hello)
    with pytest.raises(ProtocolError, match="4097 is over the limit of 4096"):
        codec.decode_client(bytes(4097), codec.MAX_HELLO)
