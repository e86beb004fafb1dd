"""How many rows rebuild an adapter, by attack and noise, what the noise costs, and whether the ledger says the same.

    python benchmarks/extraction.py --out DIR                                     the embedded default
    python benchmarks/extraction.py --out DIR --base B --adapter A --data FILE    another one

A row is a token. Both parts resume: what was measured is kept in --out. The embedded default is judged on the held-out
pairs of its training text (../shared/text/medquad, or --shared DIR).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from splitveil.adapters import load_adapter
from splitveil.auditing.data import read_texts
from splitveil.embedded import folder
from splitveil.extraction.calibrate import channel_of
from splitveil.extraction.chosen import chosen, confirm
from splitveil.extraction.rows import Row
from splitveil.extraction.run import Subject, run
from splitveil.extraction.target import Target, publish_target
from splitveil.extraction.worth import Text
from splitveil.private.leakage import peak_ratio, rows_until

NOISES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
SHARES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
CLONE = 0.95
"""Of the adapter's gain in perplexity: what a clone has to bring back to count as one."""
ERRORS = (0.1, 0.01, 0.0)
STEP = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=folder("base"))
    parser.add_argument("--adapter", type=Path, default=folder("clinic"))
    parser.add_argument("--data", help="held-out text; needed for other models than the embedded default")
    parser.add_argument("--column")
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="half of them are the attacker's")
    parser.add_argument("--noises", default=",".join(map(str, NOISES)))
    parser.add_argument("--layers", type=int, default=3, help="compared with the ledger, one by one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    adapter = load_adapter(options.adapter)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    text = Text.of(tokenizer, texts(options), tokens=options.tokens, length=256)
    noises = tuple(map(float, options.noises.split(",")))
    width = min(module.d_in for module in adapter.modules)
    rank = max(module.rank for module in adapter.modules)
    mine = text.halves()[0].tokens
    rows = sorted({rank, *(n for share in SHARES if (n := round(share * width)) <= mine)})
    subject = Subject(model, adapter, text, options.adapter.name, f"{adapter.digest} {text.windows.sum().item()}")
    found = run(
        subject,
        rows=rows,
        noises=noises,
        out=options.out,
        attacks=("chosen", "directed", "honest", "known-A"),
        watch=lambda words: print(f"\r{words:60}", end="", file=sys.stderr),
    )
    print(file=sys.stderr)
    print(f"{options.adapter.name}: d = {width}, r = {rank}, {text.tokens} tokens, half of them judge\n")
    worth(found, noises)
    ledger(adapter, noises, options.layers, options.out / "ledger.jsonl")
    print(f"{time.process_time() - began:.0f} s of one core")


def texts(options: argparse.Namespace) -> list[str]:
    if options.data is not None:
        return [one.text for one in read_texts(options.data, options.column)]
    if not (options.shared / "text/medquad").is_dir():
        sys.exit(
            f"{options.shared}/text/medquad is missing: it holds the held-out pairs (--shared DIR, or --data FILE)"
        )
    from corpus import clinic_pairs, dialogue

    return [dialogue(question, answer) for question, answer in clinic_pairs(options.shared / "text", held_out=True)]


def worth(found: Sequence[Row], noises: Sequence[float]) -> None:
    """Perplexity lost to the noise, and the fewest rows measured after which each attack has a clone."""
    attacks = ("chosen", "directed", "honest", "known-A")
    value = {(one.attack, one.noise, one.rows, one.metric): one.value for one in found}
    quiet, base = value["adapter", 0.0, 0, "perplexity"], value["base", 0.0, 0, "perplexity"]
    heads = [f"{name}: rows to {round(100 * CLONE)} % of the gain" for name in attacks]
    heads += [f"chosen: rows to {_error(error)}" for error in ERRORS]
    print(f"perplexity without the adapter {base:.2f}, with it {quiet:.2f}\n")
    print("| noise | perplexity | of the gain lost | " + " | ".join(heads) + " |")
    print("|" + "---|" * (len(heads) + 3))
    for noise in noises:
        here = value["adapter", noise, 0, "perplexity"]
        cells = [f"{100 * noise:g} %", f"{here:.2f}", f"{100 * (here - quiet) / (base - quiet):.2f} %"]
        for attack in attacks:
            goal = base - CLONE * (base - quiet)
            cells.append(_first(value, attack, noise, "perplexity", goal))
        cells += [_first(value, "chosen", noise, "error", error) for error in ERRORS[:-1]]
        cells.append(_first(value, "chosen", noise, "exact", 1.0, least=True))
        print("| " + " | ".join(cells) + " |")
    print()


def _first(
    value: dict[tuple[str, float, int, str], float],
    attack: str,
    noise: float,
    metric: str,
    goal: float,
    *,
    least: bool = False,
) -> str:
    """The fewest rows measured with at most ``goal``, or at ``least`` as much."""
    rows = sorted(n for a, x, n, m in value if (a, x, m) == (attack, noise, metric))
    sign = -1 if least else 1
    good = [n for n in rows if sign * value[attack, noise, n, metric] <= sign * goal]
    return f"{good[0]:,}" if good else f"> {rows[-1]:,}"


def _error(error: float) -> str:
    return f"{100 * error:g} %" if error else "exact"


def ledger(adapter: Any, noises: Sequence[float], count: int, path: Path) -> None:
    """For some layers: rows that the ledger says, and rows that the attack needs, in steps of 5 %."""
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(one["noise"], one["layer"], one["error"]): one for one in kept}
    for noise in noises:
        target: Target | None = None
        for place in range(count):
            for error in ERRORS:
                if (noise, place, error) in done:
                    continue
                target = target or publish_target(adapter, noise)
                layer = place * len(target.publication.layers) // count
                measured, said = compared(target, layer, error)
                line = {"noise": noise, "layer": place, "error": error, "measured": measured, "said": said}
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                done[noise, place, error] = line
    print("rows the attack needs ÷ rows the ledger says, layer by layer\n")
    print("| noise | " + " | ".join(map(_error, ERRORS)) + " |")
    print("|" + "---|" * (len(ERRORS) + 1))
    for noise in noises:
        cells = []
        for error in ERRORS:
            pairs = [done[noise, place, error] for place in range(count)]
            cells.append(", ".join(_ratio(pair) for pair in pairs))
        print(f"| {100 * noise:g} % | " + " | ".join(cells) + " |")
    print()


def _ratio(pair: dict[str, Any]) -> str:
    if pair["said"] is None or pair["measured"] is None:
        return "not measured"
    return f"{pair['measured']}/{pair['said']} = {pair['measured'] / pair['said']:.2f}"


def compared(target: Target, layer: int, error: float) -> tuple[int | None, int | None]:
    """(rows measured, rows said); None where the search gives up."""
    channel = channel_of(target, layer)
    try:
        said = rows_until(channel, error)
    except OverflowError:
        return None, None
    truth, ratio = target.core(layer), peak_ratio([target.core(layer)])
    for rows in _around(said):
        client = target.client()
        got = chosen(client, layer, rows, peak_ratio=ratio)
        if error == 0:
            reached = bool(got.seen.all()) and confirm(client, layer, got.integers)
        else:
            reached = float(np.linalg.norm(got.values - truth) / np.linalg.norm(truth)) <= error
        if reached:
            return rows, said
    return None, said


def _around(rows: int) -> Iterator[int]:
    yield from (math.floor(rows * share) for share in np.arange(0.7, 2.0, STEP))


if __name__ == "__main__":
    main()
