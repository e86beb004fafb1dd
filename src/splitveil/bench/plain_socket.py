"""The same messages over a plain TCP socket: what another transport than gRPC would cost at least.

Not a transport: nothing is computed at the other end, which only sends as many bytes back as an answer has, and a model
that decodes this way is given the answers to earlier queries, so its tokens mean nothing. What it takes does not
depend on that.
"""

import contextlib
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

HEADER = struct.Struct(">II")
"""Bytes that follow, and bytes to send back."""
Question: TypeAlias = tuple[tuple[int, ...], int]
"""Layers and rows: what decides how large a query and its answer are."""


class Asks(Protocol):
    """What is asked of a session while a model decodes."""

    def submit(self, layers: Sequence[int], rows: int, data: bytes) -> Any:
        """Sends a query."""

    def result(self, ticket: Any) -> bytes:
        """Waits for its answer."""


class PlainSocket:
    """``submit`` and ``result`` of a session, over a socket to a process that echoes."""

    def __init__(self, port: int, session: Asks) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._session = session
        self._kept: dict[Question, bytes] = {}

    def submit(self, layers: Sequence[int], rows: int, data: bytes) -> Question:
        question = tuple(layers), rows
        if question not in self._kept:
            self._kept[question] = self._session.result(self._session.submit(layers, rows, data))
        self._socket.sendall(HEADER.pack(len(data), len(self._kept[question])) + data)
        return question

    def result(self, ticket: Question) -> bytes:
        _receive(self._socket, len(self._kept[ticket]))
        return self._kept[ticket]

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def plain_socket(session: Asks) -> Iterator[PlainSocket]:
    """A stand-in for ``session``: of each kind of query the first still goes to the server, for its answer."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or not (port := process.stdout.readline()):
            raise RuntimeError("the process that echoes ended early")
        with contextlib.closing(PlainSocket(int(port), session)) as asked:
            yield asked
    finally:
        process.terminate()
        process.wait()


def _receive(connection: socket.socket, size: int) -> bytes:
    """Exactly that many bytes; none at the connection's end."""
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            return b""
        data += piece
    return bytes(data)


def _echo() -> None:
    """The other end, for one connection; says its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        sys.stdout.write(f"{listening.getsockname()[1]}\n")
        sys.stdout.flush()
        connection, _ = listening.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while header := _receive(connection, HEADER.size):
            size, back = HEADER.unpack(header)
            connection.sendall(_receive(connection, size)[:back])


if __name__ == "__main__":
    _echo()
