"""How many sessions there are, and what it takes to lose one: silence, disappearance, and not reading."""

import socket
import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from abuse.support import (
    ADAPTER,
    WIDTHS,
    RawClient,
    Relay,
    assert_serves,
    clear_error,
    eventually,
    hello,
    lora,
    query_data,
    served,
    session,
)
from splitveil.errors import ConnectionFailedError, RefusedError, SplitveilError
from splitveil.private.layer import public_half
from splitveil.serving import conversation, host, stream
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.server import Server
from splitveil.wire import codec


@pytest.fixture
def single(layers: ServedAdapter) -> Iterator[Server]:
    """A server with room for one session."""
    with Server({ADAPTER: layers}, "127.0.0.1:0", sessions=1) as running:
        yield running


def assert_has_room(server: Server) -> None:
    """A session that has ended makes room, soon."""

    def served() -> bool:
        try:
            assert_serves(server.address)
        except (RefusedError, ConnectionFailedError):
            return False
        return True

    eventually(served)


def test_too_many_sessions_are_refused_and_room_comes_back(layers: ServedAdapter) -> None:
    with Server({ADAPTER: layers}, "127.0.0.1:0", sessions=3) as server:
        opened = [session(server.address) for _ in range(3)]
        for _ in range(3):
            with clear_error(RefusedError, match="too many sessions open; try again later"):
                session(server.address)
        # Those inside notice nothing.
        for one in opened:
            assert one.result(one.submit([0], 1, query_data()))
        opened.pop().close()
        assert_has_room(server)
        for one in opened:
            one.close()


def test_a_client_that_says_nothing_loses_its_session(single: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "HELLO_SECONDS", 1.0)
    with RawClient(single.address) as client:
        assert client.ending()[0] is grpc.StatusCode.CANCELLED
        assert_has_room(single)


def test_silent_connections_take_no_sessions(single: Server) -> None:
    host, _, port = single.address.rpartition(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(40)]
    assert_has_room(single)
    for one in sockets:
        one.close()


@pytest.mark.parametrize("moment", ["connected", "greeted", "welcomed", "asked"])
def test_a_client_that_disappears_makes_room(moment: str, single: Server) -> None:
    with RawClient(single.address) as client:
        if moment != "connected":
            client.send(hello())
        if moment in ("welcomed", "asked"):
            client.welcome()
        if moment == "asked":
            client.send(codec.Query(1, (0,), 1024, query_data(rows=1024)))
    assert_has_room(single)


def test_a_connection_that_breaks_makes_room(single: Server) -> None:
    """The same without a farewell: the bytes just stop, in the middle of a query."""
    query = codec.Query(1, (0,), 1024, query_data(rows=1024))
    with Relay(single.address, limit=2000) as relay, RawClient(relay.address, hello(), query) as client:
        assert client.ending()[0] is not grpc.StatusCode.OK
    assert_has_room(single)


def test_many_queries_may_be_under_way(server: Server) -> None:
    """Three threads with 100 queries each, answers fetched from the last to the first."""
    opened = session(server.address)
    site = public_half(opened.publication).site([0, 1])
    wrong: list[object] = []

    def work(seed: int) -> None:
        x = np.random.default_rng(seed).normal(size=(100, 1, WIDTHS[0])).astype(np.float32)
        try:
            queries = [site.query(row, site.make_masks(1)) for row in x]
            tickets = [opened.submit([0, 1], 1, data) for data, _ in queries]
            last = site.recover(queries[-1][1], opened.result(tickets[-1]))
            for (_, pending), ticket in reversed(list(zip(queries[:-1], tickets[:-1], strict=True))):
                site.recover(pending, opened.result(ticket))
            (data, pending) = site.query(x[-1], site.make_masks(1))
            again = site.recover(pending, opened.result(opened.submit([0, 1], 1, data)))
            np.testing.assert_allclose(again[0], last[0], rtol=0.02, atol=0.02)
        except (SplitveilError, AssertionError) as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened.close()
    assert not wrong


def test_a_client_that_never_reads_is_not_worked_for() -> None:
    """Flow control: the server takes no more queries while its answers are not taken, whatever the client sends."""
    rank, rows, count = 64, 512, 200
    tall = served([lora("m.linear", 16, rank, rank)])
    answer_size, data = rows * rank * 4, query_data(16, rows)
    queries = [codec.encode_client(codec.Query(i + 1, (0,), rows, data)) for i in range(count)]
    seen: list[int] = []
    with (
        Server({ADAPTER: tall}, "127.0.0.1:0", on_query=lambda _, query: seen.append(query.seq)) as server,
        RawClient(server.address, hello(have_digest=tall.digest), *queries) as client,
    ):
        made, since = -1, time.monotonic()
        while time.monotonic() - since < 1.0:
            if len(seen) != made:
                made, since = len(seen), time.monotonic()
            time.sleep(0.05)
        assert made * answer_size < 8 << 20, f"{made} answers were made for nobody"
        assert client.taken < count
        # Others are served meanwhile …
        other = session(server.address)
        assert len(other.result(other.submit([0], 1, query_data()))) == rank * 4
        other.close()
        # … and a client that reads after all gets its answers.
        client.receive()
        for i in range(made + 20):
            answer = client.receive()
            assert (answer.seq, len(answer.data)) == (i + 1, answer_size)


def test_an_idle_session_lives(layers: ServedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepalive pings are no offence: by default a gRPC server hangs up on clients that send them while idle."""
    real = dict(stream.OPTIONS)["grpc.keepalive_time_ms"]
    allowed = dict(host.OPTIONS)["grpc.http2.min_ping_interval_without_data_ms"]
    assert allowed < real
    # The same in seconds, the fastest that gRPC pings. Its default server would hang up after the fourth.
    hurried = {"grpc.keepalive_time_ms": 1000, "grpc.http2.min_ping_interval_without_data_ms": 1000 * allowed // real}
    for module in (stream, host):
        options = [(name, hurried.get(name, value)) for name, value in module.OPTIONS]
        monkeypatch.setattr(module, "OPTIONS", [*options, ("grpc.http2.max_pings_without_data", 0)])
    with Server({ADAPTER: layers}, "127.0.0.1:0") as server:
        opened = session(server.address)
        time.sleep(6.0)
        assert opened.result(opened.submit([0], 1, query_data()))
        opened.close()


def test_a_session_does_not_cross_a_fork(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC's threads stay with the parent: a child would wait for ever."""
    opened = session(server.address)
    with monkeypatch.context() as child:
        child.setattr(stream.os, "getpid", lambda: -1)
        with clear_error(ConnectionFailedError, match="connect again in the new process"):
            opened.submit([0], 1, query_data())
    assert opened.result(opened.submit([0], 1, query_data()))
    opened.close()


def test_closing_the_server_ends_all_sessions(layers: ServedAdapter) -> None:
    server = Server({ADAPTER: layers}, "127.0.0.1:0")
    opened = [session(server.address) for _ in range(3)]
    server.close()
    server.close()
    for one in opened:
        with clear_error(ConnectionFailedError):
            one.result(one.submit([0], 1, query_data()))
        one.close()
        one.close()
        with clear_error(ConnectionFailedError):
            one.submit([0], 1, query_data())
