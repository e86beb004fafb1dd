"""Trains a LoRA adapter for stories3M on medical dialogues (MTS-Dialog): what ``extraction.py`` attacks besides clinic.

    python benchmarks/dialog_adapter.py --out DIR
    python benchmarks/extraction.py --base STORIES3M --adapter DIR/adapter --data DIR/held_out.jsonl --out DIR/found

DIR gets adapter/ (a PEFT folder), held_out.jsonl (one dialogue a line, none of which was trained on) and gain.json.
The split is the data set's own, file by file: the training file is trained on, the validation and test files are held
out, without dialogues that the training file has too. Everything is seeded; on one core it takes about ten minutes.
"""

import argparse
import csv
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitveil.extraction.worth import Perplexity, Text, perplexity

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 8, 16
TRAINED = ("MTS-Dialog-TrainingSet.csv",)
HELD_OUT = (
    "MTS-Dialog-ValidationSet.csv",
    "MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv",
    "MTS-Dialog-TestSet-2-MEDIQA-Sum-2023.csv",
)
LENGTH, BATCH, WARM_UP = 256, 8, 20
SEED = 1


def dialogues(folder: Path, names: tuple[str, ...]) -> list[str]:
    """The dialogues of some files, whitespace at line ends removed; repeated ones once."""
    found: dict[str, None] = {}
    for name in names:
        with (folder / name).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                text = "\n".join(line.strip() for line in row["dialogue"].splitlines()).strip()
                if text:
                    found[text] = None
    return list(found)


def train(model: Any, windows: Tensor, epochs: int, peak: float) -> None:
    """AdamW on all windows (number, LENGTH), in an order that depends on the seed alone."""
    order = torch.Generator().manual_seed(SEED)
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(windows), generator=order).split(BATCH)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    model.train()
    for step, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = peak * min((step + 1) / WARM_UP, (len(batches) - step) / len(batches))
        loss = model(input_ids=windows[batch], labels=windows[batch], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 20 == 0 or step == len(batches) - 1:
            print(f"\rstep {step + 1} of {len(batches)}, loss {loss.item():.3f}  ", end="", file=sys.stderr)
    print(file=sys.stderr)
    model.eval()


def main() -> None:
    shared = Path(__file__).resolve().parents[2] / "shared"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=shared / "models/stories3M")
    parser.add_argument("--data", type=Path, default=shared / "data/mts-dialog", help="folder of the data set's files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    began = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32).eval()

    learnt = dialogues(options.data, TRAINED)
    held_out = dialogues(options.data, HELD_OUT)
    known = set(learnt)
    fresh = [text for text in held_out if text not in known]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in fresh))

    windows = Text.of(tokenizer, learnt, tokens=1 << 30, length=LENGTH).windows
    judged = Text.of(tokenizer, fresh, tokens=1 << 30, length=LENGTH)
    before = perplexity(model, judged)
    wanted = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=MODULES)
    peft = get_peft_model(model, wanted)
    train(peft, windows, options.epochs, options.learning_rate)
    after = perplexity(peft, judged)
    peft.peft_config["default"].base_model_name_or_path = "stories3M"
    peft.save_pretrained(options.out / "adapter", save_embedding_layers=False)

    facts = {
        "dialogues trained on": len(learnt),
        "dialogues held out": len(fresh),
        "left out, being in both": len(held_out) - len(fresh),
        "tokens trained on, an epoch": windows.numel(),
        "tokens held out": judged.tokens,
        "perplexity before": _shown(before),
        "perplexity after": _shown(after),
        "gain in nats a token": round(math.log(before.value / after.value), 4),
        "seconds of one core": round(time.process_time() - began),
    }
    (options.out / "gain.json").write_text(json.dumps(facts, indent=1) + "\n")
    print("\n".join(f"{name:<28}{value}" for name, value in facts.items()))


def _shown(found: Perplexity) -> str:
    return f"{found.value:.2f} ({found.low:.2f} – {found.high:.2f})"


if __name__ == "__main__":
    main()
