"""Private = PEFT with the sealed engine: the embedded default, and a tiny model through the command line.

A layer takes a tenth of a second a row, so these are few tokens: ``benchmarks/equality.py`` compares more. The engine
itself is measured in ``tests/unit/test_private_sealed.py``.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitveil
from equivalence.support import greedy, logits, random_model, tiny_llama
from splitveil.embedded import folder
from splitveil.errors import ConfigurationError
from splitveil.serving.connect import connection

PROMPT = "Q: asthma?"
NEW_TOKENS = 3


def test_tokens_of_the_embedded_default_are_pefts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder("base"))
    base, copied = (AutoModelForCausalLM.from_pretrained(folder("base"), dtype=torch.float32).eval() for _ in range(2))
    prompt = tokenizer("Fever", return_tensors="pt")["input_ids"]
    peft = PeftModel.from_pretrained(copied, folder("clinic")).eval()
    expected = greedy(peft, prompt, NEW_TOKENS)
    assert not torch.equal(expected, greedy(base, prompt, NEW_TOKENS)), "the adapter changes nothing here"
    with splitveil.serve({"clinic": folder("clinic")}, "127.0.0.1:0", engine="sealed") as server:
        with pytest.raises(ConfigurationError, match="served by the sealed engine, and the lattice one was asked for"):
            splitveil.connect(base, server.address, adapter="clinic")
        model = splitveil.connect(base, server.address, adapter="clinic", engine="sealed")
        try:
            assert connection(model).session.publication.engine == "sealed"
            assert torch.equal(greedy(model, prompt, NEW_TOKENS), expected)
        finally:
            splitveil.disconnect(model)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[int]]:
    """(base folder, adapter folder, plaintext PEFT's tokens): one block; q and v, which share A, and o."""
    where = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder("base"))
    base = random_model(tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=1))
    base.save_pretrained(where / "base")
    tokenizer.save_pretrained(where / "base")
    torch.manual_seed(1)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    peft = get_peft_model(copy.deepcopy(base), lora).eval()
    attention = peft.base_model.model.model.layers[0].self_attn
    attention.v_proj.lora_A["default"].weight.data.copy_(attention.q_proj.lora_A["default"].weight.data)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data *= 6
    peft.save_pretrained(where / "adapter", save_embedding_layers=False)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens = greedy(peft, prompt, NEW_TOKENS)
    best = logits(peft, tokens).topk(2, dim=-1).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-3, "a near-tie proves nothing"
    assert not torch.equal(tokens, greedy(base, prompt, NEW_TOKENS))
    return where / "base", where / "adapter", tokens[0, prompt.shape[1] :].tolist()


def test_through_the_command_line(tiny: tuple[Path, Path, list[int]], tmp_path: Path) -> None:
    base, adapter, expected = tiny
    command = [sys.executable, "-m", "splitveil"]
    serve = [*command, "serve", "--engine", "sealed", "--listen", "127.0.0.1:0", "--adapter", f"tiny={adapter}"]
    process = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("listening on "):
                break
        assert "2 private layers" in lines[0]  # q and v are one
        assert "parameters ckks-8192-176" in lines[0]
        ask = [
            *command,
            "generate",
            "--base",
            str(base),
            "--server",
            lines[-1].split()[2],
            "--adapter",
            "tiny",
            "--engine",
            "sealed",
            "--json",
        ]
        done = subprocess.run(
            [*ask, "--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS)],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "SPLITVEIL_CACHE": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["tokens"] == expected
        assert result["bytes_sent"] > 21_000_000  # the keys, once
    finally:
        process.kill()
        process.wait()
