"""A server process under its operator: TLS from the command line, signals, logs, a ledger that carries on."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from certificates import Authority, Pair
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitveil import connect, disconnect
from splitveil.cli import cli
from splitveil.embedded import folder
from splitveil.errors import ConfigurationError, ConnectionFailedError
from splitveil.metering import Database, Keyring, accounts
from splitveil.serving.connect import connection
from splitveil.serving.directions import FILE as DIRECTIONS
from splitveil.serving.tls import ClientTLS

QUESTION = "Question: What is anemia?\nAnswer:"
WEIGHTS = "adapter_model.safetensors"
PATIENCE = 120.0


@dataclass
class Process:
    """A running ``splitveil serve``."""

    popen: "subprocess.Popen[str]"
    address: str
    opening: list[str]
    log: Path

    def logged(self) -> list[dict[str, Any]]:
        """All events so far. Every line must be JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def wait_for(self, event: str, number: int = 1) -> dict[str, Any]:
        """The ``number``-th event of that name."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            found = [line for line in self.logged() if line["event"] == event]
            if len(found) >= number:
                return found[number - 1]
            time.sleep(0.05)
        pytest.fail(f"{event} was never logged")

    def end(self, number: signal.Signals) -> tuple[int, float]:
        """(exit status, seconds) after a signal."""
        began = time.monotonic()
        self.popen.send_signal(number)
        return self.popen.wait(PATIENCE), time.monotonic() - began


@contextlib.contextmanager
def serving(log: Path, *arguments: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "splitveil", "serve", "--listen", "127.0.0.1:0", "--log-json", *arguments]
    with log.open("w") as errors:
        popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert popen.stdout is not None
        opening: list[str] = []
        for line in popen.stdout:
            opening.append(line)
            if line.startswith("listening on "):
                yield Process(popen, line.split()[2], opening, log)
                return
        pytest.fail(f"the server ended early: {log.read_text()}")
    finally:
        popen.kill()
        popen.wait()


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder("base"), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder("base"))


@dataclass
class Customer:
    """A client in this process."""

    base: tuple[Any, Any]
    address: str
    key: str | None = None
    tls: ClientTLS | None = None

    def generate(self, length: int, started: threading.Event | None = None) -> list[int]:
        model, tokenizer = self.base
        connect(model, self.address, "clinic", api_key=self.key, tls=self.tls, pool_bytes=4 << 20)
        try:
            ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
            if started is not None:
                traffic = connection(model).session.traffic
                threading.Thread(target=lambda: _after(traffic, 30, started), daemon=True).start()
            output = model.generate(input_ids=ids, max_new_tokens=length, do_sample=False, eos_token_id=None)
            tokens: list[int] = output[0, ids.shape[1] :].tolist()
            return tokens
        finally:
            disconnect(model)


def _after(traffic: Any, queries: int, started: threading.Event) -> None:
    while traffic.queries < queries:
        time.sleep(0.01)
    started.set()


def test_one_servers_life(base: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutual TLS, a key, a ledger, metrics; a new adapter by SIGHUP, then a broken one; SIGTERM under a generation."""
    monkeypatch.setenv("SPLITVEIL_CACHE", str(tmp_path / "cache"))
    authority = Authority(tmp_path, "authority")
    server, client = authority.issue("server"), authority.issue("client")
    adapter = tmp_path / "clinic"
    shutil.copytree(folder("clinic"), adapter, ignore=shutil.ignore_patterns(DIRECTIONS))
    ledger = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    with Database(ledger) as database:
        key, _ = Keyring(database).create("acme-hospital")
    arguments = (
        *("--adapter", f"clinic={adapter}", "--ledger", ledger, "--limit", "5000", "--metrics", "127.0.0.1:0"),
        *("--tls-cert", str(server.certificate), "--tls-key", str(server.key), "--tls-client-ca", str(authority.file)),
        *("--drain", "1.5"),
    )
    with serving(tmp_path / "log", *arguments) as process:
        assert "(TLS, clients show a certificate)" in process.opening[-1]
        tls = ClientTLS(authority.file, client.certificate, client.key)
        customer = Customer(base, process.address, key, tls)
        first = customer.generate(6)
        by_hand = customer_process(process.address, key, authority, client)
        assert by_hand["tokens"] == first
        with pytest.raises(ConnectionFailedError, match="speaks TLS"):  # and nothing but JSON comes of it in the log
            Customer(base, process.address, key).generate(1)
        before = spent(ledger)

        process.popen.send_signal(signal.SIGHUP)  # the same folder: nothing is published again
        assert process.wait_for("certificate_renewed")
        assert customer.generate(6) == first
        assert metric(process, 'splitveil_publication_version{adapter="clinic"}') == 1

        reweight(adapter, -1.0)
        process.popen.send_signal(signal.SIGHUP)
        assert process.wait_for("adapter_replaced")["publication"] == 2
        second = customer.generate(6)
        assert second != first, "the adapter was not replaced, or does nothing"
        after = spent(ledger)
        assert min(after[site] - before[site] for site in before) >= 0
        assert sum(after.values()) > sum(before.values())

        (adapter / WEIGHTS).write_bytes(b"torn")
        process.popen.send_signal(signal.SIGHUP)
        failed = process.wait_for("adapter_not_replaced")
        assert failed["level"] == "error"
        assert WEIGHTS in failed["error"]
        assert customer.generate(6) == second, "a broken folder changed what is served"
        assert metric(process, 'splitveil_replacements_failed_total{adapter="clinic"}') == 1
        assert metric(process, 'splitveil_publication_version{adapter="clinic"}') == 2

        status, seconds, error = ended_under_a_generation(process, customer, signal.SIGTERM)
        assert status == 0
        assert 1.4 < seconds < 20
        assert "is shutting down; connect again later" in error
        assert process.wait_for("stopped")
        assert "acme" not in process.log.read_text()
        assert "sv_" not in process.log.read_text()
        assert {"draining", "session_opened", "session_ended", "certificate_renewed"} <= {
            line["event"] for line in process.logged()
        }
    final = spent(ledger)
    assert all(final[site] >= rows for site, rows in after.items())


def test_control_c_and_a_plain_log(base: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a generation sooner than SIGTERM would, and also with exit status 0."""
    monkeypatch.setenv("SPLITVEIL_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path / "log", "--adapter", "clinic=embedded:clinic", "--drain", "300") as process:
        assert "(plaintext, this machine only)" in process.opening[-1]
        status, seconds, error = ended_under_a_generation(process, Customer(base, process.address), signal.SIGINT)
    assert status == 0
    assert seconds < 30
    assert "is shutting down; connect again later" in error


def customer_process(address: str, key: str, authority: Authority, client: Pair) -> dict[str, Any]:
    """What ``splitveil generate --json`` prints."""
    command = [sys.executable, "-m", "splitveil", "generate", "--base", "embedded:base", "--server", address]
    command += ["--adapter", "clinic", "--prompt", QUESTION, "--max-new-tokens", "6", "--json"]
    command += ["--tls-ca", str(authority.file), "--tls-cert", str(client.certificate), "--tls-key", str(client.key)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "SPLITVEIL_API_KEY": key}
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def ended_under_a_generation(process: Process, customer: Customer, number: signal.Signals) -> tuple[int, float, str]:
    """(the server's exit status, how long it took, the client's error)."""
    errors: list[str] = []
    started = threading.Event()

    def work() -> None:
        try:
            while True:
                customer.generate(400, started)
        except ConnectionFailedError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(PATIENCE)
    status, seconds = process.end(number)
    thread.join(PATIENCE)
    return status, seconds, errors[0]


def reweight(adapter: Path, factor: float) -> None:
    """Another adapter of the same shape."""
    tensors = {name: t * (factor if "lora_B" in name else 1.0) for name, t in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)


def spent(ledger: str) -> dict[str, int]:
    with Database(ledger) as database:
        return {account.site: account.rows for account in accounts(database)}


def metric(process: Process, name: str) -> float:
    line = next(line for line in process.opening if line.startswith("metrics on "))
    with urllib.request.urlopen(line.split()[2], timeout=20) as answer:
        found = dict(x.rsplit(" ", 1) for x in answer.read().decode().splitlines() if not x.startswith("#"))
    return float(found[name])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("serve", "--adapter", "a=b", "--tls-cert", "x.crt"), "both --tls-cert and --tls-key"),
        (("serve", "--adapter", "a=b", "--tls-client-ca", "x.crt"), "both --tls-cert and --tls-key"),
        (
            ("generate", "--base", "x", "--server", "127.0.0.1:1", "--adapter", "a", "--prompt", "p", "--tls-key", "k"),
            "--tls-cert and --tls-key come together",
        ),
        (
            ("serve", "--adapter", "a=embedded:clinic", "--listen", "0.0.0.0:0"),
            "without TLS; give --tls-cert and --tls-key, or --allow-plaintext-beyond-this-machine",
        ),
    ],
)
def test_flags_that_do_not_go_together(arguments: tuple[str, ...], reason: str) -> None:
    done = CliRunner().invoke(cli, list(arguments))
    assert isinstance(done.exception, ConfigurationError), done.output
    assert reason in str(done.exception)
