"""Clients and servers that break the rules, and the honest things that they break them with."""

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from splitveil.adapters import Adapter, LoraModule
from splitveil.errors import SplitveilError
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.private.layer import public_half
from splitveil.private.published import digest
from splitveil.serving.publishing import ServedAdapter, publish_adapter
from splitveil.serving.session import Session
from splitveil.wire import codec

ADAPTER = "clinic"
WIDTHS = (16, 16, 24, 24)
RANK = 2
PATIENCE = 60.0
"""Seconds after which something that should have happened has not. Generous: the machine may be busy."""

Script = Callable[[Iterator[bytes]], Iterator[Any]]


# -- honest things -----------------------------------------------------------------------------------------------------


def lora(name: str, inputs: int, outputs: int, rank: int = RANK, seed: int = 0) -> LoraModule:
    """A module's adapter with random matrices."""
    draw = np.random.default_rng([seed, *name.encode()])
    a = draw.normal(size=(rank, inputs)).astype(np.float32)
    b = draw.normal(size=(outputs, rank)).astype(np.float32)
    return LoraModule(name, a, b, 1.0)


def served(modules: Sequence[LoraModule]) -> ServedAdapter:
    """Modules ready to be served, with the small parameter set that is for tests."""
    adapter = Adapter(Path(), None, "", tuple(modules))
    return publish_adapter(adapter, parameters=INSECURE_TEST, allow_insecure=True)


def served_layers(widths: Sequence[int] = WIDTHS, rank: int = RANK) -> ServedAdapter:
    """One layer ``m{i}.linear`` a width, each with as many outputs as inputs."""
    return served([lora(f"m{i}.linear", width, width, rank) for i, width in enumerate(widths)])


def tiny_llama() -> PreTrainedModel:
    """Two blocks of 16 features."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def attention_adapter(seed: int = 0) -> ServedAdapter:
    """q and v of both blocks of ``tiny_llama``."""
    names = [f"model.layers.{block}.self_attn.{part}_proj" for block in range(2) for part in "qv"]
    return served([lora(name, 16, 16, seed=seed) for name in names])


def session(address: str) -> Session:
    """An honest session."""
    return Session(address, ADAPTER, allow_insecure=True)


def query_data(width: int = WIDTHS[0], rows: int = 1) -> bytes:
    """The bytes of a query of the right size."""
    return bytes(4 * rows * INSECURE_TEST.query_width(width))


def assert_serves(address: str) -> None:
    """A new client of ``served_layers()`` gets right answers: scale·B·A·x, for two rows of two layers."""
    opened = session(address)
    try:
        site = public_half(opened.publication).site([0, 1])
        x = np.random.default_rng(7).normal(size=(2, WIDTHS[0])).astype(np.float32)
        data, pending = site.query(x, site.make_masks(2))
        cores = site.recover(pending, opened.result(opened.submit([0, 1], 2, data)))
        for index, core in enumerate(cores):
            module, q = lora(f"m{index}.linear", WIDTHS[index], WIDTHS[index]), opened.publication.layers[index].Q
            assert q is not None
            want = module.scale * (x @ module.A.T @ module.B.T)
            assert np.linalg.norm(core @ q.T - want) < 0.002 * np.linalg.norm(want)
    finally:
        opened.close()


# -- a client that breaks the rules ------------------------------------------------------------------------------------


class RawClient:
    """A gRPC stream that sends whatever it is told: messages of the wire format, or bytes."""

    def __init__(self, address: str, *messages: Any, wire: Any = codec, **call_options: Any) -> None:
        self._wire = wire
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(address, options=unlimited)
        self._ready = threading.Semaphore(0)
        self._waiting: list[bytes | None] = []
        self.taken = 0
        """Messages that gRPC has accepted for sending."""
        self.stream = self._channel.stream_stream(wire.METHOD)(self._outgoing(), timeout=PATIENCE, **call_options)
        self.send(*messages)

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._push(None)
        self.stream.cancel()
        self._channel.close()

    def send(self, *messages: Any) -> None:
        for message in messages:
            self._push(message if isinstance(message, bytes) else self._wire.encode_client(message))

    def finish(self) -> None:
        """Nothing more will be sent."""
        self._push(None)

    def receive(self) -> Any:
        return self._wire.decode_server(next(self.stream))

    def welcome(self) -> codec.Welcome:
        """Reads the welcome and the publication."""
        welcome = self.receive()
        assert isinstance(welcome, codec.Welcome)
        received = 0
        while received < welcome.publication_size:
            received += len(self.receive().data)
        return welcome

    def ending(self) -> tuple[grpc.StatusCode, str]:
        """Reads to the end: the status and its text."""
        try:
            for _ in self.stream:
                pass
        except grpc.RpcError:
            pass
        return self.stream.code(), self.stream.details()

    def _push(self, message: bytes | None) -> None:
        self._waiting.append(message)
        self._ready.release()

    def _outgoing(self) -> Iterator[bytes]:
        while True:
            self._ready.acquire()
            message = self._waiting.pop(0)
            if message is None:
                return
            self.taken += 1
            yield message


def hello(**changes: Any) -> codec.Hello:
    """An honest greeting, except for what is changed."""
    return codec.Hello(**({"version": codec.VERSION, "adapter": ADAPTER, "have_digest": b""} | changes))


# -- a server that breaks the rules ------------------------------------------------------------------------------------


class _Lying(grpc.GenericRpcHandler):
    def __init__(self, script: Script, wire: Any) -> None:
        self._script = script
        self._wire = wire

    def service(self, details: Any) -> Any:
        def run(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            for message in self._script(requests):
                if isinstance(message, tuple):
                    context.abort(*message)
                yield message if isinstance(message, bytes) else self._wire.encode_server(message)

        return grpc.stream_stream_rpc_method_handler(run) if details.method == self._wire.METHOD else None


@contextmanager
def grpc_server(*handlers: grpc.GenericRpcHandler) -> Iterator[str]:
    """Any gRPC service; yields its address."""
    threads = ThreadPoolExecutor(4)
    running = grpc.server(threads, handlers=handlers, options=[("grpc.max_send_message_length", -1)])
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        running.stop(0).wait()
        threads.shutdown(wait=False)


@contextmanager
def lying_server(script: Script, wire: Any = codec) -> Iterator[str]:
    """A server that follows a script: it gets the client's messages, and yields messages, bytes or a (status, text)."""
    with grpc_server(_Lying(script, wire)) as address:
        yield address


def welcome_of(adapter: ServedAdapter, **changes: Any) -> codec.Welcome:
    """The honest welcome, except for what is changed."""
    honest = {
        "version": codec.VERSION,
        "digest": adapter.digest,
        "publication_size": len(adapter.published),
        "max_rows": adapter.max_rows,
    }
    return codec.Welcome(**(honest | changes))


def opening(adapter: ServedAdapter, published: bytes | None = None) -> Iterator[Any]:
    """Welcome and publication; other bytes than the adapter's are announced honestly."""
    data = adapter.published if published is None else published
    yield welcome_of(adapter, digest=digest(data), publication_size=len(data))
    for offset in range(0, len(data), codec.CHUNK):
        yield codec.Chunk(offset, data[offset : offset + codec.CHUNK])


def answer_to(adapter: ServedAdapter, raw: bytes) -> codec.Answer:
    """The honest answer to a query."""
    query = codec.decode_client(raw)
    assert isinstance(query, codec.Query)
    return codec.Answer(query.seq, adapter.half.answer(query.layers, query.rows, query.data))


# -- a network that breaks --------------------------------------------------------------------------------------------


class Relay:
    """Passes one connection's bytes on to ``address``, until it is cut, or ``limit`` bytes came from the client."""

    def __init__(self, address: str, limit: float = math.inf) -> None:
        self._target, self._limit = address, limit
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._listening.close()

    def cut(self) -> None:
        """Both ends are closed."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        client, _ = self._listening.accept()
        host, _, port = self._target.rpartition(":")
        server = socket.create_connection((host, int(port)))
        self._ends += client, server
        threading.Thread(target=self._pump, args=(server, client, math.inf), daemon=True).start()
        self._pump(client, server, self._limit)

    def _pump(self, source: socket.socket, sink: socket.socket, limit: float) -> None:
        with contextlib.suppress(OSError):
            while limit > 0 and (data := source.recv(500)):
                limit -= len(data)
                sink.sendall(data)
        self.cut()
        source.close()


# -- what is demanded --------------------------------------------------------------------------------------------------


@contextmanager
def clear_error(kind: type[SplitveilError], match: str = "") -> Iterator[None]:
    """Exactly this error: one readable line, without gRPC's own words, and no other exception shown before it."""
    with pytest.raises(SplitveilError, match=match or None) as caught:
        yield
    error = caught.value
    assert type(error) is kind, repr(error)
    text = str(error)
    assert text.isprintable()
    assert 10 < len(text) < 700
    assert "grpc" not in text.lower()
    assert "Traceback" not in text
    shown = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert shown is None, f"shown together with {shown!r}"


def eventually(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Waits until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
