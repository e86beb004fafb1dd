"""The vendor's server: one gRPC stream a session, several adapters and several clients at once."""

import ipaddress
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from types import TracebackType
from typing import Any

import grpc

from splitveil.errors import BudgetExceededError, ConfigurationError, KeyRejectedError, ProtocolError, RefusedError
from splitveil.serving.ending import close_at_exit, end
from splitveil.serving.gate import Admitted, Anyone, Doorkeeper, Gate, Open
from splitveil.serving.publishing import ServedAdapter
from splitveil.wire import codec

log = logging.getLogger(__name__)

HELLO_SECONDS = 20.0
DEFAULT_SESSIONS = 32

OPTIONS = [
    *codec.GRPC_OPTIONS,
    ("grpc.so_reuseport", 0),
    # A client whose machine has vanished is noticed by its missing pongs.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients do the same, through every pause of their user's; by default gRPC would end their connection for it.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class Server:
    """Serves adapters until closed; a context manager. ``address`` says where, with the port that was bound.

    Raises ``ConfigurationError`` for an address that is malformed, taken, or not a loopback address: queries reveal
    nothing, but without TLS anyone on the way could answer in the server's stead.
    """

    def __init__(
        self,
        adapters: Mapping[str, ServedAdapter],
        listen: str = "127.0.0.1:7433",
        *,
        gate: Gate | None = None,
        keys: Doorkeeper | None = None,
        sessions: int = DEFAULT_SESSIONS,
        on_query: Callable[[str, codec.Query], None] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """``gate`` may refuse rows, ``keys`` clients; without them all are answered. ``on_close`` is called once."""
        host, port = split_address(listen)
        require_loopback(host, "listen beyond loopback")
        if not adapters:
            raise ConfigurationError("a server needs at least one adapter: --adapter NAME=DIR")
        self._service = _Service(adapters, gate or Open(), keys, on_query)
        self._on_close = on_close
        self._threads = _Threads()
        threads: Any = self._threads  # gRPC asks for a ThreadPoolExecutor, and calls ``submit`` alone
        self._server = grpc.server(
            threads,
            handlers=[self._service],
            maximum_concurrent_rpcs=sessions,
            options=OPTIONS,
        )
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            raise ConfigurationError(f"cannot listen on {listen}: is the port taken?") from None
        self.address = f"{host}:{bound}"
        self._server.start()
        close_at_exit(self)

    def summary(self) -> list[str]:
        """One line an adapter: what is served, for the operator to read."""
        return [
            f"{name}: {len(adapter.publication.layers)} private layers, {len(adapter.published):,} bytes published, "
            f"noise {adapter.publication.noise:g}, parameters {adapter.publication.parameters.name}"
            for name, adapter in self._service.adapters.items()
        ]

    def wait(self) -> None:
        """Blocks until the server is closed."""
        self._server.wait_for_termination()

    def close(self) -> None:
        """Ends all sessions and stops listening; safe to call twice."""
        self._server.stop(grace=0.5).wait()
        self._threads.shutdown()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Threads(Executor):
    """A thread a session; how many there are is limited by gRPC.

    Unlike those of a ``ThreadPoolExecutor`` they end with their session, and a program that ends without closing its
    server is not kept alive by them.
    """

    def __init__(self) -> None:
        self._running: set[threading.Thread] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Runs the call in a thread of its own."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - whose it is, the future's reader decides
                future.set_exception(error)
            finally:
                self._running.discard(thread)

        thread = threading.Thread(target=run, name="splitveil-session", daemon=True)
        self._running.add(thread)
        thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Waits for the sessions, which the server has ended."""
        if wait:
            end(list(self._running))


class _Service(grpc.GenericRpcHandler):
    """The single method of the service, with bytes in and out: decoding, and its limits, are the codec's."""

    def __init__(
        self,
        adapters: Mapping[str, ServedAdapter],
        gate: Gate,
        keys: Doorkeeper | None,
        on_query: Callable[[str, codec.Query], None] | None,
    ) -> None:
        self.adapters = dict(adapters)
        self._gate = gate
        self._keys = keys
        self._on_query = on_query

    def service(self, details: Any) -> Any:
        """gRPC's hook: the handler of a method name, or None."""
        return grpc.stream_stream_rpc_method_handler(self._session) if details.method == codec.METHOD else None

    def _session(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        # A client that connects and says nothing may not occupy a session for ever.
        impatience = threading.Timer(HELLO_SECONDS, context.cancel)
        impatience.daemon = True
        impatience.start()
        try:
            first = next(requests, None)
            impatience.cancel()
            if first is not None:
                yield from self._serve(codec.decode_client(first), requests)
        except _Rejected as rejected:
            context.abort(rejected.status, str(rejected))
        except ProtocolError as error:
            log.warning("session ended: %s", error)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            impatience.cancel()

    def _serve(self, hello: codec.Hello | codec.Query, requests: Iterator[bytes]) -> Iterator[bytes]:
        client, adapter = self._admit(hello)
        name = hello.adapter if isinstance(hello, codec.Hello) else ""
        size = len(adapter.published)
        yield codec.encode_server(codec.Welcome(codec.VERSION, adapter.digest, size, adapter.max_rows))
        if isinstance(hello, codec.Hello) and hello.have_digest != adapter.digest:
            for offset in range(0, size, codec.CHUNK):
                yield codec.encode_server(codec.Chunk(offset, adapter.published[offset : offset + codec.CHUNK]))
        for seq, raw in enumerate(requests, start=1):
            query = codec.decode_client(raw)
            if not isinstance(query, codec.Query) or query.seq != seq:
                raise ProtocolError(f"query number {seq} was expected")
            if self._on_query is not None:
                self._on_query(name, query)
            yield codec.encode_server(self._reply(client, name, adapter, query))

    def _admit(self, hello: codec.Hello | codec.Query) -> tuple[Admitted, ServedAdapter]:
        """The client, and the adapter that it asks for. Raises ``ProtocolError`` or ``_Rejected``."""
        if not isinstance(hello, codec.Hello):
            raise ProtocolError("a session begins with Hello")
        if hello.version != codec.VERSION:
            raise _Rejected(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol version {hello.version} is not served here, only {codec.VERSION}",
            )
        client = self._identify(hello)
        adapter = self.adapters.get(hello.adapter)
        if adapter is None:
            raise _Rejected(grpc.StatusCode.NOT_FOUND, "no adapter of that name is served here")
        return client, adapter

    def _identify(self, hello: codec.Hello) -> Admitted:
        """Before the adapter is looked up: who has no key does not learn which there are. Raises ``_Rejected``."""
        if self._keys is None:
            if hello.key:
                raise _Rejected(grpc.StatusCode.UNAUTHENTICATED, "this server knows no API keys; connect without one")
            return Anyone()
        if not hello.key:
            raise _Rejected(grpc.StatusCode.UNAUTHENTICATED, "this server asks for an API key, which its vendor makes")
        try:
            return self._keys.admit(hello.key, hello.adapter)
        except KeyRejectedError as error:
            raise _Rejected(grpc.StatusCode.UNAUTHENTICATED, str(error)) from None
        except RefusedError as error:
            raise _Rejected(grpc.StatusCode.PERMISSION_DENIED, str(error)) from None

    def _reply(
        self, client: Admitted, name: str, adapter: ServedAdapter, query: codec.Query
    ) -> codec.Answer | codec.Refusal:
        """The answer, or a refusal that leaves the session open."""
        try:
            adapter.half.check(query.layers, query.rows, len(query.data))
            limit = min(adapter.max_rows, codec.max_rows(1, adapter.answer_size(query.layers)))
            if query.rows > limit:
                raise ProtocolError(f"{query.rows} rows in a query; at most {limit} are answered")
            client.check()
            modules = [adapter.publication.layers[index].outputs[0][0] for index in query.layers]
            self._gate.reserve_all(client.identity, name, modules, query.rows)
            return codec.Answer(query.seq, adapter.half.answer(query.layers, query.rows, query.data))
        except ProtocolError as error:
            return codec.Refusal(query.seq, budget=False, message=str(error))
        except KeyRejectedError as error:
            raise _Rejected(grpc.StatusCode.UNAUTHENTICATED, str(error)) from None
        except RefusedError as error:
            spent = isinstance(error, BudgetExceededError)
            return codec.Refusal(query.seq, budget=spent, message=str(error))


class _Rejected(Exception):  # noqa: N818 - not an error of ours: it ends a session with a status
    """Ends a session with a gRPC status of its own."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_adapter_name(name: str) -> None:
    """Raises ``ConfigurationError`` for a name that no adapter can have."""
    if not name or len(name) > codec.MAX_ADAPTER_NAME or not name.isprintable():
        raise ConfigurationError(
            f"adapter name {name[:32]!r} must be printable and 1 to {codec.MAX_ADAPTER_NAME} characters long"
        )


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port"; an IPv6 host is in brackets, and stays so. Raises ``ConfigurationError``."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or (":" in host and not bracketed) or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigurationError(f"address {address!r} is not HOST:PORT, such as 127.0.0.1:7433 or [::1]:7433")
    return host, int(port)


def require_loopback(host: str, purpose: str) -> None:
    """Raises ``ConfigurationError`` unless every address that ``host`` resolves to is of this machine alone."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), None)}
    except (OSError, ValueError):  # ValueError: a name that no resolver would take
        raise ConfigurationError(f"host {host!r} is not known; try 127.0.0.1") from None
    if not all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found):
        raise ConfigurationError(f"refusing to {purpose} ({host}) without TLS, which this version does not offer yet")
