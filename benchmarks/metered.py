"""What the ledger costs a token: decoding through servers without and with one, in turn.

    PYTHONPATH=tests python benchmarks/metered.py                   the embedded default
    PYTHONPATH=tests python benchmarks/metered.py --qwen            a model of Qwen2-0.5B's shape, random weights
    PYTHONPATH=tests python benchmarks/metered.py --clients 32      32 clients at once, without a model

Servers are processes of their own on this machine; every client has an API key where there is a ledger. Blocks of
tokens alternate between the servers, and go on for longer than a lease of 256 rows. PostgreSQL runs in a temporary
folder, where it is installed.
"""

import argparse
import datetime
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ledger import own_postgresql
from metered_clients import compare
from transformers import AutoModelForCausalLM

from splitveil import connect, disconnect
from splitveil.bench.decode import PROMPT, decode, qwen2_half_billion, served, with_adapter
from splitveil.bench.timing import machine
from splitveil.embedded import folder
from splitveil.metering import Database, Keyring

BLOCK = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qwen", action="store_true")
    parser.add_argument(
        "--rounds", type=int, help=f"of {BLOCK} tokens at every server (12); with --clients: in all (3)"
    )
    parser.add_argument("--clients", type=int, metavar="N", help="so many sessions at once, see metered_clients.py")
    parser.add_argument("--limit", type=int, default=100, help="rows a client and layer, with --clients")
    options = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{datetime.date.today()}, {machine()}")
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        adapter = write_adapter(place / "adapter") if options.qwen else folder("clinic")
        urls: dict[str, str | None] = {"no ledger": None, "SQLite": f"sqlite:///{place / 'ledger.sqlite'}"}
        postgresql = stack.enter_context(own_postgresql())
        if postgresql is not None:
            urls["PostgreSQL"] = postgresql
        if options.clients:
            compare(adapter, urls, options.clients, options.limit, options.rounds or 3)
            return
        options.rounds = options.rounds or 12
        models: dict[str, Any] = {}
        weights = None
        for name, url in urls.items():
            model = base(options.qwen, weights)
            weights = model.state_dict()
            address = stack.enter_context(served(adapter, *([] if url is None else ["--ledger", url])))
            models[name] = connect(model, address, "bench", api_key=None if url is None else key(url))
            stack.callback(disconnect, model)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for model in models.values():
            decode(model, 4)
        for _ in range(options.rounds):
            for name, model in models.items():
                seconds[name] += decode(model, BLOCK)[0]
    report(seconds, options.rounds)


def base(qwen: bool, weights: dict[str, torch.Tensor] | None) -> Any:
    if qwen:
        return qwen2_half_billion(torch.float32, weights)
    return AutoModelForCausalLM.from_pretrained(folder("base"), dtype=torch.float32).eval()


def write_adapter(place: Path) -> Path:
    with_adapter(qwen2_half_billion(torch.float32), 8, ["q_proj", "v_proj"]).save_pretrained(place)
    return place


def key(url: str) -> str:
    """A new client's key."""
    with Database(url) as database:
        return Keyring(database).create("bench")[0]


def report(seconds: dict[str, list[float]], rounds: int) -> None:
    plain = seconds["no ledger"]
    print(f"\n{rounds} × {BLOCK} tokens each, after prompts of {PROMPT}\n")
    print("| | ms a token, median | mean | ÷ no ledger, median (blocks: 10 to 90 %) |\n|---|---|---|---|")
    without = np.array(plain).reshape(rounds, BLOCK)
    for name, taken in seconds.items():
        # Ratios of neighbouring blocks: what slows the machine for a while slows both.
        blocks = np.median(np.array(taken).reshape(rounds, BLOCK), axis=1) / np.median(without, axis=1)
        low, high = np.quantile(blocks, [0.1, 0.9])
        print(
            f"| {name} | {1e3 * np.median(taken):.2f} | {1e3 * np.mean(taken):.2f} | "
            f"{np.median(blocks):.3f} ({low:.3f} to {high:.3f}) |"
        )


if __name__ == "__main__":
    main()
