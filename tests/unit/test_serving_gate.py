"""The gate: asked once a query, between the checks and the computation, and obeyed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from splitveil.errors import RefusedError
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.private.core import LayerSpec
from splitveil.private.engine import ServedHalf
from splitveil.private.layer import publish
from splitveil.private.published import digest
from splitveil.serving.gate import ANONYMOUS
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.server import Server
from splitveil.serving.session import Session

WIDTHS = (16, 16, 24)
Events = list[tuple[object, ...]]


class Recording:
    """A gate that writes down what it is asked, and refuses some modules."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self.refused: set[str] = set()

    def require_rows_left(self, identity: str, adapter: str) -> None:
        """Leaves refusing to ``reserve_all``."""

    def reserve_all(self, identity: str, adapter: str, modules: Sequence[str], rows: int) -> None:
        self.events.append(("reserve", identity, adapter, *modules, rows))
        for module in self.refused.intersection(modules):
            raise RefusedError(f"no more rows of {module}")


class RecordedHalf:
    """A served half that writes down when it checks and when it computes."""

    def __init__(self, half: ServedHalf, events: Events) -> None:
        self._half = half
        self._events = events

    def check(self, layers: Sequence[int], rows: int, size: int) -> None:
        self._events.append(("check",))
        self._half.check(layers, rows, size)

    def answer(self, layers: Sequence[int], rows: int, query: bytes) -> bytes:
        self._events.append(("answer",))
        return self._half.answer(layers, rows, query)


@pytest.fixture
def gate() -> Recording:
    return Recording([])


@pytest.fixture
def session(gate: Recording) -> Iterator[Session]:
    """A session with a server of three layers m0, m1 (two modules) and m2; the gate and the half share their notes."""
    draw = np.random.default_rng(0)
    specs = [
        LayerSpec(
            draw.normal(size=(2, width)).astype(np.float32),
            draw.normal(size=(8, 2)).astype(np.float32),
            1.0,
            (("m1.k", 4), ("m1.v", 4)) if i == 1 else ((f"m{i}", 8),),
        )
        for i, width in enumerate(WIDTHS)
    ]
    half, public = publish(specs, parameters=INSECURE_TEST, allow_insecure=True)
    data = public.to_bytes()
    adapter = ServedAdapter(half, public, data, digest(data), 1024)
    recorded = replace(adapter, half=RecordedHalf(half, gate.events))
    with Server({"clinic": recorded, "other": adapter}, "127.0.0.1:0", gate=gate) as server:
        opened = Session(server.address, "clinic", allow_insecure=True)
        yield opened
        opened.close()


def ask(session: Session, layers: Sequence[int], rows: int = 1, extra: int = 0) -> bytes:
    """A query with the right length for the first layer, or ``extra`` bytes more."""
    size = 4 * rows * INSECURE_TEST.query_width(WIDTHS[layers[0]])
    return session.result(session.submit(layers, rows, bytes(size + extra)))


def test_asked_once_a_query_after_the_check_and_before_the_kernel(session: Session, gate: Recording) -> None:
    assert len(ask(session, [1, 0], 3)) == 3 * 4 * 4
    assert gate.events == [
        ("check",),
        ("reserve", ANONYMOUS, "clinic", "m1.k", "m0", 3),
        ("answer",),
    ]
    gate.events.clear()
    ask(session, [2], 1)
    assert gate.events == [("check",), ("reserve", ANONYMOUS, "clinic", "m2", 1), ("answer",)]


def test_a_refusal_reaches_the_client_and_nothing_is_computed(session: Session, gate: Recording) -> None:
    gate.refused = {"m0"}
    for _ in range(3):
        gate.events.clear()
        with pytest.raises(RefusedError, match="the server refused a query: no more rows of m0"):
            ask(session, [0])
        assert ("answer",) not in gate.events
    gate.events.clear()
    assert ask(session, [2])
    gate.refused = set()
    assert ask(session, [0])


def test_one_refused_layer_refuses_the_query(session: Session, gate: Recording) -> None:
    gate.refused = {"m1.k"}
    with pytest.raises(RefusedError, match=r"no more rows of m1\.k"):
        ask(session, [0, 1])
    assert ("answer",) not in gate.events


def test_refusals_among_queries_under_way_find_their_own(session: Session, gate: Recording) -> None:
    gate.refused = {"m0"}
    data = {i: bytes(4 * INSECURE_TEST.query_width(WIDTHS[i])) for i in range(3)}
    tickets = [(i, session.submit([i], 1, data[i])) for i in (0, 2, 0, 1, 2, 0)]
    for i, ticket in reversed(tickets):
        if i == 0:
            with pytest.raises(RefusedError):
                session.result(ticket)
        else:
            assert len(session.result(ticket)) == 8


def test_malformed_queries_never_reach_the_gate(session: Session, gate: Recording) -> None:
    for layers, rows, extra in (([0], 1, 1), ([0], 1, -4), ([0, 0], 1, 0), ([0, 2], 1, 0), ([0], 0, 0)):
        with pytest.raises(RefusedError):
            ask(session, layers, rows, extra)
    for layers in ([], [3], [2**32 - 1], [0, 99]):
        with pytest.raises(RefusedError):
            session.result(session.submit(layers, 1, bytes(4 * INSECURE_TEST.query_width(16))))
    assert {event[0] for event in gate.events} == {"check"}
    assert ask(session, [0])
