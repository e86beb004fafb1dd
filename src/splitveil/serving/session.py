"""The client's end of one stream: hello, publication, then queries out and answers in."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from splitveil.errors import ConnectionFailedError, ProtocolError, RefusedError, UnknownAdapterError, VersionError
from splitveil.private.published import Publication, digest
from splitveil.serving.cache import PublicationCache
from splitveil.wire import codec

CONNECT_SECONDS = 20.0
# A peer that stops reacting without closing the connection is noticed by its missing pongs.
_KEEPALIVE = [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 20_000)]


@dataclass
class Traffic:
    """Bytes of queries and answers, and rows asked for, so far."""

    sent: int = 0
    received: int = 0
    queries: int = 0
    rows: int = 0


class Session:
    """One open session with a server. Safe for several threads: each waits for its own answers.

    Raises ``ConnectionFailedError`` where no Splitveil server answers, ``UnknownAdapterError``, ``VersionError``, and
    ``ProtocolError`` or ``PublicationError`` for a server that breaks the format.
    """

    def __init__(
        self,
        address: str,
        adapter: str,
        *,
        cache: PublicationCache | None = None,
        progress: Callable[[int, int], None] | None = None,
        allow_insecure: bool = False,
    ) -> None:
        self.address = address
        self.traffic = Traffic()
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reading = threading.Lock()
        self._sending = threading.Lock()
        self._seq = 0
        self._arrived: dict[int, codec.Answer | codec.Refusal] = {}
        self._abandoned: set[int] = set()
        self._failure: ConnectionFailedError | None = None
        self._channel = grpc.insecure_channel(address, options=[*codec.GRPC_OPTIONS, *_KEEPALIVE])
        try:
            grpc.channel_ready_future(self._channel).result(timeout=CONNECT_SECONDS)
            call: Any = self._channel.stream_stream(codec.METHOD)
            self._stream: Iterator[bytes] = call(iter(self._outgoing.get, None))
            have = None if cache is None else cache.load(address, adapter)
            self._send(codec.Hello(codec.VERSION, adapter, b"" if have is None else digest(have)))
            self.welcome = self._welcome(adapter)
            data = have if have is not None and digest(have) == self.welcome.digest else self._download(progress)
            self.publication = Publication.from_bytes(data, allow_insecure=allow_insecure)
            if cache is not None and data is not have:
                cache.store(address, adapter, data)
        except grpc.FutureTimeoutError:
            self.close()
            raise ConnectionFailedError(
                f"no Splitveil server answers at {address}: is `splitveil serve` running there, and is the port right?"
            ) from None
        except BaseException:
            self.close()
            raise

    def submit(self, layers: Sequence[int], rows: int, data: bytes) -> int:
        """Sends one query; returns the number under which ``result`` will find its answer."""
        if self._failure is not None:
            raise self._failure
        with self._sending:
            self._seq += 1
            seq = self._seq
            self._send(codec.Query(seq, tuple(layers), rows, data))
            self.traffic.queries += 1
            self.traffic.rows += rows
        return seq

    def result(self, seq: int) -> bytes:
        """The answer to query ``seq``, waiting for it. Raises ``RefusedError`` if the server refused it."""
        with self._reading:
            while seq not in self._arrived:
                message = self._receive()
                if not isinstance(message, codec.Answer | codec.Refusal) or not 0 < message.seq <= self._seq:
                    raise ProtocolError("the server sent something that is not the answer to a query")
                if message.seq in self._abandoned:
                    self._abandoned.discard(message.seq)
                else:
                    self._arrived[message.seq] = message
            message = self._arrived.pop(seq)
        if isinstance(message, codec.Refusal):
            raise RefusedError(f"the server refused a query: {message.message}")
        return message.data

    def abandon(self, seq: int) -> None:
        """Nobody will ask for this answer: it is dropped when it comes."""
        with self._reading:
            if self._arrived.pop(seq, None) is None:
                self._abandoned.add(seq)

    def close(self) -> None:
        """Ends the session; safe to call twice."""
        self._outgoing.put(None)
        self._channel.close()

    def _send(self, message: codec.Hello | codec.Query) -> None:
        data = codec.encode_client(message)
        self.traffic.sent += len(data)
        self._outgoing.put(data)

    def _receive(self) -> codec.Welcome | codec.Chunk | codec.Answer | codec.Refusal:
        try:
            data = next(self._stream)
        except StopIteration:
            self._failure = ConnectionFailedError(f"the server at {self.address} ended the session")
            raise self._failure from None
        except grpc.RpcError as error:
            raise self._translate(error) from None
        self.traffic.received += len(data)
        return codec.decode_server(data)

    def _translate(self, error: grpc.RpcError) -> Exception:
        """A gRPC status as an error of ours."""
        status, details = error.code(), _printable(error.details() or "")
        match status:
            case grpc.StatusCode.NOT_FOUND:
                return UnknownAdapterError(f"the server at {self.address}: {details}")
            case grpc.StatusCode.FAILED_PRECONDITION:
                return VersionError(f"the server at {self.address}: {details}")
            case grpc.StatusCode.INVALID_ARGUMENT:
                return ProtocolError(f"the server at {self.address} rejected a message: {details}")
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return RefusedError(f"the server at {self.address} refuses: {details or 'too many sessions'}")
            case grpc.StatusCode.UNIMPLEMENTED | grpc.StatusCode.UNKNOWN:
                return ConnectionFailedError(f"what answers at {self.address} is not a Splitveil server")
        self._failure = ConnectionFailedError(
            f"the connection to {self.address} broke ({status.name.lower()}); is the server still running?"
        )
        return self._failure

    def _welcome(self, adapter: str) -> codec.Welcome:
        try:
            message = self._receive()
        except UnknownAdapterError:
            raise UnknownAdapterError(
                f"the server at {self.address} serves no adapter named {adapter!r}; ask its operator for the name"
            ) from None
        if not isinstance(message, codec.Welcome):
            raise ProtocolError("the server did not begin with Welcome")
        if message.version != codec.VERSION:
            raise VersionError(f"the server speaks protocol version {message.version}, this client {codec.VERSION}")
        return message

    def _download(self, progress: Callable[[int, int], None] | None) -> bytes:
        """The publication, chunk by chunk, checked against its digest."""
        total = self.welcome.publication_size
        data = bytearray()
        while len(data) < total:
            chunk = self._receive()
            if not isinstance(chunk, codec.Chunk) or chunk.offset != len(data) or len(data) + len(chunk.data) > total:
                raise ProtocolError(f"the publication is broken at byte {len(data)} of {total}")
            data += chunk.data
            if progress is not None:
                progress(len(data), total)
        whole = bytes(data)
        if digest(whole) != self.welcome.digest:
            raise ProtocolError("the publication does not have the digest that the server announced")
        return whole


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[: codec.MAX_TEXT])
