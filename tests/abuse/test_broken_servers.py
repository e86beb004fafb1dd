"""Servers that lie in the opening of a session: the client says what is wrong, and does not wait for ever."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.numpy

from abuse.support import (
    ADAPTER,
    answer_to,
    assert_serves,
    clear_error,
    lying_server,
    opening,
    session,
    welcome_of,
)
from splitveil.errors import (
    ConnectionFailedError,
    InsecureParametersError,
    KeyRejectedError,
    ParameterError,
    ProtocolError,
    PublicationError,
    RefusedError,
    SplitveilError,
    UnknownAdapterError,
    VersionError,
)
from splitveil.private.published import digest
from splitveil.serving import stream
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.session import Session
from splitveil.wire import codec

Opening = Callable[[ServedAdapter], Any]


def chunks(adapter: ServedAdapter, *pieces: tuple[int, int]) -> Iterator[codec.Chunk]:
    """Chunks (offset as announced, first byte …) cut out of the publication: (offset, size)."""
    for offset, size in pieces:
        yield codec.Chunk(offset, adapter.published[offset : offset + size])


def announced(size: int) -> Opening:
    """An opening that announces ``size`` bytes in two chunks, whatever they hold."""
    data = bytes(size)

    def begin(adapter: ServedAdapter) -> Iterator[Any]:
        yield welcome_of(adapter, digest=digest(data), publication_size=size)
        yield codec.Chunk(0, data[: codec.CHUNK])
        yield codec.Chunk(codec.CHUNK, data[codec.CHUNK :])

    return begin


def large(*pieces: tuple[int, int]) -> Opening:
    """Two and a half chunks are announced, and these (offset, size) are sent."""
    total = 5 * codec.CHUNK // 2

    def begin(adapter: ServedAdapter) -> Iterator[Any]:
        yield welcome_of(adapter, digest=digest(bytes(total)), publication_size=total)
        for offset, size in pieces:
            yield codec.Chunk(offset, bytes(size))

    return begin


FULL, HALF = codec.CHUNK, codec.CHUNK // 2
OPENINGS: dict[str, tuple[Opening, type[SplitveilError], str]] = {
    "nothing at all": (lambda a: [], ConnectionFailedError, "ended the session"),
    "garbage": (lambda a: [b"\xff" * 30], ProtocolError, "not of the wire format"),
    "an empty message": (lambda a: [b""], ProtocolError, "without a known body"),
    "a client's message": (
        lambda a: [b"\x0a\x08\x08\x01\x12\x04name"],
        ProtocolError,
        "a digest of 4 bytes; expected 32",
    ),
    "an answer first": (lambda a: [codec.Answer(1, b"1234")], ProtocolError, "did not begin with Welcome"),
    "a refusal first": (lambda a: [codec.Refusal(1, True, "no")], ProtocolError, "did not begin with Welcome"),
    "a chunk first": (lambda a: [codec.Chunk(0, b"1234")], ProtocolError, "did not begin with Welcome"),
    "version 2": (lambda a: [welcome_of(a, version=2)], VersionError, "protocol version 2, this client 1"),
    "a short digest": (lambda a: [welcome_of(a, digest=b"short")], ProtocolError, "a digest of 5 bytes; expected 32"),
    "a huge publication": (
        lambda a: [welcome_of(a, publication_size=codec.MAX_PUBLICATION + 1)],
        ProtocolError,
        "publication size: 4294967297 is over the limit of 4294967296",
    ),
    "2^64-1 bytes": (lambda a: [welcome_of(a, publication_size=2**64 - 1)], ProtocolError, "over the limit"),
    "no rows": (lambda a: [welcome_of(a, max_rows=0)], ProtocolError, "a row limit of 0"),
    "too many rows": (lambda a: [welcome_of(a, max_rows=1025)], ProtocolError, "a row limit of 1025"),
    "welcome twice": (lambda a: [welcome_of(a), welcome_of(a)], ProtocolError, "broken at byte 0 of"),
    "an answer for a chunk": (lambda a: [welcome_of(a), codec.Answer(1, b"1")], ProtocolError, "broken at byte 0 of"),
    "no publication": (
        lambda a: [welcome_of(a, publication_size=0, digest=digest(b""))],
        PublicationError,
        "truncated or not a safetensors file",
    ),
    "no publication, other digest": (lambda a: [welcome_of(a, publication_size=0)], ProtocolError, "digest"),
    "another digest": (
        lambda a: [welcome_of(a, digest=bytes(32)), *chunks(a, (0, FULL))],
        ProtocolError,
        "does not have the digest",
    ),
    "not a publication": (announced(FULL + 7), PublicationError, "missing or malformed"),
    "an end in the middle": (large((0, FULL)), ConnectionFailedError, "ended the session"),
    "chunks in another order": (large((FULL, FULL), (0, FULL)), ProtocolError, "broken at byte 0 of"),
    "a chunk twice": (large((0, FULL), (0, FULL)), ProtocolError, f"broken at byte {FULL} of"),
    "a hole": (large((0, FULL), (2 * FULL, HALF)), ProtocolError, f"broken at byte {FULL} of"),
    "crumbs": (large((0, 10), (10, 10)), ProtocolError, "broken at byte 0 of"),
    "an empty chunk": (large((0, 0)), ProtocolError, "a publication chunk of 0 bytes"),
    "a chunk too long": (large((0, FULL + 1)), ProtocolError, "1 to 1048576 are allowed"),
    "more than announced": (large((0, FULL), (FULL, FULL), (2 * FULL, FULL)), ProtocolError, "broken at byte"),
    "a huge message": (lambda a: [bytes(codec.MAX_MESSAGE + 1)], ProtocolError, "is over the limit of its size"),
    "a huge second message": (
        lambda a: [welcome_of(a), bytes(codec.MAX_MESSAGE + 1)],
        ProtocolError,
        "is over the limit of its size",
    ),
}


@pytest.mark.parametrize("case", OPENINGS)
def test_a_false_opening_is_a_clear_error(case: str, layers: ServedAdapter) -> None:
    begin, kind, match = OPENINGS[case]

    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        yield from begin(layers)

    with lying_server(script) as address, clear_error(kind, match):
        session(address)


STATUS: dict[grpc.StatusCode, tuple[type[SplitveilError], str]] = {
    grpc.StatusCode.NOT_FOUND: (UnknownAdapterError, r"serves no adapter named|: \?\[31mred"),
    grpc.StatusCode.FAILED_PRECONDITION: (VersionError, r": \?\[31mred"),
    grpc.StatusCode.INVALID_ARGUMENT: (ProtocolError, r"rejected a message: \?\[31mred"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (RefusedError, "too many sessions open"),
    grpc.StatusCode.UNAUTHENTICATED: (KeyRejectedError, r"refuses: \?\[31mred"),
    grpc.StatusCode.PERMISSION_DENIED: (RefusedError, r"refuses: \?\[31mred"),
    grpc.StatusCode.ABORTED: (ConnectionFailedError, r"ended the session: \?\[31mred"),
}


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
@pytest.mark.parametrize("welcomed", [False, True])
def test_every_status_is_an_error_of_ours(code: grpc.StatusCode, welcomed: bool, layers: ServedAdapter) -> None:
    """Its text may hold anything: it is cut, and control characters do not reach the terminal."""

    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        if welcomed:
            yield welcome_of(layers)
        yield code, "\x1b[31mred\r\n\u202e" + 300 * "long "

    other = r"broke \(" if welcomed else "no Splitveil server answers|is not a Splitveil server"
    if welcomed and code is grpc.StatusCode.CANCELLED:
        other = "ended the session: nothing was asked for too long"
    with lying_server(script) as address, clear_error(*STATUS.get(code, (ConnectionFailedError, other))):
        session(address)


@pytest.mark.parametrize("size", [10_000, 100_000])
def test_a_status_too_long_for_grpc(size: int) -> None:
    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        yield grpc.StatusCode.NOT_FOUND, "x" * size

    with lying_server(script) as address, pytest.raises(SplitveilError) as caught:
        session(address)
    # gRPC draws lots whether it takes a text between 8 and 16 KB.
    assert type(caught.value) is ProtocolError or (size < 16_000 and type(caught.value) is UnknownAdapterError)


@pytest.mark.parametrize("after", ["hello", "welcome", "half of the publication"])
def test_a_server_that_falls_silent_is_given_up(
    after: str, layers: ServedAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CONNECT_SECONDS", 1.5)

    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        if after != "hello":
            yield welcome_of(layers, publication_size=2 * FULL)
        if after == "half of the publication":
            yield codec.Chunk(0, bytes(FULL))
        yield from (codec.Answer(0, raw) for raw in requests)

    with lying_server(script) as address:
        wanted = "no Splitveil server answers" if after == "hello" else "broke"
        with clear_error(ConnectionFailedError, match=wanted):
            session(address)


# -- publications that lie ---------------------------------------------------------------------------------------------

Header = dict[str, Any]
Tensors = dict[str, Any]


def tampered(published: bytes, change: Callable[[Header, Tensors], None]) -> bytes:
    """The publication with its header or tensors changed."""
    tensors = safetensors.numpy.load(published)
    size = int.from_bytes(published[:8], "little")
    header = json.loads(json.loads(published[8 : 8 + size])["__metadata__"]["splitveil"])
    change(header, tensors)
    data: bytes = safetensors.numpy.save(tensors, {"splitveil": json.dumps(header)})
    return data


def layer(**changes: Any) -> Callable[[Header, Tensors], None]:
    """Changes the first layer's entry."""
    return lambda header, tensors: header["layers"][0].update(changes)


def top(**changes: Any) -> Callable[[Header, Tensors], None]:
    """Changes the header."""
    return lambda header, tensors: header.update(changes)


def tensor(name: str, make: Callable[[Any], Any]) -> Callable[[Header, Tensors], None]:
    """Changes one tensor."""

    def change(header: Header, tensors: Tensors) -> None:
        tensors[name] = make(tensors[name])

    return change


def with_nan(q: Any) -> Any:
    q = q.copy()
    q[1, 1] = np.nan
    return q


PUBLICATIONS: dict[str, tuple[Callable[[Header, Tensors], None], type[SplitveilError], str]] = {
    "norm bound 0": (layer(norm_bound=0), PublicationError, "norm_bound"),
    "norm bound over 2^20": (layer(norm_bound=2**20 + 1), PublicationError, "norm_bound"),
    "norm bound NaN": (layer(norm_bound=float("nan")), PublicationError, "norm_bound"),
    "norm bound true": (layer(norm_bound=True), PublicationError, "norm_bound"),
    "step NaN": (layer(step=float("nan")), PublicationError, "step"),
    "step infinite": (layer(step=float("inf")), PublicationError, "step"),
    "step 0": (layer(step=0.0), PublicationError, "step"),
    "step negative": (layer(step=-1.0), PublicationError, "step"),
    "step a text": (layer(step="1.0"), PublicationError, "step"),
    "noise NaN": (top(noise=float("nan")), PublicationError, "noise"),
    "noise negative": (top(noise=-0.1), PublicationError, "noise"),
    "noise huge": (top(noise=1e9), PublicationError, "noise"),
    "an unknown parameter set": (top(parameters="lattice-99"), ParameterError, "unknown parameter set"),
    "parameters a list": (top(parameters=["lattice-2048-1024"]), ParameterError, "unknown parameter set"),
    "an unknown engine": (top(engine="open"), PublicationError, "unknown engine"),
    "the engine a list": (top(engine=["lattice"]), PublicationError, "unknown engine"),
    "another format": (top(format="splitveil-publication-2"), PublicationError, "publication format"),
    "a short id": (top(id="00"), PublicationError, "'id'"),
    "a seed that is not hexadecimal": (top(seed="zz" * 32), PublicationError, "'seed'"),
    "no layers": (top(layers=[]), PublicationError, "layers"),
    "layers a number": (top(layers=3), PublicationError, "layers"),
    "a layer a number": (top(layers=[3]), PublicationError, "layer"),
    "too many layers": (top(layers=[{}] * 16385), PublicationError, "16384"),
    "rank 0": (layer(rank=0), PublicationError, "rank"),
    "another rank": (layer(rank=3), PublicationError, "tensor"),
    "width huge": (layer(width=2**40), PublicationError, "width"),
    "no outputs": (layer(outputs=[]), PublicationError, "outputs"),
    "a name with control characters": (layer(outputs=[["m\x1b[2J", 16]]), PublicationError, "printable"),
    "a long name": (layer(outputs=[["m" * 513, 16]]), PublicationError, "512"),
    "a name with half a surrogate pair": (layer(outputs=[["\ud800", 16]]), PublicationError, "printable"),
    "outputs of size 0": (layer(outputs=[["m", 0], ["n", 16]]), PublicationError, "size"),
    "more outputs than Q": (layer(outputs=[["m", 17]]), PublicationError, "Q.0"),
    "a module twice": (layer(outputs=[["m1.linear", 16]]), PublicationError, "twice"),
    "Q with NaN": (tensor("Q.0", with_nan), PublicationError, "NaN"),
    "Q infinite": (tensor("Q.0", lambda q: np.full_like(q, np.inf)), PublicationError, "NaN or infinite"),
    "Q in float64": (tensor("Q.0", lambda q: q.astype(np.float64)), PublicationError, "Q.0"),
    "Q missing": (lambda header, tensors: tensors.pop("Q.0"), PublicationError, "lacks Q"),
    "a hint missing": (lambda header, tensors: tensors.pop("hint.1"), PublicationError, "hint.1"),
    "a hint too short": (tensor("hint.0", lambda h: h[:, :32]), PublicationError, "hint.0"),
    "a hint of floats": (tensor("hint.0", lambda h: h.astype(np.float32)), PublicationError, "hint.0"),
}


@pytest.mark.parametrize("case", PUBLICATIONS)
def test_a_false_publication_is_a_clear_error(case: str, layers: ServedAdapter) -> None:
    change, kind, match = PUBLICATIONS[case]
    data = tampered(layers.published, change)

    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        yield from opening(layers, data)

    with lying_server(script) as address, clear_error(kind, match):
        session(address)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_a_truncated_publication_is_a_clear_error(cut: int, layers: ServedAdapter) -> None:
    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        yield from opening(layers, layers.published[:cut])

    with lying_server(script) as address, clear_error(PublicationError, "truncated|not a readable"):
        session(address)


def test_what_is_for_tests_is_not_accepted_in_earnest(layers: ServedAdapter) -> None:
    """Without the argument that only code can give, a client takes neither weak parameters nor the plain engine."""
    plain = tampered(layers.published, top(engine="plain"))
    for data, kind in ((layers.published, InsecureParametersError), (plain, PublicationError)):

        def script(requests: Iterator[bytes], data: bytes = data) -> Iterator[Any]:
            next(requests)
            yield from opening(layers, data)

        with lying_server(script) as address, clear_error(kind, match="tests only"):
            Session(address, ADAPTER)


def test_a_lie_to_one_client_is_not_kept_for_the_next(layers: ServedAdapter) -> None:
    """A server whose first publication was bad is believed when it comes with a good one."""
    bad = iter([tampered(layers.published, layer(norm_bound=0))])

    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        yield from opening(layers, next(bad, layers.published))
        yield from (answer_to(layers, raw) for raw in requests)

    with lying_server(script) as address:
        with clear_error(PublicationError, "norm_bound"):
            session(address)
        assert_serves(address)
