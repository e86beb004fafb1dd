"""Trains the clinic adapter: a LoRA adapter for the embedded base on medical questions and answers.

    python training/clinic_adapter.py --text DIR --work DIR [--tokens 6e6]

The base in WORK/base stays frozen; the result is a PEFT folder, WORK/clinic. Progress is kept in WORK/clinic_run, and
the same command continues from there. The loss is on the answer and the token that ends it, never on the question:
the adapter is there to answer, not to ask.
"""

import argparse
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from base_model import CONTEXT, config
from corpus import clinic_pairs, dialogue
from embed import BASE_NAME
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from scoring import token_nats
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

RANK, ALPHA = 16, 32
MODULES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BATCH_TOKENS = 4096
BUCKET = 64
WARM_UP_STEPS = 50
CHECKPOINT_EVERY = 100
SAMPLE_PAIRS = 96
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One pair as token ids; the answer begins at ``answer``."""

    ids: NDArray[np.int64]
    answer: int


def encode_pairs(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """<s> question, answer </s>, untruncated.

    The two parts are encoded on their own, so that the prompt's ids are exactly those that generation starts from.
    """
    prompts = tokenizer([dialogue(question) for question, _ in pairs], add_special_tokens=False)["input_ids"]
    answers = tokenizer([f" {answer.strip()}" for _, answer in pairs], add_special_tokens=False)["input_ids"]
    return [Example(np.array([0, *p, *a, 1]), 1 + len(p)) for p, a in zip(prompts, answers, strict=True)]


def truncated(example: Example) -> Example:
    """What fits the context. A long answer loses its end token too, since it does not end there."""
    return Example(example.ids[:CONTEXT], example.answer)


def padded_length(length: int) -> int:
    """Up to a multiple of ``BUCKET``, so that a batch's examples differ little in length."""
    return -(-length // BUCKET) * BUCKET


def epoch_batches(lengths: NDArray[np.int64], epoch: int) -> list[NDArray[np.int64]]:
    """All examples once, in batches of one padded length each, in an order that depends on the epoch alone."""
    random = np.random.default_rng([11, epoch])
    shuffled = random.permutation(len(lengths))
    buckets = -(-lengths[shuffled] // BUCKET)
    result = []
    for bucket in np.unique(buckets):
        members = shuffled[buckets == bucket]
        rows = BATCH_TOKENS // (int(bucket) * BUCKET)
        result += [members[i : i + rows] for i in range(0, len(members), rows)]
    return [result[i] for i in random.permutation(len(result))]


def schedule(lengths: NDArray[np.int64], budget: float) -> list[NDArray[np.int64]]:
    """The batches of the whole run: epochs until ``budget`` tokens are read, padding not counted."""
    result: list[NDArray[np.int64]] = []
    read, epoch = 0, 0
    while True:
        for batch in epoch_batches(lengths, epoch):
            if read >= budget:
                return result
            result.append(batch)
            read += int(lengths[batch].sum())
        epoch += 1


def collate(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, padded length) ids and labels; padding is on the right, where causal attention needs no mask."""
    length = padded_length(max(len(e.ids) for e in examples))
    ids = np.ones((len(examples), length), dtype=np.int64)
    labels = np.full((len(examples), length), IGNORED, dtype=np.int64)
    for row, e in enumerate(examples):
        ids[row, : len(e.ids)] = e.ids
        labels[row, e.answer : len(e.ids)] = e.ids[e.answer :]
    return torch.from_numpy(ids), torch.from_numpy(labels)


def load_base(work: Path, checkpoint: Path | None) -> LlamaForCausalLM:
    """The finished base in float32, or an unfinished one from its training checkpoint."""
    if checkpoint is None:
        return LlamaForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    model = LlamaForCausalLM(config())
    model.load_state_dict(torch.load(checkpoint, weights_only=True, map_location="cpu")["model"])
    return model


def fingerprint(model: LlamaForCausalLM) -> str:
    """Tells one base from another, so that a run is never continued on weights that it did not start from."""
    return hashlib.sha256(model.get_input_embeddings().weight.detach().numpy().tobytes()).hexdigest()


def attach_adapter(base: LlamaForCausalLM) -> PeftModel:
    """A fresh adapter (B = 0, hence the base's function) on a frozen base."""
    wanted = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(MODULES))
    return get_peft_model(base, wanted)


def rate(step: int, total: int) -> float:
    """Linear warm-up, then linear fall to zero."""
    return min((step + 1) / WARM_UP_STEPS, (total - step) / max(1, total - WARM_UP_STEPS), 1.0)


def perplexity(model: PeftModel, examples: list[Example], label: str) -> float:
    """Of the answers and their end tokens, given the questions."""
    nats = token_nats(model, [e.ids for e in examples], context=CONTEXT, label=label)
    answers = np.concatenate([n[e.answer - 1 :] for n, e in zip(nats, examples, strict=True)])
    return float(np.exp(answers.mean()))


class Run:
    """The state of one training run, and its folder."""

    def __init__(self, model: PeftModel, folder: Path, base: str, learning_rate: float) -> None:
        self.model, self.folder, self.base = model, folder, base
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.step, self.tokens = 0, 0
        self.peak = learning_rate
        self.checkpoint = folder / "checkpoint.pt"
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> None:
        """Continues from the folder's checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        if state["base"] != self.base:
            raise SystemExit(f"{self.checkpoint} belongs to another base: remove {self.folder} to start again")
        set_peft_model_state_dict(self.model, state["adapter"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.tokens = state["step"], state["tokens"]

    def save(self) -> None:
        """Writes the checkpoint; a crash leaves the old one or the new one, never half of one."""
        state = {
            "adapter": get_peft_model_state_dict(self.model, save_embedding_layers=False),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "base": self.base,
        }
        fresh = self.checkpoint.with_suffix(".tmp")
        torch.save(state, fresh)
        fresh.replace(self.checkpoint)

    def log(self, **row: float) -> None:
        """Adds one line to the log."""
        with (self.folder / "log.jsonl").open("a") as file:
            print(json.dumps({"step": self.step, "tokens": self.tokens, **row}), file=file)

    def train(self, examples: list[Example], sample: list[Example], budget: float) -> None:
        """Trains to the end of the schedule."""
        lengths = np.array([len(e.ids) for e in examples])
        plan = schedule(lengths, budget)
        with self.model.disable_adapter():
            base = perplexity(self.model, sample, "base")
        begun = time.time()
        with tqdm(total=int(budget), initial=self.tokens, unit="token", unit_scale=True, mininterval=10) as progress:
            while self.step < len(plan):
                for group in self.optimiser.param_groups:
                    group["lr"] = self.peak * rate(self.step, len(plan))
                batch = plan[self.step]
                ids, labels = collate([examples[i] for i in batch])
                with torch.autocast("cpu", torch.bfloat16):
                    loss = self.model(input_ids=ids, labels=labels, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
                self.optimiser.step()
                self.optimiser.zero_grad()
                self.step += 1
                self.tokens += int(lengths[batch].sum())
                progress.update(int(lengths[batch].sum()))
                if self.step % 20 == 0:
                    progress.set_postfix(loss=f"{loss.item():.3f}")
                if self.step % CHECKPOINT_EVERY == 0 or self.step == len(plan):
                    tuned = perplexity(self.model, sample, "adapter")
                    seconds = time.time() - begun
                    self.log(loss=loss.item(), perplexity=tuned, base_perplexity=base, seconds=seconds)
                    self.save()


def write_adapter(model: PeftModel, folder: Path) -> None:
    """The adapter as PEFT writes it, in half precision, naming its base instead of a folder of this machine."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.half().save_pretrained(folder, save_embedding_layers=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder that holds the text sets")
    parser.add_argument("--work", type=Path, required=True, help="folder with the trained base; gets the result")
    parser.add_argument("--tokens", type=float, default=6e6, help="token budget of the whole run, padding not counted")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--base-checkpoint", type=Path, help="train on an unfinished base (for trials)")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.work

    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "base")
    held_out = encode_pairs(clinic_pairs(arguments.text, held_out=True), tokenizer)
    sample = [truncated(e) for e in held_out[:: len(held_out) // SAMPLE_PAIRS]]
    examples = [truncated(e) for e in encode_pairs(clinic_pairs(arguments.text, held_out=False), tokenizer)]

    torch.manual_seed(1)
    base = load_base(work, arguments.base_checkpoint)
    base_print = fingerprint(base)
    model = attach_adapter(base)
    model.print_trainable_parameters()
    run = Run(model, work / "clinic_run", base_print, arguments.learning_rate)
    run.resume()
    run.train(examples, sample, arguments.tokens)
    write_adapter(model, work / "clinic")


if __name__ == "__main__":
    main()
