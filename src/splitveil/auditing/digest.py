"""Digests of what a measurement depends on: SHA-256 in hexadecimal, equal for equal contents on every machine."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What a configuration says about itself and not about what the model computes.
_INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}


def digest(value: Any) -> str:
    """Of anything that JSON can hold; numbers that are not finite are a ``ValueError``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of named tensors: names, shapes, dtypes and contents."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def digest_model(model: Any) -> str:
    """Of a Hugging Face model: its class, its configuration, its weights and buffers, wherever it was loaded from."""
    described = {key: value for key, value in model.config.to_dict().items() if key not in _INCIDENTAL}
    about = json.dumps([type(model).__name__, described], sort_keys=True, default=str)
    return digest([about, digest_tensors(model.state_dict())])
