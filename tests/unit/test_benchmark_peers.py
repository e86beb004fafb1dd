"""benchmarks/peers.py: a wrong result is marked, a missing peer has its reason, plaintext and lattice are right."""

import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TIMES = {"rounds": 1, "seconds": 0.05, "limit": 60.0, "slow": 60.0}


@pytest.fixture(scope="module")
def peers() -> Iterator[Any]:
    """The benchmark's modules, importable as its own command imports them."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("catalogue", "environments", "runs", "report")
        yield SimpleNamespace(**{name: importlib.import_module(f"peers.{name}") for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def shape(peers: Any) -> Any:
    return peers.runs.Shape.of("24:20:3")


def table(peers: Any, shape: Any, chosen: list[Any], folder: Path, **changed: Any) -> tuple[dict[str, Any], str]:
    """Rows by name, and the Markdown, of a real run."""
    environments = peers.environments.Environments(folder / "envs", {"gone": str(folder / "no-such-python")})
    made = peers.report.rows(peers.runs.measure(shape, chosen, environments, folder, **TIMES | changed))
    return {row["peer"]: row for row in made}, peers.report.markdown(shape, made)


def test_plaintext_and_lattice_are_right(peers: Any, shape: Any, tmp_path: Path) -> None:
    ours = [peer for peer in peers.catalogue.PEERS if peer.name in ("plaintext", "Splitveil lattice")]
    rows, text = table(peers, shape, ours, tmp_path)
    plain, lattice = rows["plaintext"], rows["Splitveil lattice"]
    assert [plain["right"], lattice["right"]] == ["yes", "yes"]
    assert plain["relative error"] < 1e-6 < lattice["relative error"] < 1e-2
    assert (plain["up bytes"], plain["down bytes"], lattice["down bytes"]) == (4 * 24, 4 * 20, 4 * 3)
    assert plain["hides the prompt"] == "no"
    assert lattice["hides the prompt"] == "yes"
    assert f"| {lattice['version, licence']} | yes | span(B), hints |" in peers.report.facts(list(rows.values()))
    assert lattice["server ms"] > 0 < lattice["offline ms"]
    assert lattice["÷ lattice, online"] == 1.0
    assert math.isnan(plain["offline ms"])  # not measured, so not 0
    assert "skipped" not in text


WORKER = """
import json, sys, numpy as np
with np.load(sys.argv[1]) as job:
    y = job["B"] @ (job["A"] @ job["x"])
{change}
times = {{"server": [0.5], "encrypt": [0.25], "decrypt": [0.25]}}
print(json.dumps({{"version": "1", "output": y.tolist(), "sizes": {{}}, "cpu": times, "wall": times}}))
"""


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ("", "yes"),
        ("y[0] += np.linalg.norm(y) / 50", "WRONG"),
        ("y = y[:-1]", "WRONG"),
        ("y[3] = np.nan", "WRONG"),
    ],
)
def test_a_wrong_result_is_marked(
    peers: Any, shape: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, right: str
) -> None:
    monkeypatch.setattr(peers.runs, "WORKERS", tmp_path)
    (tmp_path / "worker.py").write_text(WORKER.format(change=change))
    rows, text = table(peers, shape, [peers.catalogue.Peer("other", "worker.py", "numpy", "MIT")], tmp_path)
    assert rows["other"]["right"] == right
    assert f"| other | {right} |" in text
    assert (rows["other"]["server ms"], rows["other"]["client ms"]) == (500.0, 500.0)
    assert math.isnan(rows["other"]["÷ lattice, online"])  # lattice was not in this run


def test_whoever_is_missing_or_fails_has_a_row_with_the_reason(
    peers: Any, shape: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.runs, "WORKERS", tmp_path)
    (tmp_path / "raises.py").write_text("raise MemoryError('no room')")
    (tmp_path / "silent.py").write_text("")
    (tmp_path / "endless.py").write_text("import time; time.sleep(60)")
    new = peers.catalogue.Peer
    chosen = [
        new("not here", "silent.py", "not-here", "MIT", module="not_here"),
        new("no python", "silent.py", "gone", "MIT", pin="1"),
        new("raises", "raises.py", "numpy", "MIT"),
        new("silent", "silent.py", "numpy", "MIT"),
        new("endless", "endless.py", "numpy", "MIT"),
    ]
    rows, text = table(peers, shape, chosen, tmp_path, limit=1.5)
    assert {name: row["skipped"] for name, row in rows.items()} == {
        "not here": "not-here is not installed: pip install not-here",
        "no python": "does not run: No such file or directory",
        "raises": "failed: MemoryError: no room",
        "silent": "failed: its worker printed no result",
        "endless": "failed: not finished within 1.5 s",
    }
    for name, row in rows.items():
        assert f"| {name} | skipped: {row['skipped']} |" in text
        assert row["right"] == ""


def test_a_slow_peer_runs_once(peers: Any, shape: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.runs, "WORKERS", tmp_path)
    (tmp_path / "worker.py").write_text(WORKER.format(change=""))
    one = [peers.catalogue.Peer("other", "worker.py", "numpy", "MIT")]
    assert table(peers, shape, one, tmp_path, rounds=2, slow=0.0)[0]["other"]["repetitions"] == 1
    assert table(peers, shape, one, tmp_path, rounds=2, slow=60.0)[0]["other"]["repetitions"] == 2


def test_repetitions_count_from_the_second(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(peers.runs.WORKERS)
    measured = importlib.import_module("timed").Measured()
    calls: list[int] = []
    measured.step("setup", lambda: None)
    measured.repeat(60.0, lambda: measured.step("server", lambda: calls.append(1)))
    assert len(calls) == 200
    assert {name: len(taken) for name, taken in measured.cpu.items()} == {"setup": 1, "server": 199}
    assert measured.step("shared", lambda: np.ones(3).sum(), 8) == 3.0


def test_shapes_are_named_or_given(peers: Any) -> None:
    assert peers.runs.Shape.of("chatglm") == peers.runs.Shape("ChatGLM2-6B, query_key_value", 4096, 4608, 8)
    for text in ("glm", "1:2", "1:2:0", "a:b:c"):
        with pytest.raises(ValueError, match="is not a shape"):
            peers.runs.Shape.of(text)


def test_json_has_no_nan(peers: Any) -> None:
    spec = importlib.util.spec_from_file_location("peers_command", BENCHMARKS / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    shape = peers.runs.Shape.of("24:20:3")
    row = {"peer": "x", "error": math.inf, "times": [math.nan, 1.0]}
    (got,) = json.loads(command.as_json("head", [(shape, [row])]), parse_constant=pytest.fail)["shapes"]
    assert got["peers"] == [{"peer": "x", "error": None, "times": [None, 1.0]}]
    assert [peer.name for peer in command.chosen("OpenFHE; plaintext")] == ["plaintext", "OpenFHE"]
    with pytest.raises(ValueError, match="unknown peers"):
        command.chosen("nobody")
