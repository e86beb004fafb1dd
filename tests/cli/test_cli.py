"""The command line as people meet it: help, one-line errors, exit statuses, JSON."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from command_line import Here, one_line_error

from splitveil import cli, serve
from splitveil.embedded import folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As a process of its own."""
    return subprocess.run([sys.executable, "-m", "splitveil", *arguments], capture_output=True, text=True, timeout=120)


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


def commands(command: click.Command, *path: str) -> Iterator[tuple[str, ...]]:
    """The words that lead to every command and group."""
    yield path
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            inner = command.get_command(click.Context(command), name)
            assert inner is not None
            yield from commands(inner, *path, name)


def found(path: tuple[str, ...]) -> click.Command:
    command: click.Command = cli.cli
    for name in path:
        assert isinstance(command, click.Group)
        inner = command.get_command(click.Context(command), name)
        assert inner is not None
        command = inner
    return command


@pytest.mark.parametrize("path", commands(cli.cli), ids=" ".join)
def test_help_says_something(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli.cli, [*path, "--help"])
    assert done.exit_code == 0
    assert "Usage: " in done.output
    assert len(done.output.splitlines()) > 8
    options = [one for one in found(path).params if isinstance(one, click.Option)]
    assert not [one.opts for one in options if not one.help]


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


def test_serve_refuses(adapter: Path, here: Here) -> None:
    one_line_error(run("serve", "--adapter", str(adapter)), "NAME=DIR")
    one_line_error(here.run("serve", "--adapter", f"a={adapter}", "--listen", "0.0.0.0:0"), "TLS")
    one_line_error(here.run("serve", "--adapter", f"a={adapter}", "--listen", "here"), "HOST:PORT")
    one_line_error(here.run("serve", "--adapter", f"a={adapter}", "--noise", "-1"), "noise")
    one_line_error(here.run("serve", "--adapter", f"a={adapter}", "--adapter", f"a={adapter}"), "two adapters")


def test_serve_refuses_weights_that_are_missing_or_nan(adapter: Path, here: Here) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    weights.unlink()
    one_line_error(here.run("serve", "--adapter", f"a={adapter}"), str(adapter), "adapter_model.safetensors is missing")
    next(iter(tensors.values()))[0, 0] = np.nan
    safetensors.numpy.save_file(tensors, weights)
    one_line_error(here.run("serve", "--adapter", f"a={adapter}"), str(adapter), "NaN")


def test_generate_refuses(here: Here, tmp_path: Path) -> None:
    where = ("--server", "127.0.0.1:1", "--adapter", "clinic")
    one_line_error(here.run("generate", "--base", str(tmp_path), *where, "--prompt", "hello"), "config.json")
    (tmp_path / "config.json").write_text("{}")
    one_line_error(run("generate", "--base", str(tmp_path), *where, "--prompt", "hello"), "cannot be loaded")
    one_line_error(here.run("generate", "--base", str(tmp_path), *where, "--prompt", " "), "empty")
    one_line_error(here.run("generate", "--base", "embedded:other", *where, "--prompt", "hello"), "embedded")


def truncated(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def reconfigured(base: Path, name: str, value: object) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, name: value}))


def pickled(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


BASES = {
    "a damaged tokenizer": (lambda b: (b / "tokenizer.json").write_text("{}"), "its tokenizer cannot be loaded"),
    "weights in a pickle": (pickled, "which are pickles and are not read"),
    "truncated weights": (truncated, "cannot be loaded as a causal language model: Error while deserializing header"),
    "weights of another shape": (lambda b: reconfigured(b, "vocab_size", 4097), "such as model.embed_tokens.weight;"),
    "a block that has no weights": (lambda b: reconfigured(b, "num_hidden_layers", 7), "9 are missing"),
    "a size that is text": (lambda b: reconfigured(b, "hidden_size", "256"), "'hidden_size' expected int"),
}


@pytest.mark.parametrize("case", BASES)
def test_generate_refuses_a_damaged_base(case: str, here: Here, tmp_path: Path) -> None:
    damage, part = BASES[case]
    base = tmp_path / "base"
    shutil.copytree(folder("base"), base)
    damage(base)
    done = here.run("generate", "--base", str(base), "--server", "127.0.0.1:1", "--adapter", "a", "--prompt", "hello")
    one_line_error(done, str(base), part)


def test_generate_refuses_an_adapter_for_another_base(adapter: Path, here: Here, tmp_path: Path) -> None:
    with serve({"a": adapter}, "127.0.0.1:0", gauge_key=tmp_path / "gauge.key") as server:
        done = here.run(
            "generate", "--base", "embedded:base", "--server", server.address, "--adapter", "a", "--prompt", "hello"
        )
    one_line_error(done, "maps 256 to 256 features, the adapter 64 to 32", "for another base model")


@contextlib.contextmanager
def something_else(says: bytes) -> Iterator[str]:
    """A TCP server that says one thing to everybody and hangs up; yields its address."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                with client, contextlib.suppress(OSError):
                    client.sendall(says)
                    client.recv(4096)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(timeout=10)


OTHERS = {
    "a web server": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "a shell": b"SSH-2.0-OpenSSH_9.6\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("case", OTHERS)
def test_generate_refuses_a_port_where_something_else_answers(case: str, here: Here) -> None:
    with something_else(OTHERS[case]) as address:
        done = here.run(
            "generate", "--base", "embedded:base", "--server", address, "--adapter", "a", "--prompt", "hello"
        )
    one_line_error(done, address, "Splitveil server")


def test_what_a_terminal_would_obey_is_not_shown_there() -> None:
    from splitveil.cli.generate import harmless

    assert harmless("a\x1b[2Jb\x07\r\x9bc\nd\té 東") == "a[2Jbc\nd\té 東"
