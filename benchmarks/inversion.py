"""How much of a prompt each attack recovers: model × cut × attack × data set, with intervals.

    python benchmarks/inversion.py                      the subset: stories3M, 9 × 150 s to learn, at most
    python benchmarks/inversion.py --full               both models, 300 s to learn

Both resume: rows are kept in --out. The models and texts are those of a folder named `shared` beside the repository,
or of --shared DIR: models/stories3M, data/{gsm8k,wikitext2-small,mts-dialog,presidio-synth-pii}. Shadow text (maths
questions, Wikipedia) is of other domains than the victims' (doctor-patient talk, texts with personal data).
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitveil
from splitveil.auditing.data import Text, read_texts
from splitveil.auditing.grid import Step
from splitveil.auditing.meta import Names
from splitveil.embedded import folder

LEARNED = ("mlp", "pooled", "revert")
BEFORE = ("lens", "nearest", "ridge", "mlp")
ATTACKS = ("lens", "nearest", "ridge", *LEARNED, "search")
DATA = {
    "mts-dialog": ("MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv", "dialogue"),
    "presidio-synth-pii": ("synth_dataset_v2.json", "full_text"),
}
SHORTEST = 60
"""Characters of a shadow text: Wikipedia's headings are no text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="both models, and more time to learn")
    parser.add_argument("--budget", type=float, help="seconds that an attack may learn at a cut")
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path("inversion"))
    parser.add_argument("--models", default="", help="only these, with commas")
    parser.add_argument("--cuts", default="", help="only these, with commas")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="with commas")
    options = parser.parse_args()
    if absent(options.shared):
        return
    budget = options.budget or (300.0 if options.full else 150.0)
    models = {"stories3M": options.shared / "models/stories3M"}
    if options.full:
        models["embedded"] = folder("base")
    if options.models:
        models = {"stories3M": options.shared / "models/stories3M", "embedded": folder("base")}
        models = {name: models[name] for name in options.models.split(",")}
    print(
        f"{datetime.date.today()}, {budget:.0f} s to learn, "
        f"splitveil {splitveil.__version__}, torch {torch.__version__}\n"
    )
    for name, path in models.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        blocks = model.config.num_hidden_layers
        cuts = tuple(map(int, options.cuts.split(","))) if options.cuts else (1, blocks // 2, blocks)
        out = options.out / name
        for data in DATA:
            report = splitveil.audit(
                model,
                tokenizer,
                victims(options.shared, data),
                shadow(options.shared),
                cuts=cuts,
                attacks=options.attacks.split(","),
                out=out,
                budget=budget,
                names=Names(name, data, " ".join(sys.argv)),
                watch=watch,
            )
            print(f"\r{' ' * 100}\r", end="", file=sys.stderr)
            table(name, data, report)
            report.to_html(out / f"{data}.html")
        curves(out)


def absent(shared: Path) -> bool:
    """Says so where there is nothing to measure with."""
    if not shared.is_dir():
        print(f"skipped: {shared} is missing, which holds the models and texts of this benchmark (--shared DIR)")
    return not shared.is_dir()


def victims(shared: Path, data: str) -> list[Text]:
    file, column = DATA[data]
    return read_texts(str(shared / "data" / data / file), column)


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
    judged = measured.issuperset((*BEFORE, "pooled", "revert"))
    print(f"| cut | {' | '.join(names)} |" + f" revert − best of {', '.join(BEFORE)} | revert ÷ pooled |" * judged)
    print("|---" * (len(names) + 1 + 2 * judged) + "|")
    for cut in sorted({row.cut for row in report.scores}):
        rows = {row.attack: row for row in report.scores if row.cut == cut}
        cells = [cell(rows[name]) for name in names]
        if judged:
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


def cell(row: Any) -> str:
    return row.error or f"{row.value:.3f} ({row.low:.3f}–{row.high:.3f})"


def curves(out: Path) -> None:
    """Whether learning had flattened: the validation score in the end, and what the last half of the time brought."""
    print("| attack, cut | steps | seconds | validation | half of the time before |")
    print("|---|---|---|---|---|")
    for path in sorted((out / "fitted").glob("*.safetensors")):
        state = load_file(path)
        if "curve" in state:
            label = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])[
                "__metadata__"
            ]
            curve = state["curve"]
            seconds, steps, _ = curve[-1].tolist()
            before = curve[curve[:, 0] <= seconds / 2][:, 2]
            earlier = f"{before.max():.3f}" if len(before) else "–"
            print(f"| {label['attack']} | {steps:.0f} | {seconds:.0f} | {curve[:, 2].max():.3f} | {earlier} |")
    print()


def watch(step: Step) -> None:
    print(
        f"\r{step.unit + 1}/{step.units} {step.label} {step.done:.0%} {step.note}".ljust(100), end="", file=sys.stderr
    )


if __name__ == "__main__":
    main()
