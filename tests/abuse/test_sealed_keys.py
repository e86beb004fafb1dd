"""Keys that are malformed, oversized, out of order or missing: the session ends clearly, nothing computed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from abuse.support import RawClient, clear_error, hello, lora
from splitveil.adapters import Adapter
from splitveil.errors import ProtocolError
from splitveil.private.ckks_served import SealedServed, SealedSession
from splitveil.private.layer import public_half
from splitveil.serving.publishing import ServedAdapter, publish_adapter
from splitveil.serving.server import Server
from splitveil.serving.session import Session
from splitveil.wire import adapter_pb2 as pb
from splitveil.wire import codec

ADAPTER = "clinic"


class Watched:
    """A sealed half that counts the sessions opened and the rows computed."""

    def __init__(self, half: SealedServed) -> None:
        self._half = half
        self.key_size = half.key_size
        self.opened_sessions = self.rows = 0

    def opened(self, keys: bytes) -> SealedSession:
        session = self._half.opened(keys)
        answer = session.answer

        def counted(layers: object, rows: int, query: bytes) -> bytes:
            self.rows += rows
            return answer(layers, rows, query)

        session.answer = counted
        self.opened_sessions += 1
        return session


@pytest.fixture(scope="module")
def sealed() -> ServedAdapter:
    return publish_adapter(Adapter(Path(), None, "", (lora("m0.linear", 16, 16, 1),)), engine="sealed")


@pytest.fixture(scope="module")
def keys(sealed: ServedAdapter) -> bytes:
    return public_half(sealed.publication).keys()


@pytest.fixture
def watched(sealed: ServedAdapter) -> Watched:
    return Watched(sealed.half)


@pytest.fixture
def address(sealed: ServedAdapter, watched: Watched) -> Iterator[str]:
    with Server({ADAPTER: replace(sealed, keyed=watched)}, "127.0.0.1:0") as server:
        yield server.address
        before = watched.rows
        exchange(server.address)  # whatever was done to it, the server still answers honest clients
        assert watched.rows == before + 2


def exchange(address: str) -> None:
    session = Session(address, ADAPTER)
    try:
        half = public_half(session.publication)
        session.upload(half.keys())
        site = half.site([0])
        x = np.ones((2, 16), np.float32)
        data, pending = site.query(x, site.make_masks(2))
        (out,) = site.recover(pending, session.result(session.submit([0], 2, data)))
        np.testing.assert_allclose(out[0], out[1], atol=1e-3)
    finally:
        session.close()


def test_keys_that_break_the_order_or_the_format(address: str, watched: Watched, keys: bytes) -> None:
    first, _, *rest = codec.key_chunks(keys)
    query = codec.Query(1, (0,), 1, b"")
    scripts = {
        "a query instead of keys": [query],
        "a query between keys": [first, query],
        "a second greeting": [first, hello()],
        "a chunk twice": [first, first],
        "a chunk left out": [first, *rest[:1]],
        "crumbs": [codec.KeyChunk(0, keys[:100])],
        "a chunk out of place": [codec.KeyChunk(1, first.data)],
        "an empty chunk": [encoded(0, b"")],
        "a chunk too large": [encoded(0, bytes(codec.CHUNK + 1))],
        "a chunk beyond all keys": [encoded(codec.MAX_KEYS, b"x")],
        "a huge offset": [encoded(2**64 - 1, b"x")],
    }
    for what, script in scripts.items():
        with RawClient(address, hello(), *script) as client:
            client.welcome()
            status, text = client.ending()
            assert status is grpc.StatusCode.INVALID_ARGUMENT, (what, text)
    assert (watched.opened_sessions, watched.rows) == (0, 0)


def test_keys_whose_content_is_wrong(address: str, watched: Watched, keys: bytes) -> None:
    half = len(keys) // 2
    for wrong in (bytes(len(keys)), keys[::-1], keys[:half] + b"\xff" * 64 + keys[half + 64 :]):
        with RawClient(address, hello(), *codec.key_chunks(wrong)) as client:
            client.welcome()
            status, text = client.ending()
            assert status is grpc.StatusCode.INVALID_ARGUMENT
            assert "key" in text
    assert (watched.opened_sessions, watched.rows) == (0, 0)


def test_more_keys_after_the_keys(address: str, watched: Watched, keys: bytes) -> None:
    with RawClient(address, hello(), *codec.key_chunks(keys), codec.KeyChunk(len(keys), b"more")) as client:
        client.welcome()
        assert client.ending()[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert (watched.opened_sessions, watched.rows) == (1, 0)


def test_a_client_that_leaves_before_or_amid_its_keys(address: str, watched: Watched, keys: bytes) -> None:
    with RawClient(address, hello()) as client:
        client.welcome()
        client.finish()
        assert client.ending()[0] is grpc.StatusCode.OK
    with RawClient(address, hello(), next(codec.key_chunks(keys))) as client:
        client.welcome()
        client.finish()
        assert client.ending()[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert watched.opened_sessions == 0


def test_the_session_of_a_client_with_bad_keys_ends_in_our_own_error(address: str, keys: bytes) -> None:
    session = Session(address, ADAPTER)
    session.upload(bytes(len(keys)))
    with clear_error(ProtocolError, "key"):
        session.result(session.submit([0], 1, b""))
    session.close()


def test_a_query_that_is_malformed_is_refused_in_band(address: str, watched: Watched, keys: bytes) -> None:
    with RawClient(address, hello(), *codec.key_chunks(keys), codec.Query(1, (0,), 1, b"short")) as client:
        client.welcome()
        assert isinstance(client.receive(), codec.Refusal)
    assert watched.rows == 0


def test_the_lattice_engine_takes_no_keys(sealed: ServedAdapter) -> None:
    from abuse.support import served_layers

    with (
        Server({ADAPTER: served_layers()}, "127.0.0.1:0") as server,
        RawClient(server.address, hello(), codec.KeyChunk(0, b"x")) as client,
    ):
        client.welcome()
        assert client.ending()[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_rows_in_a_message_are_few(sealed: ServedAdapter) -> None:
    assert sealed.max_rows == 16
    assert sealed.keyed is not None
    assert sealed.keyed.key_size < codec.MAX_KEYS


def encoded(offset: int, data: bytes) -> bytes:
    return pb.ClientMessage(keys=pb.KeyChunk(offset=offset, data=data)).SerializeToString()
