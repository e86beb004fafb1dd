"""Whole tokens: decoding with a private adapter beside plaintext PEFT, unmerged and merged, over a socket.

The server runs in another process on the same cores. Three states of the mask pool are told apart: *cold* (empty at the
start), *burst* (full behind the prompt), and *sustained* (five times the pool's capacity in one go). A sustained run is
compared with the plaintext runs before and after it: what slows the machine for a while slows both. Between them stands
a run whose messages go over a plain socket, too, so that what the transport costs is told from the rest.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from splitveil.bench.plain_socket import plain_socket
from splitveil.serving.connect import connect, connection, disconnect
from splitveil.serving.session import Session

PROMPT = 16
COLD = 16
POOL_BYTES = 13 << 18
"""Masks for sixteen tokens: small, so that a sustained run is short and can be repeated often."""


@dataclass(frozen=True)
class DecodeResult:
    """Median milliseconds a token, and the private side's share of bytes."""

    dtype: str
    tokens: int
    """Of a sustained run."""
    pool_rows: int
    private_ms: float
    unmerged_ms: float
    merged_ms: float
    cold_ms: float
    burst_ms: float
    bytes_per_token: float
    identical: float
    """Share of the sustained run's tokens that equal the unmerged run's."""
    to_unmerged: list[float]
    """Of every sustained run: private ÷ unmerged."""
    to_merged: list[float]
    socket_ms: float
    """With a plain socket in gRPC's place, sustained."""
    socket_to_unmerged: list[float]


def qwen2_half_billion(dtype: torch.dtype, weights: dict[str, torch.Tensor] | None = None) -> Any:
    """A model of Qwen2-0.5B's shape: with random weights, or sharing those of another one."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(dtype)
    if weights is not None:
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
    return model.eval()


def with_adapter(model: Any, rank: int, targets: list[str]) -> Any:
    """The same weights behind plaintext PEFT, with a random adapter of visible size."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return adapted.eval()


def decode(model: Any, count: int, behind_prompt: Callable[[], None] = lambda: None) -> tuple[list[float], list[int]]:
    """Greedy tokens one by one after a fixed prompt: seconds of each, and the tokens."""
    ids = torch.arange(1, PROMPT + 1).reshape(1, -1)
    seconds, tokens = [], []
    with torch.no_grad():  # as generate() has it
        output = model(input_ids=ids, use_cache=True)
        behind_prompt()
        for _ in range(count):
            ids = output.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
            begun = time.perf_counter()
            output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - begun)
    return seconds, tokens


def measure(dtype: torch.dtype, *, rounds: int = 5, threads: int = 2) -> DecodeResult:
    """Measures one dtype: private, unmerged and merged in turn, ``rounds`` times."""
    torch.set_num_threads(threads)
    private = qwen2_half_billion(dtype)
    # A merged adapter is the base model with other numbers: the base itself costs exactly the same.
    merged = qwen2_half_billion(dtype, private.state_dict())
    unmerged = with_adapter(qwen2_half_billion(dtype, private.state_dict()), 8, ["q_proj", "v_proj"])
    with tempfile.TemporaryDirectory() as folder:
        unmerged.save_pretrained(folder)
        with served(Path(folder)) as address:
            return _in_turn(private, unmerged, merged, address, rounds, dtype)


def _in_turn(private: Any, unmerged: Any, merged: Any, address: str, rounds: int, dtype: torch.dtype) -> DecodeResult:
    connect(private, address, "bench", pool_bytes=POOL_BYTES)
    try:
        decode(private, 2)
        decode(unmerged, 2)
        adapter = connection(private)
        session = adapter.session
        pool, traffic = adapter.pool, session.traffic
        if pool is None:
            raise RuntimeError("no mask pool")
        count = 5 * pool.rows_per_site
        runs: dict[str, list[list[float]]] = {
            "private": [],
            "unmerged": [],
            "merged": [],
            "burst": [],
            "cold": [],
            "socket": [],
        }
        expected: list[int] = []
        same, used = [], 0
        for turn in range(rounds + 1):
            seconds, expected = decode(unmerged, count)
            runs["unmerged"].append(seconds)
            runs["merged"].append(decode(merged, count)[0])
            if turn == rounds:
                break
            pool.clear()
            runs["cold"].append(decode(private, COLD)[0])
            runs["burst"].append(decode(private, pool.rows_per_site, pool.fill)[0])
            before = traffic.sent + traffic.received
            seconds, tokens = decode(private, count)
            used += traffic.sent + traffic.received - before
            runs["private"].append(seconds)
            same.append(np.mean(np.array(tokens) == np.array(expected)))
            with plain_socket(session) as stand_in:
                adapter.session = cast(Session, stand_in)
                runs["socket"].append(decode(private, count)[0])
                adapter.session = session
    finally:
        disconnect(private)
    ms = {name: 1e3 * float(np.median(np.concatenate(each))) for name, each in runs.items()}

    def ratios(kind: str, name: str) -> list[float]:
        return [
            float(2 * np.median(run) / (np.median(runs[name][turn]) + np.median(runs[name][turn + 1])))
            for turn, run in enumerate(runs[kind])
        ]

    return DecodeResult(
        str(dtype).removeprefix("torch."),
        count,
        pool.rows_per_site,
        ms["private"],
        ms["unmerged"],
        ms["merged"],
        ms["cold"],
        ms["burst"],
        used / rounds / (count + PROMPT),
        float(np.mean(same)),
        ratios("private", "unmerged"),
        ratios("private", "merged"),
        ms["socket"],
        ratios("socket", "unmerged"),
    )


@contextlib.contextmanager
def served(folder: Path, *flags: str) -> Iterator[str]:
    """Serves an adapter folder as "bench" from another process, with more flags if given; yields the address."""
    command = [sys.executable, "-m", "splitveil", "serve", "--adapter", f"bench={folder}", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout or ():
            if line.startswith("listening on "):
                yield line.split()[2]
                break
        else:
            raise RuntimeError("the server process ended early")
    finally:
        process.terminate()
        process.wait()
