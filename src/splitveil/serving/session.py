"""The client's end of one session: hello, publication, then queries out and answers in."""

from collections.abc import Callable, Sequence

from splitveil.errors import BudgetExceededError, ProtocolError, RefusedError, UnknownAdapterError, VersionError
from splitveil.private.published import Publication, digest
from splitveil.serving.cache import PublicationCache
from splitveil.serving.stream import Stream, Ticket, Traffic
from splitveil.serving.tls import ClientCredentials
from splitveil.wire import codec


class Session:
    """One open session with a server. Safe for several threads: each waits for its own answers.

    Raises ``ConnectionFailedError`` where no Splitveil server answers, ``UnknownAdapterError``, ``VersionError``,
    ``RefusedError`` from a server that has too many sessions open, ``BudgetExceededError`` from one that would answer
    this client no row, and ``ProtocolError`` or ``PublicationError`` for a server that breaks the format.
    """

    def __init__(
        self,
        address: str,
        adapter: str,
        *,
        key: str = "",
        cache: PublicationCache | None = None,
        progress: Callable[[int, int], None] | None = None,
        allow_insecure: bool = False,
        credentials: ClientCredentials | None = None,
    ) -> None:
        self.address = address
        have = None if cache is None else cache.load(address, adapter)
        hello = codec.Hello(codec.VERSION, adapter, b"" if have is None else digest(have), key)
        self._stream = Stream(address, hello, credentials)
        try:
            self.welcome = self._welcome(adapter)
            data = have if have is not None and hello.have_digest == self.welcome.digest else self._download(progress)
            self._stream.start_answers()
            self.publication = Publication.from_bytes(data, allow_insecure=allow_insecure)
            if cache is not None and data is not have:
                cache.store(address, adapter, data)
        except BaseException:
            self.close()
            raise

    @property
    def traffic(self) -> Traffic:
        """What has gone over the wire so far."""
        return self._stream.traffic

    def upload(self, keys: bytes) -> None:
        """Sends what the engine's public half makes for a session (``PublicHalf.keys``); before the first query."""
        self._stream.upload(keys)

    def submit(self, layers: Sequence[int], rows: int, data: bytes) -> Ticket:
        """Sends one query; what it returns is for ``result``. An answer that nobody asks for is dropped."""
        return self._stream.submit(tuple(layers), rows, data)

    def result(self, ticket: Ticket) -> bytes:
        """The answer to a query, waiting for it, once.

        Raises ``RefusedError`` if the server refused it, ``BudgetExceededError`` if that is for too many rows.
        """
        message: codec.Answer | codec.Refusal = self._stream.wait(ticket)
        if isinstance(message, codec.Refusal):
            kind = BudgetExceededError if message.budget else RefusedError
            raise kind(f"the server refused a query: {message.message}")
        return message.data

    def close(self) -> None:
        """Ends the session; safe to call twice."""
        self._stream.close()

    def _welcome(self, adapter: str) -> codec.Welcome:
        try:
            message = self._stream.receive()
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
        """The publication, chunk by chunk, checked against its digest.

        All chunks but the last are full: crumbs would keep a client busy without end.
        """
        total = self.welcome.publication_size
        data = bytearray()
        while len(data) < total:
            chunk = self._stream.receive()
            size = min(codec.CHUNK, total - len(data))
            if not isinstance(chunk, codec.Chunk) or chunk.offset != len(data) or len(chunk.data) != size:
                raise ProtocolError(f"the publication is broken at byte {len(data)} of {total}")
            data += chunk.data
            if progress is not None:
                progress(len(data), total)
        whole = bytes(data)
        if digest(whole) != self.welcome.digest:
            raise ProtocolError("the publication does not have the digest that the server announced")
        return whole
