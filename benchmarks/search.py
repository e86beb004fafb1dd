"""The exact search: candidates a token with its learnt ranking, against brute force over the vocabulary, in one run.

    python benchmarks/search.py                     both models, every cut, fp32, bf16 and int8 crossings (≈ 20 minutes)
    python benchmarks/search.py --cuts 1,3,6 --defences none

Models and texts as in inversion.py; 20 prompts of 40 tokens from each data set. Brute force runs every vocabulary entry
through the device half for each of the first positions of one prompt.
"""

import argparse
import datetime
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inversion import DATA, absent, victims
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitveil
from splitveil.attacks.attack import Effort, silent
from splitveil.attacks.knowledge import Access, Knowledge, WhiteBox
from splitveil.attacks.search import Search, twins
from splitveil.defences.catalogue import create
from splitveil.embedded import folder
from splitveil.split import DeviceHalf, cut

PROMPTS, TOKENS = 20, 40
BRUTE = 6
"""Positions that brute force recovers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--models", default="stories3M,embedded", help="with commas")
    parser.add_argument("--cuts", default="0,1,2,3,4,5,6", help="with commas")
    parser.add_argument("--defences", default="none,bfloat16,int8", help="with commas")
    options = parser.parse_args()
    if absent(options.shared):
        return
    print(f"{datetime.date.today()}, splitveil {splitveil.__version__}, torch {torch.__version__}\n")
    columns = (
        *("model", "cut", "crossing", "tokens right", "of those with an embedding of their own", "certified"),
        *("candidates a token: median", "mean", "99th percentile", "most", "s to learn", "ms a token"),
    )
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    brute: list[str] = []
    paths = {"stories3M": options.shared / "models/stories3M", "embedded": folder("base")}
    for name, path in {name: paths[name] for name in options.models.split(",")}.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokens = prompts(AutoTokenizer.from_pretrained(path), options.shared)
        for block in map(int, options.cuts.split(",")):
            for spec in options.defences.split(","):
                print(f"| {name} | {block} | {spec} | " + measure(model, block, spec, tokens), flush=True)
            brute.append(f"| {name} | {block} | " + against_brute_force(model, block, tokens))
    print("\nBrute force beside it: candidates, and milliseconds, a token.\n")
    print("| model | cut | brute force | ranked | ratio | brute force ms | ranked ms | ratio |")
    print("|" + "---|" * 8)
    print("\n".join(brute))


def prompts(tokenizer: Any, shared: Path) -> Tensor:
    """(2 × PROMPTS, TOKENS) token ids: the first texts of each data set that are long enough."""
    found = []
    for data in DATA:
        ids = (tokenizer(text.text)["input_ids"] for text in victims(shared, data))
        found += [one[:TOKENS] for one in ids if len(one) >= TOKENS][:PROMPTS]
    return torch.tensor(found)


def fitted(device: DeviceHalf, spec: str, vocabulary: int, width: int) -> tuple[Search, WhiteBox, Any, float]:
    defence = create(spec, 0)
    white_box = WhiteBox(device, defence.protect)
    known = Knowledge(vocabulary, width, frozenset({Access.WEIGHTS}), _white_box=white_box)
    search = Search()
    begun = time.perf_counter()
    search.fit(known, Effort(), silent)
    return search, white_box, defence, time.perf_counter() - begun


def measure(model: Any, block: int, spec: str, tokens: Tensor) -> str:
    device = cut(model, block).device
    search, _, defence, learning = fitted(device, spec, model.config.vocab_size, model.config.hidden_size)
    with torch.no_grad():
        crossing = defence.protect(device(tokens))
    embeddings = model.get_input_embeddings().weight.detach()
    begun = time.perf_counter()
    found = search.recover(crossing, silent)
    seconds = time.perf_counter() - begun
    right, own = found.tokens == tokens, ~twins(embeddings, torch.arange(len(embeddings)))[tokens]
    tries = found.facts["evaluations"].numpy()
    figures = f"{np.median(tries):.0f} | {tries.mean():.2f} | {np.percentile(tries, 99):.0f} | {tries.max():.0f}"
    sure = found.facts["certified"].mean().item()
    shares = f"{right.float().mean():.4f} | {right[own].float().mean():.4f} | {sure:.4f}"
    return f"{shares} | {figures} | {learning:.1f} | {1000 * seconds / tokens.numel():.1f} |"


def against_brute_force(model: Any, block: int, tokens: Tensor) -> str:
    device, one = cut(model, block).device, tokens[:1, :BRUTE]
    search, white_box, _, _ = fitted(device, "none", model.config.vocab_size, model.config.hidden_size)
    with torch.no_grad():
        crossing = device(one)
    begun = time.perf_counter()
    found = search.recover(crossing, silent)
    quick = time.perf_counter() - begun
    tries = found.facts["evaluations"].mean().item()

    before, prefix = white_box.evaluations, one[:, :0]
    begun = time.perf_counter()
    for position in range(BRUTE):
        every = torch.arange(model.config.vocab_size)[:, None]
        texts = torch.cat([prefix.expand(len(every), -1), every], 1)
        states = torch.cat([white_box(part).hidden[:, -1] for part in torch.split(texts, 512)])
        best = (states - crossing.hidden[0, position]).norm(dim=1).argmin()
        prefix = torch.cat([prefix, best.view(1, 1)], 1)
    slow = time.perf_counter() - begun
    if not torch.equal(prefix, one) or not torch.equal(found.tokens, one):
        return "wrong tokens |"
    all_ = (white_box.evaluations - before) / BRUTE
    per = 1000 * slow / BRUTE, 1000 * quick / BRUTE
    return f"{all_:.0f} | {tries:.1f} | {all_ / tries:.0f} × | {per[0]:.0f} | {per[1]:.1f} | {per[0] / per[1]:.0f} × |"


if __name__ == "__main__":
    main()
