"""A small model with an adapter that matters on its own text: what the tests of extraction attack and judge on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from equivalence.support import lora_pairs, random_model, tiny_llama
from peft import LoraConfig, get_peft_model

from splitveil.adapters import Adapter, load_adapter
from splitveil.extraction.worth import Text

SEED = 7
TARGETS = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Small:
    """d = 64 and 96, two blocks, rank 4. The text is sampled from the adapted model: the adapter gains on it."""

    model: Any
    peft: Any
    adapter: Adapter
    folder: Path
    text: Text


def small(folder: Path, windows: int = 48, length: int = 33, drift: float = 0.0) -> Small:
    """``drift``: r.m.s. of what is added to A, whose initial entries have 1/√(3d); 0 leaves A as PEFT drew it."""
    base, copied = random_model(tiny_llama()), random_model(tiny_llama())
    torch.manual_seed(SEED)
    peft = get_peft_model(copied, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    for a, b in lora_pairs(peft):
        torch.nn.init.normal_(b.weight, std=0.2)
        if drift:
            a.weight.data += drift * torch.randn_like(a.weight)
    peft.eval().save_pretrained(folder, save_embedding_layers=False)
    start = torch.randint(2, 160, (windows, 1))
    sampled = peft.generate(
        input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=length - 1
    )
    return Small(base, peft, load_adapter(folder), folder, Text(sampled))
