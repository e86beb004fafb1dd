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
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import splitveil
from splitveil.attacks.knowledge import Shadow
from splitveil.attacks.revert import SAY, Inverter
from splitveil.auditing.grid import Grid
from splitveil.auditing.intervals import ratio
from splitveil.auditing.stage import Stage
from splitveil.embedded import folder
from splitveil.split import Crossing

CANDIDATES = 8
BEAMS = 8
PROMPTS = 32
"""Prompts searched at a time."""
WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 1.0)
VALIDATION = 32
"""Windows of the attacker's own that choose the prior's weight."""


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
    mlp, net = attacks["mlp"]._net, attacks["revert"]._net
    found = readings(net, stage.crossing)
    readers: dict[str, Reader] = {
        "`mlp`": lambda crossing: mlp(crossing.hidden).log_softmax(-1),
        "`revert`'s two readers, without stage 2": lambda crossing: together(net, crossing),
    }
    for name, reader in readers.items():
        scores = reader(stage.crossing)
        weight = chosen(model, reader, stage, grid.shadow)
        found[name] = scores.argmax(-1)
        found[f"{name}, beam search, weight {weight}"] = beam_search(model, scores, stage.crossing.text, weight)
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


def together(net: Inverter, crossing: Crossing) -> Tensor:
    """(prompts, positions, vocabulary) log-scores of stage 1 and the single states' reader, weighed as in `revert`."""
    text = None if bool(crossing.text.all()) else crossing.text
    points = net.project(crossing.hidden, text)[1]
    return net.scores(points).log_softmax(-1) + SAY * net.alone(crossing.hidden).log_softmax(-1)


@torch.no_grad()
def chosen(model: Any, reader: "Reader", stage: Stage, shadow: Shadow) -> float:
    """The prior's weight that reads validation text best; of equals, the smallest."""
    tokens = shadow.validation[:VALIDATION]
    crossing = stage.knowledge().oracle(tokens)
    scores = reader(crossing)
    right = [int((beam_search(model, scores, crossing.text, weight) == tokens).sum()) for weight in WEIGHTS]
    return WEIGHTS[right.index(max(right))]


@torch.no_grad()
def beam_search(
    model: Any, scores: Tensor, text: Tensor, weight: float, candidates: int = CANDIDATES, beams: int = BEAMS
) -> Tensor:
    """(prompts, positions) token ids: for each prompt the text whose log-probability as it was read, ``scores``
    (prompts, positions, vocabulary), plus ``weight`` times the model's own is highest among those that were followed.

    ``text`` (prompts, positions) says where there is any; it is padded on the right.
    """
    parts = zip(torch.split(scores, PROMPTS), torch.split(text, PROMPTS), strict=True)
    return torch.cat([_searched(model, some, there, weight, candidates, beams) for some, there in parts])


def _searched(model: Any, scores: Tensor, text: Tensor, weight: float, candidates: int, beams: int) -> Tensor:
    prompts, positions, vocabulary = scores.shape
    read, tokens = scores.topk(min(candidates, vocabulary))
    totals, found = read[:, 0, :beams], tokens[:, 0, :beams, None]
    cache = DynamicCache()
    for position in range(1, positions):
        followed = totals.shape[1]
        logits = model(input_ids=found[:, :, -1].reshape(-1, 1), past_key_values=cache, use_cache=True).logits[:, -1]
        likely = logits.float().log_softmax(-1).view(prompts, followed, -1)
        here = tokens[:, position]
        step = read[:, position, None] + weight * likely.gather(2, here[:, None].expand(-1, followed, -1))
        # After the end nothing is judged, and every beam goes on as itself.
        ended = torch.full_like(step, -torch.inf)
        ended[:, :, 0] = 0
        step = torch.where(text[:, position, None, None], step, ended)
        every = (totals[:, :, None] + step).flatten(1)
        totals, best = every.topk(min(beams, every.shape[1]))
        parents, choice = best // step.shape[2], best % step.shape[2]
        cache.reorder_cache((torch.arange(prompts)[:, None] * followed + parents).flatten())
        before = found.gather(1, parents[:, :, None].expand(-1, -1, found.shape[2]))
        found = torch.cat([before, here.gather(1, choice)[:, :, None]], 2)
    return found[:, 0]


if __name__ == "__main__":
    main()
