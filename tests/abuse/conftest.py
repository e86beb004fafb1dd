"""One torch thread, a publication cache of the tests' own, and a server that must still work after every test."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from abuse.support import ADAPTER, assert_serves, served_layers
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.server import Server


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPLITVEIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C means KeyboardInterrupt, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def layers() -> ServedAdapter:
    """Four private layers: 0 and 1 of one width, 2 and 3 of another."""
    return served_layers()


@pytest.fixture(scope="session")
def shared_server(layers: ServedAdapter) -> Iterator[Server]:
    with Server({ADAPTER: layers}, "127.0.0.1:0") as running:
        yield running


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """An honest server; whatever a test does to it, it serves the next client."""
    yield shared_server
    assert_serves(shared_server.address)
