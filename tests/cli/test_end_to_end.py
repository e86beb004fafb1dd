"""The product as processes: a server, a client, a socket, and the demo, on the embedded default."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Here, one_line_error

from splitveil.demo.run import Demonstration, demonstrate

QUESTION = "Question: What is anemia?\nAnswer:"


def splitveil(*arguments: str, stdin: str = "", cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SPLITVEIL_CACHE": str(cache)} if cache else None
    return subprocess.run(
        [sys.executable, "-m", "splitveil", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A server process on a port of its own choice, and its address."""
    command = [sys.executable, "-m", "splitveil", "serve", "--listen", "127.0.0.1:0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("listening on "):
                yield line.split()[2], process
                return
        pytest.fail("the server ended early")
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving("--adapter", "clinic=embedded:clinic") as (address, _):
        yield address


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """Plaintext PEFT's tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from splitveil.embedded import folder

    base = AutoModelForCausalLM.from_pretrained(folder("base"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder("base"))
    model = PeftModel.from_pretrained(base, folder("clinic")).eval()
    ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    tokens: list[int] = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    return tokens


def common(server: str) -> tuple[str, ...]:
    return "--base", "embedded:base", "--server", server, "--adapter", "clinic"


def test_generate_as_json(server: str, expected: list[int], here: Here, tmp_path: Path) -> None:
    arguments = ("generate", *common(server), "--max-new-tokens", "24", "--json")
    done = splitveil(*arguments, "--prompt", QUESTION, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert sorted(result) == ["bytes_received", "bytes_sent", "text", "tokens", "tokens_per_second"]
    assert result["tokens"] == expected
    assert result["bytes_sent"] > 24 * 4 * (256 + 1024)
    # The prompt from standard input; the publication from the cache this time; the same tokens.
    again = here.run(*arguments, "--prompt", "-", stdin=QUESTION)
    assert json.loads(again.stdout)["tokens"] == expected
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


def test_generate_streams_text(server: str, here: Here) -> None:
    done = here.run("generate", *common(server), "--prompt", QUESTION, "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "8 tokens" in done.stderr


def test_fixed_length_sends_as_much_whatever_the_answer(server: str, here: Here) -> None:
    told = {}
    for question in ("What is anemia?", "What are the treatments for asthma?"):
        for flags in ((), ("--fixed-length",)):
            asked = ("--prompt", f"Question: {question}\nAnswer:", "--max-new-tokens", "32", "--json")
            done = here.run("generate", *common(server), *flags, *asked)
            assert done.returncode == 0, done.stderr
            told[question, bool(flags)] = json.loads(done.stdout)
    lengths = {key: len(answer["tokens"]) for key, answer in told.items()}
    long, short = "What is anemia?", "What are the treatments for asthma?"
    assert lengths[long, False] == lengths[long, True] == 32
    assert lengths[short, False] == lengths[short, True] < 32
    steps = {key: answer["bytes_sent"] for key, answer in told.items()}
    assert steps[short, False] < steps[long, False]
    # The second prompt is longer by a few rows, so that nothing but the short answer could have sent less.
    assert steps[short, True] >= steps[long, True] >= steps[long, False]


def test_chat(server: str, tmp_path: Path) -> None:
    done = splitveil("chat", *common(server), "--max-new-tokens", "8", stdin="What is anemia?\n\n", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_an_unknown_adapter_and_no_server(server: str, here: Here) -> None:
    for where, part in (
        (("--server", server, "--adapter", "law"), "law"),
        (("--server", "127.0.0.1:9", "--adapter", "clinic"), "127.0.0.1:9"),
        (("--server", "example.org:7433", "--adapter", "clinic"), "example.org"),
    ):
        one_line_error(here.run("generate", "--base", "embedded:base", *where, "--prompt", "hello"), part)


def test_a_server_that_dies_in_the_middle(tmp_path: Path) -> None:
    with serving("--adapter", "clinic=embedded:clinic") as (address, process):
        client = subprocess.Popen(
            [sys.executable, "-m", "splitveil", "generate", *common(address), "--prompt", QUESTION]  # noqa: RUF005
            + ["--max-new-tokens", "480"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SPLITVEIL_CACHE": str(tmp_path)},
        )
        assert client.stdout is not None
        assert client.stdout.read(1)  # the first word is out
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        _, errors = client.communicate(timeout=60)
    assert client.returncode == 1
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("splitveil: ")


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    """The demo, once: a vendor's process, this one, a socket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITVEIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return demonstrate(new_tokens=32, out=tmp_path_factory.mktemp("report"))


def test_the_demo(demonstration: Demonstration, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitveil.demo.run.demonstrate", lambda *_: demonstration)
    done = here.run("demo", "--json")
    assert done.returncode == 0, done.stderr
    d = json.loads(done.stdout)
    assert d["identical"]
    assert d["private"]["tokens"] == d["plaintext"]["tokens"]
    assert d["private"]["tokens"] != d["base"]["tokens"], "the adapter changes nothing: the equality proves nothing"
    assert min(d["seen"]["bytes_p"], d["seen"]["pairs_p"]) >= 1e-6, "the server could tell the queries from noise"
    assert min(d["plain"]["bytes_p"], d["plain"]["pairs_p"]) < 1e-6, "the test could not tell plain activations either"
    rows = d["prompt_tokens"] + len(d["private"]["tokens"]) - 1
    assert d["rows_used"] == rows
    # Two tokens to learn which modules share a tensor, the conversation, and four times more to time it.
    assert d["rows_in_all"] == d["prompt_tokens"] + 1 + 5 * rows
    assert d["bytes_sent_per_token"] >= d["queries_per_token"] * 4 * (d["width"] + 1024)
    leak = d["plain_split"]
    assert d["question"] in leak["recovered"]
    assert leak["accuracy"] == leak["certified"] == 1.0
    assert leak["tries"] <= 3
    assert "<html" in Path(leak["report"]).read_text()


def test_the_demo_fits_on_a_screen(demonstration: Demonstration, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitveil.demo.run.demonstrate", lambda *_: demonstration)
    done = here.run("demo")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) <= 55
    for words in (
        "the server saw",
        "unencrypted",
        "never left",
        "rows used",
        "this conversation",
        "identical",
        "Without encryption",
    ):
        assert words in done.stdout
