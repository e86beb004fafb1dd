"""``splitveil split`` as processes: a server on a socket, a device that trains and is interrupted, an answer."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from command_line import Here
from equivalence.support import random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from splitveil.cli import cli
from splitveil.errors import ConfigurationError, SplitveilError
from splitveil.splitlearning.agreement import folder_name
from splitveil.splitlearning.cloud import LocalCloud
from splitveil.splitlearning.course import Course
from splitveil.splitlearning.data import hold_out, make_windows
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.splitlearning.training import train

SENTENCES = (
    "the cat sat on a mat and ran to my house",
    "my old red house in cold rain",
    "you ran in rain with my cat",
    "a cold mat sat in the old house with you",
)
WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})
PATIENCE = 120.0
TRAINING = ("--cut", "1", "--cloud", "lora", "--rank", "2", "--batch", "2", "--accumulate", "2", "--tokens", "8")
PLAN = Plan(1, Shape.U, Trains.LORA, Trains.LORA, rank=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer of words, in a folder."""
    place = tmp_path_factory.mktemp("model") / "tiny"
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(place)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    random_model(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = SENTENCES * 10
    file = tmp_path_factory.mktemp("data") / "notes.txt"
    file.write_text("\n".join(lines))
    return file


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "splitveil", "split", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def serving(model: Path, state: Path, log: Path, *more: object) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A server process on a port of its own choice, and its address."""
    arguments = command("serve", "--model", model, "--cut", 1, "--state", state, "--train", "lora", "--log-json")
    with log.open("a") as errors:
        process = subprocess.Popen(
            [*arguments, "--listen", "127.0.0.1:0", *map(str, more)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=ENVIRONMENT,
        )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("listening on "):
                yield line.split()[2], process
                return
        pytest.fail(f"the server ended early: {log.read_text()}")
    finally:
        process.kill()
        process.wait()


def loaded(model: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(model)


def expected(model: Path, data: Path, folder: Path, steps: int) -> Any:
    """The same run in this process, without a network and without interruption."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base, tokenizer = loaded(model)
        windows, held = hold_out(make_windows(tokenizer, data.read_text().splitlines(), 8, 0), 0.2)
        course = Course(steps, 1e-2, 2, 2, save_every=5)
        cloud = LocalCloud(base, cut=1, shape=Shape.U, plan=PLAN, folder=folder / "cloud")
        return train(Device(base, cut=1, shape=Shape.U, plan=PLAN), cloud, windows, held, course, folder / "mine")
    finally:
        torch.set_num_threads(threads)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


def training(model: Path, data: Path, address: str, out: Path, steps: int) -> list[object]:
    where = ("train", "--base", model, "--server", address, "--data", data, "--out", out)
    return [*where, *TRAINING, "--steps", steps, "--rate", 1e-2, "--held-out", 0.2, "--checkpoint-every", 5]


def refused(arguments: list[object], part: str) -> None:
    """One of our errors, which the command line shows as one line."""
    result = CliRunner().invoke(cli, ["split", *map(str, arguments)])
    assert isinstance(result.exception, SplitveilError), result.output
    assert part in str(result.exception)


def test_train_kill_resume_generate(model: Path, data: Path, here: Here, tmp_path: Path) -> None:
    """The server is killed in the middle of the run; the same command goes on, to the weights of an unbroken run."""
    state, out, log = tmp_path / "cloud", tmp_path / "mine", tmp_path / "log"
    steps = 40
    with serving(model, state, log) as (address, server):
        device = subprocess.Popen(
            command(*training(model, data, address, out, steps)), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        end = time.monotonic() + PATIENCE
        while not list((out / "checkpoints").glob("step-*")):
            assert time.monotonic() < end, "no checkpoint was made"
            assert device.poll() is None, device.communicate()[1]
            time.sleep(0.01)
        server.send_signal(signal.SIGKILL)
        _, errors = device.communicate(timeout=PATIENCE)
    assert device.returncode == 1, errors
    assert "Traceback" not in errors
    assert "the same command goes on" in errors
    assert errors.strip().splitlines()[-1].startswith("splitveil: ")
    with serving(model, state, log) as (address, server):
        done = here.run("split", *map(str, training(model, data, address, out, steps)), "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        unbroken = expected(model, data, tmp_path / "expected", steps)
        assert 0 < result["resumed"] < steps
        assert result["step"] == steps
        assert result["loss"] == unbroken.loss
        assert result["held_out"] == unbroken.held_out
        assert result["held_out"] < unbroken.held_out_before, "nothing was learnt: the equality proves little"
        assert result["tokens_per_second"] > 0
        assert result["bytes_sent"] > 4 * 16 * result["tokens"]
        assert files(out) == files(tmp_path / "expected" / "mine")
        (kept,) = state.iterdir()
        assert kept.name == folder_name(bytes.fromhex((out / "token").read_text()))
        assert files(kept) == files(tmp_path / "expected" / "cloud")
        assert (out / "token").stat().st_mode & 0o077 == 0

        asked = ("--base", model, "--server", address, "--personal", out / "personal", "--prompt", "the cat")
        answer = here.run("split", "generate", *map(str, asked), "--max-new-tokens", "12", "--json")
        assert answer.returncode == 0, answer.stderr
        told = json.loads(answer.stdout)
        assert sorted(told) == ["bytes_received", "bytes_sent", "text", "tokens", "tokens_per_second"]
        assert told["tokens"] == continued(model, out, kept, "the cat", 12)
        assert told["tokens"] != continued(model, out, None, "the cat", 12), "the cloud's part changes nothing"
        refused([*training(model, data, address, out, steps), "--rank", 4], "rank 2 there and 4 here")
        wrong = ["generate", "--base", model, "--server", address, "--cut", 2, "--prompt", "the cat"]
        refused(wrong, "give --cut 1 --shape u")
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"session_opened", "session_ended", "stopped"} <= {event["event"] for event in events}
    assert (out / "token").read_text() not in log.read_text()
    gone = ["generate", "--base", model, "--server", address, "--cut", 1, "--prompt", "a"]
    refused(gone, f"no Splitveil server for split sessions answers at {address}")


def continued(model: Path, out: Path, kept: Path | None, prompt: str, count: int) -> list[int]:
    """The whole model with both sides' adapters (or the device's alone), greedily, by PEFT and transformers alone."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    base, tokenizer = loaded(model)
    whole = get_peft_model(base, LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"])).eval()
    named = dict(whole.named_parameters())
    tensors = load_file(out / "personal" / "adapter_model.safetensors")
    with torch.no_grad():
        for name, tensor in tensors.items():
            named[name.replace(".weight", ".default.weight")].copy_(tensor)
        for name, tensor in load_file(max(kept.glob("step-*")) / "tensors.safetensors").items() if kept else ():
            if name.startswith("weight."):
                named["base_model.model." + name.removeprefix("weight.")].copy_(tensor)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = whole.generate(
        input_ids=ids, max_new_tokens=count, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


def test_ctrl_c_says_how_to_go_on(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    with serving(model, tmp_path / "cloud", tmp_path / "log") as (address, _):
        device = subprocess.Popen(
            command(*training(model, data, address, out, 100_000)),
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            # Tests that a shell runs in the background inherit that this signal is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        end = time.monotonic() + PATIENCE
        while not list((out / "checkpoints").glob("step-*")):
            assert time.monotonic() < end, "no checkpoint was made"
            assert device.poll() is None, device.communicate()[1]
            time.sleep(0.01)
        device.send_signal(signal.SIGINT)
        _, errors = device.communicate(timeout=PATIENCE)
    assert device.returncode == 130, errors
    assert "Traceback" not in errors
    assert "the same command goes on from the last one" in errors


WRONG: dict[str, tuple[list[str], str]] = {
    "no steps": (["train", "--cut", "1"], "one of --steps and --epochs"),
    "both": (["train", "--cut", "1", "--steps", "1", "--epochs", "1"], "one of --steps and --epochs"),
    "nothing trained": (
        ["train", "--cut", "1", "--steps", "1", "--device", "nothing"],
        "nothing is trained on either side",
    ),
    "no run to resume": (["train", "--cut", "1", "--steps", "1", "--resume"], "holds no run"),
    "encrypted": (["train", "--cut", "1", "--steps", "1", "--defence", "encrypted"], "splitveil generate"),
    "an unknown defence": (["train", "--cut", "1", "--steps", "1", "--defence", "fog"], "unknown defence 'fog'"),
    "no such cut": (["train", "--cut", "7", "--steps", "1"], "cut 7 does not exist"),
    "windows too long": (["train", "--cut", "1", "--steps", "1", "--tokens", "9999"], "at least a window"),
    "beyond this machine": (["train", "--cut", "1", "--steps", "1", "--server", "192.0.2.1:1"], "--tls"),
    "an empty prompt": (["generate", "--cut", "1", "--prompt", " "], "the prompt is empty"),
    "no cut": (["generate", "--prompt", "the"], "give --cut, or --personal"),
    "no run": (["generate", "--prompt", "the", "--personal", "."], "belongs to no run"),
}


def test_a_run_without_a_checkpoint_is_not_taken_for_the_base(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ["--base", str(model), "--server", "127.0.0.1:9"]
    begun = [
        "split",
        "train",
        *common,
        "--data",
        str(data),
        "--out",
        str(out),
        "--cut",
        "1",
        "--steps",
        "1",
        "--tokens",
        "8",
    ]
    CliRunner().invoke(cli, begun)
    assert (out / "run.json").is_file()
    for personal in (out, out / "personal"):
        used = ["split", "generate", *common, "--prompt", "the", "--personal", str(personal)]
        result = CliRunner().invoke(cli, used)
        assert "has not come to a checkpoint" in str(result.exception)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line(case: str, model: Path, data: Path, tmp_path: Path) -> None:
    arguments, part = WRONG[case]
    where = ["--base", str(model), *([] if "--server" in arguments else ["--server", "127.0.0.1:9"])]
    if arguments[0] == "train":
        where += ["--data", str(data), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, ["split", arguments[0], *where, *arguments[1:]])
    assert isinstance(result.exception, SplitveilError), result.output
    assert part in str(result.exception)
    assert not (tmp_path / "out" / "run.json").exists() or case == "beyond this machine"


def test_serve_needs_a_place_to_train() -> None:
    result = CliRunner().invoke(cli, ["split", "serve", "--model", "embedded:base", "--cut", "2", "--train", "lora"])
    assert isinstance(result.exception, ConfigurationError)
    assert "--state DIR" in str(result.exception)


@pytest.mark.parametrize("name", ["", "serve", "train", "generate"])
def test_help_says_first_what_is_not_protected(name: str) -> None:
    result = CliRunner().invoke(cli, ["split", *([name] if name else []), "--help"])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "audit" in text
    assert min(text.index(word) for word in ("READ", "LEARNS") if word in text) < text.index("Options:")
    assert "abels" in text or name == "generate"
    assert "splitveil split" in text
