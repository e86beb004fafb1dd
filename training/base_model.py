"""Trains the embedded base model: tokenizer, then a small Llama, resumable at any step.

    python training/base_model.py --text DIR --work DIR [--tokens 15e6]

The learning rate is constant after a warm-up and falls to zero over the last fifth of the token budget, so a run can
be resumed with a smaller or larger ``--tokens``: what has been trained so far is always a valid beginning. The falling
part reads windows of the full context; before it they are half as long, which is faster and loses little.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from corpus import base_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 512
BATCH_TOKENS = 8192
DECAY_SHARE = 0.2
WARM_UP_STEPS = 100
CHECKPOINT_EVERY = 200
PEAK_ADAM, PEAK_MUON = 2e-3, 4e-3


def config() -> LlamaConfig:
    """Six blocks of width 256 with grouped-query attention: 5.5 million parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def train_tokenizer(documents: list[str], folder: Path) -> None:
    """A byte-level BPE of ``VOCABULARY`` entries: every text can be written, nothing maps to 'unknown'."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    # Every text begins as the documents did in training.
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],  # what the model takes: generate(**tokens) works
    ).save_pretrained(folder)


def encode(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All documents as one stream of token ids, each between <s> and </s>."""
    parts: list[np.ndarray] = []
    for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        parts.append(np.array([0, *ids, 1], dtype=np.uint16))
    return np.concatenate(parts)


def windows(stream: np.ndarray, step: int, length: int) -> torch.Tensor:
    """The batch of a step: (BATCH_TOKENS // length, length) ids, a function of the step alone, hence resumable."""
    per_epoch = len(stream) // length - 1
    batch = BATCH_TOKENS // length
    out = np.empty((batch, length), dtype=np.int64)
    for row in range(batch):
        epoch, index = divmod(step * batch + row, per_epoch)
        offset = int(np.random.default_rng(epoch).integers(length))
        start = int(order(epoch, per_epoch)[index]) * length + offset
        out[row] = stream[start : start + length]
    return torch.from_numpy(out)


@functools.lru_cache(maxsize=2)
def order(epoch: int, count: int) -> np.ndarray:
    """The order in which one epoch reads its windows."""
    return np.random.default_rng([7, epoch]).permutation(count)


def rate(step: int, total: int) -> float:
    """Warm-up, constant, linear fall over the last ``DECAY_SHARE``."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    left = (total - step) / (total * DECAY_SHARE)
    return max(0.0, min(1.0, left))


def optimisers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embeddings = [p for n, p in model.named_parameters() if "embed" in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(matrices, lr=PEAK_MUON, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": embeddings, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}],
            lr=PEAK_ADAM,
            betas=(0.9, 0.95),
        ),
    ]


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, stream: np.ndarray) -> float:
    """Mean cross-entropy in nats per token over the first 64 windows of the held-out stream."""
    losses = []
    for i in range(0, 64, 16):
        ids = torch.from_numpy(stream[i * CONTEXT : (i + 16) * CONTEXT].astype(np.int64)).view(-1, CONTEXT)
        losses.append(float(model(input_ids=ids, labels=ids).loss))
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder that holds the text sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the result")
    parser.add_argument("--tokens", type=float, default=15e6, help="token budget of the whole run")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    result = work / "base"

    if not (work / "train.npy").exists():
        documents = base_documents(arguments.text, held_out=False)
        train_tokenizer(documents, result)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(result)
        np.save(work / "held_out.npy", encode(base_documents(arguments.text, held_out=True), tokenizer))
        np.save(work / "train.npy", encode(documents, tokenizer))
    stream, held_out = np.load(work / "train.npy"), np.load(work / "held_out.npy")
    print(f"{len(stream) / 1e6:.1f} M training tokens, {len(held_out) / 1e6:.2f} M held out")

    torch.manual_seed(1)
    model = LlamaForCausalLM(config())
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    steps = optimisers(model)
    first = 0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(steps, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first = state["step"]
    compiled = torch.compile(model)
    total = math.ceil(arguments.tokens / BATCH_TOKENS)
    peaks = [PEAK_MUON, PEAK_ADAM]
    log = (work / "log.jsonl").open("a")
    begun = time.time()
    progress = tqdm(range(first, total), initial=first, total=total, mininterval=10)
    for step in progress:
        for optimiser, peak in zip(steps, peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * rate(step, total)
        falling = step >= total * (1 - DECAY_SHARE)
        ids = windows(stream, step, CONTEXT if falling else CONTEXT // 2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in steps:
            optimiser.step()
            optimiser.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == total:
            model.eval()
            row = {
                "step": step + 1,
                "loss": loss.item(),
                "held_out": validation_loss(model, held_out),
                "seconds": time.time() - begun,
            }
            model.train()
            print(json.dumps(row), file=log, flush=True)
            saved = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in steps], "step": step + 1}
            torch.save(saved, work / "checkpoint.tmp")
            (work / "checkpoint.tmp").replace(checkpoint)
    model.half().save_pretrained(result)


if __name__ == "__main__":
    main()
