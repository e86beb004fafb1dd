"""The vendor's end of a session: one gRPC stream each, several adapters and several clients at once."""

from collections.abc import Callable, Iterator, Mapping

import grpc

from splitveil.errors import BudgetExceededError, KeyRejectedError, ProtocolError, RefusedError
from splitveil.serving.conversation import Conversations
from splitveil.serving.gate import (
    Admitted,
    Doorkeeper,
    Gate,
    Rejected,
    dismissed,
    identify,
    other_version,
    require_rows_left,
)
from splitveil.serving.operations.visits import Visit, Visits
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.uploads import opened
from splitveil.wire import codec


class Service(Conversations):
    """The sessions of private adapters."""

    def __init__(
        self,
        adapters: Mapping[str, ServedAdapter],
        gate: Gate,
        keys: Doorkeeper | None,
        on_query: Callable[[str, codec.Query], None] | None,
        visits: Visits,
        silent: int,
    ) -> None:
        """``silent`` is how many may be connected that have not said anything yet."""
        super().__init__(codec.METHOD, visits, silent)
        self.adapters = dict(adapters)
        self.withdrawn: set[str] = set()
        """Adapters that are being replaced: nothing is answered under their names."""
        self._gate = gate
        self._keys = keys
        self._on_query = on_query

    def _serve(
        self, first: bytes, requests: Iterator[bytes], visit: Visit, hang_up: Callable[[], object]
    ) -> Iterator[bytes]:
        hello = codec.decode_client(first, codec.MAX_HELLO)
        client, adapter = self._admit(hello)
        name = hello.adapter if isinstance(hello, codec.Hello) else ""
        visit.admitted(client.identity, name)
        size = len(adapter.published)
        yield codec.encode_server(codec.Welcome(codec.VERSION, adapter.digest, size, adapter.max_rows))
        if isinstance(hello, codec.Hello) and hello.have_digest != adapter.digest:
            for offset in range(0, size, codec.CHUNK):
                yield codec.encode_server(codec.Chunk(offset, adapter.published[offset : offset + codec.CHUNK]))
            visit.sent(size)
        visit.rest()

        def late() -> None:
            visit.overdue = True
            hang_up()

        session = opened(adapter, requests, late)
        for seq, raw in enumerate(requests, start=1):
            begun = visit.asked()
            self._check_current(name, adapter)
            query = codec.decode_client(raw)
            if not isinstance(query, codec.Query) or query.seq != seq:
                raise ProtocolError(f"query number {seq} was expected")
            if self._on_query is not None:
                self._on_query(name, query)
            reply = self._reply(client, name, session, query, visit, lambda: self._check_current(name, adapter))
            data = codec.encode_server(reply)
            if isinstance(reply, codec.Answer):
                visit.answered(begun, query.rows, len(raw), len(data))
            yield data
            visit.rest()

    def _admit(self, hello: codec.ClientMessage) -> tuple[Admitted, ServedAdapter]:
        """The client, and the adapter that it asks for. Raises ``ProtocolError`` or ``Rejected``."""
        if not isinstance(hello, codec.Hello):
            raise ProtocolError("a session begins with Hello")
        if hello.version != codec.VERSION:
            raise other_version(hello.version, codec.VERSION)
        client = identify(self._keys, hello.key, hello.adapter)
        adapter = self.adapters.get(hello.adapter)
        if adapter is None:
            raise Rejected(grpc.StatusCode.NOT_FOUND, "no adapter of that name is served here", "adapter")
        self._check_current(hello.adapter, adapter)
        require_rows_left(self._gate, client, hello.adapter)
        return client, adapter

    def _check_current(self, name: str, adapter: ServedAdapter) -> None:
        """Raises ``Rejected`` for an adapter that was replaced, or is about to be."""
        if name in self.withdrawn or self.adapters[name] is not adapter:
            raise Rejected(grpc.StatusCode.ABORTED, "the adapter was replaced by its vendor", "replaced")

    def _reply(
        self,
        client: Admitted,
        name: str,
        adapter: ServedAdapter,
        query: codec.Query,
        visit: Visit,
        still_current: Callable[[], None],
    ) -> codec.Answer | codec.Refusal:
        """The answer, or a refusal that leaves the session open. ``still_current`` raises if the adapter is not."""
        try:
            adapter.half.check(query.layers, query.rows, len(query.data))
            limit = min(adapter.max_rows, codec.max_rows(1, adapter.answer_size(query.layers)))
            if query.rows > limit:
                raise ProtocolError(f"{query.rows} rows in a query; at most {limit} are answered")
            client.check()
            modules = [adapter.publication.layers[index].outputs[0][0] for index in query.layers]
            self._gate.reserve_all(client.identity, name, modules, query.rows)
            # Reserving may have waited for the database; what was reserved meanwhile is of the new declaration.
            still_current()
            return codec.Answer(query.seq, adapter.half.answer(query.layers, query.rows, query.data))
        except ProtocolError as error:
            visit.turned_down("malformed")
            return codec.Refusal(query.seq, budget=False, message=str(error))
        except KeyRejectedError as error:
            visit.turned_down("key")
            raise dismissed(error) from None
        except RefusedError as error:
            spent = isinstance(error, BudgetExceededError)
            visit.turned_down("budget" if spent else "database")
            return codec.Refusal(query.seq, budget=spent, message=str(error))
