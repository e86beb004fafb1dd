"""A model of ChatGLM2-6B's shape with a private LoRA adapter of rank 8 on query_key_value, beside plaintext PEFT.

    python benchmarks/chatglm.py                        28 blocks in bfloat16 on the CPU: 17 GB of memory, half an hour
    python benchmarks/chatglm.py --blocks 2             a small one
    python benchmarks/chatglm.py --device cuda          the client's base model on an accelerator

Weights are random: times do not depend on them. The adapter is made under the original names and goes through
``splitveil convert``; the server is another process on this machine. In a *burst* the masks are ready; *sustained* is
many times what the mask pool holds, in one go. Idle OpenMP threads spin briefly, as under every `splitveil` command
(GOMP_SPINCOUNT=2000; set it to measure with another). Each run stands between two of plaintext, so that a slow moment
of the machine meets both. Of a private token: what encryption, the wait for answers (network and server, as far as the
base product has not covered them) and recovery take on the thread that generates, and what the server says it took.
Then the private layers of a token by themselves, on one core.
"""

import argparse
import datetime
import json
import os
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from splitveil import connect, disconnect
from splitveil.bench.decode import served
from splitveil.bench.layer import SHAPE, measure
from splitveil.bench.timing import machine
from splitveil.checkpoints import convert_adapter
from splitveil.serving.connect import connection

HIDDEN, OUTPUTS, RANK = SHAPE
PROMPT = 16
KINDS = ("burst", "sustained")
ORIGINAL = {
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "ffn_hidden_size": 13696,
    "hidden_size": HIDDEN,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "seq_length": 32768,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--burst", type=int, default=16, help="tokens for which masks are ready; the pool holds them")
    parser.add_argument("--sustained", type=int, default=4, help="times the pool's masks, in one go; 0 for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if "GOMP_SPINCOUNT" not in os.environ:
        # As every `splitveil` command has it: read when torch is loaded, which has happened already.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GOMP_SPINCOUNT": "2000"})
    torch.set_num_threads(options.threads)
    print(f"{datetime.date.today()}, {machine()}, {options.threads} threads, {options.device}, {options.dtype}\n")
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_adapter(Path(folder), options.blocks)
        private, plaintext = models(Path(folder) / "original", adapter, options)
        size = sum(p.numel() * p.element_size() for p in private.parameters())
        count = sum(p.numel() for p in private.parameters())
        print(f"{count / 1e9:.2f} billion parameters, {size / 2**30:.1f} GiB, {options.blocks} blocks\n")
        metrics = f"127.0.0.1:{free_port()}"
        with served(adapter, "--metrics", metrics) as address:
            pool = options.burst * options.blocks * mask_bytes()
            connect(private, address, "bench", pool_bytes=pool)
            try:
                watched = {kind: Watched(metrics) for kind in KINDS}
                measured = in_turn(private, plaintext, watched, options)
            finally:
                disconnect(private)
    report(measured, watched)
    del private, plaintext
    alone(options.blocks)


def write_adapter(folder: Path, blocks: int) -> Path:
    """A random adapter under the original names, converted."""
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for block in range(blocks):
        at = f"base_model.model.transformer.encoder.layers.{block}.self_attention.query_key_value"
        tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=draw) / HIDDEN**0.5
        tensors[f"{at}.lora_B.weight"] = torch.randn(OUTPUTS, RANK, generator=draw) * 0.02
    original, adapter = folder / "original", folder / "adapter"
    original.mkdir()
    (original / "config.json").write_text(json.dumps(ORIGINAL | {"num_layers": blocks}))
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["query_key_value"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"task_type": "CAUSAL_LM"}))
    convert_adapter(adapter, folder / "converted", original)
    return folder / "converted"


def models(original: Path, adapter: Path, options: argparse.Namespace) -> tuple[Any, Any]:
    """Two models that share one set of weights: the base, and the base behind plaintext PEFT."""
    from peft import PeftModel

    from splitveil.checkpoints.chatglm import read_config

    settings, _ = read_config(original)
    config = AutoConfig.for_model(**settings)
    dtype = getattr(torch, options.dtype)
    made = []
    for _ in range(2):
        with torch.device("meta"):
            made.append(AutoModelForCausalLM.from_config(config, dtype=dtype))
    weights = {name: random(p.shape, dtype, options.device) for name, p in made[0].named_parameters()}
    for model in made:
        model.load_state_dict(weights, assign=True)
        # Not a parameter, and therefore still without values: the table of rotary frequencies.
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(options.device)
        model.eval()
    return made[0], PeftModel.from_pretrained(made[1], adapter).to(options.device).eval()


def random(shape: torch.Size, dtype: torch.dtype, device: str) -> torch.nn.Parameter:
    """Normal numbers of a layer's usual size, repeated after the first million: drawing six billion takes minutes."""
    count = shape.numel()
    some = torch.randn(min(count, 1_000_003), generator=torch.Generator().manual_seed(0)).to(dtype) * 0.02
    values = torch.empty(count, dtype=dtype)
    for first in range(0, count, len(some)):
        values[first : first + len(some)] = some[: count - first]
    # Norms around one keep a deep stack of random blocks finite.
    values = values + 1 if len(shape) == 1 and shape[0] == HIDDEN else values
    return torch.nn.Parameter(values.reshape(shape).to(device), requires_grad=False)


def mask_bytes() -> int:
    """Of one row of one layer, as the pool counts them."""
    from splitveil.bench.layer import LayerBench

    return LayerBench(HIDDEN, OUTPUTS, RANK).site.mask_size


class Parts:
    """Seconds that the generating thread spends in parts of the client, added up for each token."""

    def __init__(self) -> None:
        self.now: dict[str, float] = {}
        self.tokens: list[dict[str, float]] = []

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.now[name] = self.now.get(name, 0.0) + time.perf_counter() - begun

        return measured

    @contextmanager
    def on(self, adapter: Any) -> Iterator[None]:
        """Watches a connected model's client."""
        watched = [
            (adapter.pool, "take", "masks"),
            (adapter.session, "submit", "sending"),
            (adapter.session, "result", "waiting"),
            *((site, "query", "encryption") for site in adapter._sites.values()),
            *((site, "recover", "recovery") for site in adapter._sites.values()),
        ]
        for thing, method, name in watched:
            object.__setattr__(thing, method, self.timed(name, getattr(thing, method)))
        try:
            yield
        finally:
            for thing, method, _ in watched:
                object.__delattr__(thing, method)

    def token(self) -> None:
        self.tokens.append(self.now)
        self.now = {}

    def medians(self) -> dict[str, float]:
        """Milliseconds a token."""
        names = sorted({name for token in self.tokens for name in token})
        return {name: 1e3 * float(np.median([token.get(name, 0.0) for token in self.tokens])) for name in names}


def tokens(model: Any, device: str) -> Iterator[float]:
    """Seconds of greedy tokens, one by one after a fixed prompt, without end. The prompt's come first."""
    ids = torch.arange(1, PROMPT + 1, device=device).reshape(1, -1)
    cache = None
    while True:
        with torch.no_grad():  # as generate() has it
            begun = time.perf_counter()
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            if device != "cpu":
                torch.cuda.synchronize()
        yield time.perf_counter() - begun


def decode(model: Any, count: int, device: str, each: Callable[[], None] = lambda: None) -> list[float]:
    """Seconds of ``count`` tokens after the prompt, in one go; ``each`` is called after every one, the prompt too."""
    running, seconds = tokens(model, device), []
    for _ in range(count + 1):
        seconds.append(next(running))
        each()
    return seconds[1:]


def in_turn(private: Any, plaintext: Any, watched: dict[str, "Watched"], options: argparse.Namespace) -> dict[str, Any]:
    """Runs of private tokens, bursts and sustained, each between two runs of plaintext; and the base model alone."""
    device, adapter = options.device, connection(private)
    decode(private, 2, device)
    decode(plaintext, 2, device)
    long = options.sustained * adapter.pool.rows_per_site
    print(f"the pool holds masks for {adapter.pool.rows_per_site} tokens; sustained: {long} tokens in one go")
    todo = [adapter.pool.fill]

    def filled() -> None:
        """Once, behind the prompt, whose own rows come out of the same pool."""
        watched["burst"].token()
        while todo:
            todo.pop()()

    def burst() -> list[float]:
        todo[:] = [adapter.pool.fill]
        with watched["burst"].on(adapter, PROMPT + options.burst):
            return decode(private, options.burst, device, filled)

    def sustained() -> list[float]:
        with watched["sustained"].on(adapter, PROMPT + long):
            return decode(private, long, device, watched["sustained"].token)

    found: dict[str, Any] = {"base": []}
    for kind, run, count in zip(KINDS, (burst, sustained), (options.burst, long // 2), strict=True):
        if not count:
            continue
        found[f"beside {kind}"] = [decode(plaintext, count, device)]
        found[kind] = []
        for _ in range(options.rounds):
            found[kind].append(run())
            found[f"beside {kind}"].append(decode(plaintext, count, device))
    with plaintext.disable_adapter():
        found["base"] = decode(plaintext.get_base_model(), 2 * options.burst, device)
    return found


class Watched:
    """Where the time of private tokens goes, and their bytes."""

    def __init__(self, metrics: str) -> None:
        self.parts = Parts()
        self.bytes = 0
        self.tokens = 0
        self.server = 0.0
        self.token = self.parts.token
        self._metrics = metrics

    @contextmanager
    def on(self, adapter: Any, tokens: int) -> Iterator[None]:
        """Watches a run of so many tokens, its prompt's among them."""
        traffic = adapter.session.traffic
        before, server = traffic.sent + traffic.received, self._answering()
        with self.parts.on(adapter):
            yield
        self.tokens += tokens
        self.bytes += traffic.sent + traffic.received - before
        self.server += self._answering() - server

    def _answering(self) -> float:
        """Seconds that the server has spent between queries' arrivals and their answers, from its own metrics."""
        with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        (line,) = (line for line in lines if line.startswith("splitveil_answer_seconds_sum"))
        return float(line.split()[-1])


def report(found: dict[str, Any], watched: dict[str, Watched]) -> None:
    print(
        "\n| | private ms/token | plaintext PEFT ms/token | private ÷ plaintext, median | runs |\n|---|---|---|---|---|"
    )
    for kind in KINDS:
        runs, beside = ([1e3 * float(np.median(run)) for run in found.get(f"{of}{kind}", [])] for of in ("", "beside "))
        if not runs:
            continue
        # A run's own moment of the machine is that of the runs before and after it.
        ratios = [2 * run / (beside[i] + beside[i + 1]) for i, run in enumerate(runs)]
        print(
            f"| {kind} | {np.median(runs):.1f} | {np.median(beside):.1f} | {np.median(ratios):.3f} | "
            f"{', '.join(f'{ratio:.3f}' for ratio in ratios)} |"
        )
    print(f"\nthe base model alone {1e3 * np.median(found['base']):.1f} ms/token")
    for kind, one in watched.items():
        if not one.tokens:
            continue
        parts, server = one.parts.medians(), 1e3 * one.server / one.tokens
        added = sum(parts.values())
        private = 1e3 * float(np.median([token for run in found[kind] for token in run]))
        print(f"\n{kind}: {one.bytes / one.tokens:,.0f} bytes a token, both ways")
        print("of a private token, on the generating thread, ms: ", end="")
        print(", ".join(f"{name} {value:.2f}" for name, value in parts.items()))
        print(f"together {added:.2f} ms, which is {added / (private - added):.4f} of the rest of the token")
        print(f"in the server, from a query's arrival until its answer is ready, ms a token: {server:.2f}; the rest of")
        print("the way to it and back is hidden behind the base product, or is in the waiting")
    print()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def alone(blocks: int) -> None:
    """The private layers by themselves, on one core."""
    torch.set_num_threads(1)
    for name, block in (("warm", 25), ("cold", 1)):
        one = measure(*SHAPE, block=block)
        steps = {"client": one.client_us, "server": one.server_us, "recovery": one.recover_us}
        shares = ", ".join(f"{step} {blocks * micro / 1e3:.2f}" for step, micro in steps.items())
        print(
            f"{blocks} private layers alone, {name}: online {blocks * one.online_us / 1e3:.2f} ms ({shares}), "
            f"offline {blocks * one.offline_us / 1e3:.2f} ms; relative error {one.error:.1e}"
        )


if __name__ == "__main__":
    main()
