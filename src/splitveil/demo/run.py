"""Runs the demo: a vendor's process, a customer's process (this one), a socket between them."""

import contextlib
import copy
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from splitveil.demo.noise_test import NoiseTest, noise_test
from splitveil.demo.plain_split import PlainSplit, attack_plain_split
from splitveil.embedded import folder
from splitveil.errors import SplitveilError
from splitveil.serving.connect import connect, connection, disconnect

QUESTION = "What are the symptoms of anemia?"
NEW_TOKENS = 80
REPEATS = 3
# Greedy, for every model alike; without the penalty so small a model repeats itself.
DECODING: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.3}


@dataclass(frozen=True)
class Reply:
    """One model's answer to the question, and its speed."""

    text: str
    tokens: list[int]
    tokens_per_second: float


@dataclass(frozen=True)
class Demonstration:
    """All that the screen shows. Nothing here is hard-coded: every field was measured in this run."""

    question: str
    prompt_tokens: int
    base: Reply
    plaintext: Reply
    private: Reply
    bytes_sent_per_token: float
    bytes_received_per_token: float
    queries_per_token: float
    first_words: list[int]
    seen: NoiseTest
    plain_words: list[int]
    plain: NoiseTest
    published_bytes: int
    published_rows: int
    adapter_parameters: int
    rows_used: int
    """At every layer, by the conversation that is shown."""
    rows_in_all: int
    """At the layer that was asked most, by the whole session: as the server counted them."""
    width: int
    pool_bytes: int
    plain_split: PlainSplit
    seconds: float
    modules: list[str] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Whether the private tokens are those of plaintext PEFT."""
        return self.private.tokens == self.plaintext.tokens


def demonstrate(question: str = QUESTION, new_tokens: int = NEW_TOKENS, out: Path | None = None) -> Demonstration:
    """Runs everything.

    The report on the plain split goes to ``out``, by default a new folder among the temporary ones.
    Raises ``SplitveilError`` if the vendor's process fails.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    begun = time.perf_counter()
    base_folder, adapter_folder = folder("base"), folder("clinic")
    tokenizer = AutoTokenizer.from_pretrained(base_folder, local_files_only=True)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, local_files_only=True).eval()

    prompt = f"Question: {question}\nAnswer:"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    model = load()
    base_reply, _ = _replies(model, model, ids, new_tokens, tokenizer)
    with warnings.catch_warnings():
        # PEFT asks transformers for an attribute that is about to be renamed; nothing for the reader of a demo.
        warnings.simplefilter("ignore", FutureWarning)
        with_adapter = PeftModel.from_pretrained(load(), adapter_folder).eval()
    captured: list[NDArray[np.float32]] = []
    with tempfile.TemporaryDirectory() as scratch, _vendor(adapter_folder, Path(scratch) / "seen") as vendor:
        connect(model, vendor.address, "clinic")
        try:
            adapter = connection(model)
            traffic = adapter.session.traffic
            model.generate(ids, max_new_tokens=2, **DECODING)  # which modules share a tensor is learned here
            before = copy.copy(traffic)
            with _capture(model, adapter.groups[0][0], captured):
                model.generate(ids, max_new_tokens=new_tokens, **DECODING)
            rows, sent, received = (
                traffic.rows - before.rows,
                traffic.sent - before.sent,
                traffic.received - before.received,
            )
            plaintext, private = _replies(with_adapter, model, ids, new_tokens, tokenizer)
            publication = adapter.session.publication
            groups, pool_bytes = adapter.groups, adapter.pool.size if adapter.pool is not None else 0
        finally:
            disconnect(model)
        seen, rows_in_all = vendor.report()
    tokens = ids.shape[1] + len(private.tokens) - 1
    plain = _as_sent_without_mask(captured)
    out = Path(tempfile.mkdtemp(prefix="splitveil-demo-")) if out is None else out
    leak = attack_plain_split(model, tokenizer, prompt, out)
    return Demonstration(
        question=question,
        prompt_tokens=ids.shape[1],
        base=base_reply,
        plaintext=plaintext,
        private=private,
        bytes_sent_per_token=sent / tokens,
        bytes_received_per_token=received / tokens,
        queries_per_token=len(groups),
        first_words=seen[:8].tolist(),
        seen=noise_test(seen),
        plain_words=plain[:8].tolist(),
        plain=noise_test(plain),
        published_bytes=len(publication.to_bytes()),
        published_rows=sum(layer.rank for layer in publication.layers),
        adapter_parameters=sum(layer.rank * layer.width for layer in publication.layers),
        rows_used=rows // len(groups),
        rows_in_all=rows_in_all,
        width=min(layer.width for layer in publication.layers),
        pool_bytes=pool_bytes,
        plain_split=leak,
        seconds=time.perf_counter() - begun,
        modules=sorted({name.rpartition(".")[2] for layer in publication.layers for name, _ in layer.outputs}),
    )


def _replies(first: Any, second: Any, ids: torch.Tensor, new_tokens: int, tokenizer: Any) -> tuple[Reply, Reply]:
    """Both models' greedy answers, timed in turn; the median of a few runs each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    new: list[list[int]] = [[], []]
    for _ in range(REPEATS + 1):
        for i, model in enumerate((first, second)):
            begun = time.perf_counter()
            output = model.generate(input_ids=ids, max_new_tokens=new_tokens, **DECODING)
            seconds[i].append(time.perf_counter() - begun)
            new[i] = output[0, ids.shape[1] :].tolist()
    # The first run of each warms up and does not count.
    one, two = (
        Reply(
            tokenizer.decode(new[i], skip_special_tokens=True).strip(),
            new[i],
            len(new[i]) / float(np.median(seconds[i][1:])),
        )
        for i in range(2)
    )
    return one, two


@contextlib.contextmanager
def _capture(model: Any, name: str, into: list[NDArray[np.float32]]) -> Iterator[None]:
    """Records what a module receives: the activations that a split without encryption would send."""

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        into.append(args[0].detach().reshape(-1, args[0].shape[-1]).float().numpy())

    handle = model.get_submodule(name).register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def _as_sent_without_mask(captured: list[NDArray[np.float32]]) -> NDArray[np.uint32]:
    """The same activations as 32-bit integers of the size a query has, but without the mask."""
    rows = np.concatenate(captured).astype(np.float64)
    scaled = rows / np.linalg.norm(rows, axis=1, keepdims=True) * 2.0**31 / np.sqrt(rows.shape[1])
    words: NDArray[np.uint32] = np.rint(scaled).astype(np.int64).astype(np.uint32).reshape(-1)
    return words


class _Vendor:
    """The vendor's process, seen from this side."""

    def __init__(self, process: "subprocess.Popen[str]", seen_file: Path) -> None:
        self._process = process
        self._seen_file = seen_file
        self.address = str(self._line()["address"])

    def report(self) -> tuple[NDArray[np.uint32], int]:
        """Stops the server and returns the words that it received, and how many rows of one layer it was asked for."""
        last, _ = self._process.communicate("\n", timeout=30)
        return np.frombuffer(self._seen_file.read_bytes(), dtype="<u4"), _parsed(last)["rows_of_a_layer"]

    def _line(self) -> dict[str, Any]:
        return _parsed(self._process.stdout.readline() if self._process.stdout is not None else "")


def _parsed(line: str) -> dict[str, Any]:
    if not line:
        raise SplitveilError("the demo's server process ended early; its message is above")
    parsed: dict[str, Any] = json.loads(line)
    return parsed


@contextlib.contextmanager
def _vendor(adapter_folder: Path, seen_file: Path) -> Iterator[_Vendor]:
    command = [sys.executable, "-m", "splitveil.demo.vendor", str(adapter_folder), str(seen_file)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield _Vendor(process, seen_file)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
