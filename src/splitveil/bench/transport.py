"""One round trip over a socket to a server in another process, with the query and the answer of one layer."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from splitveil.bench.decode import served
from splitveil.bench.plain_socket import Asks, plain_socket
from splitveil.private.layer import public_half
from splitveil.serving.session import Session

BLOCKS = 10
SHAPES = ((896, 896, 8), (4096, 4608, 8))


def write_adapter(folder: Path, width: int, features: int, rank: int) -> None:
    """A PEFT folder with one random module."""
    rng = np.random.default_rng(3)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{key}.lora_A.weight": rng.normal(size=(rank, width)).astype(np.float32),
        f"{key}.lora_B.weight": rng.normal(size=(features, rank)).astype(np.float32),
    }
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measure(runs: int = 2000) -> list[dict[str, Any]]:
    """Microseconds from submitting a query until its answer is there, over gRPC and over a plain socket, in turn."""
    rows = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), *shape)
            with served(Path(folder)) as address:
                session = Session(address, "bench")
                try:
                    site = public_half(session.publication).site([0])
                    x = np.random.default_rng(4).normal(size=(1, shape[0])).astype(np.float32)
                    data, _ = site.query(x, site.make_masks(1))
                    with plain_socket(session) as stand_in:
                        ways: dict[str, Asks] = {"gRPC": session, "plain socket": stand_in}
                        taken = _in_turn(ways, data, runs)
                finally:
                    session.close()
        row: dict[str, Any] = {"layer": f"{shape[0]}→{shape[1]}, r={shape[2]}"}
        for way, (seconds, busy) in taken.items():
            row |= {
                f"{way}, median µs": 1e6 * float(np.median(seconds)),
                f"{way}, 95th percentile µs": 1e6 * float(np.percentile(seconds, 95)),
                f"{way}, client's processor time µs": 1e6 * busy,
            }
        rows.append(row | {"up bytes": len(data), "down bytes": 4 * shape[2]})
    return rows


def _in_turn(ways: dict[str, Asks], data: bytes, runs: int) -> dict[str, tuple[NDArray[np.float64], float]]:
    """Of each way, in blocks that alternate: seconds of each round trip, and this process's mean processor seconds."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    busy = dict.fromkeys(ways, 0.0)
    for block in range(BLOCKS + 1):
        for way, session in ways.items():
            used = time.process_time()
            for _ in range(runs // BLOCKS):
                begun = time.perf_counter()
                session.result(session.submit([0], 1, data))
                if block:  # the first one warms up
                    seconds[way].append(time.perf_counter() - begun)
            if block:
                busy[way] += time.process_time() - used
    return {way: (np.array(each), busy[way] / len(each)) for way, each in seconds.items()}
