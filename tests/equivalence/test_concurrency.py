"""Several adapters, clients and threads on one server at once: nobody gets anybody else's answers."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from peft import LoraConfig
from torch import Tensor

from equivalence.support import (
    RANDOM_LIMIT,
    Served,
    Verdict,
    draw_case,
    greedy,
    logits,
    random_model,
    random_prompts,
    report,
    same_greedy,
    served_by_both,
    tiny_llama,
)

Record = Callable[[str, object], None]

NEW_TOKENS = 12
TARGETS = {"law": ["q_proj", "v_proj"], "clinic": "all-linear", "tax": ["o_proj", "down_proj", "up_proj"]}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three adapters of one base model, on one server."""
    base = random_model(tiny_llama())
    cases = {}
    for seed, (name, targets) in enumerate(TARGETS.items()):
        lora = LoraConfig(r=3 + seed, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        prompts = random_prompts(base, 4, 6 + seed, seed=seed)
        cases[name] = draw_case(base, tmp_path_factory.mktemp(name), lora, prompts, NEW_TOKENS)
        # Their tolerances are found here: while threads run, nobody else's noise may be on.
        assert cases[name].tolerance
    with served_by_both(cases) as served:
        yield served


def test_clients_with_different_adapters_at_once(adapters: Served, engine: str, record_property: Record) -> None:
    """Six clients, two an adapter, each with a model of its own, all at the same time."""
    names = [name for name in TARGETS for _ in range(2)]
    together = Barrier(len(names), timeout=120)

    def client(name: str) -> tuple[list[Verdict], str]:
        case = adapters.cases[name]
        with adapters.connected(engine, adapter=name, base=copy.deepcopy(case.base)) as model:
            together.wait()
            verdicts = [case.judge(logits(model, case.sequences)) for _ in range(3)]
            got = greedy(model, case.prompts, NEW_TOKENS)
        return verdicts, same_greedy(case, got)

    with ThreadPoolExecutor(len(names)) as pool:
        results = list(pool.map(client, names))
    for name, (verdicts, same) in zip(names, results, strict=True):
        report(record_property, name, f"{max(verdicts, key=lambda v: v.deviation)}; identical prompts {same}")
        for verdict in verdicts:
            verdict.check(RANDOM_LIMIT)


def test_threads_that_share_one_connected_model(adapters: Served, engine: str, record_property: Record) -> None:
    """Three threads with texts of different lengths; the first forward passes, which learn the sites, coincide too."""
    case = adapters.cases["clinic"]
    texts = [case.sequences[:, : 18 - 4 * i] for i in range(3)]
    together = Barrier(len(texts), timeout=120)

    with adapters.connected(engine, adapter="clinic") as model:

        def reader(text: Tensor) -> list[Tensor]:
            together.wait()
            return [logits(model, text) for _ in range(4)]

        with ThreadPoolExecutor(len(texts)) as pool:
            results = list(pool.map(reader, texts))
    for text, answers in zip(texts, results, strict=True):
        for answer in answers:
            verdict = case.judge(answer)
            verdict.check(RANDOM_LIMIT)
        report(record_property, f"{text.shape[1]} tokens", verdict)


def test_clients_come_and_go(adapters: Served, engine: str) -> None:
    """A client's results do not depend on others that connect, ask and leave meanwhile."""
    law, tax = adapters.cases["law"], adapters.cases["tax"]
    with adapters.connected(engine, adapter="law", base=copy.deepcopy(law.base)) as model:
        for _ in range(3):
            with adapters.connected(engine, adapter="tax", base=copy.deepcopy(tax.base)) as other:
                tax.judge(logits(other, tax.sequences)).check(RANDOM_LIMIT)
                law.judge(logits(model, law.sequences)).check(RANDOM_LIMIT)
            law.judge(logits(model, law.sequences)).check(RANDOM_LIMIT)


def test_one_model_moves_from_adapter_to_adapter(adapters: Served, engine: str) -> None:
    for name in (*TARGETS, *TARGETS):
        case = adapters.cases[name]
        with adapters.connected(engine, adapter=name) as model:
            for _ in range(2):
                case.judge(logits(model, case.sequences)).check(RANDOM_LIMIT)
