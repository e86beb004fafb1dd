"""The long benchmarks run from end to end: on a tiny model and invented text, with hardly any learning."""

import csv
import importlib
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from splitveil.embedded import folder

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DATA = {
    "gsm8k/train.jsonl": "question",
    "wikitext2-small/valid.txt": None,
    "wikitext2-small/test.txt": None,
    "mts-dialog/MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv": "dialogue",
    "presidio-synth-pii/synth_dataset_v2.json": "full_text",
    "alpaca-demo/alpaca_en_demo.json": "instruction",
}
WORDS = "the doctor asked whether pain had come back after a long walk in cold rain and she said it never left"
TINY = ["--attacker-steps", "2", "--steps", "2", "--prompts", "4", "--windows", "20"]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        # Their names are common words, which another test may want for something else.
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models and texts as the benchmarks expect it."""
    place = tmp_path_factory.mktemp("shared")
    model = place / "models/stories3M"
    config = AutoConfig.from_pretrained(folder("base"))
    for name, value in (("hidden_size", 32), ("intermediate_size", 48), ("num_hidden_layers", 4)):
        setattr(config, name, value)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 2, 16
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    for file in folder("base").glob("tokenizer*"):
        shutil.copy(file, model)
    words = WORDS.split()
    draw = random.Random(0)
    for file, column in DATA.items():
        path = place / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, column, [" ".join(draw.choices(words, k=70)) for _ in range(60)])
    return place


def write(path: Path, column: str | None, texts: list[str]) -> None:
    if column is None:
        path.write_text("\n".join(texts))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([[column], *([text] for text in texts)])
    else:
        rows = [{column: text, "input": "", "output": "", "spans": []} for text in texts]
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))


def run(benchmark: Any, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{benchmark.__name__}.py", *map(str, words)])
    benchmark.main()


def rows_of(shown: str) -> dict[str, list[str]]:
    """First cell of a table's row → the others."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in shown.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in rows}


def test_frontier(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frontier: Any = importlib.import_module("frontier")
    monkeypatch.setattr(frontier, "ATTACKS", ("ridge", "search"))
    words = ["--cut", "2", "--weights", "1", "--defences", "int8", "--shared", shared, "--out", tmp_path]
    run(frontier, monkeypatch, *TINY, *words)
    shown = capsys.readouterr().out
    assert "not measured" not in shown
    assert "INVALID" not in shown
    defences = {"none", "int8", f"regularised:{tmp_path}/stories3M/dcor-1/personal"}
    assert defences <= rows_of(shown).keys()
    assert (tmp_path / "stories3M/report.html").stat().st_size > 10_000
    before = (tmp_path / "stories3M/rows.jsonl").read_bytes()
    run(frontier, monkeypatch, *TINY, *words)  # nothing is measured again
    assert (tmp_path / "stories3M/rows.jsonl").read_bytes() == before


def test_scenarios(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenarios: Any = importlib.import_module("scenarios")
    some = (
        scenarios.Scenario("the base alone", attacks=("ridge", "search")),
        scenarios.Scenario("the personal half", knows="personal", attacks=("ridge", "search")),
    )
    monkeypatch.setattr(scenarios, "SCENARIOS", some)
    run(scenarios, monkeypatch, *TINY, "--data", "alpaca-demo", "--shared", shared, "--out", tmp_path)
    found = rows_of(capsys.readouterr().out)
    assert found["scenario"] == ["chance", "ridge", "search"]
    # Of a device half that it has, the search reads every token.
    assert found["the personal half"][-1].startswith("1.000")
    assert found.keys() >= {scenario.name for scenario in some}


def test_split_training(shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--rounds", "1", "--steps", "1", "--batch", "1", "--tokens", "8"]
    run(importlib.import_module("split_training"), monkeypatch, "--model", shared / "models/stories3M", *small)
    losses = {name: cells[-1] for name, cells in rows_of(capsys.readouterr().out).items() if "split" in name}
    assert len(losses) == 3
    assert len(set(losses.values())) == 1


def test_chatglm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "2000")
    chatglm: Any = importlib.import_module("chatglm")
    small = {"ffn_hidden_size": 96, "hidden_size": 64, "kv_channels": 16, "num_attention_heads": 4}
    monkeypatch.setattr(chatglm, "ORIGINAL", chatglm.ORIGINAL | small | {"padded_vocab_size": 300})
    shape = 64, 64 + 2 * 2 * 16, chatglm.RANK
    for name, value in zip(("HIDDEN", "OUTPUTS", "SHAPE"), (*shape[:2], shape), strict=True):
        monkeypatch.setattr(chatglm, name, value)
    words = ["--blocks", "2", "--burst", "8", "--sustained", "2", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["chatglm.py", *words])
    threads = torch.get_num_threads()
    try:
        chatglm.main()
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert {"burst", "sustained"} <= rows_of(shown).keys()
    for part in ("encryption", "masks", "recovery", "sending", "waiting"):
        assert shown.count(f"{part} ") >= 2
