"""Clients that break the rules get one clear ending or refusal, and the server goes on serving others."""

from typing import Any

import grpc
import pytest

from abuse.support import RawClient, eventually, hello, lora, query_data, served, served_layers
from splitveil.private.published import digest
from splitveil.serving.server import Server
from splitveil.wire import adapter_pb2 as pb
from splitveil.wire import codec

HELLO = codec.encode_client(hello())
GOOD = codec.Query(1, (0,), 1, query_data())
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def query(**changes: Any) -> codec.Query:
    """A good query, except for what is changed."""
    return codec.Query(**({"seq": 1, "layers": (0,), "rows": 1, "data": query_data()} | changes))


ENDED = {
    "garbage": ([b"\xff" * 40], INVALID, "not of the wire format"),
    "nothing": ([b""], INVALID, "without a known body"),
    "truncated hello": ([HELLO[:-1]], INVALID, "not of the wire format"),
    "a field from the future": ([b"\x7a\x01\x00"], INVALID, "without a known body"),
    "a server's message": ([codec.encode_server(codec.Answer(1, b"x" * 40))], INVALID, "begins with Hello"),
    "a name that is not UTF-8": ([b"\x0a\x04\x12\x02\xff\xfe"], INVALID, "not of the wire format"),
    "a long name": ([hello(adapter="n" * 129)], INVALID, "129 is over the limit of 128"),
    "a long digest": ([hello(have_digest=bytes(33))], INVALID, "33 is over the limit of 32"),
    "a long key": ([hello(key="k" * 513)], INVALID, "513 is over the limit of 512"),
    "another version": ([hello(version=2)], grpc.StatusCode.FAILED_PRECONDITION, "version 2 is not served"),
    "version 2^32-1": ([hello(version=2**32 - 1)], grpc.StatusCode.FAILED_PRECONDITION, "not served"),
    "an unknown adapter": ([hello(adapter="other")], grpc.StatusCode.NOT_FOUND, "no adapter of that name"),
    "no adapter": ([hello(adapter="")], grpc.StatusCode.NOT_FOUND, "no adapter of that name"),
    "an API key": ([hello(key="secret")], grpc.StatusCode.UNAUTHENTICATED, "knows no API keys"),
    "query before hello": ([GOOD], INVALID, "begins with Hello"),
    "hello twice": ([HELLO, HELLO], INVALID, "query number 1 was expected"),
    "hello between queries": ([HELLO, GOOD, HELLO], INVALID, "query number 2 was expected"),
    "garbage after hello": ([HELLO, b"\xff" * 40], INVALID, "not of the wire format"),
    "truncated query": ([HELLO, codec.encode_client(GOOD)[:-1]], INVALID, "not of the wire format"),
    "numbers begin with 0": ([HELLO, query(seq=0)], INVALID, "query number 1 was expected"),
    "a gap in the numbers": ([HELLO, GOOD, query(seq=3)], INVALID, "query number 2 was expected"),
    "a number again": ([HELLO, GOOD, GOOD], INVALID, "query number 2 was expected"),
    "the largest number": ([HELLO, query(seq=2**64 - 1)], INVALID, "query number 1 was expected"),
    "rows over the format's limit": ([HELLO, query(rows=1025)], INVALID, "rows: 1025 is over the limit of 1024"),
    "2^32-1 rows": ([HELLO, query(rows=2**32 - 1)], INVALID, "over the limit of 1024"),
    "65 layers": ([HELLO, query(layers=(0,) * 65)], INVALID, "layers: 65 is over the limit of 64"),
    "a huge message": ([HELLO, bytes(codec.MAX_MESSAGE + 1)], grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
    "a huge first message": ([bytes(codec.MAX_MESSAGE + 1)], grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
}


@pytest.mark.parametrize("case", ENDED)
def test_a_message_against_the_format_ends_the_session(case: str, server: Server) -> None:
    messages, code, text = ENDED[case]
    with RawClient(server.address, *messages) as client:
        got, details = client.ending()
    assert got is code, details
    assert text in details
    assert "secret" not in details


REFUSED = {
    "no rows": query(rows=0, data=b""),
    "no rows but data": query(rows=0),
    "no layers": query(layers=()),
    "a layer twice": query(layers=(0, 0)),
    "a layer beyond the last": query(layers=(4,)),
    "layer 2^32-1": query(layers=(2**32 - 1,)),
    "one layer that exists and one that does not": query(layers=(0, 2**32 - 1)),
    "mixed widths": query(layers=(0, 2)),
    "the other width's data": query(layers=(2,)),
    "no data": query(data=b""),
    "a byte too few": query(data=query_data()[:-1]),
    "a byte too many": query(data=query_data() + b"x"),
    "fewer rows than data": query(rows=1, data=query_data(rows=2)),
    "more rows than data": query(rows=1024),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_query_that_does_not_fit_is_refused_and_the_session_goes_on(case: str, server: Server) -> None:
    with RawClient(server.address, HELLO, REFUSED[case], query(seq=2)) as client:
        client.welcome()
        refusal = client.receive()
        assert isinstance(refusal, codec.Refusal)
        assert (refusal.seq, refusal.budget) == (1, False)
        assert refusal.message
        answer = client.receive()
        assert isinstance(answer, codec.Answer)
        assert (answer.seq, len(answer.data)) == (2, 8)


def test_rows_over_the_adapters_own_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest layer's rows do not fit 1024 times in a message, and neither do the answers of five tall layers."""
    monkeypatch.setattr(codec, "MAX_MESSAGE", 1 << 20)
    wide, tall = served_layers([400, 16]), served([lora(f"m{i}.linear", 16, 64, 64) for i in range(5)])
    assert wide.max_rows < codec.MAX_ROWS == tall.max_rows
    with Server({"wide": wide, "tall": tall}, "127.0.0.1:0") as server:
        for name, adapter, layers, rows in (
            ("wide", wide, (1,), wide.max_rows + 1),
            ("tall", tall, (0, 1, 2, 3, 4), 1024),
        ):
            attempt = query(layers=layers, rows=rows, data=query_data(16, rows))
            with RawClient(server.address, hello(adapter=name, have_digest=adapter.digest), attempt) as client:
                client.receive()
                refusal = client.receive()
                assert isinstance(refusal, codec.Refusal)
                assert f"{rows} rows in a query" in refusal.message


def test_messages_cannot_unpack_beyond_their_limit(server: Server) -> None:
    """34 MB of zeros are 33 KB on the wire when compressed; they count as 34 MB."""
    bomb = bytes(codec.MAX_MESSAGE + (2 << 20))
    with RawClient(server.address, HELLO, bomb, compression=grpc.Compression.Gzip) as client:
        code, details = client.ending()
    assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED), details


def test_a_message_may_hold_fields_of_the_future(server: Server) -> None:
    """Unknown fields are ignored, as protocol buffers have it, so that the format can grow."""
    known = pb.ClientMessage()
    known.ParseFromString(HELLO)
    assert known.hello.adapter
    extended = pb.ClientMessage.FromString(HELLO + b"\x7a\x01\x00").SerializeToString()
    with RawClient(server.address, extended) as client:
        client.welcome()


def test_a_client_that_has_the_publication_gets_no_chunks(server: Server) -> None:
    with RawClient(server.address, HELLO) as first:
        size = first.welcome().publication_size
    with RawClient(server.address, HELLO) as again:
        welcome = again.receive()
        data = b"".join(again.receive().data for _ in range(-(-size // codec.CHUNK)))
    assert digest(data) == welcome.digest
    with RawClient(server.address, hello(have_digest=welcome.digest), GOOD) as client:
        assert client.receive() == welcome
        assert isinstance(client.receive(), codec.Answer)


def test_an_empty_session_ends_quietly(server: Server) -> None:
    with RawClient(server.address) as client:
        client.finish()
        assert client.ending()[0] is grpc.StatusCode.OK


def test_a_client_may_stop_sending_and_still_read(server: Server) -> None:
    with RawClient(server.address, HELLO, GOOD) as client:
        client.finish()
        client.welcome()
        assert isinstance(client.receive(), codec.Answer)
        assert client.ending()[0] is grpc.StatusCode.OK


def test_methods_that_do_not_exist_are_said_so(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        for method in ("/splitveil.v1.PrivateAdapter/Other", "/other.Service/Session"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(method)(b"", timeout=60)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_endings_are_logged_without_contents(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with RawClient(server.address, HELLO, codec.encode_client(query(data=b"activations" * 9))[:-1]) as client:
        client.ending()
    eventually(lambda: "session ended" in caplog.text)
    assert "activations" not in caplog.text
    assert "Traceback" not in caplog.text
