"""How much of a prompt each attack recovers: model × cut × attack × data set, with intervals.

    python benchmarks/inversion.py                      the subset: stories3M, 9 × 150 s to learn, at most
    python benchmarks/inversion.py --full               both models, 300 s to learn
    python benchmarks/inversion.py --data mts-dialog-2,piqa,alpaca-demo         prompts that nothing was chosen by

All resume: rows and attackers are kept in --out, and what an attacker has learnt serves for all data sets. The models
and texts are those of a folder named `shared` beside the repository, or of --shared DIR: models/stories3M,
data/{gsm8k,wikitext2-small,mts-dialog,presidio-synth-pii,piqa,alpaca-demo}. Shadow text (maths questions, Wikipedia) is
of other domains than the victims' (by default doctor-patient talk, and texts with personal data).
"""

import argparse
import datetime
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attackers import grid_of, hits, restored
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitveil
from splitveil.attacks.attack import silent
from splitveil.auditing.data import Text, read_texts
from splitveil.auditing.grid import Grid, Step
from splitveil.auditing.intervals import ratio
from splitveil.auditing.meta import Names
from splitveil.auditing.prepare import Sizes
from splitveil.embedded import folder

LEARNED = ("mlp", "pooled", "revert")
BEFORE = ("lens", "nearest", "ridge", "mlp")
ATTACKS = ("lens", "nearest", "ridge", *LEARNED, "search")
DATA = {
    "mts-dialog": ("mts-dialog/MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv", "dialogue"),
    "presidio-synth-pii": ("presidio-synth-pii/synth_dataset_v2.json", "full_text"),
}
"""The default. `revert` was given its second reader with these prompts in view (docs/design/attacks-and-audits.md)."""
UNSEEN = {
    "mts-dialog-2": ("mts-dialog/MTS-Dialog-TestSet-2-MEDIQA-Sum-2023.csv", "dialogue"),
    "piqa": ("piqa/valid.jsonl", "goal"),
    "alpaca-demo": ("alpaca-demo/alpaca_en_demo.json", "instruction"),
}
"""Prompts that played no part in how an attack was made."""
OTHERS = {
    "rouge_l": "ROUGE-L F",
    "bleu": "BLEU",
    "exact_match": "exact match",
    "cosine": "cosine of mean input embeddings",
    "personal_recall": "personal data",
}
SHORTEST = 60
"""Characters of a shadow text: Wikipedia's headings are no text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="both models, and more time to learn")
    parser.add_argument("--data", default=",".join(DATA), help=f"of {', '.join(DATA | UNSEEN)}, with commas")
    add_options(parser)
    parser.add_argument("--models", default="", help="only these, with commas")
    parser.add_argument("--cuts", default="", help="only these, with commas")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="with commas")
    options = parser.parse_args()
    if absent(options.shared):
        return
    options.budget = options.budget or (300.0 if options.full else 150.0)
    every = {"stories3M": options.shared / "models/stories3M", "embedded": folder("base")}
    wanted = options.models.split(",") if options.models else every if options.full else ["stories3M"]
    print(
        f"{datetime.date.today()}, {options.budget:.0f} s to learn, seed {options.seed}, "
        f"splitveil {splitveil.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    for name in wanted:
        measure(name, every[name], options)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What says which attackers are meant; stages.py takes the same."""
    parser.add_argument("--budget", type=float, help="seconds that an attack may learn at a cut")
    parser.add_argument("--seed", type=int, default=0, help="of the attackers, and of which prompts are taken")
    parser.add_argument("--no-plateau", action="store_true", help="attackers use all of their time")
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path("inversion"))


def sizes_of(options: argparse.Namespace) -> Sizes:
    return Sizes(budget=options.budget, seed=options.seed, plateau=not options.no_plateau)


def measure(name: str, path: Path, options: argparse.Namespace) -> None:
    """One model: the audit of each data set, and its tables."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    blocks = model.config.num_hidden_layers
    cuts = tuple(map(int, options.cuts.split(","))) if options.cuts else (1, blocks // 2, blocks)
    out, own, sizes = options.out / name, shadow(options.shared), sizes_of(options)
    for data in options.data.split(","):
        texts = victims(options.shared, data)
        report = splitveil.audit(
            model,
            tokenizer,
            texts,
            own,
            cuts=cuts,
            attacks=options.attacks.split(","),
            out=out,
            budget=sizes.budget,
            seed=sizes.seed,
            plateau=sizes.plateau,
            names=Names(name, data, " ".join(sys.argv)),
            watch=watch,
        )
        print(f"\r{' ' * 100}\r", end="", file=sys.stderr)
        table(name, data, report)
        paired(grid_of(model, tokenizer, name, data, texts, own, sizes, out), out, cuts, report)
        others(report)
        report.to_html(out / "reports" / data)
    curves(report)


def absent(shared: Path) -> bool:
    """Says so where there is nothing to measure with."""
    if not shared.is_dir():
        print(f"skipped: {shared} is missing, which holds the models and texts of this benchmark (--shared DIR)")
    return not shared.is_dir()


def victims(shared: Path, data: str) -> list[Text]:
    file, column = (DATA | UNSEEN)[data]
    return read_texts(str(shared / "data" / file), column)


def shadow(shared: Path) -> list[Text]:
    """As many maths questions as paragraphs of Wikipedia."""
    maths = read_texts(str(shared / "data/gsm8k/train.jsonl"), "question")
    wiki = [
        text
        for part in ("valid", "test")
        for text in read_texts(str(shared / f"data/wikitext2-small/{part}.txt"), None)
        if len(text.text) > SHORTEST
    ]
    count = min(len(maths), len(wiki))
    return [text for pair in zip(maths[:count], wiki[:count], strict=True) for text in pair]


def table(model: str, data: str, report: Any) -> None:
    """Token accuracy by cut and attack, and what the attack is judged by."""
    if not report.valid:
        print(f"INVALID: {report.meta['invalid']}")
    measured = {row.attack for row in report.scores}
    names = [name for name in ("floor", "floor:commonest", "oracle", *ATTACKS) if name in measured]
    print(f"### {model}, {data}, {report.scores[0].prompts} prompts\n")
    compared = measured.issuperset((*BEFORE, "pooled", "revert"))
    print(f"| cut | {' | '.join(names)} |" + f" revert − best of {', '.join(BEFORE)} | revert ÷ pooled |" * compared)
    print("|---" * (len(names) + 1 + 2 * compared) + "|")
    for cut in sorted({row.cut for row in report.scores}):
        rows = {row.attack: row for row in report.scores if row.cut == cut}
        cells = [cell(rows[name]) for name in names]
        if compared:
            revert = rows["revert"].value
            cells += [
                f"{revert - max(rows[name].value for name in BEFORE):+.4f}",
                f"{revert / rows['pooled'].value:.2f}",
            ]
        print(f"| {cut} | {' | '.join(cells)} |")
    print()
    facts = {(row.cut, row.metric): row.value for row in report.rows if row.attack == "search" and row.error is None}
    for cut in sorted({cut for cut, _ in facts}):
        tries = ", ".join(f"{name} {facts[cut, f'evaluations_{name}']:.1f}" for name in ("median", "mean", "p99"))
        print(f"- search, cut {cut}: candidates a token {tries}; certified {facts[cut, 'certified']:.1%}")
    print()


def paired(grid: Grid, out: Path, cuts: Sequence[int], report: Any) -> None:
    """`revert` beside the best of the earlier attacks, prompt by prompt, where all were measured. Both meet the same
    prompts, so that the interval of the difference is narrower than theirs. What was learnt is restored, and read with
    again.
    """
    scores = {(row.cut, row.attack): row.value for row in report.scores if row.error is None}
    for cut in cuts:
        if not all((cut, name) in scores for name in (*BEFORE, "revert")):
            continue
        stage, attacks = restored(grid, out, cut, (*BEFORE, "revert"))
        right = {}
        for name, attack in attacks.items():
            right[name], counts = hits(attack.recover(stage.crossing, silent).tokens.cpu(), grid.victims)
            again = right[name].sum() / counts.sum()
            if not math.isclose(again, scores[cut, name], abs_tol=1e-3):
                print(f"- NOT THE SAME: {name} at cut {cut} reads {again:.4f} now and {scores[cut, name]:.4f} before")
        best = max(BEFORE, key=lambda name: right[name].sum())
        found = ratio(right["revert"] - right[best], counts, grid.setting.seed)
        print(
            f"- cut {cut}: revert − {best} {found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f}), "
            f"95 % by paired bootstrap over {found.prompts} prompts"
        )
    print()


def others(report: Any) -> None:
    """The other metrics, by cut and attack."""
    found = {(row.cut, row.attack, row.metric): row for row in report.rows if row.error is None}
    print(f"| cut | attack | {' | '.join(OTHERS.values())} |")
    print("|---" * (len(OTHERS) + 2) + "|")
    for cut in sorted({row.cut for row in report.scores}):
        for name in ("floor", "floor:commonest", *ATTACKS):
            rows = [found[cut, name, metric] for metric in OTHERS if (cut, name, metric) in found]
            if rows:
                print(f"| {cut} | {name} | {' | '.join(cell(row) for row in rows)} |")
    print()


def cell(row: Any) -> str:
    """A figure with its interval; a dash where it does not apply, as for personal data where none is marked."""
    if row.error is None and math.isnan(row.value):
        return "–"
    return row.error or f"{row.value:.3f} ({row.low:.3f}–{row.high:.3f})"


def curves(report: Any) -> None:
    """Whether learning had flattened: validation in the end and after half of the steps, and why it ended."""
    print("| attack | cut | texts asked | steps | seconds | validation | after half of the steps | ended |")
    print("|---" * 8 + "|")
    for one in report.meta["learning"]:
        if one["steps"] is not None:
            earlier = "–" if one["halfway"] is None else f"{one['halfway']:.3f}"
            ended = "had flattened" if one["plateau"] else "still rising" if one["rising"] else ""
            cells = [one["queries"] or "–", one["steps"], f"{one['seconds']:.0f}", f"{one['validation']:.3f}", earlier]
            print(f"| {one['attack']} | {one['cut']} | {' | '.join(map(str, cells))} | {ended} |")
    print()


def watch(step: Step) -> None:
    print(
        f"\r{step.unit + 1}/{step.units} {step.label} {step.done:.0%} {step.note}".ljust(100), end="", file=sys.stderr
    )


if __name__ == "__main__":
    main()
