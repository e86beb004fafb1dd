"""Attacks on split fine-tuning, one factor at a time from a base case: scenario × attack, on three data sets.

    python benchmarks/scenarios.py          100 steps of learning for each attacker, a dozen attackers: 80 minutes
    python benchmarks/scenarios.py --full --ray ADDRESS         every factor with every other, on a Ray cluster

It resumes: rows, attackers and personalised models are kept in --out. The models and texts are those of a folder named
`shared` beside the repository, or of --shared DIR, as in inversion.py.

The base case: stories3M cut after block 3; the user's device half carries a personal LoRA trained in the U shape on
texts of the user's domain, below upper blocks that stay as they are; prompts are texts of that domain that share no run
of words with those; the attacker knows the public model alone, and learns from text of other domains (maths questions,
Wikipedia). Each other scenario changes one thing, where that can be: a deeper cut has more blocks with a personal part
below it, so the cuts are there without one, too. Learning is counted in steps, so that a busy machine changes no
figure, and all attackers have equally many windows of text: as many as the smallest domain has. Attackers that know
the base alone are the same for all users, and learn once. `search` has the weights of the device half that it knows,
`beam` the public base as a language model; the others ask it for recordings alone.
"""

import argparse
import csv
import datetime
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import inversion
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitveil
from splitveil.auditing.data import Text
from splitveil.auditing.disjoint import Victims
from splitveil.auditing.meta import Names
from splitveil.split import cut
from splitveil.split import personal as split_personal
from splitveil.splitlearning.cloud import LocalCloud
from splitveil.splitlearning.course import Course, Decay
from splitveil.splitlearning.data import hold_out, make_windows
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.splitlearning.training import PERSONAL, DeviceRun, Progress, train

LENGTH, BATCH, STEPS = 48, 16, 150
RATES = {Trains.LORA: 1e-3, Trains.FULL: 5e-4}
HARDER = 3.0
NO_CLOCK = 1e6
"""Seconds: learning is counted in steps."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTACKS = ("ridge", "revert", "beam", "search")


@dataclass(frozen=True)
class Scenario:
    """One line of the table; what is not given is as in the base case."""

    name: str
    cut: int = 3
    personal: str = "lora"
    """none, lora, full, half: the LoRA at half of its training; or harder: a LoRA trained at three times the rate."""
    same_domain: bool = False
    """Whether the attacker's text is of the user's domain."""
    knows: str = "base"
    defence: str = "none"
    training: bool = False
    attacks: tuple[str, ...] = field(default=ATTACKS)


SCENARIOS = (
    Scenario("base case", attacks=(*ATTACKS, "mlp")),
    Scenario("not personalised", personal="none", attacks=(*ATTACKS, "mlp")),
    Scenario("half-way through personalisation", personal="half", attacks=(*ATTACKS, "mlp")),
    Scenario("personalised at three times the rate", personal="harder"),
    Scenario("all device weights personalised", personal="full"),
    Scenario("gradients cross too, half-way", personal="half", training=True, attacks=("gradient",)),
    Scenario("gradients cross too, at the end", training=True, attacks=("gradient",)),
    Scenario("the attacker has the personal half", knows="personal"),
    Scenario("the attacker's text is of the user's domain", same_domain=True),
    Scenario("cut after block 1", cut=1),
    Scenario("cut after block 1, not personalised", cut=1, personal="none"),
    Scenario("cut after block 6, the last", cut=6),
    Scenario("cut after block 6, not personalised", cut=6, personal="none"),
    Scenario("quantised to int8", defence="int8"),
    Scenario("quantised to int4", defence="int4"),
    Scenario("sparsified: a quarter of the entries", defence="topk:0.25"),
)
"""`gradient` begins with what `mlp` reads of the states, so `mlp` on the same device half is what it is to be compared
with."""


def product() -> Iterator[Scenario]:
    """Every factor with every other, but for attackers who know a personal half that is not there."""
    personals, defences = ("none", "half", "lora", "full"), ("none", "int8", "int4", "topk:0.25")
    factors = itertools.product((1, 3, 6), personals, (False, True), ("base", "personal"), defences, (False, True))
    for block, personal, same, knows, defence, training in factors:
        if personal == "none" and knows == "personal":
            continue
        words = [f"cut {block}", personal, "same domain" if same else "other domains", f"knows the {knows}", defence]
        attacks = ("mlp", "gradient") if training else ATTACKS
        name = ", ".join([*words, "training"] if training else words)
        yield Scenario(name, block, personal, same, knows, defence, training, attacks)


@dataclass(frozen=True)
class User:
    """One data set: what the device is personalised on, what the prompts are, what an attacker of the domain has."""

    own: list[Text]
    prompts: list[Text]
    similar: list[Text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacker-steps", type=int, default=100, help="of learning, for each attacker")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--windows", type=int, default=2200, help="of shadow text that the attackers learn from")
    parser.add_argument("--steps", type=int, default=STEPS, help="of personalisation")
    parser.add_argument("--data", default=",".join(USERS), help="only these, with commas")
    parser.add_argument("--scenarios", default="", help="only those whose names contain one of these, with commas")
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path("scenarios"))
    parser.add_argument("--full", action="store_true", help="every factor with every other")
    parser.add_argument("--ray", metavar="ADDRESS", help="measure on a Ray cluster, as `splitveil audit --ray`")
    options = parser.parse_args()
    if inversion.absent(options.shared):
        return
    print(
        f"{datetime.date.today()}, stories3M, {options.attacker_steps} steps of learning, {options.steps} steps of "
        f"personalisation, splitveil {splitveil.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads\n",
        flush=True,
    )
    model = AutoModelForCausalLM.from_pretrained(options.shared / "models/stories3M", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.shared / "models/stories3M")
    users = {name: apart(USERS[name](options.shared / "data")) for name in options.data.split(",")}
    parts = options.scenarios.split(",")
    every = product() if options.full else SCENARIOS
    wanted = [scenario for scenario in every if any(part in scenario.name for part in parts)]
    shifted = inversion.shadow(options.shared)
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in users}
    # Scenarios first: an attacker that serves all users learns once, while the first of them is attacked.
    for scenario in wanted:
        for name, user in users.items():
            shadow = user.similar if scenario.same_domain else shifted
            found[name][scenario.name] = measure(scenario, name, user, shadow, model, tokenizer, options)
    for name in users:
        table(name, found[name])


def measure(
    scenario: Scenario, name: str, user: User, shadow: list[Text], model: Any, tokenizer: Any, options: Any
) -> dict[str, Any]:
    """Rows of token accuracy by attack."""
    personal = None
    if scenario.personal != "none":
        personal = personalised(scenario, name, user, model, tokenizer, options)
    report = splitveil.audit(
        model,
        tokenizer,
        user.prompts,
        disjoint(shadow, user.prompts),
        cuts=(scenario.cut,),
        attacks=scenario.attacks,
        defences=(scenario.defence,),
        out=options.out,
        prompts=options.prompts,
        tokens=LENGTH,
        windows=options.windows,
        budget=NO_CLOCK,
        steps=options.attacker_steps,
        personal=personal,
        attacker_knows=scenario.knows,
        training=scenario.training,
        ray=options.ray,
        names=Names("stories3M", name, "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        watch=inversion.watch,
    )
    print(f"\r{' ' * 100}\r", end="", file=sys.stderr)
    if not report.valid:
        print(f"INVALID: {report.meta['invalid']}")
    asked = {*scenario.attacks, "floor", "floor:commonest", "oracle"}
    rows = {
        row.attack: row
        for row in report.scores
        if row.attack in asked and (row.cut, row.defence) == (scenario.cut, scenario.defence)
    }
    print(
        f"- {name}, {scenario.name}: " + "; ".join(f"{a} {inversion.cell(rows[a])}" for a in scenario.attacks),
        flush=True,
    )
    return rows


def personalised(
    scenario: Scenario, name: str, user: User, model: Any, tokenizer: Any, options: argparse.Namespace
) -> Path:
    """The personal part's folder, trained once."""
    trains = Trains.FULL if scenario.personal == "full" else Trains.LORA
    steps = options.steps // 2 if scenario.personal == "half" else options.steps
    place = options.out / "personal" / f"{name}-cut{scenario.cut}-{scenario.personal}"
    windows, held_out = hold_out(make_windows(tokenizer, [text.text for text in user.own], LENGTH), 0.1)
    plan = Plan(scenario.cut, Shape.U, trains, Trains.NOTHING, targets=TARGETS)
    device = Device(model, cut=scenario.cut, shape=Shape.U, plan=plan)
    cloud = LocalCloud(model, cut=scenario.cut, shape=Shape.U, plan=plan, folder=place / "cloud")
    start = cloud.resume(DeviceRun(place).steps())
    rate = RATES[trains] * (HARDER if scenario.personal == "harder" else 1)
    course = Course(steps, rate, BATCH, warmup=20, decay=Decay.CONSTANT, save_every=50)
    outcome = train(device, cloud, windows, held_out[:100], course, place, start=start, watch=watch)
    cloud.close()
    print(f"\r{' ' * 100}\r", end="", file=sys.stderr)
    print(
        f"- {name}, cut {scenario.cut}, {scenario.personal}: states of held-out text moved by "
        f"{moved(model, place / PERSONAL, scenario.cut, held_out[:100]):.0%} of their length, median",
        flush=True,
    )
    if outcome.step > outcome.resumed:
        print(
            f"- {name}, cut {scenario.cut}, {scenario.personal}: {outcome.step} steps, {outcome.seconds:.0f} s, "
            f"held-out loss {outcome.held_out_before:.3f} → {outcome.held_out:.3f} nats a token",
            flush=True,
        )
    return place / PERSONAL


@torch.no_grad()
def moved(model: Any, personal: Path, block: int, windows: torch.Tensor) -> float:
    """How far personalisation takes a state, relative to its length: median over positions."""
    before = cut(model, block).device(windows).hidden
    after = cut(split_personal.personalised(model, personal), block).device(windows).hidden
    return float(((after - before).norm(dim=-1) / before.norm(dim=-1)).median())


def table(data: str, found: dict[str, dict[str, Any]]) -> None:
    """Scenario × attack, with the level of chance: always the commonest token of the attacker's text, or a guess."""
    asked = {attack for rows in found.values() for attack in rows}
    attacks = [name for name in ("ridge", "mlp", "revert", "beam", "gradient", "search") if name in asked]
    prompts = next(iter(found.values()))["oracle"].prompts
    print(f"\n### {data}, {prompts} prompts of {LENGTH} tokens\n")
    print(f"| scenario | chance | {' | '.join(attacks)} |")
    print("|---" * (len(attacks) + 2) + "|")
    for name, rows in found.items():
        chance = max(rows[control].value for control in ("floor", "floor:commonest"))
        cells = [inversion.cell(rows[attack]) if attack in rows else "" for attack in attacks]
        print(f"| {name} | {chance:.3f} | {' | '.join(cells)} |")


def disjoint(shadow: list[Text], prompts: list[Text]) -> list[Text]:
    """Without the texts that share a run of words with a prompt, which an audit would refuse."""
    known = Victims([text.text for text in prompts])
    return [text for text in shadow if known.shares(text.text) is None]


def apart(user: User) -> User:
    """The same without own texts that share a run of words with a prompt: a device is attacked on what is new to it."""
    return replace(user, own=disjoint(user.own, user.prompts))


def halves(texts: list[str]) -> tuple[list[Text], list[Text]]:
    return [Text(text) for text in texts[::2]], [Text(text) for text in texts[1::2]]


def medical(data: Path) -> User:
    """Doctor-patient talk; the user's own and the attacker's are halves of the training set."""

    def dialogues(part: str) -> list[str]:
        with (data / "mts-dialog" / f"MTS-Dialog-{part}.csv").open(encoding="utf-8", newline="") as file:
            return [row["dialogue"] for row in csv.DictReader(file)]

    own, similar = halves(dialogues("TrainingSet"))
    return User(own, [Text(text) for text in dialogues("TestSet-1-MEDIQA-Chat-2023")], similar)


def small_talk(data: Path) -> User:
    """Two people getting to know each other."""

    def conversations(part: str) -> list[str]:
        found = json.loads((data / "personachat" / f"{part}.txt").read_text(encoding="utf-8"))
        return ["\n".join(one["conv"]) for one in found]

    own, similar = halves(conversations("dev"))
    return User(own, [Text(text) for text in conversations("test")], similar)


def instructions(data: Path) -> User:
    """What people ask of an assistant, and what it says: a fifth of them are the prompts."""
    found = json.loads((data / "alpaca-demo" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    texts = ["\n".join(filter(None, (one["instruction"], one["input"], one["output"]))) for one in found]
    prompts = texts[::5]
    own, similar = halves([text for index, text in enumerate(texts) if index % 5])
    return User(own, [Text(text) for text in prompts], similar)


USERS = {"mts-dialog": medical, "personachat": small_talk, "alpaca-demo": instructions}


def watch(progress: Progress) -> None:
    print(
        f"\rpersonalising {progress.step}/{progress.steps}, loss {progress.loss:.3f}".ljust(100),
        end="",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
