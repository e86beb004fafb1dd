"""The layer alone: one token through one private LoRA layer, beside the plaintext product, each step on its own.

Conversions from torch and to the wire's messages are part of every figure; the transport is not.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from splitveil.bench.timing import median_times
from splitveil.private.core import LayerSpec
from splitveil.private.engine import Mask, Pending
from splitveil.private.layer import public_half, publish
from splitveil.private.published import Publication
from splitveil.wire import codec

SHAPE = (4096, 4608, 8)  # ChatGLM2-6B's fused attention projection, rank 8
SEED = 20


@dataclass(frozen=True)
class LayerResult:
    """Microseconds (medians), bytes, and the error against float64."""

    width: int
    features: int
    rank: int
    client_us: float
    server_us: float
    recover_us: float
    offline_us: float
    offline_single_us: float
    plaintext_us: float
    sent: int
    received: int
    error: float
    publication_bytes: int

    @property
    def online_us(self) -> float:
        """Client, server and recovery together."""
        return self.client_us + self.server_us + self.recover_us


class LayerBench:
    """One layer with random weights, set up for measuring."""

    def __init__(self, width: int, features: int, rank: int) -> None:
        rng = np.random.default_rng(SEED)
        self.A = rng.normal(size=(rank, width)).astype(np.float32)
        self.B = rng.normal(size=(features, rank)).astype(np.float32)
        self.served, publication = publish([LayerSpec(self.A, self.B, 2.0, (("layer", features),))])
        self.published = publication.to_bytes()
        self.half = public_half(Publication.from_bytes(self.published))
        self.site = self.half.site([0])
        q = self.half.publication.layers[0].Q
        if q is None:
            raise ValueError("a low-rank layer publishes Q")
        self._q = torch.from_numpy(q).T.contiguous()
        self.x = torch.from_numpy(rng.normal(size=(1, width)).astype(np.float32))
        self._base = torch.zeros(1, features)
        self._a, self._b = torch.from_numpy(self.A), torch.from_numpy(self.B)

    def query(self, mask: Mask) -> tuple[bytes, Pending]:
        """The client, online: tensor to message."""
        rows = self.x.detach().numpy().copy()
        data, pending = self.site.query(rows, [mask])
        return codec.encode_client(codec.Query(1, (0,), 1, data)), pending

    def answer(self, message: bytes) -> bytes:
        """The server: message to message."""
        query = codec.decode_client(message)
        if not isinstance(query, codec.Query):
            raise TypeError("not a query")
        self.served.check(query.layers, query.rows, len(query.data))
        return codec.encode_server(codec.Answer(1, self.served.answer(query.layers, query.rows, query.data)))

    def recover(self, pending: Pending, message: bytes) -> torch.Tensor:
        """The client again: message to the module's output."""
        answer = codec.decode_server(message)
        if not isinstance(answer, codec.Answer):
            raise TypeError("not an answer")
        (core,) = self.site.recover(pending, answer.data)
        return torch.addmm(self._base, torch.from_numpy(core), self._q)

    def plaintext(self) -> torch.Tensor:
        """What PEFT computes."""
        return torch.nn.functional.linear(torch.nn.functional.linear(self.x, self._a), self._b) * 2.0

    def exact(self) -> Any:
        """The product in float64."""
        return 2.0 * self.x.double().numpy() @ self.A.astype(np.float64).T @ self.B.astype(np.float64).T


def measure(width: int, features: int, rank: int, *, block: int = 25) -> LayerResult:
    """Measures one shape, 400 calls of each step, in blocks (``timing.median_times``)."""
    runs = 400 // block
    with torch.inference_mode():
        bench = LayerBench(width, features, rank)
        masks = iter(bench.site.make_masks(512 + block))
        message, pending = bench.query(next(masks))
        reply = bench.answer(message)
        exact, got = bench.exact(), bench.recover(pending, reply).numpy()
        times = median_times(
            {
                "client": lambda: bench.query(next(masks)),
                "server": lambda: bench.answer(message),
                "recover": lambda: bench.recover(pending, reply),
                "plaintext": bench.plaintext,
            },
            runs,
            block,
        )
        offline = median_times({"eight": lambda: bench.site.make_masks(8), "one": lambda: bench.site.make_masks(1)}, 30)
    micro = 1e6
    return LayerResult(
        width,
        features,
        rank,
        times["client"] * micro,
        times["server"] * micro,
        times["recover"] * micro,
        offline["eight"] / 8 * micro,
        offline["one"] * micro,
        times["plaintext"] * micro,
        len(message),
        len(reply),
        float(np.linalg.norm(got - exact) / np.linalg.norm(exact)),
        len(bench.published),
    )
