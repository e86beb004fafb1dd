"""Loading a local base model and its tokenizer, with errors that people can act on."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitveil.embedded import resolve
from splitveil.errors import BaseModelError, ConfigurationError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_base(text: str, *, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a Hugging Face folder. Nothing is ever downloaded, no remote code is run, and
    no pickle is read: weights come from safetensors files only.

    Raises ``BaseModelError`` for a folder that does not hold a causal language model and its tokenizer,
    ``ConfigurationError`` for a device that this machine lacks.
    """
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    folder = resolve(text)
    if not (folder / "config.json").is_file():
        raise BaseModelError(
            f"{folder} is not a Hugging Face model folder (no config.json); "
            "download the base model first, and give the folder it is in"
        )
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise BaseModelError(
            f"{folder} holds its weights in PyTorch .bin files, which are pickles and are not read; save the model as "
            "safetensors first (load it where you trust it, then save_pretrained) or download its safetensors files"
        )
    transformers.utils.logging.disable_progress_bar()
    kind = torch.float32 if dtype == "auto" and device == "cpu" and _half(folder) else dtype
    try:
        with _quiet(transformers.utils.logging):
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=kind,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        json.JSONDecodeError,
        RuntimeError,  # weights that are damaged inside, or too large for this machine's memory
        SafetensorError,
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BaseModelError(f"{folder} cannot be loaded as a causal language model: {reason}") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BaseModelError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {reason}); the folder needs the "
            "model's own tokenizer.json and tokenizer_config.json"
        ) from None
    # transformers would go on with random numbers in their places.
    lacking = sorted({*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])})
    if lacking:
        raise BaseModelError(
            f"{folder}: the weights are not those that its config.json describes: {len(lacking)} are missing or of "
            f"another shape, such as {lacking[0]}; download the model again, all files together"
        )
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device {device!r} is not usable here: {str(error).splitlines()[0]}") from None


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without transformers' table of the weights that it did not find: one line says it here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _half(folder: Path) -> bool:
    """Whether the weights are fp16, in which CPUs are slow and imprecise: they are widened there."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and str(config.get("dtype", config.get("torch_dtype"))) == "float16"
