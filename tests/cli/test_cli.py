"""The command line as people meet it: help, one-line errors, exit statuses, JSON."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

COMMANDS = ("demo", "serve", "generate", "chat", "inspect", "bench")


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "splitveil", *arguments], input=stdin, capture_output=True, text=True, timeout=120
    )


def one_line_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit status 1, one line on stderr that says what is wrong, no traceback."""
    assert done.returncode == 1, done
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("splitveil: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A small PEFT folder."""
    rng = np.random.default_rng(0)
    tensors = {}
    for block in range(2):
        key = f"base_model.model.model.layers.{block}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = rng.normal(size=(4, 64)).astype(np.float32)
        tensors[f"{key}.lora_B.weight"] = rng.normal(size=(32, 4)).astype(np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_says_something(command: tuple[str, ...]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Usage: " in done.stdout
    assert len(done.stdout.splitlines()) > 8


def test_version() -> None:
    from splitveil import __version__

    assert run("--version").stdout.strip() == f"splitveil, version {__version__}"


def test_a_misspelt_command_is_a_usage_error() -> None:
    done = run("serv")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_inspect(adapter: Path) -> None:
    done = run("inspect", str(adapter), "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["modules"] == 2
    assert facts["rows"] == 8
    assert facts["rows_until_learned"] == 64
    attack = facts["rows_of_best_known_attack_without_noise"]
    assert attack["error_10_percent"] < 64, "fewer than d rows are enough without noise"
    assert attack["error_10_percent"] <= attack["error_1_percent"] <= attack["exact"] <= 64
    assert facts["sent_bytes"] == 2 * 4 * (64 + 1024)
    assert facts["publication_bytes"] == 8 * 4 * (2048 + 32)
    assert "can be served" in run("inspect", str(adapter)).stdout


def test_inspect_agrees_with_what_is_published(adapter: Path) -> None:
    from splitveil.adapters import load_adapter
    from splitveil.serving.costs import cost_of
    from splitveil.serving.publishing import publish_adapter

    loaded = load_adapter(adapter)
    cost, served = cost_of(loaded), publish_adapter(loaded)
    assert 0 <= len(served.published) - cost.publication_bytes < 4096


def test_inspect_of_nothing() -> None:
    one_line_error(run("inspect", "/nowhere/at/all"), "/nowhere/at/all")


def test_inspect_of_nan(adapter: Path) -> None:
    tensors = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    safetensors.numpy.save_file(tensors, adapter / "adapter_model.safetensors")
    one_line_error(run("inspect", str(adapter)), "NaN")


def test_serve_refuses(adapter: Path) -> None:
    one_line_error(run("serve", "--adapter", str(adapter)), "NAME=DIR")
    one_line_error(run("serve", "--adapter", f"a={adapter}", "--listen", "0.0.0.0:0"), "TLS")
    one_line_error(run("serve", "--adapter", f"a={adapter}", "--listen", "here"), "HOST:PORT")
    one_line_error(run("serve", "--adapter", f"a={adapter}", "--noise", "-1"), "noise")
    one_line_error(run("serve", "--adapter", f"a={adapter}", "--adapter", f"a={adapter}"), "two adapters")


def test_generate_refuses(tmp_path: Path) -> None:
    where = ("--server", "127.0.0.1:1", "--adapter", "clinic")
    one_line_error(run("generate", "--base", str(tmp_path), *where, "--prompt", "hello"), "config.json")
    (tmp_path / "config.json").write_text("{}")
    one_line_error(run("generate", "--base", str(tmp_path), *where, "--prompt", "hello"), "cannot be loaded")
    one_line_error(run("generate", "--base", str(tmp_path), *where, "--prompt", " "), "empty")
    one_line_error(run("generate", "--base", "embedded:other", *where, "--prompt", "hello"), "embedded")


def test_what_a_terminal_would_obey_is_not_shown_there() -> None:
    from splitveil.cli.generate import harmless

    assert harmless("a\x1b[2Jb\x07\r\x9bc\nd\té 東") == "a[2Jbc\nd\té 東"
