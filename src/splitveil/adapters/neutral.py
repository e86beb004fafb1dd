"""What an `adapter_config.json` may hold but not use: fields with the values at which PEFT does nothing, and advice.

Compared with the sources of PEFT 0.21. The advice is the tail of an error message: what the vendor should do.
"""

from collections.abc import Mapping

from splitveil.errors import UnsupportedAdapterError

_PLAIN = "train a plain LoRA adapter"
_MERGED_START = "it changes the base model's weights; convert to plain LoRA first, then set it to null"

# The first value is PEFT's default. An empty list or object counts as neutral only where PEFT treats it so: an empty
# alora_invocation_tokens, for one, still switches aLoRA on.
NEUTRAL: Mapping[str, tuple[tuple[object, ...], str]] = {
    "alora_invocation_tokens": ((None,), f"aLoRA acts on some tokens only; {_PLAIN}"),
    "arrow_config": ((None,), "Arrow routes between adapters; serve each adapter under its own name"),
    "bias": (("none",), 'the biases of the base model were trained too; train with bias="none"'),
    "corda_config": ((None,), _MERGED_START),
    "enable_lora": ((None,), "it is a merged layer of an early PEFT; load and save the adapter with a current PEFT"),
    "ensure_weight_tying": ((False,), "train without the embeddings and the head, and set it to false"),
    "kasa_config": ((None,), f"KaSA truncates the base model's weights; {_PLAIN}"),
    "layer_replication": ((None, []), f"it builds another base model; {_PLAIN}"),
    "loftq_config": (({}, None), "LoftQ replaces the base model's weights; convert to plain LoRA first"),
    "lora_bias": ((False,), "train with lora_bias=False"),
    "lora_ga_config": ((None,), _MERGED_START),
    "megatron_config": ((None,), f"Megatron layers are not Hugging Face layers; {_PLAIN} on the Hugging Face model"),
    "megatron_core": (("megatron.core", None), "it is for Megatron layers; set it to null"),
    "merge_weights": ((False,), "it is a field of an early PEFT; load and save the adapter with a current PEFT"),
    "modules_to_save": ((None, []), "whole modules were trained too; train with modules_to_save=None"),
    "monteclora_config": ((None,), f"MonteCLoRA draws its weights at random; {_PLAIN}"),
    "qalora_group_size": ((16,), "it belongs to QALoRA; set it to 16, PEFT's default"),
    "runtime_config": (
        (None, {"ephemeral_gpu_offload": False}),
        "it does not belong into a saved file; set it to null",
    ),
    "target_parameters": ((None, []), f"it adapts bare parameters, not linear modules; {_PLAIN} with target_modules"),
    "trainable_token_indices": ((None,), "rows of the embedding were trained too; train without it"),
    "use_bdlora": ((None,), f"block-diagonal matrices are not served; {_PLAIN}"),
    "use_dora": ((False,), "DoRA needs the base model's weights at the server; train with use_dora=False"),
    "use_qalora": ((False,), "QALoRA pools the inputs; train with use_qalora=False"),
    "velora_config": ((None,), "VeLoRA stores its own tensors; set it to null and remove them if training is over"),
}

_RESIDUAL = (
    "convert to plain LoRA first: model.save_pretrained(folder, path_initial_model_for_weight_conversion=<the adapter "
    "as it was saved before training>)"
)

# Methods that subtract the first B·A from the base model, or quantise it. The customer's base model is the public one.
_BASE_CHANGING_INITS: Mapping[str, str] = {
    "pissa": _RESIDUAL,
    "olora": _RESIDUAL,
    "corda": _RESIDUAL,
    "lora_ga": _RESIDUAL,
    "loftq": "convert to plain LoRA first, that is, train again with init_lora_weights=True on the public base model",
}


def refuse_base_changing_init(init: str, where: str) -> None:
    """Refuse a start of training that changes the base model's weights; `where` names the file.

    Raises:
        UnsupportedAdapterError: `init` is PiSSA (in any variant), OLoRA, CorDA, LoRA-GA or LoftQ.
    """
    for prefix, advice in _BASE_CHANGING_INITS.items():
        # PEFT takes "pissa_niter_16" and the like for PiSSA.
        if init.lower().startswith(prefix):
            raise UnsupportedAdapterError(
                f'{where}: init_lora_weights = "{init[:40]}" changes the base model\'s weights, which the customer '
                f"does not have; {advice}"
            )
