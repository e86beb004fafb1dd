"""One gRPC stream to a server: queries go out numbered, and every answer goes to whoever waits for it.

Once a session is open, only the stream's own threads touch gRPC: one numbers and sends, one receives. Ctrl-C, which
Python raises in the main thread between any two instructions, can therefore neither leave a gap in the numbers nor a
half-done read, and every wait has an end: a server that falls silent is given up.
"""

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import grpc

from splitveil.errors import (
    BudgetExceededError,
    ConnectionFailedError,
    KeyRejectedError,
    ProtocolError,
    RefusedError,
    SplitveilError,
    UnknownAdapterError,
    VersionError,
)
from splitveil.serving.diagnosis import diagnose
from splitveil.serving.ending import SHUTTING_DOWN, close_at_exit, end
from splitveil.serving.gate import BUDGET_SPENT
from splitveil.serving.tls import ClientCredentials
from splitveil.wire import codec
from splitveil.wire.parsing import GRPC_OPTIONS, printable

CONNECT_SECONDS = 20.0
"""For the server's first message, and for every piece of a publication."""
ANSWER_SECONDS = 120.0
"""Without any message from the server while an answer is due; then the server counts as dead."""
POLL_SECONDS = 1.0

OPTIONS = [
    *GRPC_OPTIONS,
    # A peer that stops reacting without closing the connection is noticed by its missing pongs.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A proxy named in the environment is for the web; an address on this machine is reached directly.
    ("grpc.enable_http_proxy", 0),
    # A session is a connection of its own: the trouble of one, and its waits before reconnecting, are not another's.
    ("grpc.use_local_subchannel_pool", 1),
]


class Wire(Protocol):
    """A module that knows one wire format, such as ``splitveil.wire.codec``."""

    METHOD: str
    SERVER: str
    """What its servers are called, behind "a Splitveil server"."""
    COMMAND: str
    """What starts them."""
    REPLIES: Any
    """The classes of replies; each has the ``seq`` of what it answers."""

    def encode_client(self, message: Any) -> bytes:
        """One message of a client."""

    def decode_server(self, data: bytes) -> Any:
        """One message of a server. Raises ``ProtocolError``."""


@dataclass
class Traffic:
    """Bytes of all messages, the publication's included, and queries and rows asked for, so far."""

    sent: int = 0
    received: int = 0
    queries: int = 0
    rows: int = 0


class Ticket:
    """Held by whoever waits for the answer to one query."""

    __slots__ = ("arrived", "message")

    def __init__(self) -> None:
        self.message: Any = None
        self.arrived = threading.Lock()
        self.arrived.acquire()


class Asked(NamedTuple):
    """What waits to be sent: a claim to the reply, the message for a number, and how many rows it counts for."""

    ticket: Ticket
    message: Callable[[int], Any]
    rows: int


class Stream:
    """A stream that begins with ``hello``. First ``receive`` the welcome and the publication, then ``start_answers``.

    ``wire`` is the format that is spoken, ``patience`` takes the place of ``ANSWER_SECONDS``.

    Whatever goes wrong is one of Splitveil's errors, and stays: a broken stream raises the same at every later call.
    """

    def __init__(
        self,
        address: str,
        hello: Any,
        credentials: ClientCredentials | None = None,
        *,
        wire: Wire = codec,
        patience: float | None = None,
    ) -> None:
        self.traffic = Traffic()
        self._address = address
        self._process = os.getpid()
        self._wire = wire
        self._patience = patience
        # Requests, messages that get no reply, and None at the end.
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._due: deque[Ticket] = deque()
        self._welcomed = False
        self._late = False
        self._heard = 0.0
        self._failure: SplitveilError | None = None
        self._threads: list[threading.Thread] = []
        self._credentials = credentials
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials.grpc(), options=OPTIONS)
        method: Any = self._channel.stream_stream(wire.METHOD)
        self._call: Any = method(self._requests(hello))
        # gRPC calls back in the thread that serves this channel, which ends a moment after.
        self._call.add_callback(self._here)
        close_at_exit(self)

    def receive(self) -> Any:
        """The next message, within ``CONNECT_SECONDS``; before ``start_answers`` only."""
        timer = threading.Timer(CONNECT_SECONDS, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            message = self._receive()
        finally:
            timer.cancel()
        self._welcomed = True
        return message

    def start_answers(self) -> None:
        """From now on the server may only answer."""
        reader = threading.Thread(target=self._read, name="splitveil-answers", daemon=True)
        self._threads.append(reader)
        reader.start()

    def submit(self, layers: tuple[int, ...], rows: int, data: bytes) -> Ticket:
        """Sends one query."""
        return self.ask(lambda seq: codec.Query(seq, layers, rows, data), rows)

    def ask(self, message: Callable[[int], Any], rows: int = 0) -> Ticket:
        """Sends what ``message`` makes of the next number."""
        if self._process != os.getpid():
            raise ConnectionFailedError("a connection does not survive a fork; connect again in the new process")
        self._raise_failure()
        ticket = Ticket()
        self._outgoing.put(Asked(ticket, message, rows))
        return ticket

    def upload(self, keys: bytes) -> None:
        """Sends the session's keys; before the first query."""
        for chunk in codec.key_chunks(keys):
            self._outgoing.put(chunk)

    def wait(self, ticket: Ticket) -> Any:
        """The answer to a query, once."""
        waited = 0.0
        patience = ANSWER_SECONDS if self._patience is None else self._patience
        while not ticket.arrived.acquire(timeout=POLL_SECONDS):
            # Normally a failure wakes all that wait; this look is for a query handed in while it happened.
            self._raise_failure()
            waited += POLL_SECONDS
            if min(waited, time.monotonic() - self._heard) >= patience:
                self._fail(ConnectionFailedError(f"the server at {self._address} no longer answers"))
        if ticket.message is None:
            self._raise_failure()
            raise ConnectionFailedError(f"the session with {self._address} is over")
        return ticket.message

    def close(self) -> None:
        """Ends the stream and its threads, gRPC's included; safe to call twice."""
        self._fail(ConnectionFailedError(f"the session with {self._address} is closed; connect again"))
        self._channel.close()
        end(self._threads)

    # -- the stream's own threads ------------------------------------------------------------------------------------

    def _here(self) -> None:
        self._threads.append(threading.current_thread())

    def _requests(self, hello: Any) -> Iterator[bytes]:
        """What gRPC sends, in a thread of its own."""
        self._here()
        yield self._counted(self._wire.encode_client(hello))
        while (item := self._outgoing.get()) is not None:
            if not isinstance(item, Asked):
                yield self._counted(self._wire.encode_client(item))
                continue
            self._due.append(item.ticket)
            self.traffic.queries += 1
            self.traffic.rows += item.rows
            yield self._counted(self._wire.encode_client(item.message(self.traffic.queries)))

    def _counted(self, data: bytes) -> bytes:
        self.traffic.sent += len(data)
        return data

    def _read(self) -> None:
        seq = 0
        try:
            while True:
                message = self._receive()
                seq += 1
                if not isinstance(message, self._wire.REPLIES) or message.seq != seq or not self._due:
                    raise ProtocolError("the server sent something that is not the answer to the next query")
                ticket = self._due.popleft()
                ticket.message = message
                ticket.arrived.release()
        except SplitveilError as error:
            self._fail(error)

    def _receive(self) -> Any:
        try:
            data = next(self._call)
        except StopIteration:
            raise ConnectionFailedError(f"the server at {self._address} ended the session") from None
        except grpc.RpcError as error:
            raise self._translate(error) from None
        self._heard = time.monotonic()
        self.traffic.received += len(data)
        return self._wire.decode_server(data)

    # -- failures ----------------------------------------------------------------------------------------------------

    def _give_up(self) -> None:
        self._late = True
        self._call.cancel()

    def _fail(self, error: SplitveilError) -> None:
        """The end: the first error is kept, everybody who waits is woken, gRPC's sending thread ends."""
        if self._failure is None:
            self._failure = error
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._outgoing.get_nowait()
                if isinstance(item, Asked):
                    item.ticket.arrived.release()
        self._outgoing.put(None)
        with contextlib.suppress(IndexError):
            while True:
                self._due.popleft().arrived.release()
        self._call.cancel()

    def _raise_failure(self) -> None:
        # A new exception each time: several threads may raise it, each with a traceback of its own.
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)

    def _translate(self, error: Any) -> SplitveilError:
        """A gRPC status as an error of ours."""
        server = f"the server at {self._address}"
        status, details = error.code(), printable(error.details() or "")
        if self._late:
            status = grpc.StatusCode.UNAVAILABLE
        match status:
            case grpc.StatusCode.NOT_FOUND:
                return UnknownAdapterError(f"{server}: {details}")
            case grpc.StatusCode.FAILED_PRECONDITION:
                return VersionError(f"{server}: {details}")
            case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
                kind = KeyRejectedError if status is grpc.StatusCode.UNAUTHENTICATED else RefusedError
                return kind(f"{server} refuses: {details}")
            case grpc.StatusCode.INVALID_ARGUMENT:
                return ProtocolError(f"{server} rejected a message: {details}")
            case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details or "metadata size" in details:
                return ProtocolError(f"a message to or from {self._address} is over the limit of its size")
            case grpc.StatusCode.RESOURCE_EXHAUSTED if details == BUDGET_SPENT:
                return BudgetExceededError(f"{server} refuses: {details}")
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return RefusedError(f"{server} has too many sessions open; try again later")
            case grpc.StatusCode.UNAVAILABLE if details == SHUTTING_DOWN:
                return ConnectionFailedError(f"{server} is shutting down; connect again later")
            case grpc.StatusCode.ABORTED:
                return ConnectionFailedError(f"{server} ended the session: {details}; connect again")
            case grpc.StatusCode.CANCELLED if self._welcomed:
                return ConnectionFailedError(
                    f"{server} ended the session: nothing was asked for too long, or it was begun anew from elsewhere"
                )
        if self._welcomed:
            return ConnectionFailedError(
                f"the connection to {self._address} broke ({status.name.lower()}); is the server still running?"
            )
        if status is grpc.StatusCode.UNAVAILABLE:
            return diagnose(self._address, self._credentials) or ConnectionFailedError(
                f"no Splitveil server{self._wire.SERVER} answers at {self._address}: is `{self._wire.COMMAND}` running "
                "there, and is the port right?"
            )
        return ConnectionFailedError(f"what answers at {self._address} is not a Splitveil server{self._wire.SERVER}")
