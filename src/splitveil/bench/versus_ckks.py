"""One private layer by both of our engines, and by SEAL's CKKS without protection, in one run.

They do not hide the same: the lattice engine publishes span(B) and a hint that rests on LWE; CKKS publishes nothing.
Bare, it tells the client more in its ciphertexts than the product; sealed, it does not.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from splitveil.bench.ckks import CkksLayer
from splitveil.bench.layer import SHAPE, LayerBench
from splitveil.bench.timing import median_times
from splitveil.private.ckks_parameters import flood_bits
from splitveil.private.ckks_served import SealedServed
from splitveil.private.core import LayerSpec
from splitveil.private.engine import Pending
from splitveil.private.layer import public_half, publish

BLOCK = 10


def measure(runs: int = 5) -> list[dict[str, Any]]:
    """All three at ChatGLM2-6B's attention shape: milliseconds, bytes, error. Raises if seal is not installed."""
    ours = LayerBench(*SHAPE)
    peer = CkksLayer(ours.A, 2.0 * ours.B)
    exact = ours.exact().ravel()
    x = ours.x.double().numpy().ravel()
    masks = iter(ours.site.make_masks(BLOCK * (runs + 2)))
    message, pending = ours.query(next(masks))
    reply = ours.answer(message)
    bare, norm = peer.encrypt(x)
    bare_reply = peer.answer(bare)
    guarded = _Sealed(ours)
    asked, kept = guarded.query()
    told = guarded.session.answer([0], 1, asked)
    times = median_times(
        {
            "our client": lambda: ours.query(next(masks)),
            "our server": lambda: ours.answer(message),
            "our recovery": lambda: ours.recover(pending, reply),
            "our offline": lambda: ours.site.make_masks(8),
            "encrypt": lambda: peer.encrypt(x),
            "answer": lambda: peer.answer(bare),
            "decrypt": lambda: peer.decrypt(bare_reply, norm),
            "sealed client": guarded.query,
            "sealed server": lambda: guarded.session.answer([0], 1, asked),
            "sealed recovery": lambda: guarded.site.recover(kept, told),
        },
        runs,
        BLOCK,
    )
    processor = _processor_times(
        {
            "our server": lambda: ours.answer(message),
            "answer": lambda: peer.answer(bare),
            "sealed server": lambda: guarded.session.answer([0], 1, asked),
        },
        BLOCK * runs // 2,
    )
    online = times["our client"] + times["our server"] + times["our recovery"]
    offline = times["our offline"] / 8

    def row(
        engine: str, name: str, client: float, ahead: float, sizes: tuple[int, int, int], got: Any, publishes: str
    ) -> dict[str, Any]:
        server = times[name]
        return {
            "engine": engine,
            "server ms": server * 1e3,
            "server processor ms": processor[name] * 1e3,
            "client online ms": client * 1e3,
            "client offline ms": ahead * 1e3,
            "up bytes": sizes[0],
            "down bytes": sizes[1],
            "key bytes": sizes[2],
            "relative error": float(np.linalg.norm(got - exact) / np.linalg.norm(exact)),
            "publishes": publishes,
            "server ÷ bare CKKS": server / times["answer"],
            "in processor time": processor[name] / processor["answer"],
            "÷ lattice, online": (server + client) / online,
            "÷ lattice, offline included": (server + client) / (online + offline),
        }

    bits = flood_bits(SHAPE[2])
    return [
        row(
            "lattice",
            "our server",
            times["our client"] + times["our recovery"],
            offline,
            (len(message), len(reply), 0),
            ours.recover(pending, reply).numpy().ravel(),
            "span(B), the core's size, hints",
        ),
        row(
            "bare CKKS, not protected",
            "answer",
            times["encrypt"] + times["decrypt"],
            0.0,
            (len(bare), len(bare_reply), peer.key_bytes),
            peer.decrypt(bare_reply, norm),
            "nothing",
        ),
        row(
            f"sealed, {bits:.1f} bits of flooding",
            "sealed server",
            times["sealed client"] + times["sealed recovery"],
            0.0,
            (len(asked), len(told), guarded.key_bytes),
            guarded.site.recover(kept, told)[0].ravel(),
            "a rounded size",
        ),
    ]


def _processor_times(work: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of processor time, the pieces in turn: other programs on the same core do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(runs):
        for name, call in work.items():
            begun = time.process_time()
            call()
            seconds[name].append(time.process_time() - begun)
    return {name: float(np.median(taken)) for name, taken in seconds.items()}


class _Sealed:
    """The sealed engine on the weights and the input of ``LayerBench``, one session's keys made."""

    def __init__(self, ours: LayerBench) -> None:
        spec = LayerSpec(ours.A, ours.B, 2.0, (("layer", SHAPE[1]),))
        served, publication = publish([spec], engine="sealed")
        half = public_half(publication)
        if not isinstance(served, SealedServed):
            raise TypeError(f"a sealed layer is a SealedServed, got {type(served).__name__}")
        keys = half.keys()
        self.key_bytes = len(keys)
        self.session = served.opened(keys)
        self.site = half.site([0])
        self._x = ours.x.numpy()

    def query(self) -> tuple[bytes, Pending]:
        """The client, online."""
        return self.site.query(self._x, self.site.make_masks(1))
