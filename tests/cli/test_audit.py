"""``splitveil audit`` as people meet it: a table, JSON, one-line errors, and going on after being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from auditing_support import SHADOW, UNITS, VICTIMS, save_tiny, tiny_model

from splitveil.attacks.catalogue import CONTROLS
from splitveil.cli import main

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, prompts and shadow text."""
    folder = tmp_path_factory.mktemp("audit")
    save_tiny(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(VICTIMS))
    (folder / "shadow.txt").write_text("\n".join(SHADOW))
    (folder / "empty.txt").write_text("\n\n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "table.csv").write_text("note,n\nhello,1\n")
    tiny_model().save_pretrained(folder / "bare")
    return folder


def command(there: Path, out: Path, **changes: Any) -> list[str]:
    """The command line of a small audit; an option of None is left out."""
    options = {
        "model": there / "model",
        "data": there / "prompts.txt",
        "shadow": there / "shadow.txt",
        "cut": "0,2",
        "attack": "ridge",
        "tokens": 12,
        "windows": 30,
        "budget": 2,
        "out": out,
    }
    given = {name: value for name, value in (options | changes).items() if value is not None}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "splitveil", "audit", *words]


class Done(NamedTuple):
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(there: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: importing torch anew for each would take most of the time."""

    def run(out: Path, *flags: str, **changes: Any) -> Done:
        monkeypatch.setattr(sys, "argv", ["splitveil", *command(there, out, **changes)[3:], *flags])
        code = 0
        try:
            main()
        except SystemExit as ending:
            code = int(ending.code or 0)
        said = capfd.readouterr()
        return Done(code, said.out, said.err)

    return run


def test_an_audit(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(out, "--json", defence="none,int8")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["valid"]
    assert len(summary["scores"]) == 2 * 2 * UNITS
    best = {(s["cut"], s["defence"]): s["value"] for s in summary["scores"] if s["attack"] == "ridge"}
    assert set(best) == {(0, "none"), (0, "int8"), (2, "none"), (2, "int8")}
    assert best[0, "none"] > 0.5
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {row["data"] for row in rows} == {"prompts.txt"}
    assert {row["model"] for row in rows} == {"model"}
    page = Path(summary["report"]).read_text()
    assert Path(summary["rows"]) == out / "rows.jsonl"
    assert "Inversion audit" in page
    assert "splitveil audit" in page, "the command is part of the report"

    before = (out / "rows.jsonl").read_bytes()
    table = run(out, defence="none,int8")  # nothing is measured again
    assert table.returncode == 0, table.stderr
    assert (out / "rows.jsonl").read_bytes() == before
    assert "After block 2, defended by int8: an attacker with " in table.stdout
    assert "shadow text" in table.stdout
    assert "(contains prompts)" in table.stdout
    for name in (*CONTROLS, "ridge"):
        assert name in table.stdout


def test_killed_in_the_middle(there: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = out / "rows.jsonl"
    how: dict[str, Any] = {"cut": "0,1,2", "attack": "lens", "defence": "none,int8,int4"}
    begun = subprocess.Popen(command(there, out, **how), stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.stat().st_size > 4000):
        assert begun.poll() is None, "the audit ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    with rows.open("ab") as file:
        file.write(b'{"key": "torn')  # as if it had been killed in the middle of a write
    left = rows.read_bytes()
    done = run(out, "--json", **how)
    assert done.returncode == 0, done.stderr
    assert rows.read_bytes().startswith(left[:4000])
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len({row["key"] for row in found}) == len(found), "something was measured twice"
    assert len(json.loads(done.stdout)["scores"]) == 3 * 3 * UNITS


def test_interrupted_from_the_keyboard(there: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Long enough that the signal finds it at work, also where this process has to wait for a processor.
    noises = ",".join(f"gaussian:{number / 10}" for number in range(1, 41))
    words = command(there, out, cut="0,1,2", attack="lens,nearest", defence=f"none,int8,int4,{noises}")
    begun = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # Tests that a shell runs in the background inherit that this signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "rows.jsonl").exists():
        assert begun.poll() is None, "the audit ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    begun.send_signal(signal.SIGINT)
    _, said = begun.communicate(timeout=60)
    assert begun.returncode == 130, said
    assert "Traceback" not in said
    assert f"what was measured is in {out}" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "empty.txt"}, "empty.txt holds no text"),
        ({"data": "broken.jsonl"}, "broken.jsonl, line 2: not JSON"),
        ({"data": "absent.txt"}, "cannot be read"),
        ({"data": "table.csv", "column": "body"}, "no column 'body'; its columns are 'note', 'n'"),
        ({"tokens": 97}, "longer than the model's context of 96"),
        ({"cut": "0,3"}, "cut 3 does not exist: this model has 2 blocks"),
        ({"shadow": "prompts.txt"}, "overlaps with the victims in 3 of its 3 texts"),
        ({"model": "bare"}, "bare has no tokenizer"),
        ({"model": "nothing"}, "no config.json"),
        ({"attack": "telepathy"}, "no attack 'telepathy'"),
        ({"defence": "hope"}, "unknown defence 'hope'"),
        ({"out": "prompts.txt"}, "is a file"),
        ({"shadow": None, "shadow_column": "text"}, "--shadow-column without --shadow"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(there: Path, run: Run, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    files = {"data", "shadow", "model", "out"}
    given = {name: there / value if name in files and value else value for name, value in changes.items()}
    done = run(given.pop("out", tmp_path / "out"), **given)
    assert done.returncode == 1, done
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("splitveil: ")
    assert said in lines[0]
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_usage_errors(run: Run, tmp_path: Path) -> None:
    for changes in ({"cut": "one"}, {"attack": "lens,,ridge"}):
        done = run(tmp_path / "out", **changes)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_help_names_every_attack_and_defence() -> None:
    from splitveil.attacks.catalogue import names as attacks
    from splitveil.defences.catalogue import names as defences

    words = [sys.executable, "-m", "splitveil", "audit", "--help"]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
    for name in {*attacks(), *defences()} - {*CONTROLS}:
        assert name in shown, name
    assert "CONTAIN PROMPTS" in shown
    assert max(map(len, shown.splitlines())) <= 80
