"""What may go wrong in the middle of generate(): interrupts, a server that dies, refusals, numbers that are none."""

import _thread
import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from abuse.support import ADAPTER, Relay, attention_adapter, clear_error, eventually, tiny_llama
from splitveil import connect, disconnect
from splitveil.errors import ConfigurationError, ConnectionFailedError, NonFiniteError, RefusedError
from splitveil.serving import stream
from splitveil.serving.connect import connection
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.server import Server
from splitveil.wire import codec

PROMPT = torch.tensor([[5, 9, 23, 41]])
WIDTH = 16
"""Inputs of the adapted modules."""
NEW_TOKENS = 8
QUERIES = 2 * NEW_TOKENS
"""Of one generation, once the sites are known: two blocks a token."""


@pytest.fixture(scope="module")
def adapter() -> ServedAdapter:
    return attention_adapter()


class Watch:
    """Sees every query as the server gets it, and does something at one of them."""

    def __init__(self) -> None:
        self.seen: list[codec.Query] = []
        self.at: dict[int, object] = {}

    def __call__(self, _: str, query: codec.Query) -> None:
        self.seen.append(query)
        act = self.at.pop(len(self.seen), None)
        if callable(act):
            act()

    def after(self, queries: int, act: object) -> None:
        """At the ``queries``-th query from now."""
        self.at[len(self.seen) + queries] = act


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def running(adapter: ServedAdapter, watch: Watch) -> Iterator[Server]:
    with Server({ADAPTER: adapter}, "127.0.0.1:0", on_query=watch) as server:
        yield server


@pytest.fixture
def model(running: Server) -> Iterator[PreTrainedModel]:
    """A connected model that knows its sites."""
    connected = connect(tiny_llama(), running.address, ADAPTER, allow_insecure=True)
    with torch.no_grad():
        connected(PROMPT)
    yield connected
    disconnect(connected)


def generate(model: PreTrainedModel) -> Tensor:
    return model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(PROMPT))


def assert_every_row_had_its_own_mask(queries: Sequence[codec.Query]) -> None:
    """A query's last coordinates are the mask's pad alone: under one mask they are equal, whatever was asked."""
    words = [np.frombuffer(query.data, dtype="<u4").reshape(query.rows, -1) for query in queries]
    pads = [row[WIDTH:].tobytes() for rows in words for row in rows]
    assert len(set(pads)) == len(pads)
    assert len({query.data for query in queries}) == len(queries)


def test_an_interrupt_leaves_model_connection_and_masks_usable(model: PreTrainedModel, watch: Watch) -> None:
    """Ctrl-C at every query of a generation: while the answer is awaited, or just as it comes. None is sent again."""
    expected = generate(model)
    pool = connection(model).pool
    assert pool is not None
    for at in range(1, QUERIES + 1):

        def interrupt(pause: float = 0.02 * (at % 2)) -> None:
            _thread.interrupt_main()
            time.sleep(pause)

        watch.after(at, interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(model)
        assert torch.equal(generate(model), expected)
    capacity = sum(site.mask_size for site in pool._sites) * pool.rows_per_site
    eventually(lambda: pool.size > 0)
    assert pool.size <= capacity
    assert torch.equal(generate(model), expected)
    assert_every_row_had_its_own_mask(watch.seen)


def test_interrupts_at_any_instruction(model: PreTrainedModel, watch: Watch) -> None:
    """The same at moments that nobody chose."""
    expected = generate(model)
    began = time.monotonic()
    generate(model)
    usual = time.monotonic() - began
    for i in range(30):
        timer = threading.Timer(usual * i / 30, _thread.interrupt_main)
        with contextlib.suppress(KeyboardInterrupt):
            timer.start()
            while timer.is_alive():
                generate(model)
            # Python itself swallows an interrupt that falls into a destructor.
            generate(model)
    assert torch.equal(generate(model), expected)
    assert_every_row_had_its_own_mask(watch.seen)


def test_an_interrupt_in_the_very_first_pass(running: Server, watch: Watch) -> None:
    """Before the sites are known: they are learned in the next pass."""
    model = connect(tiny_llama(), running.address, ADAPTER, allow_insecure=True)
    for at in (1, 2, 3, 4):
        watch.after(at, _thread.interrupt_main)
        with pytest.raises(KeyboardInterrupt):
            generate(model)
    first = generate(model)
    assert torch.equal(generate(model), first)
    assert len(connection(model).groups) == 2
    disconnect(model)


def test_a_server_that_dies_in_the_middle(adapter: ServedAdapter, watch: Watch) -> None:
    server = Server({ADAPTER: adapter}, "127.0.0.1:0", on_query=watch)
    model = connect(tiny_llama(), server.address, ADAPTER, allow_insecure=True)
    base = generate(tiny_llama())
    ends: list[threading.Thread] = []

    def die() -> None:
        ends.append(threading.Thread(target=server.close))
        ends[0].start()
        time.sleep(1.0)

    watch.after(5, die)
    for _ in range(2):
        with clear_error(ConnectionFailedError):
            generate(model)
    ends[0].join()
    disconnect(model)
    assert torch.equal(generate(model), base)
    # A new server at the same place, and all is well.
    with Server({ADAPTER: adapter}, server.address) as again:
        connect(model, again.address, ADAPTER, allow_insecure=True)
        assert generate(model).shape == (1, PROMPT.shape[1] + NEW_TOKENS)
        disconnect(model)


def test_a_connection_that_breaks_in_the_middle(running: Server, watch: Watch) -> None:
    with Relay(running.address) as relay:
        model = connect(tiny_llama(), relay.address, ADAPTER, allow_insecure=True)
        generate(model)
        watch.after(5, relay.cut)
        for _ in range(2):
            with clear_error(ConnectionFailedError, match="broke"):
                generate(model)
        disconnect(model)
    connect(model, running.address, ADAPTER, allow_insecure=True)
    generate(model)
    disconnect(model)


def test_a_server_that_hangs_in_the_middle(
    model: PreTrainedModel, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "ANSWER_SECONDS", 0.4)
    monkeypatch.setattr(stream, "POLL_SECONDS", 0.2)
    release = threading.Event()
    watch.after(5, lambda: release.wait(60))
    with clear_error(ConnectionFailedError, match="no longer answers"):
        generate(model)
    release.set()


def test_numbers_that_are_not_finite_are_reported_afterwards(
    running: Server, model: PreTrainedModel, watch: Watch
) -> None:
    """The zero query goes out in their place, at its time and in its size; then the error, then all is well."""
    expected = generate(model)
    ordinary = {len(query.data) for query in watch.seen[-QUERIES + 2 :]}
    assert len(ordinary) == 1
    for value in (float("nan"), float("inf"), -float("inf")):
        before = len(watch.seen)
        good = model.model.embed_tokens.weight.data.clone()
        model.model.embed_tokens.weight.data[PROMPT[0, -1], 3] = value
        with clear_error(NonFiniteError, match="NaN or infinite"):
            generate(model)
        sent = watch.seen[before:]
        assert [(query.rows, len(query.data)) for query in sent] == [(4, 4 * min(ordinary))]
        model.model.embed_tokens.weight.data.copy_(good)
        assert torch.equal(generate(model), expected)


def test_training_mode_is_a_clear_error(model: PreTrainedModel) -> None:
    expected = generate(model)
    model.train()
    with clear_error(ConfigurationError, match=r"serves inference only; call model.eval\(\)"):
        model(PROMPT)
    model.eval()
    assert torch.equal(generate(model), expected)


def test_a_refusal_in_the_middle(adapter: ServedAdapter) -> None:
    """A gate's no ends this generation with its words, and nothing else."""

    class UpTo:
        left = 20

        def require_rows_left(self, identity: str, adapter: str) -> None:
            """Leaves refusing to ``reserve_all``."""

        def reserve_all(self, identity: str, adapter: str, modules: Sequence[str], rows: int) -> None:
            self.left -= rows
            if self.left < 0:
                raise RefusedError("the budget is used up")

    gate = UpTo()
    with Server({ADAPTER: adapter}, "127.0.0.1:0", gate=gate) as server:
        model = connect(tiny_llama(), server.address, ADAPTER, allow_insecure=True)
        for _ in range(2):
            with clear_error(RefusedError, match="the server refused a query: the budget is used up"):
                generate(model)
        gate.left = 10**6
        generate(model)
        disconnect(model)


def sockets() -> int:
    """Sockets that this process has open."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found += str(descriptor.readlink()).startswith("socket:")
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count sockets")
def test_connecting_and_disconnecting_leaks_nothing(running: Server) -> None:
    model = tiny_llama()
    base = generate(model)

    def cycle() -> None:
        connect(model, running.address, ADAPTER, allow_insecure=True)
        model(PROMPT)
        disconnect(model)

    cycle()
    eventually(lambda: not any(t.name.startswith("splitveil") for t in threading.enumerate()))
    threads, open_sockets = threading.active_count(), sockets()
    for _ in range(20):
        cycle()
    eventually(lambda: threading.active_count() <= threads)
    eventually(lambda: sockets() <= open_sockets)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(generate(model), base)
