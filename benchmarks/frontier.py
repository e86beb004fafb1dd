"""What each defence leaves to the best adapted attacker, and what it costs: perplexity, bytes and time.

    python benchmarks/frontier.py                       stories3M, cut after block 3, 80 steps to learn for each attack
    python benchmarks/frontier.py --models embedded     the other model

It resumes: rows, and device halves in training, are kept in --out. The models and texts are those of a folder named
`shared` beside the repository, or of --shared DIR, as in inversion.py. Device halves named dcor-WEIGHT were trained,
all of their weights but the embeddings, on shadow text with that much distance correlation in the loss, below upper
blocks that stay as they are; dcor-0 was trained in the same way without it: what dcor-0 has gained or lost beside
`none` is training's doing, and only the rest is the penalty's.
"""

import argparse
import datetime
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import inversion
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitveil
from splitveil.auditing.meta import Names
from splitveil.auditing.windows import check_length
from splitveil.defences.regularise import create_regulariser
from splitveil.embedded import folder
from splitveil.report import write_report
from splitveil.report.frontier import Mark, marks
from splitveil.report.measurements import Measurements, Setting
from splitveil.report.meta import Meta
from splitveil.report.numbers import percent, percent_range, plain
from splitveil.report.prices import times
from splitveil.split import cut
from splitveil.splitlearning.cloud import LocalCloud
from splitveil.splitlearning.course import Course, Decay
from splitveil.splitlearning.data import hold_out, make_windows
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.splitlearning.training import PERSONAL, DeviceRun, Progress, train

ATTACKS = ("ridge", "revert", "beam", "search")
"""`search` has the device half's weights, `beam` the model as a language prior; the others ask for recordings alone."""
NOISE = (0.3, 1.0, 3.0)
METRIC_NOISE = (0.3, 1.0)
"""Standard deviations of an entry's noise, relative to the states' root mean square over the shadow text."""
SHARES = (0.25, 0.1)
WEIGHTS = (0.0, 1.0, 3.0, 10.0)
LENGTH, BATCH, RATE = 48, 16, 1e-3
NO_CLOCK = 1e6
"""Seconds: learning is counted in steps, so that a busy machine changes no figure."""
SAMPLE = 200
"""Shadow texts from which the states' size is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="stories3M", help="stories3M, embedded, or both with a comma")
    parser.add_argument("--cut", type=int, default=3)
    parser.add_argument("--attacker-steps", type=int, default=80, help="of learning, for each attack")
    parser.add_argument("--steps", type=int, default=400, help="of training a device half")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--windows", type=int, default=6000, help="of shadow text that the attackers learn from")
    parser.add_argument("--weights", default=",".join(f"{w:g}" for w in WEIGHTS), help="of dcor, with commas")
    parser.add_argument("--defences", default="", help="only these, with commas, besides `none` and those of --weights")
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path("frontier"))
    options = parser.parse_args()
    if inversion.absent(options.shared):
        return
    print(
        f"{datetime.date.today()}, cut {options.cut}, {options.attacker_steps} steps to learn, "
        f"{options.prompts} prompts, "
        f"splitveil {splitveil.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    paths = {"stories3M": options.shared / "models/stories3M", "embedded": folder("base")}
    for name in options.models.split(","):
        measure(name, paths[name], options)


def measure(name: str, path: Path, options: argparse.Namespace) -> None:
    """One model: its device halves, the audit of both data sets, the tables and the report."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    check_length(model, tokenizer, LENGTH)
    shadow = inversion.shadow(options.shared)
    texts = [text.text for text in shadow]
    out = options.out / name
    weights = [float(weight) for weight in options.weights.split(",") if weight]
    windows = make_windows(tokenizer, texts, LENGTH) if weights else None
    halves = [trained(model, windows, weight, out, options) for weight in weights]
    asked = options.defences.split(",") if options.defences else defences(model, tokenizer, texts, options.cut)
    reports = {}
    for data in inversion.DATA:
        reports[data] = splitveil.audit(
            model,
            tokenizer,
            inversion.victims(options.shared, data),
            shadow,
            cuts=(options.cut,),
            attacks=ATTACKS,
            defences=tuple(dict.fromkeys(("none", *asked, *halves))),
            out=out,
            prompts=options.prompts,
            tokens=LENGTH,
            windows=options.windows,
            budget=NO_CLOCK,
            steps=options.attacker_steps,
            names=Names(name, data, "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
            watch=inversion.watch,
        )
        print(f"\r{' ' * 100}\r", end="", file=sys.stderr)
    rows, shown, meta = together(list(reports.values()))
    for data, report in reports.items():
        table(name, data, options.cut, report, rows, meta)
    print(f"report: {write_report(rows, shown, meta, out)}\n")


def defences(model: Any, tokenizer: Any, texts: Sequence[str], block: int) -> list[str]:
    """All but the trained ones. d_χ's noise has the size that it has in units of this model's states."""
    size = state_size(model, tokenizer, texts, block)
    # Entries get noise of about √width/η each.
    width = cut(model, block).device(torch.zeros(1, 1, dtype=torch.long)).width
    etas = [float(f"{math.sqrt(width) / (share * size):.3g}") for share in METRIC_NOISE]
    print(f"root mean square of the states on shadow text: {size:.3g}; d_chi's eta {etas} for {METRIC_NOISE} of it\n")
    return [
        *(f"gaussian:{sigma}" for sigma in NOISE),
        *(f"dchi:{eta}" for eta in etas),
        "int8",
        "int4",
        *(f"topk:{share}" for share in SHARES),
        "permutation",
        "encrypted",
    ]


@torch.no_grad()
def state_size(model: Any, tokenizer: Any, texts: Sequence[str], block: int) -> float:
    """Median over positions of the root mean square of a state: a few of them can be very large."""
    windows = make_windows(tokenizer, texts[:SAMPLE], LENGTH)
    hidden = cut(model, block).device(windows).hidden
    return float(hidden.square().mean(-1).sqrt().median())


def trained(model: Any, windows: Any, weight: float, out: Path, options: argparse.Namespace) -> str:
    """The defence of a device half trained with that much distance correlation; goes on where it was interrupted."""
    place = out / f"dcor-{weight:g}"
    windows, held_out = hold_out(windows, 0.02)
    plan = Plan(options.cut, Shape.U, Trains.FULL, Trains.NOTHING, freeze_embeddings=True)
    regulariser = create_regulariser(f"dcor:{weight}") if weight else None
    device = Device(model, cut=options.cut, shape=Shape.U, plan=plan, regulariser=regulariser)
    cloud = LocalCloud(model, cut=options.cut, shape=Shape.U, plan=plan, folder=place / "cloud")
    start = cloud.resume(DeviceRun(place).steps())
    course = Course(options.steps, RATE, BATCH, warmup=20, decay=Decay.COSINE, save_every=50)
    outcome = train(device, cloud, windows, held_out, course, place, start=start, watch=watch_training)
    cloud.close()
    print(f"\r{' ' * 100}\r", end="", file=sys.stderr)
    if outcome.step > outcome.resumed:
        print(
            f"dcor-{weight:g}: {outcome.step} steps, {outcome.seconds:.0f} s, held-out loss "
            f"{outcome.held_out_before:.3f} → {outcome.held_out:.3f} nats a token\n"
        )
    return f"regularised:{place / PERSONAL}"


def together(reports: Sequence[Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Rows, texts and meta of one report over several data sets; an audit is of one."""
    meta = dict(reports[0].meta)
    meta["title"] = "Defences: what they leave, and what they cost"
    meta["data"] = {name: note for report in reports for name, note in report.meta["data"].items()}
    meta["invalid"] = [reason for report in reports for reason in report.meta["invalid"]]
    meta["digests"] = dict(reports[0].meta["digests"])
    for report in reports:
        name = next(iter(report.meta["data"]))
        meta["digests"][f"data, {name}"] = report.meta["digests"]["data"]
    del meta["digests"]["data"]
    meta["prices"] = {
        spec: price | {"points": [point for report in reports for point in report.meta["prices"][spec]["points"]]}
        for spec, price in reports[0].meta["prices"].items()
    }
    meta["defences"] = {name: _summary(name, words) for name, words in meta["defences"].items()}
    # The folder may hold rows of other defences, from a run that asked for them; they have no price here.
    rows = [row.as_dict() for report in reports for row in report.rows if row.defence in meta["prices"]]
    return rows, [dict(text) for report in reports for text in report.texts], meta


def _summary(defence: str, words: str) -> str:
    if not defence.startswith("regularised:"):
        return words
    weight = Path(defence).parent.name.removeprefix("dcor-")
    if float(weight) == 0:
        return "a device half trained on shadow text without a penalty, to tell training's part from the penalty's"
    return f"a device half trained on shadow text with {weight} times the distance correlation in its loss"


def table(model: str, data: str, block: int, report: Any, rows: list[dict[str, Any]], meta: dict[str, Any]) -> None:
    """Defence × (perplexity, bytes, time, recovery), the most recovered first."""
    if not report.valid:
        print(f"INVALID: {report.meta['invalid']}")
    found = marks(Measurements(rows), Meta.of(meta).prices, Setting(model, data), block)
    floor = Measurements(rows).floor(Setting(model, data), block)
    print(f"### {model}, {data}, cut {block}, floor {percent(floor.value)}\n")
    print("| defence | perplexity | bytes a token | µs a token | tokens recovered | by | |")
    print("|---|---|---|---|---|---|---|")
    for mark in sorted(found, key=lambda mark: -mark.cell.value):
        print(line(mark, meta, data, block))
    print()
    if any(mark.defence == "encrypted" for mark in found):
        print("- encrypted: bytes and time are of the query to one private layer; an adapter of n layers sends n\n")
    for row in report.scores:
        if row.error is not None:
            print(f"- not measured: {row.defence}, {row.attack}: {row.error}")
    print()


def line(mark: Mark, meta: dict[str, Any], data: str, block: int) -> str:
    point = next(p for p in meta["prices"][mark.defence]["points"] if (p["data"], p["cut"]) == (data, block))
    perplexity = f"{plain(mark.ratio * point['undefended'])} ({times(mark.ratio)})" if point["perplexity"] else "–"
    recovered = f"{percent(mark.cell.value)} ({percent_range(mark.cell.low, mark.cell.high)})"
    standing = "" if mark.defence == "none" else mark.standing.value
    cells = (perplexity, plain(mark.size), plain(mark.microseconds), recovered, mark.attack, mark.doubt or standing)
    return f"| {mark.defence} | {' | '.join(cells)} |"


def watch_training(progress: Progress) -> None:
    print(
        f"\rtraining a device half {progress.step}/{progress.steps}, loss {progress.loss:.3f}".ljust(100),
        end="",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
