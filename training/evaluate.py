"""Measures the embedded base and its clinic adapter, and writes their model cards.

    python training/evaluate.py --text DIR --work DIR [--reference DIR]

Reads WORK/base, WORK/clinic, WORK/train.npy and the two logs; writes WORK/evaluation.json, WORK/base/README.md and
WORK/clinic/README.md. The cards hold no number that evaluation.json does not.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import base_model
import cards
import clinic_adapter
import numpy as np
import torch
from corpus import BASE_SETS, CLINIC_SET, base_documents, clinic_pairs
from ngram import ORDER, RUN, NGram, Runs
from numpy.typing import NDArray
from peft import PeftModel
from scoring import token_nats
from sources import source
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

Row = dict[str, Any]

CONTEXT = base_model.CONTEXT
NEW_TOKENS = 80
REFERENCE_SET = "child_stories"

# Fixed before the first evaluation, and shown with whatever comes out.
GENERAL_PROMPTS = (
    "Once upon a time, a little girl named Amina found a small brown dog by the river.",
    "The old lion was hungry. He looked at the mouse and said,",
    "Plain language helps readers because",
    "When a government agency builds a website, the first thing the team should do is",
    "In the years after the Civil War, the United States",
    "The human heart is a muscle that",
    "User: Hi, I would like to order two large coffees, please.\nAssistant:",
    "Question: Sam has 3 boxes with 4 apples in each box. He eats 2 apples. How many apples are left?\nAnswer:",
)
PATIENT_QUESTIONS = (
    "What is high blood pressure?",
    "What are the symptoms of diabetes?",
    "How is asthma treated?",
    "My mother has Alzheimer's disease. Will I get it too?",
    "What causes kidney stones?",
    "How can I lower my cholesterol?",
    "I feel tired all the time and my skin looks pale. Could it be anemia?",
    "What tests will my doctor do to find out if I have celiac disease?",
    "Is cystic fibrosis inherited?",
    "Who is at risk for skin cancer?",
    "What should I eat if I have gout?",
    "How long does it take to get over the flu?",
)


@dataclass(frozen=True)
class Language:
    """A model with its tokenizer, called on text."""

    name: str
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerFast

    def ids(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """Start token and text; no end token, which not every model was trained to predict."""
        start = self.tokenizer.bos_token_id
        return [np.array([start, *i]) for i in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def nats(self, texts: list[str]) -> list[NDArray[np.float64]]:
        """Per-token losses of each text."""
        return token_nats(self.model, self.ids(texts), context=CONTEXT, label=self.name)


def bits_per_byte(nats: list[NDArray[np.float64]], texts: list[str]) -> float:
    """All losses in bits over all UTF-8 bytes."""
    return round(sum(float(n.sum()) for n in nats) / math.log(2) / utf8_bytes(texts), 3)


def utf8_bytes(texts: list[str]) -> int:
    """The length of all texts together."""
    return sum(len(t.encode()) for t in texts)


def clinic_perplexity(model: PeftModel, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> Row:
    """Perplexity of held-out pairs without and with the adapter: answers given questions, and the whole text."""
    examples = clinic_adapter.encode_pairs(pairs, tokenizer)
    ids = [e.ids for e in examples]
    tuned = token_nats(model, ids, context=CONTEXT, label="clinic, adapter")
    with model.disable_adapter():
        plain = token_nats(model, ids, context=CONTEXT, label="clinic, base")

    def compared(part: Callable[[int], slice]) -> dict[str, float]:
        chosen = [np.concatenate([n[part(e.answer)] for n, e in zip(m, examples, strict=True)]) for m in (plain, tuned)]
        before, after = (float(np.exp(nats.mean())) for nats in chosen)
        return {
            "tokens": len(chosen[0]),
            "base": round(before, 2),
            "adapter": round(after, 2),
            "lower_by_percent": round(100 * (1 - after / before), 1),
        }

    return {
        "pairs": len(pairs),
        "answers": compared(lambda answer: slice(answer - 1, None)),
        "whole_text": compared(lambda _: slice(None)),
    }


def compression(base: Language, stream: NDArray[np.integer], documents: dict[str, list[str]]) -> Row:
    """Bits per byte of the held-out documents, set by set and over all, for the base and for an n-gram model.

    With each goes the share of its tokens that stand word for word in the training stream.
    """
    names = [name for name in documents if documents[name]]
    texts = [text for name in names for text in documents[name]]
    ids = base.ids(texts)
    ngram = NGram(stream, start=base.tokenizer.bos_token_id, vocabulary=len(base.tokenizer))
    runs = Runs(stream)
    copied = [runs.copied(i[1:]) for i in ids]
    losses = {"base": base.nats(texts), "ngram": [ngram.nats(i) for i in tqdm(ids, desc=f"{ORDER}-gram")]}
    rows, begin = [], 0
    for name in ["overall", *names]:
        part = slice(None) if name == "overall" else slice(begin, begin + len(documents[name]))
        begin = 0 if name == "overall" else part.stop
        row: Row = {"set": name, "documents": len(texts[part]), "utf8_bytes": utf8_bytes(texts[part])}
        row["tokens"] = sum(len(i) - 1 for i in ids[part])
        row["copied_percent"] = round(100 * sum(copied[part]) / row["tokens"], 1)
        rows.append(row | {model: bits_per_byte(n[part], texts[part]) for model, n in losses.items()})
    return {"ngram_order": ORDER, "copied_run": RUN, "overall": rows[0], "sets": rows[1:]}


def against_reference(folder: Path, base: Language, texts: list[str]) -> Row:
    """Bits per byte of the same texts for the base and for another small model, read in the same way."""
    model = load(folder)
    other = Language(folder.name, model, AutoTokenizer.from_pretrained(folder))
    return {
        "name": folder.name,
        "parameters": model.num_parameters(),
        "set": REFERENCE_SET,
        "documents": len(texts),
        "utf8_bytes": utf8_bytes(texts),
        "base": bits_per_byte(base.nats(texts), texts),
        "reference": bits_per_byte(other.nats(texts), texts),
    }


@torch.no_grad()
def continuation(model: PeftModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The greedy continuation of a prompt that follows a start token; ends with an ellipsis if the limit cut it."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )[0, ids.shape[1] :]
    ended = output[-1] == tokenizer.eos_token_id
    text: str = tokenizer.decode(output, skip_special_tokens=True)
    return text if ended else f"{text} …"


def continuations(model: PeftModel, tokenizer: PreTrainedTokenizerFast, limit: int | None) -> list[dict[str, str]]:
    """Every fixed prompt with what the base and the adapted model make of it."""
    prompts = [("general", p) for p in GENERAL_PROMPTS[:limit]]
    prompts += [("patient", f"Question: {q}\nAnswer:") for q in PATIENT_QUESTIONS[:limit]]
    rows = []
    for kind, prompt in tqdm(prompts, desc="prompts"):
        tuned = continuation(model, tokenizer, prompt)
        with model.disable_adapter():
            plain = continuation(model, tokenizer, prompt)
        rows.append({"kind": kind, "prompt": prompt, "base": plain, "adapter": tuned})
    return rows


def data(text_dir: Path, held_out: dict[str, list[str]]) -> list[Row]:
    """Each set with its sizes and its origin, the clinic set last."""
    rows = []
    for name in tqdm(BASE_SETS, desc="sets"):
        training = base_documents(text_dir, held_out=False, sets=(name,))
        rows.append(set_row(text_dir, name, training, held_out[name]))
    parts = [[a for _, a in clinic_pairs(text_dir, held_out=h)] for h in (False, True)]
    return [*rows, set_row(text_dir, CLINIC_SET, *parts)]


def set_row(text_dir: Path, name: str, training: list[str], held_out: list[str]) -> Row:
    """One set's sizes and origin."""
    return {
        "set": name,
        "training_documents": len(training),
        "training_mb": round(utf8_bytes(training) / 1e6, 2),
        "held_out_documents": len(held_out),
        **source(text_dir / name),
    }


def weights(file: Path, parameters: int) -> Row:
    """Size and digest of one weights file."""
    content = file.read_bytes()
    return {
        "file": file.name,
        "parameters": parameters,
        "megabytes": round(len(content) / 1e6, 2),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def last_row(log: Path) -> Row:
    """The last line of a training log."""
    row: Row = json.loads(log.read_text().splitlines()[-1])
    return row


def models(work: Path, base_parameters: int, adapter_parameters: int) -> Row:
    """Shape, weights and training of both models, from their folders and logs."""
    config = json.loads((work / "base" / "config.json").read_text())
    lora = json.loads((work / "clinic" / "adapter_config.json").read_text())
    steps = last_row(work / "log.jsonl")["step"]
    run = last_row(work / "clinic_run" / "log.jsonl")
    stream = len(np.load(work / "train.npy", mmap_mode="r"))
    read = steps * base_model.BATCH_TOKENS
    return {
        "base": {
            **weights(work / "base" / "model.safetensors", base_parameters),
            "layers": config["num_hidden_layers"],
            "width": config["hidden_size"],
            "mlp_width": config["intermediate_size"],
            "heads": config["num_attention_heads"],
            "key_value_heads": config["num_key_value_heads"],
            "vocabulary": config["vocab_size"],
            "context": config["max_position_embeddings"],
            "stream_tokens": stream,
            "tokens_read": read,
            "passes": round(read / stream, 2),
            "steps": steps,
        },
        "adapter": {
            **weights(work / "clinic" / "adapter_model.safetensors", adapter_parameters),
            "rank": lora["r"],
            "alpha": lora["lora_alpha"],
            "modules": sorted(lora["target_modules"]),
            "tokens_read": run["tokens"],
            "steps": run["step"],
        },
    }


def load(folder: Path) -> PreTrainedModel:
    """A model in float32, whatever it is stored in."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def evaluation(text: Path, work: Path, reference: Path | None, limit: int | None) -> Row:
    """Everything that the cards say, measured."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "base", model_max_length=int(1e9))
    plain = load(work / "base")
    base_parameters = plain.num_parameters()
    base = Language("base", plain, tokenizer)
    held_out = {name: base_documents(text, held_out=True, sets=(name,)) for name in BASE_SETS}
    some = {name: documents[:limit] for name, documents in held_out.items()}
    result: Row = {
        "trial": limit is not None,
        "licence_of_the_weights": "Apache-2.0",
        "context": CONTEXT,
        "overlap": CONTEXT // 2,
        "new_tokens": NEW_TOKENS,
        "compression": compression(base, np.load(work / "train.npy"), some),
        "reference": against_reference(reference, base, some[REFERENCE_SET]) if reference else None,
    }
    # From here on `plain` carries the adapter: peft puts its layers into the model that it is given.
    model = PeftModel.from_pretrained(plain, work / "clinic").eval()
    adapter_parameters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    return result | {
        "clinic": clinic_perplexity(model, tokenizer, clinic_pairs(text, held_out=True)[:limit]),
        "prompts": continuations(model, tokenizer, limit),
        "models": models(work, base_parameters, adapter_parameters),
        "data": data(text, held_out),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder that holds the text sets")
    parser.add_argument("--work", type=Path, required=True, help="folder with the trained base and adapter")
    parser.add_argument("--reference", type=Path, help="another small model to compare with, a Hugging Face folder")
    parser.add_argument("--limit", type=int, help="a trial on so many documents, pairs and prompts of each kind")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.work
    found = evaluation(arguments.text, work, arguments.reference, arguments.limit)
    (work / "evaluation.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for folder, card in (("base", cards.base_card(found)), ("clinic", cards.clinic_card(found))):
        cards.check_numbers(card, found)
        (work / folder / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
