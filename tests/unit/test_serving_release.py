"""A model that is dropped while connected gives up its threads and its place at the server."""

import gc
import threading
import time

import numpy as np
import torch
from torch import nn

from splitveil.adapters.folder import LoraModule
from splitveil.private.core import LayerSpec
from splitveil.private.layer import publish
from splitveil.private.published import digest
from splitveil.serving.connect import connect
from splitveil.serving.publishing import ServedAdapter, layer_specs
from splitveil.serving.server import Server


class Small(nn.Module):
    """One linear module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        return result


def served() -> ServedAdapter:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 16)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)
    specs: list[LayerSpec] = layer_specs([LoraModule("linear", a, b, 1.0)])
    half, publication = publish(specs)
    data = publication.to_bytes()
    return ServedAdapter(half, publication, data, digest(data), 64)


def client_threads() -> int:
    return sum(t.name in ("splitveil-masks", "splitveil-answers") for t in threading.enumerate())


def test_a_dropped_model_leaves_nothing_behind() -> None:
    before = client_threads()
    with Server({"a": served()}, "127.0.0.1:0", sessions=1) as server:
        for _ in range(4):  # the server has room for one: a session that stayed would keep the next one out
            model = connect(Small().eval(), server.address, "a")
            model(torch.ones(1, 16))
            assert client_threads() == before + 2
            del model
            gc.collect()
            deadline = time.monotonic() + 20
            while client_threads() > before and time.monotonic() < deadline:
                time.sleep(0.01)
            assert client_threads() == before
            time.sleep(0.3)  # the server learns of it a moment later
