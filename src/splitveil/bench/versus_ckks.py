"""One private layer beside SEAL's CKKS doing the same job, in one run.

The two do not hide the same: ours publishes span(B) and a hint that rests on LWE; the CKKS evaluation publishes nothing
and, not being flooded, tells the client more in its ciphertexts than the product. The table says so.
"""

from typing import Any

import numpy as np

from splitveil.bench.ckks import CkksLayer
from splitveil.bench.layer import SHAPE, LayerBench
from splitveil.bench.timing import median_times

BLOCK = 10


def measure(runs: int = 5) -> list[dict[str, Any]]:
    """Both engines at ChatGLM2-6B's attention shape: milliseconds, bytes, error. Raises if seal is not installed."""
    ours = LayerBench(*SHAPE)
    peer = CkksLayer(ours.A, 2.0 * ours.B)
    exact = ours.exact().ravel()
    x = ours.x.double().numpy().ravel()
    masks = iter(ours.site.make_masks(BLOCK * (runs + 2)))
    message, pending = ours.query(next(masks))
    reply = ours.answer(message)
    sealed, norm = peer.encrypt(x)
    sealed_reply = peer.answer(sealed)
    times = median_times(
        {
            "our client": lambda: ours.query(next(masks)),
            "our server": lambda: ours.answer(message),
            "our recovery": lambda: ours.recover(pending, reply),
            "our offline": lambda: ours.site.make_masks(8),
            "encrypt": lambda: peer.encrypt(x),
            "answer": lambda: peer.answer(sealed),
            "decrypt": lambda: peer.decrypt(sealed_reply, norm),
        },
        runs,
        BLOCK,
    )
    online = times["our client"] + times["our server"] + times["our recovery"]
    offline = times["our offline"] / 8
    theirs = times["encrypt"] + times["answer"] + times["decrypt"]

    def row(
        engine: str, server: float, client: float, ahead: float, sizes: tuple[int, int], got: Any
    ) -> dict[str, Any]:
        return {
            "engine": engine,
            "server ms": server * 1e3,
            "client online ms": client * 1e3,
            "client offline ms": ahead * 1e3,
            "up bytes": sizes[0],
            "down bytes": sizes[1],
            "relative error": float(np.linalg.norm(got - exact) / np.linalg.norm(exact)),
        }

    return [
        {
            **row(
                "lattice (ours)",
                times["our server"],
                times["our client"] + times["our recovery"],
                offline,
                (len(message), len(reply)),
                ours.recover(pending, reply).numpy().ravel(),
            ),
            "publishes": "span(B), the core's size, hints",
            "CKKS ÷ ours, online": theirs / online,
            "CKKS ÷ ours, offline included": theirs / (online + offline),
        },
        {
            **row(
                "SEAL CKKS, not flooded",
                times["answer"],
                times["encrypt"] + times["decrypt"],
                0.0,
                (len(sealed), len(sealed_reply)),
                peer.decrypt(sealed_reply, norm),
            ),
            "publishes": "nothing",
            "CKKS ÷ ours, online": 1.0,
            "CKKS ÷ ours, offline included": 1.0,
        },
    ]
