"""How many rows rebuild an adapter, by attack and noise, what the noise costs, and whether the ledger says the same.

    python benchmarks/extraction.py --out DIR                                     the embedded default
    python benchmarks/extraction.py --out DIR --base B --adapter A --data FILE    another one

A row is a token. Both parts resume: what was measured is kept in --out. The embedded default is judged on the held-out
pairs of its training text (../shared/text/medquad, or --shared DIR), which DIR/held_out.jsonl then holds.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
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
from splitveil.extraction.directed import ask_along
from splitveil.extraction.guessed import SEEDS, Guesses
from splitveil.extraction.honest import relative_error
from splitveil.extraction.known import row_space
from splitveil.extraction.measure import DIRECTED_TOKENS, Judge, worth_of_directions
from splitveil.extraction.page import write_page
from splitveil.extraction.prior import Plan, informed, root_of_prior, root_of_weight
from splitveil.extraction.rows import Row
from splitveil.extraction.run import Subject, run
from splitveil.extraction.target import Target, publish_target
from splitveil.extraction.worth import Text
from splitveil.private.columns import peak_ratio
from splitveil.private.core import core_rms
from splitveil.private.directions import Directions
from splitveil.private.leakage import leakage, rows_until

NOISES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
SHARES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
TIMES = (1, 2, 3)
"""Multiples of every width that are among the rows: where the attack on columns takes its steps."""
ATTACKS = ("chosen", "directed", "honest", "trained-A", "initial-A")
ASIDE = ("span", "published")
"""Attacks with tables of their own: they ask for nothing, or for the first r rows."""
PARTS = (1 / 32, 0.125, 0.25, 0.5, 0.75, 0.9375, 1.0)
"""Of d: rows at which the attack and the ledger's figure are compared."""
LEAST = 1e-3
"""Errors below it are not compared: what is left there is the rounding of the integer core."""
CLONE = 0.95
"""Of the adapter's gain in perplexity: what a clone has to bring back to count as one."""
ERRORS = (0.1, 0.01, 0.0)
TRIES = 3


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
    parser.add_argument("--attacks", default=",".join((*ATTACKS, *ASIDE)))
    parser.add_argument("--initial", default=SEEDS, help="where initial-A looks: seeds, or a PEFT folder")
    parser.add_argument("--ledger-only", action="store_true", help="compare with the ledger, and no more")
    parser.add_argument("--errors", default=",".join(map(str, ERRORS)), help="of ΔW, to compare at; 0 is exact")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    adapter = load_adapter(options.adapter)
    noises = tuple(map(float, options.noises.split(",")))
    errors = tuple(map(float, options.errors.split(",")))
    options.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    judged = texts(options)
    (options.out / "held_out.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in judged))
    text = Text.of(tokenizer, judged, tokens=options.tokens, length=256)
    widths = sorted({module.d_in for module in adapter.modules})
    rank = max(module.rank for module in adapter.modules)
    mine = text.halves()[0].tokens
    wanted = [round(share * widths[0]) for share in SHARES] + [times * width for times in TIMES for width in widths]
    rows = sorted({rank, *(n for n in wanted if n <= mine)})
    digest = f"{adapter.digest} {text.windows.sum().item()}"
    subject = Subject(model, adapter, text, options.adapter.name, digest, options.initial)
    attacks = options.attacks.split(",")
    judge = Judge(model, publish_target(adapter, 0.0), text, Guesses(model, adapter.path, options.initial))
    if options.ledger_only:
        ledger(judge, adapter, noises, errors, options.out / "agreement.jsonl")
        return
    found = run(
        subject,
        rows=rows,
        noises=noises,
        out=options.out,
        attacks=attacks,
        watch=lambda words: print(f"\r{words:60}", end="", file=sys.stderr),
    )
    print(file=sys.stderr)
    print(f"{options.adapter.name}: d = {_list(widths)}, r = {rank}, {text.tokens} tokens, half of them judge\n")
    if judged_on_text := [attack for attack in ATTACKS if attack in attacks]:
        worth(found, noises, judged_on_text)
    for attack in ASIDE:
        aside(found, attack)
    command = "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    print(f"report: {write_page(found, options.out, command)}\n")
    if "directed" in attacks:
        below(judge, adapter, noises)
    if attacks != [*ATTACKS, *ASIDE]:
        return
    ledger(judge, adapter, noises, errors, options.out / "agreement.jsonl")
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


def worth(found: Sequence[Row], noises: Sequence[float], attacks: Sequence[str]) -> None:
    """Perplexity lost to the noise, the fewest rows measured after which each attack has a clone, and all clones."""
    value = {(one.attack, one.noise, one.rows, one.metric): one.value for one in found}
    quiet, base = value["adapter", 0.0, 0, "perplexity"], value["base", 0.0, 0, "perplexity"]
    goal = base - CLONE * (base - quiet)
    measured = sorted({one.rows for one in found if one.attack in attacks})
    print(f"perplexity without the adapter {base:.2f}, with it {quiet:.2f}; measured at {_list(measured)} rows\n")
    heads = ["noise", "perplexity", "of the gain lost", "attack", f"rows to {round(100 * CLONE)} % of the gain"]
    heads += [f"rows to {_error(error)}" for error in ERRORS]
    _heads(heads)
    for noise in noises:
        here = value["adapter", noise, 0, "perplexity"]
        cells = [f"{100 * noise:g} %", f"{here:.2f}", f"{100 * (here - quiet) / (base - quiet):.2f} %"]
        for attack in attacks:
            rows = [_first(value, attack, noise, "perplexity", goal)]
            rows += [_first(value, attack, noise, "error", error) for error in ERRORS[:-1]]
            # Only this attack is after integers.
            rows.append(_first(value, attack, noise, "exact", 1.0, least=True) if attack == "chosen" else "")
            print("| " + " | ".join([*cells, attack, *rows]) + " |")
            cells = ["", "", ""]

    def table(words: str, shown: Callable[[str, float, int], str]) -> None:
        print(f"\n{words}, by rows\n")
        _heads(["noise", "attack", *(f"{rows:,}" for rows in measured)])
        for noise in noises:
            for attack in attacks:
                cells = [shown(attack, noise, rows) for rows in measured]
                print("| " + " | ".join([f"{100 * noise:g} %", attack, *cells]) + " |")

    def share(attack: str, noise: float, rows: int) -> str:
        return _percent((base - value.get((attack, noise, rows, "perplexity"), math.nan)) / (base - quiet), ".1f")

    def error(attack: str, noise: float, rows: int) -> str:
        exact = value.get((attack, noise, rows, "exact"), 0.0)
        words = _percent(value.get((attack, noise, rows, "error"), math.nan))
        return words if not exact else f"{words}, {100 * exact:.0f} % exact"

    table("share of the gain that the clone brings back", share)
    table("error of ΔW, all layers together, and the share of layers whose integer core is confirmed", error)
    for one in found:
        if one.error and one.attack in attacks:
            print(f"\n{one.attack}, {100 * one.noise:g} %, {one.rows:,} rows: {one.error}")
    surprises = {(one.noise, one.metric): one.value for one in found if one.metric.startswith("surprise")}
    if surprises:
        print("\nsurprise of the best guess at the initial A, and of a wrong one, before anything else is asked\n")
        _heads(["noise", "the best", "a wrong one"])
        for noise in sorted({noise for noise, _ in surprises}):
            best, wrong = surprises[noise, "surprise"], surprises[noise, "surprise of a wrong guess"]
            print(f"| {100 * noise:g} % | {best:.3f} | {wrong:.3f} |")
    print()


def aside(found: Sequence[Row], attack: str) -> None:
    """What the first rows tell of span(B), or why the published half alone tells nothing."""
    rows = [one for one in found if one.attack == attack]
    if not rows:
        return
    print(f"{attack}\n")
    _heads(["noise", "rows", "of span(B) unknown: mean of the layers, least, most" if attack == "span" else "outcome"])
    for one in rows:
        between = "" if math.isnan(one.low) else f" ({_percent(one.low)} – {_percent(one.high)})"
        print(f"| {100 * one.noise:g} % | {one.rows:,} | {one.error or _percent(one.value) + between} |")
    print()


def _heads(heads: Sequence[str]) -> None:
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))


def _percent(value: float, digits: str = ".3g") -> str:
    return "not measured" if math.isnan(value) else f"{100 * value:{digits}} %"


def _list(rows: Sequence[int]) -> str:
    return ", ".join(f"{one:,}" for one in rows)


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
    return f"{good[0]:,}" if good else f"> {rows[-1]:,}" if rows else "not measured"


def _error(error: float) -> str:
    return f"{100 * error:g} %" if error else "exact"


def ledger(judge: Judge, adapter: Any, noises: Sequence[float], errors: Sequence[float], path: Path) -> None:
    """For a layer of every kind: rows that the ledger says, and rows that the best attack needs, in steps of 5 %."""
    curves = worth_of_directions(judge)
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(one["noise"], one["kind"], one["error"]): one for one in kept}
    kinds = kinds_of(publish_target(adapter, 0.0))
    print("rows the ledger says → rows the best attack needs (ratio), for one layer of every kind\n")
    print("| noise | layer | κ | " + " | ".join(map(_error, errors)) + " |")
    print("|" + "---|" * (len(errors) + 3))
    ratios = []
    for noise in noises:
        target: Target | None = None
        for kind, layer in kinds.items():
            for error in errors:
                if (noise, kind, error) in done:
                    continue
                target = target or publish_target(adapter, noise)
                peak = peak_ratio([target.core(layer)])
                own = curves[target.publication.layers[layer].outputs[0][0]]
                said, needed = compared(judge, target, layer, error, own)
                line = {"noise": noise, "kind": kind, "error": error, "peak": peak, "said": said, "needed": needed}
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                done[noise, kind, error] = line
            lines = [done[noise, kind, error] for error in errors]
            ratios += [one["needed"] / one["said"] for one in lines if one["needed"] and one["said"]]
            cells = " | ".join(map(_ratio, lines))
            print(f"| {100 * noise:g} % | {kind} | {lines[0]['peak']:.1f} | {cells} |", flush=True)
    count = len(noises) * len(kinds) * len(errors)
    print(f"\n{len(ratios)} of {count} compared; ratios from {min(ratios):.2f} to {max(ratios):.2f}\n")


def below(judge: Judge, adapter: Any, noises: Sequence[float]) -> None:
    """For a layer of every kind, up to d rows: the error that the better attack reaches, over what the ledger says."""
    kinds, curves = kinds_of(judge.target), worth_of_directions(judge)
    print(
        "error of the best attack (c: chosen, d: directed, i: initial-A) ÷ the ledger's figure, for one layer of every"
    )
    print("kind; last, the least of them ÷ the figure without directions\n")
    _heads(["noise", *(f"{share:g} d" for share in PARTS), "least without directions"])
    ratios = []
    for noise in noises:
        target = publish_target(adapter, noise)
        cells: list[str] = []
        blind = []
        for share in PARTS:
            found = []
            for layer in kinds.values():
                width = target.publication.layers[layer].width
                rows, channel = round(share * width), channel_of(target, layer)
                errors = attacked(judge, target, layer, rows)
                own = curves[target.publication.layers[layer].outputs[0][0]]
                error, name = min((max(error, LEAST), name) for name, error in errors.items())
                found.append((error / max(leakage(channel, rows, own).error, LEAST), name))
                blind.append(error / max(leakage(channel, rows).error, LEAST))
            ratios += [ratio for ratio, _ in found]
            names = "".join(sorted({name for _, name in found}))
            cells.append(f"{min(found)[0]:.2f} – {max(found)[0]:.2f} {names}")
        print(f"| {100 * noise:g} % | {' | '.join(cells)} | {min(blind):.2f} |", flush=True)
    print(f"\n{len(ratios)} compared; ratios from {min(ratios):.2f} to {max(ratios):.2f}\n")


@lru_cache(maxsize=1)
def planned(judge: Judge, layer: int) -> Plan:
    """What who has recognised the initial A asks of a layer."""
    name, basis = judge.target.publication.layers[layer].outputs[0][0], judge.main_directions[layer]
    weight = root_of_weight(len(basis), judge.foreseen(DIRECTED_TOKENS)[layer])
    return Plan.of(root_of_prior(row_space(judge.recognised.rows[name]), judge.recognised.outside), weight)


def attacked(judge: Judge, target: Target, layer: int, rows: int) -> dict[str, float]:
    """Relative error of one layer's core after every attack that plans its own queries."""
    truth, basis = target.core(layer), judge.main_directions[layer]
    peak = float(np.abs(truth @ basis.T).max()) / core_rms(len(basis))
    tries = {
        "c": chosen(target.client(), layer, rows, peak_ratio=peak_ratio([truth])).values,
        "d": ask_along(target.client(), layer, rows, basis, peak),
    }
    if judge.recognised.sure:
        plan = planned(judge, layer)
        tries["i"] = informed(target.client(), layer, rows, plan, plan.peak_ratio(truth))
    return {name: relative_error(one, truth) for name, one in tries.items()}


def kinds_of(target: Target) -> dict[str, int]:
    """Name and width → a published layer: one of every kind, each from another block where there are enough blocks."""
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(target.publication.layers):
        names = "+".join(name.rpartition(".")[2] for name, _ in layer.outputs)
        found.setdefault(f"{names}, d = {layer.width}", []).append(index)
    return {kind: layers[place % len(layers)] for place, (kind, layers) in enumerate(found.items())}


def _ratio(line: dict[str, Any]) -> str:
    if line["said"] is None:
        return "no known way"
    if line["needed"] is None:
        return f"{line['said']:,} → more than twice that"
    return f"{line['said']:,} → {line['needed']:,} ({line['needed'] / line['said']:.2f})"


def compared(
    judge: Judge, target: Target, layer: int, error: float, own: Sequence[Directions]
) -> tuple[int | None, int | None]:
    """(rows said, rows needed); None where nothing is known, and where the search gives up at twice what is said."""
    try:
        said = rows_until(channel_of(target, layer), error, own)
    except OverflowError:
        return None, None
    ratio = peak_ratio([target.core(layer)])

    def reached(rows: int) -> bool:
        if error > 0:
            return min(attacked(judge, target, layer, rows).values()) <= error
        client = target.client()
        got = chosen(client, layer, rows, peak_ratio=ratio)
        return bool(got.seen.all()) and confirm(client, layer, got.integers)

    # Of three tries two must succeed: the first success of a long search would be luck.
    return said, next((rows for rows in _around(said) if sum(reached(rows) for _ in range(TRIES)) * 2 > TRIES), None)


def _around(rows: int) -> Iterator[int]:
    yield from (round(rows * percent / 100) for percent in range(50, 201, 5))


if __name__ == "__main__":
    main()
