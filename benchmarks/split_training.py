"""What the network costs training: split over a loopback socket, split in this process, and not split, in turn.

    python benchmarks/split_training.py                       the embedded default
    python benchmarks/split_training.py --model DIR           any local causal language model, such as stories3M

U-shape, LoRA of rank 8 on q_proj and v_proj of all blocks, AdamW, float32, windows of random tokens: what text it is
does not change how long it takes. Blocks of steps alternate between the three, and medians are taken over the blocks.
The server of the split run is a process of its own on this machine, so it can compute only where a core is free for it.
"""

import argparse
import contextlib
import datetime
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from splitveil.bench.timing import machine
from splitveil.embedded import resolve
from splitveil.splitlearning.agreement import new_token
from splitveil.splitlearning.cloud import LocalCloud
from splitveil.splitlearning.connection import RemoteCloud
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.splitlearning.loss import next_tokens

RATE = 1e-3
Step = Callable[[Tensor], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:base", help="folder, or embedded:base")
    parser.add_argument("--cut", type=int, help="blocks on the device; without it a third of them")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="in a window")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="in a round, of each kind")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(resolve(options.model), dtype=torch.float32).eval()
    blocks = base.config.num_hidden_layers
    cut = options.cut if options.cut is not None else max(1, blocks // 3)
    plan = Plan(cut, Shape.U, Trains.LORA, Trains.LORA)
    draw = torch.Generator().manual_seed(0)
    count = 1 + options.rounds * options.steps
    shape = (count, options.batch, options.tokens)
    windows = torch.randint(2, base.config.vocab_size, shape, generator=draw)
    with tempfile.TemporaryDirectory() as place, served(options.model, cut, Path(place)) as address:
        remote = RemoteCloud(base, address, cut=cut, shape=Shape.U, plan=plan, token=new_token())
        kinds: dict[str, Step] = {
            "not split": whole(base, plan),
            "split, one process": split(base, plan, LocalCloud(base, cut=cut, shape=Shape.U, plan=plan)),
            "split, over loopback": split(base, plan, remote),
        }
        losses = {name: [step(windows[0])] for name, step in kinds.items()}
        sent, received = remote.traffic.sent, remote.traffic.received
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(options.rounds):
            for name, step in kinds.items():
                rows = windows[1 + turn * options.steps :][: options.steps]
                begun = time.perf_counter()
                losses[name] += [step(tokens) for tokens in rows]
                seconds[name].append((time.perf_counter() - begun) / options.steps)
        steps = options.rounds * options.steps
        up, down = (remote.traffic.sent - sent) / steps, (remote.traffic.received - received) / steps
        remote.close()
    report(options, cut, blocks, seconds, losses, (up, down))


def whole(base: Any, plan: Plan) -> Step:
    """Training as transformers, PEFT and torch do it."""
    own = AutoModelForCausalLM.from_config(base.config, dtype=torch.float32)
    own.load_state_dict(base.state_dict())
    torch.manual_seed(plan.seed)
    model = get_peft_model(
        own, LoraConfig(r=plan.rank, lora_alpha=plan.alpha, target_modules=list(plan.targets))
    ).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    o = plan.optimiser
    optimiser = torch.optim.AdamW(
        trained, lr=RATE, betas=(o.beta1, o.beta2), eps=o.epsilon, weight_decay=o.weight_decay
    )

    def step(tokens: Tensor) -> float:
        logits = model(input_ids=tokens, use_cache=False).logits
        labels = next_tokens(tokens)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        ) / predicted(tokens)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def split(base: Any, plan: Plan, cloud: Any) -> Step:
    """The same through a cut."""
    device = Device(base, cut=plan.cut, shape=plan.shape, plan=plan)

    def step(tokens: Tensor) -> float:
        loss = device.learn(cloud, tokens, next_tokens(tokens), predicted(tokens))
        cloud.step(RATE)
        device.step(RATE)
        return loss

    return step


def predicted(tokens: Tensor) -> float:
    return float(tokens.shape[0] * (tokens.shape[1] - 1))


@contextlib.contextmanager
def served(model: str, cut: int, place: Path) -> Iterator[str]:
    """A server process of the same model; yields its address."""
    command = [sys.executable, "-c", "import torch; torch.set_num_threads(1); from splitveil.cli import main; main()"]
    arguments = ["split", "serve", "--model", model, "--cut", str(cut), "--state", str(place), "--train", "lora"]
    process = subprocess.Popen(
        [*command, *arguments, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        lines = process.stdout or []
        yield next(line.split()[2] for line in lines if line.startswith("listening on "))
    finally:
        process.terminate()
        process.wait()


def report(
    options: argparse.Namespace,
    cut: int,
    blocks: int,
    seconds: dict[str, list[float]],
    losses: dict[str, list[float]],
    traffic: tuple[float, float],
) -> None:
    tokens = options.batch * options.tokens
    print(f"{datetime.date.today()}, {machine()}\n")
    print(
        f"{Path(options.model).name}, cut after {cut} of {blocks} blocks, {options.batch} × {options.tokens} tokens a "
        f"step; {options.rounds} × {options.steps} steps each, one torch thread a process\n"
    )
    print("| | tokens a second, median (slowest and fastest round) | ÷ not split, median of rounds | last loss |")
    print("|---|---|---|---|")
    plain = seconds["not split"]
    for name, taken in seconds.items():
        # Ratios of neighbouring rounds: what slows the machine for a while slows both.
        ratio = statistics.median(own / other for own, other in zip(taken, plain, strict=True))
        rates = sorted(tokens / each for each in taken)
        spread = f"{statistics.median(rates):,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f})"
        print(f"| {name} | {spread} | {ratio:.2f} × the time | {losses[name][-1]:.6f} |")
    furthest = max(
        abs(own - other) for name in losses for own, other in zip(losses[name], losses["not split"], strict=True)
    )
    up, down = traffic
    print(
        f"\n{up:,.0f} bytes up and {down:,.0f} down a step ({up / tokens:,.0f} and {down / tokens:,.0f} a token); "
        f"largest difference of any loss from unsplit training: {furthest:.1e}"
    )


if __name__ == "__main__":
    main()
