"""Strangers who occupy a server without saying anything, and what may not hold up its end."""

import contextlib
import logging
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from abuse.support import (
    ADAPTER,
    RawClient,
    assert_serves,
    clear_error,
    eventually,
    hello,
    lora,
    query_data,
    session,
)
from splitveil.adapters import Adapter
from splitveil.errors import RefusedError
from splitveil.private.layer import public_half
from splitveil.serving import conversation, ending, uploads
from splitveil.serving.operations import exposition, health
from splitveil.serving.operations.threshold import Threshold
from splitveil.serving.publishing import ServedAdapter, publish_adapter
from splitveil.serving.server import Server
from splitveil.wire import codec

MANY = 150
"""More calls than a server of one session has places for."""
SOON = 10.0
"""Seconds; everything that is awaited here would otherwise take a minute, or for ever."""


def figure(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=SOON) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(name + " ")))


@contextlib.contextmanager
def silence(address: str, method: str, count: int) -> Iterator[list[Any]]:
    """So many calls that never send a message."""
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait()
        yield from ()

    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        calls = [channel.stream_stream(method)(nothing()) for _ in range(count)]
        time.sleep(0.3)  # they have arrived
        try:
            yield calls
        finally:
            over.set()


def check(address: str, *requests: bytes, end: bool = True) -> tuple[grpc.StatusCode, bytes]:
    """A health check in raw bytes, as a stream of requests, whose end may be left out."""
    over = threading.Event()

    def outgoing() -> Iterator[bytes]:
        yield from requests
        if not end:
            over.wait()

    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.stream_stream(health.METHOD)(outgoing(), timeout=SOON)
        received = b""
        with contextlib.suppress(grpc.RpcError):
            for message in call:
                received += message
        over.set()
        return call.code(), received


def unary(address: str) -> bytes:
    """A health check as everyone makes it."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        answer: bytes = channel.unary_unary(health.METHOD)(b"", timeout=SOON)
        return answer


SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()


@pytest.mark.parametrize("method", [health.METHOD, codec.METHOD])
def test_silent_calls_lock_nobody_out(method: str, layers: ServedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while they last: they would for a minute here."""
    monkeypatch.setattr(conversation, "HELLO_SECONDS", 60.0)
    monkeypatch.setattr(health, "CHECK_SECONDS", 60.0)
    with (
        Server({ADAPTER: layers}, "127.0.0.1:0", sessions=1, metrics="127.0.0.1:0") as server,
        silence(server.address, method, MANY),
    ):
        assert unary(server.address) == SERVING
        assert figure(server, "splitveil_sessions_open") == 0
        assert_serves(server.address)


def test_a_check_without_a_request_ends(layers: ServedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CHECK_SECONDS", 0.5)
    with Server({ADAPTER: layers}, "127.0.0.1:0") as server, silence(server.address, health.METHOD, 5) as calls:
        for call in calls:
            eventually(lambda call=call: not call.is_active(), SOON)  # type: ignore[misc]
            assert call.code() is grpc.StatusCode.CANCELLED
        eventually(lambda: not [t for t in threading.enumerate() if t.name == "splitveil-session"], SOON)


def test_a_check_is_unary_on_the_wire(layers: ServedAdapter) -> None:
    with Server({ADAPTER: layers}, "127.0.0.1:0") as server:
        for _ in range(30):  # more than may wait: none is left behind
            assert unary(server.address) == SERVING
        assert check(server.address, b"", end=False) == (grpc.StatusCode.OK, SERVING)
        assert check(server.address)[0] is grpc.StatusCode.UNIMPLEMENTED
        assert check(server.address, b"\xff", end=False)[0] is not grpc.StatusCode.DEADLINE_EXCEEDED
        assert unary(server.address) == SERVING


def test_a_place_is_taken_by_who_was_admitted(layers: ServedAdapter) -> None:
    """The others are still told that there is none."""
    with Server({ADAPTER: layers}, "127.0.0.1:0", sessions=1) as server:
        with RawClient(server.address), RawClient(server.address, hello(adapter="none")) as wrong:
            wrong.ending()
            opened = session(server.address)
        with clear_error(RefusedError, match="too many sessions open"):
            session(server.address)
        opened.close()


def test_who_says_nothing_does_not_delay_a_drain(layers: ServedAdapter) -> None:
    server = Server({ADAPTER: layers}, "127.0.0.1:0")
    with RawClient(server.address):
        time.sleep(0.3)
        began = time.monotonic()
        server.drain(60.0)
        assert time.monotonic() - began < SOON


def test_the_longest_wait_ends_first() -> None:
    threshold, cut = Threshold(2), list[int]()

    def hang_up(number: int) -> Callable[[], None]:
        return lambda: cut.append(number)

    with threshold.waiting(60.0, hang_up(0)), threshold.waiting(60.0, hang_up(1)):
        with threshold.waiting(60.0, hang_up(2)):
            assert cut == [0]
        with threshold.waiting(60.0, hang_up(3)):
            assert cut == [0]
        threshold.close()
        assert cut == [0, 1]
        with threshold.waiting(60.0, hang_up(4)):
            assert cut == [0, 1, 4]
    with Threshold(1).waiting(0.05, hang_up(5)):
        eventually(lambda: cut[-1] == 5, SOON)


@pytest.mark.parametrize("sent", [0, 1])
def test_keys_that_do_not_come_end_the_session(
    sent: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "splitveil")
    monkeypatch.setattr(uploads, "KEYS_SECONDS", 0.5)
    sealed = publish_adapter(Adapter(Path(), None, "", (lora("m0.linear", 16, 16, 1),)), engine="sealed")
    chunks = list(codec.key_chunks(public_half(sealed.publication).keys()))[:sent]
    with Server({ADAPTER: sealed}, "127.0.0.1:0", sessions=1) as server:
        with RawClient(server.address, hello(), *chunks) as client:
            client.welcome()
            assert client.ending()[0] is grpc.StatusCode.CANCELLED
        eventually(lambda: any(getattr(r, "event", "") == "session_ended" for r in caplog.records), SOON)
        session(server.address).close()
    ended = [r for r in caplog.records if getattr(r, "event", "") == "session_ended"]
    assert ended[0].fields["reason"] == "silent"  # type: ignore[attr-defined]


# -- the end -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def computing(layers: ServedAdapter, sessions: int) -> Iterator[Server]:
    """A server whose sessions all compute an answer that does not come."""
    over = threading.Event()
    begun = threading.Semaphore(0)

    class Slow:
        def check(self, *arguments: Any) -> None:
            layers.half.check(*arguments)

        def answer(self, *arguments: Any) -> bytes:
            begun.release()
            over.wait()
            return layers.half.answer(*arguments)

    server = Server({ADAPTER: replace(layers, half=Slow())}, "127.0.0.1:0")
    opened = [session(server.address) for _ in range(sessions)]
    for one in opened:
        one.submit([0], 1, query_data())
    for _ in opened:
        assert begun.acquire(timeout=SOON)
    try:
        yield server
    finally:
        over.set()
        for one in opened:
            one.close()
        server.close()


def test_the_end_waits_once_for_all(layers: ServedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "PATIENCE", 1.0)
    with computing(layers, 6) as server:
        began = time.monotonic()
        server.drain(0.1)
        assert 1.0 < time.monotonic() - began < 5.0
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 0.8, "it waited again for those that it had given up"


def test_the_end_can_be_hurried(layers: ServedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the order comes after the drain, while threads are waited for."""
    monkeypatch.setattr(ending, "PATIENCE", 60.0)
    with computing(layers, 2) as server:
        began = time.monotonic()
        server.drain(0.1, lambda: time.monotonic() - began > 2.0)
        assert 2.0 <= time.monotonic() - began < SOON


# -- metrics -----------------------------------------------------------------------------------------------------------


def serving_metrics() -> list[threading.Thread]:
    """The one that listens, and one a request."""
    return [thread for thread in threading.enumerate() if thread.name == "splitveil-metrics"]


@contextlib.contextmanager
def dripping(server: Server, count: int) -> Iterator[list[socket.socket]]:
    """Requests for metrics that never end, a byte at a time."""
    assert server.metrics_address is not None
    host, _, port = server.metrics_address.rpartition(":")
    connections = [socket.create_connection((host, int(port)), timeout=SOON) for _ in range(count)]
    over = threading.Event()

    def drip() -> None:
        for byte in b"GET /metrics HTTP/1.0\r\nX: " + b"a" * 10_000:
            for one in connections:
                with contextlib.suppress(OSError):
                    one.sendall(bytes([byte]))
            if over.wait(0.1):
                return

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield connections
    finally:
        over.set()
        thread.join()
        for one in connections:
            one.close()


def test_bytes_that_drip_hold_up_neither_metrics_nor_the_end(
    layers: ServedAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposition, "REQUEST_SECONDS", 60.0)
    server = Server({ADAPTER: layers}, "127.0.0.1:0", metrics="127.0.0.1:0")
    with dripping(server, 3 * exposition.REQUESTS):
        time.sleep(0.3)
        assert figure(server, "splitveil_sessions_open") == 0
        eventually(lambda: 1 < len(serving_metrics()) <= exposition.REQUESTS + 1, SOON)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < SOON
    assert not serving_metrics()


def test_a_request_for_metrics_has_an_end(layers: ServedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "REQUEST_SECONDS", 0.5)
    with Server({ADAPTER: layers}, "127.0.0.1:0", metrics="127.0.0.1:0") as server, dripping(server, 1) as (one,):
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert one.recv(1) == b""
        assert time.monotonic() - began < 5.0
