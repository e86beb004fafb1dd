"""What ``fixed_length`` costs, and whether the pace of messages still shows the server where an answer ends.

    python benchmarks/fixed_length.py

The embedded default answers questions, each once without and once with ``fixed_length``; the server is in this process.
Its view of a step is the time between the first queries of two successive steps. Shown is how well that time tells the
last steps of an answer from the first ones after it, and, for comparison, steps half-way through an answer from those
before them: the area under the ROC curve, 0.5 where it tells nothing, 95 % interval over answers (bootstrap).
"""

import argparse
import datetime
import statistics
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitveil
from splitveil.adapters import load_adapter
from splitveil.embedded import folder
from splitveil.serving.publishing import publish_adapter
from splitveil.serving.server import Server
from splitveil.wire import codec

SUBJECTS = (
    "asthma",
    "anemia",
    "diabetes",
    "a stroke",
    "gout",
    "malaria",
    "leukemia",
    "arthritis",
    "glaucoma",
    "hepatitis",
    "psoriasis",
    "migraine",
    "epilepsy",
    "pneumonia",
    "osteoporosis",
    "tuberculosis",
)
FORMS = ("What is {}?", "What are the symptoms of {}?", "What are the treatments for {}?")
NEAR = 8
"""Steps before and after an end that are compared: farther ones differ by the length of the text alone."""


@dataclass
class Clock:
    """When the server got every query, and of how many rows."""

    seen: list[tuple[float, tuple[int, ...], int]] = field(default_factory=list)

    def __call__(self, _: str, query: codec.Query) -> None:
        self.seen.append((time.perf_counter(), query.layers, query.rows))

    def steps(self) -> list[float]:
        """Seconds from each step's first query to the next one's; the prompt's own step is left out."""
        first = self.seen[0][1]
        began = [moment for moment, layers, rows in self.seen if layers == first and rows == 1]
        return list(np.diff(began))


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    seconds: float
    queries: int
    steps: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=96, help="steps asked for")
    parser.add_argument("--prompts", type=int, default=len(SUBJECTS) * len(FORMS))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(folder("base"))
    questions = [f"Question: {form.format(subject)}\nAnswer:" for subject in SUBJECTS for form in FORMS]
    clock = Clock()
    adapter = publish_adapter(load_adapter(folder("clinic")))
    with Server({"clinic": adapter}, "127.0.0.1:0", on_query=clock) as server:
        found = {fixed: [] for fixed in (False, True)}
        models = {}
        for fixed in found:
            models[fixed] = AutoModelForCausalLM.from_pretrained(folder("base"), dtype=torch.float32).eval()
            splitveil.connect(models[fixed], server.address, "clinic", fixed_length=fixed)
            answer(models[fixed], tokenizer, questions[0], 4, clock)
        for question in questions[: options.prompts]:
            for fixed, answers in found.items():
                answers.append(answer(models[fixed], tokenizer, question, options.tokens, clock))
        for model in models.values():
            splitveil.disconnect(model)
    print(f"{datetime.date.today()}, splitveil {splitveil.__version__}, torch {torch.__version__}")
    report(found[False], found[True], options.tokens)


def answer(model: torch.nn.Module, tokenizer: object, question: str, tokens: int, clock: Clock) -> Answer:
    prompt = tokenizer(question, return_tensors="pt")
    clock.seen.clear()
    began = time.perf_counter()
    output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False, repetition_penalty=1.3)
    seconds = time.perf_counter() - began
    return Answer(output[0, prompt["input_ids"].shape[1] :].tolist(), seconds, len(clock.seen), clock.steps())


def report(plain: list[Answer], fixed: list[Answer], tokens: int) -> None:
    same = sum(a.tokens == b.tokens for a, b in zip(plain, fixed, strict=True))
    ended = [one for one in fixed if len(one.tokens) < tokens]
    print(f"{len(plain)} answers of at most {tokens} tokens, {len(ended)} ended before; the same tokens: {same}")
    lengths = sorted(len(one.tokens) for one in plain)
    print(f"tokens of an answer: median {statistics.median(lengths):.0f}, {lengths[0]} to {lengths[-1]}")
    queries = [sorted({one.queries for one in answers}) for answers in (plain, fixed)]
    print(f"queries of an answer: {queries[0][0]} to {queries[0][-1]} without, {queries[1]} with fixed_length")
    cost = sum(one.seconds for one in fixed) / sum(one.seconds for one in plain)
    step = statistics.median(sum(b.steps) / len(b.steps) for b in fixed if b.steps)
    usual = statistics.median(sum(a.steps) / len(a.steps) for a in plain if a.steps)
    print(f"time in all: {cost:.2f} ×; a step: {1e3 * step:.2f} ms with, {1e3 * usual:.2f} ms without")
    compare("the end", [near(one, len(one.tokens) - 1) for one in ended])
    # Steps grow longer with the text, whether it ends or not: what that alone tells.
    compare("a place where nothing ends", [near(one, len(one.tokens) // 2) for one in ended])


def compare(place: str, pairs: list[tuple[list[float], list[float]]]) -> None:
    pairs = [pair for pair in pairs if all(pair)]
    if not pairs:
        print(f"{place}: no steps on both sides of it")
        return
    draws = np.random.default_rng(0)
    boots = [auc([pairs[i] for i in draws.integers(len(pairs), size=len(pairs))]) for _ in range(1000)]
    low, high = np.quantile(boots, [0.025, 0.975])
    before, after = (1e3 * statistics.median(x for pair in pairs for x in pair[side]) for side in (0, 1))
    print(f"a step before {place} {before:.3f} ms, after it {after:.3f} ms (medians, {NEAR} steps each);")
    print(f"  told apart by their time: AUC {auc(pairs):.3f} ({low:.3f} to {high:.3f}), {len(pairs)} answers")


def near(one: Answer, place: int) -> tuple[list[float], list[float]]:
    """The steps before and after a place: step i goes from the query of token i + 1 to that of the next."""
    return one.steps[max(0, place - NEAR) : place], one.steps[place : place + NEAR]


def auc(pairs: list[tuple[list[float], list[float]]]) -> float:
    """How often a step after the end takes longer than one before it, within an answer."""
    wins = [(a > b) + (a == b) / 2 for before, after in pairs for b in before for a in after]
    return sum(wins) / len(wins)


if __name__ == "__main__":
    main()
