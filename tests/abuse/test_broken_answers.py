"""Servers that lie once a session is open: wrong answers, answers to nothing, silence, and an end."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from abuse.support import (
    WIDTHS,
    answer_to,
    clear_error,
    eventually,
    lying_server,
    opening,
    query_data,
    session,
    welcome_of,
)
from splitveil.errors import BudgetExceededError, ConnectionFailedError, ProtocolError, SplitveilError
from splitveil.private.engine import WRONG_LENGTH
from splitveil.private.layer import public_half
from splitveil.serving import stream
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.session import Session
from splitveil.wire import codec

Reply = Callable[[codec.Answer, ServedAdapter], list[Any]]


def replying(layers: ServedAdapter, reply: Reply) -> Callable[[Iterator[bytes]], Iterator[Any]]:
    """A server that opens honestly, then sends ``reply(honest answer)`` for every query."""

    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        yield from opening(layers)
        for raw in requests:
            yield from reply(answer_to(layers, raw), layers)

    return script


def ask(opened: Session) -> list[np.ndarray]:
    """One query for layers 0 and 1, and what is recovered from its answer."""
    site = public_half(opened.publication).site([0, 1])
    data, pending = site.query(np.ones((1, WIDTHS[0]), np.float32), site.make_masks(1))
    return site.recover(pending, opened.result(opened.submit([0, 1], 1, data)))


NOT_THE_ANSWER = "not the answer to the next query"
REPLIES: dict[str, tuple[Reply, type[SplitveilError], str]] = {
    "a later number": (lambda a, s: [codec.Answer(a.seq + 1, a.data)], ProtocolError, NOT_THE_ANSWER),
    "number 0": (lambda a, s: [codec.Answer(0, a.data)], ProtocolError, NOT_THE_ANSWER),
    "the largest number": (lambda a, s: [codec.Answer(2**64 - 1, a.data)], ProtocolError, NOT_THE_ANSWER),
    "a refusal of another query": (lambda a, s: [codec.Refusal(9, True, "no")], ProtocolError, NOT_THE_ANSWER),
    "a welcome": (lambda a, s: [welcome_of(s)], ProtocolError, NOT_THE_ANSWER),
    "a chunk": (lambda a, s: [codec.Chunk(0, b"1234")], ProtocolError, NOT_THE_ANSWER),
    "garbage": (lambda a, s: [b"\xff" * 30], ProtocolError, "not of the wire format"),
    "an empty message": (lambda a, s: [b""], ProtocolError, "without a known body"),
    "a huge message": (lambda a, s: [bytes(codec.MAX_MESSAGE + 1)], ProtocolError, "is over the limit of its size"),
    "no data": (lambda a, s: [codec.Answer(a.seq, b"")], ProtocolError, f"^{WRONG_LENGTH}$"),
    "a byte too few": (lambda a, s: [codec.Answer(a.seq, a.data[:-1])], ProtocolError, f"^{WRONG_LENGTH}$"),
    "a byte too many": (lambda a, s: [codec.Answer(a.seq, a.data + b"x")], ProtocolError, f"^{WRONG_LENGTH}$"),
    "an aborted session": (
        lambda a, s: [(grpc.StatusCode.INTERNAL, "a\x1b[31m traceback")],
        ConnectionFailedError,
        r"broke \(internal\)",
    ),
    "an unknown failure": (lambda a, s: [(grpc.StatusCode.UNKNOWN, "KeyError: 3")], ConnectionFailedError, "broke"),
}


@pytest.mark.parametrize("case", REPLIES)
def test_a_false_reply_is_a_clear_error(case: str, layers: ServedAdapter) -> None:
    reply, kind, match = REPLIES[case]
    with lying_server(replying(layers, reply)) as address:
        opened = session(address)
        for _ in range(2):  # … and stays one: what was wrong once is not trusted again
            with clear_error(kind, match):
                ask(opened)
        opened.close()


def test_any_content_of_the_right_length_is_an_answer(layers: ServedAdapter) -> None:
    """Integrity is not promised: every vector is valid, and becomes finite numbers."""
    with lying_server(replying(layers, lambda a, s: [codec.Answer(a.seq, b"\xff" * len(a.data))])) as address:
        opened = session(address)
        assert all(np.isfinite(core).all() for core in ask(opened))
        opened.close()


def test_an_answer_twice_ends_the_session(layers: ServedAdapter) -> None:
    with lying_server(replying(layers, lambda a, s: [a, a])) as address:
        opened = session(address)
        ask(opened)
        with clear_error(ProtocolError, NOT_THE_ANSWER):
            ask(opened)
        opened.close()


@pytest.mark.parametrize("extra", ["chunk", "answer", "welcome"])
def test_what_nobody_asked_for_ends_the_session(extra: str, layers: ServedAdapter) -> None:
    extras = {"chunk": codec.Chunk(0, b"1"), "answer": codec.Answer(1, bytes(16)), "welcome": welcome_of(layers)}

    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        yield from opening(layers)
        yield extras[extra]
        yield from (answer_to(layers, raw) for raw in requests)

    with lying_server(script) as address:
        opened = session(address)
        with clear_error(ProtocolError, NOT_THE_ANSWER):
            ask(opened)
            ask(opened)
        opened.close()


def test_a_flood_is_not_stored(layers: ServedAdapter) -> None:
    """A server that sends without being asked is cut off at its first message."""
    sent: list[int] = []

    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        yield from opening(layers)
        for i in range(10_000):
            sent.append(i)
            yield codec.Answer(i, bytes(1 << 20))

    with lying_server(script) as address:
        opened = session(address)
        eventually(lambda: not any(t.name == "splitveil-answers" for t in threading.enumerate()))
        time.sleep(0.3)
        assert len(sent) < 200
        with clear_error(ProtocolError, NOT_THE_ANSWER):
            ask(opened)
        opened.close()


def test_a_refusal_leaves_the_session_open(layers: ServedAdapter) -> None:
    """Its text is the other side's: bounded, and nothing in it reaches the terminal as a control."""
    hostile = "\x1b[2J\r\n\u202e\x00" + "x" * 5000

    def reply(answer: codec.Answer, _: ServedAdapter) -> list[Any]:
        return [codec.Refusal(answer.seq, True, hostile) if answer.seq % 2 else answer]

    with lying_server(replying(layers, reply)) as address:
        opened = session(address)
        for _ in range(3):
            with clear_error(BudgetExceededError, match=r"the server refused a query: \?\[2J"):
                ask(opened)
            ask(opened)
        opened.close()


def test_a_refusal_that_is_not_text_is_a_clear_error(layers: ServedAdapter) -> None:
    raw = codec.encode_server(codec.Refusal(1, True, "mark")).replace(b"mark", b"\xff\xfe\xfd\xfc")
    with lying_server(replying(layers, lambda a, s: [raw])) as address:
        opened = session(address)
        with clear_error(ProtocolError, "not of the wire format"):
            ask(opened)
        opened.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ANSWER_SECONDS", 1.5)
    monkeypatch.setattr(stream, "POLL_SECONDS", 0.2)


def test_a_server_that_never_answers_is_given_up(layers: ServedAdapter, impatient: None) -> None:
    with lying_server(replying(layers, lambda a, s: [])) as address:
        opened = session(address)
        began = time.monotonic()
        for _ in range(2):
            with clear_error(ConnectionFailedError, match="no longer answers"):
                ask(opened)
        assert time.monotonic() - began < 30
        opened.close()


def test_a_server_that_hangs_later_is_given_up_by_all_who_wait(layers: ServedAdapter, impatient: None) -> None:
    with lying_server(replying(layers, lambda a, s: [a] if a.seq <= 2 else [])) as address:
        opened = session(address)
        ask(opened)
        ask(opened)
        failures: list[str] = []

        def wait() -> None:
            with clear_error(ConnectionFailedError, match="no longer answers"):
                ask(opened)
            failures.append("as expected")

        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == ["as expected"] * 3
        opened.close()


def test_a_slow_server_is_waited_for(layers: ServedAdapter, impatient: None) -> None:
    """What counts is silence: 8 answers, each within the time, together longer than it."""

    def reply(answer: codec.Answer, _: ServedAdapter) -> list[Any]:
        time.sleep(0.25)
        return [answer]

    with lying_server(replying(layers, reply)) as address:
        opened = session(address)
        tickets = [opened.submit([0], 1, query_data()) for _ in range(8)]
        assert len(opened.result(tickets[-1])) == 8
        opened.close()


def test_a_server_that_does_not_read_is_given_up(layers: ServedAdapter, impatient: None) -> None:
    never = threading.Event()

    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        yield from opening(layers)
        never.wait(60)

    with lying_server(script) as address:
        opened = session(address)
        data = query_data(rows=1024)
        tickets = [opened.submit([0], 1024, data) for _ in range(100)]
        for ticket in tickets[:2]:
            with clear_error(ConnectionFailedError, match="no longer answers"):
                opened.result(ticket)
        opened.close()
        never.set()


def test_answers_of_abandoned_queries_are_dropped(layers: ServedAdapter) -> None:
    with lying_server(replying(layers, lambda a, s: [a])) as address:
        opened = session(address)
        for _ in range(50):
            opened.submit([0], 1, query_data())
        ask(opened)
        assert not opened._stream._due
        opened.close()
