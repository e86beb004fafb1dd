"""Loads a PEFT adapter folder: the matrices A and B of each adapted module, and their scale.

What is loaded is the vendor's secret. No repr and no message of this package shows a weight.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitveil.adapters.config import LoraSettings, parse_config
from splitveil.adapters.tensors import RawTensor, read_tensors
from splitveil.errors import AdapterError, UnsupportedAdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Rank 64 on every linear module of a 70B model is 3.3 GB in float32.
MAX_WEIGHTS_BYTES = 4 << 30
MAX_CONFIG_BYTES = 1 << 20

# Module names go over the wire and to terminals. An adapter name stands in between in files not saved by PEFT itself.
_KEY = re.compile(
    r"base_model\.model\.(?P<module>[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*?)"
    r"\.lora_(?P<half>[AB])(?:\.(?P<adapter>(?!lora_)[^.]+))?\.weight"
)
_MAX_NAME = 256

_HEADS = frozenset({"lm_head", "embed_out", "output_layer", "head", "score", "classifier"})
_EMBEDDINGS = frozenset(
    {"embed_tokens", "embed_in", "tok_embeddings", "word_embeddings", "position_embeddings", "wte", "wpe", "shared"}
)

# Parts of tensor names that tell what the tensor is for, most telling first.
_FOREIGN = (
    ("lora_embedding_", "belongs to an adapted embedding", "train without the embeddings in target_modules"),
    ("lora_magnitude_vector", "belongs to DoRA", "train with use_dora=False"),
    ("lora_diag", "belongs to KaSA", "train a plain LoRA adapter"),
    ("lora_velora", "belongs to VeLoRA", "remove it, or train a plain LoRA adapter"),
    ("lora_monteclora", "belongs to MonteCLoRA", "train a plain LoRA adapter"),
    ("trainable_tokens", "holds trained rows of the embedding", "train without trainable_token_indices"),
    ("modules_to_save", "is a whole trained module", "train with modules_to_save=None"),
    ("base_layer", "is of the base model or of nested adapters", "save only the LoRA tensors of linear modules"),
    (".bias", "is a bias", 'train with bias="none" and lora_bias=False'),
)


@dataclass(frozen=True, eq=False, repr=False)
class LoraModule:
    """The adapter of one linear module: it adds scale · B·A·x to the module's output.

    `name` is the module's path in the base model. `A` (r, d_in) and `B` (d_out, r) are read-only float32.
    """

    name: str
    A: NDArray[np.float32]
    B: NDArray[np.float32]
    scale: float

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return int(self.A.shape[0])

    @property
    def d_in(self) -> int:
        """Length of the module's input."""
        return int(self.A.shape[1])

    @property
    def d_out(self) -> int:
        """Length of the module's output."""
        return int(self.B.shape[0])

    def __repr__(self) -> str:
        return f"LoraModule(name={self.name!r}, rank={self.rank}, d_in={self.d_in}, d_out={self.d_out})"


@dataclass(frozen=True, eq=False)
class Adapter:
    """A checked adapter folder.

    `base_model` is what the training run was given, a hint that may be a path on the vendor's disk. `digest` is the
    SHA-256, in hex, of the SHA-256 of the configuration file followed by that of the weights file; it changes with
    either. `modules` are in the order of the base model's blocks.
    """

    path: Path
    base_model: str | None
    digest: str
    modules: tuple[LoraModule, ...]


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Load and check the folder that PEFT's `save_pretrained` wrote.

    Raises:
        UnsupportedAdapterError: it uses a feature that is refused by name, or holds tensors that are not plain LoRA.
        AdapterError: a file is missing, unreadable or damaged, or configuration and tensors disagree.
    """
    folder = Path(path)
    try:
        _check_files(folder)
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read ({error.strerror}); check the path and its permissions") from None
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    config = _read(config_file, MAX_CONFIG_BYTES)
    settings = parse_config(config, str(config_file))
    # Read once, so that what is hashed is what is served.
    weights = _read(weights_file, MAX_WEIGHTS_BYTES)
    digest = hashlib.sha256(hashlib.sha256(config).digest() + hashlib.sha256(weights).digest()).hexdigest()
    tensors = read_tensors(weights, str(weights_file))
    del weights
    pairs = _pair(tensors, str(weights_file))
    modules = tuple(_module(name, pairs[name], settings, str(weights_file)) for name in _in_block_order(pairs))
    return Adapter(path=folder, base_model=settings.base_model, digest=digest, modules=modules)


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise AdapterError(
            f"{folder}: no such folder; expected a local folder with {CONFIG_FILE} and {WEIGHTS_FILE} "
            "(adapters are not downloaded)"
        )
    if not (folder / CONFIG_FILE).is_file():
        # PEFT saves adapters that are not called "default" into sub-folders.
        inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
        hint = f"did you mean its sub-folder {inner[0]!r}?" if inner else "save the adapter with PEFT's save_pretrained"
        raise AdapterError(f"{folder}: {CONFIG_FILE} is missing; {hint}")
    if (folder / WEIGHTS_FILE).is_file():
        return
    if (folder / "adapter_model.bin").is_file():
        raise UnsupportedAdapterError(
            f"{folder}: adapter_model.bin is a pickle, which can run code when it is opened; load it with PEFT where "
            f"you trust it and save it again with safetensors (save_pretrained writes {WEIGHTS_FILE})"
        )
    raise AdapterError(f"{folder}: {WEIGHTS_FILE} is missing; save the adapter with PEFT's save_pretrained")


def _read(file: Path, limit: int) -> bytes:
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise AdapterError(
                    f"{file}: {size} bytes, expected at most {limit}; save only the LoRA tensors, in a 16-bit dtype"
                )
            return stream.read(size)
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read ({error.strerror}); check the file and its permissions") from None


def _pair(tensors: Iterable[RawTensor], where: str) -> dict[str, dict[str, RawTensor]]:
    """Group the tensors as {module: {"A": …, "B": …}}."""
    pairs: dict[str, dict[str, RawTensor]] = {}
    adapters: set[str | None] = set()
    for tensor in tensors:
        found = _KEY.fullmatch(tensor.name)
        if found is None or "base_layer" in found["module"].split(".") or len(found["module"]) > _MAX_NAME:
            raise _foreign(tensor.name, where)
        _check_place(found["module"], where)
        adapters.add(found["adapter"])
        pairs.setdefault(found["module"], {})[found["half"]] = tensor
    if not pairs:
        raise AdapterError(f"{where}: no LoRA tensors, expected at least one lora_A and lora_B; save the adapter again")
    if len(adapters) > 1:
        names = ", ".join(sorted(repr(name) for name in adapters))
        raise AdapterError(f"{where}: tensors of several adapters ({names}), expected one; save each on its own")
    return pairs


def _foreign(key: str, where: str) -> UnsupportedAdapterError:
    for part, what, advice in _FOREIGN:
        if part in key:
            return UnsupportedAdapterError(f"{where}: tensor {key[:200]!r} {what} and is not supported; {advice}")
    if key.removesuffix(".weight").rpartition(".")[2] in _HEADS | _EMBEDDINGS:
        # PEFT adds these by itself when it finds the vocabulary resized, which makes another base model.
        return UnsupportedAdapterError(
            f"{where}: tensor {key[:200]!r} is a whole embedding or head and is not supported; if the vocabulary is "
            "the base model's, save again with save_embedding_layers=False"
        )
    return UnsupportedAdapterError(
        f"{where}: tensor {key[:200]!r} is not supported, expected base_model.model.<module>.lora_A.weight or "
        f"….lora_B.weight with a module path of at most {_MAX_NAME} characters; save only the LoRA tensors"
    )


def _check_place(module: str, where: str) -> None:
    last = module.rpartition(".")[2]
    # InternLM calls its head "output", a name that other models use inside of their blocks.
    if last in _HEADS or module == "output":
        raise UnsupportedAdapterError(
            f"{where}: module {module!r} is the head, which cannot be adapted; train without it in target_modules"
        )
    if last in _EMBEDDINGS:
        raise UnsupportedAdapterError(
            f"{where}: module {module!r} is an embedding, which cannot be adapted; train without it in target_modules"
        )


def _module(name: str, pair: dict[str, RawTensor], settings: LoraSettings, where: str) -> LoraModule:
    for half, other in (("A", "B"), ("B", "A")):
        if half not in pair:
            raise AdapterError(f"{where}: module {name!r} has lora_{other} but no lora_{half}; save the adapter again")
    if not settings.targets.matches(name):
        raise AdapterError(
            f"{where}: module {name!r} is in the tensors, but PEFT would not adapt it under target_modules, "
            f"exclude_modules and layers_to_transform; use the {CONFIG_FILE} that was saved with these tensors"
        )
    A, B = pair["A"].matrix(where), pair["B"].matrix(where)
    rank = settings.rank(name)
    if A.shape[0] != rank or B.shape[1] != rank:
        raise AdapterError(
            f"{where}: module {name!r} has A {list(A.shape)} and B {list(B.shape)}, expected rank {rank} (A [r, d_in], "
            f"B [d_out, r]); use the {CONFIG_FILE} that was saved with these tensors"
        )
    return LoraModule(name=name, A=A, B=B, scale=settings.scale(name))


def _in_block_order(names: Iterable[str]) -> list[str]:
    """Sort with block 2 before block 10."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]

    return sorted(names, key=key)
