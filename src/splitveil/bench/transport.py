"""One round trip over a socket to a server in another process, with the query and the answer of one layer."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from splitveil.bench.decode import served
from splitveil.private.layer import public_half
from splitveil.serving.session import Session

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
    """Medians and 95th percentiles in microseconds, of submitting a query until its answer is there."""
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
                    seconds = []
                    for _ in range(runs):
                        begun = time.perf_counter()
                        session.result(session.submit([0], 1, data))
                        seconds.append(time.perf_counter() - begun)
                finally:
                    session.close()
        taken = np.array(seconds[runs // 10 :]) * 1e6
        rows.append(
            {
                "layer": f"{shape[0]}→{shape[1]}, r={shape[2]}",
                "median µs": float(np.median(taken)),
                "95th percentile µs": float(np.percentile(taken, 95)),
                "up bytes": len(data),
                "down bytes": 4 * shape[2],
            }
        )
    return rows
