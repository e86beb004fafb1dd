"""Ports where something else answers, or nothing: one clear error, soon."""

import http.server
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from abuse.support import ADAPTER, RawClient, clear_error, grpc_server, hello, session, tiny_llama
from splitveil import connect
from splitveil.errors import ConnectionFailedError, ProtocolError
from splitveil.serving import stream
from splitveil.serving.server import Server


@contextmanager
def tcp_server(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """A socket that does ``behave`` with every connection."""
    kept: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                one, _ = listening.accept()
                kept.append(one)
                behave(one)
            except OSError:
                if listening.fileno() < 0:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    for one in kept:
        one.close()


def reset(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    one.close()


def echo(one: socket.socket) -> None:
    while data := one.recv(4096):
        one.sendall(data)


SOCKETS: dict[str, Callable[[socket.socket], None]] = {
    "closes at once": lambda one: one.close(),
    "resets": reset,
    "stays silent": lambda one: None,
    "greets in another protocol": lambda one: one.sendall(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "sends noise": lambda one: one.sendall(bytes(range(256)) * 40),
    "speaks HTTP/1.1": lambda one: one.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
    "echoes": echo,
    "begins HTTP/2 and stays silent": lambda one: one.sendall(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
}


@pytest.mark.parametrize("case", SOCKETS)
def test_a_socket_of_another_kind(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CONNECT_SECONDS", 1.0)
    with tcp_server(SOCKETS[case]) as address, clear_error(ConnectionFailedError, match=address):
        session(address)


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    began = time.monotonic()
    with clear_error(ConnectionFailedError, match="is `splitveil serve` running there, and is the port right"):
        session(address)
    assert time.monotonic() - began < stream.CONNECT_SECONDS / 2, "a closed port is known at once"


def test_a_web_server() -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        with clear_error(ConnectionFailedError, match="no Splitveil server answers"):
            session(f"127.0.0.1:{web.server_address[1]}")
        web.shutdown()


def test_another_grpc_service() -> None:
    with grpc_server() as address, clear_error(ConnectionFailedError, match="is not a Splitveil server"):
        session(address)


def test_a_grpc_service_that_takes_any_method() -> None:
    """A proxy, say, which sends back what it gets: the greeting is no welcome."""

    class Echo(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.stream_stream_rpc_method_handler(lambda requests, context: requests)

    with grpc_server(Echo()) as address, clear_error(ProtocolError, match="a digest of 6 bytes"):
        session(address)


def test_a_proxy_of_the_environment_is_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names like http_proxy are for the web: with them, queries would leave the machine."""
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    session(server.address).close()


def test_connect_reports_the_same_and_leaves_the_model_alone() -> None:
    model = tiny_llama()
    with tcp_server(SOCKETS["closes at once"]) as address, clear_error(ConnectionFailedError, match=address):
        connect(model, address, ADAPTER)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_clients_of_another_kind_at_our_server(server: Server) -> None:
    """Web browsers, TLS and noise at the server's port: they get nothing, and the server serves on."""
    host, _, port = server.address.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(range(256)) * 40, preface + b"\xff" * 99):
        with socket.create_connection((host, int(port))) as one:
            one.settimeout(30)
            one.sendall(data)
            try:
                while one.recv(4096):
                    pass
            except ConnectionError:
                pass
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, int(port))) as one, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(one, server_hostname="localhost")
    with RawClient(server.address, hello()) as client:
        client.welcome()
