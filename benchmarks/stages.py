"""What each part of `revert` contributes, and what a beam search over `mlp`'s readings does without it.

    python benchmarks/inversion.py                      first: it keeps the attackers that are taken apart here
    python benchmarks/stages.py                         stories3M, the last cut, both data sets

Nothing is learnt here; give --out, --budget, --seed and --no-plateau as inversion.py was given them. The beam search
goes over the likeliest readings of each position with the audited base model itself as prior; the prior's weight is the
one of a few that does best on the attacker's own validation text.
"""

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inversion
import torch
from attackers import Counts, grid_of, hits, restored
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitveil
from splitveil.attacks.beam import VALIDATION, beam_search, best_weight, likeliest
from splitveil.attacks.beam import readings as read_together
from splitveil.attacks.knowledge import Prior
from splitveil.attacks.revert import Inverter
from splitveil.auditing.grid import Grid
from splitveil.auditing.intervals import ratio
from splitveil.embedded import folder
from splitveil.split import Crossing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories3M", choices=("stories3M", "embedded"))
    parser.add_argument("--cut", type=int, help="by default the last")
    known = inversion.DATA | inversion.UNSEEN
    parser.add_argument("--data", default=",".join(inversion.DATA), help=f"of {', '.join(known)}, with commas")
    inversion.add_options(parser)
    options = parser.parse_args()
    if inversion.absent(options.shared):
        return
    options.budget = options.budget or 150.0
    path = options.shared / "models/stories3M" if options.model == "stories3M" else folder("base")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    block = model.config.num_hidden_layers if options.cut is None else options.cut
    print(
        f"{datetime.date.today()}, {options.model}, cut {block}, {options.budget:.0f} s to learn, seed {options.seed}, "
        f"splitveil {splitveil.__version__}, torch {torch.__version__}\n"
    )
    for data in options.data.split(","):
        measure(model, path, block, data, options)


@torch.no_grad()
def measure(model: Any, path: Path, block: int, data: str, options: argparse.Namespace) -> None:
    """The table of one data set."""
    texts, own = inversion.victims(options.shared, data), inversion.shadow(options.shared)
    tokenizer, out = AutoTokenizer.from_pretrained(path), options.out / options.model
    sizes = inversion.sizes_of(options)
    grid = grid_of(model, tokenizer, options.model, data, texts, own, sizes, out)
    stage, attacks = restored(grid, out, block, ("mlp", "revert"))
    mlp, net = attacks["mlp"]._net, attacks["revert"].net
    found = readings(net, stage.crossing)
    prior, tokens = Prior(model), grid.shadow.validation[:VALIDATION]
    readers: dict[str, Reader] = {
        "`mlp`": lambda crossing: mlp(crossing.hidden).log_softmax(-1),
        "`revert`'s two readers, without stage 2": lambda crossing: read_together(net, crossing),
    }
    for name, reader in readers.items():
        read = likeliest(reader, stage.crossing)
        weight = best_weight(prior, likeliest(reader, stage.knowledge().oracle(tokens)), tokens)
        found[name] = read.tokens[:, :, 0]
        found[f"{name}, beam search, weight {weight}"] = beam_search(prior, read, stage.crossing.text, weight)
    table(grid, data, {name: hits(tokens, grid.victims) for name, tokens in found.items()})


def table(grid: Grid, data: str, found: dict[str, tuple[Counts, Counts]]) -> None:
    """Token accuracy of each, and how far it is from the whole of `revert`, prompt by prompt."""
    print(f"### {data}, {len(grid.victims.tokens)} prompts\n")
    print("| read by | token accuracy | − all of `revert` |")
    print("|---|---|---|")
    for name, (right, counts) in found.items():
        own = ratio(right, counts, grid.setting.seed)
        less = ratio(right - found[WHOLE][0], counts, grid.setting.seed)
        difference = "" if name == WHOLE else f"{less.value:+.4f} ({less.low:+.4f} to {less.high:+.4f})"
        print(f"| {name} | {own.value:.4f} ({own.low:.4f}–{own.high:.4f}) | {difference} |")
    print()


WHOLE = "all of `revert`"
Reader = Callable[[Crossing], Tensor]
"""Gives log-scores of every token at every position."""


@torch.no_grad()
def readings(net: Inverter, crossing: Crossing) -> dict[str, Tensor]:
    """(prompts, positions) token ids, by each part of the attack and by all of it."""
    text = None if bool(crossing.text.all()) else crossing.text
    points = net.project(crossing.hidden, text)[1]
    directions = functional.normalize(net.embeddings, dim=-1)
    return {
        "stage 1, nearest embedding": (points @ directions.T).argmax(-1),
        "stage 1, its own head": net.scores(points).argmax(-1),
        "the reader of single states": net.alone(crossing.hidden).argmax(-1),
        "stages 1 and 2": net.generate(crossing, say=0.0),
        WHOLE: net.generate(crossing),
    }


if __name__ == "__main__":
    main()
