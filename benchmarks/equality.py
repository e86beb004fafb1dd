"""Whether privately served tokens are plaintext PEFT's, on the embedded default, by either engine.

    python benchmarks/equality.py                       the sealed engine: 10 questions, 16 tokens each (20 minutes)
    python benchmarks/equality.py --engine lattice --prompts 16 --tokens 64

Both models answer by themselves, greedily. Shown beside the equal tokens: how many the adapter changes at all, without
which equality would mean nothing; the smallest gap between PEFT's two best logits; and the largest deviation of a logit
where the private model reads PEFT's own first answer. The server is in this process.
"""

import argparse
import datetime
import sys
import time

import torch
from fixed_length import SUBJECTS
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitveil
from splitveil.bench.timing import machine
from splitveil.embedded import folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="sealed", choices=("sealed", "lattice"))
    parser.add_argument("--prompts", type=int, default=10, choices=range(1, len(SUBJECTS) + 1), metavar="COUNT")
    parser.add_argument("--tokens", type=int, default=16, help="new ones, of each answer")
    options = parser.parse_args()
    base, copied = (load() for _ in range(2))
    peft = PeftModel.from_pretrained(copied, folder("clinic")).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder("base"))
    prompts = [
        tokenizer(f"Question: What is {subject}?\nAnswer:", return_tensors="pt")["input_ids"]
        for subject in SUBJECTS[: options.prompts]
    ]
    expected = [greedy(peft, prompt, options.tokens) for prompt in prompts]
    plain = [greedy(base, prompt, options.tokens) for prompt in prompts]
    texts = [torch.cat([prompt, answer], 1) for prompt, answer in zip(prompts, expected, strict=True)]
    read = [read_by(peft, text, len(prompt[0])) for text, prompt in zip(texts, prompts, strict=True)]
    gap = min(float((best[..., 0] - best[..., 1]).min()) for best in (one.topk(2, dim=-1).values for one in read))

    server = splitveil.serve({"clinic": folder("clinic")}, "127.0.0.1:0", engine=options.engine)
    model = splitveil.connect(base, server.address, adapter="clinic", engine=options.engine)
    try:
        begun = time.perf_counter()
        found = []
        for prompt in prompts:
            found.append(greedy(model, prompt, options.tokens))
            print(f"\r{len(found)}/{len(prompts)} answers", end="", file=sys.stderr)
        print(file=sys.stderr)
        seconds = time.perf_counter() - begun
        deviation = float((read_by(model, texts[0], len(prompts[0][0])) - read[0]).abs().max())
    finally:
        splitveil.disconnect(model)
        server.close()

    changed = sum(int((a != b).sum()) for a, b in zip(expected, plain, strict=True))
    equal = sum(int((a == b).sum()) for a, b in zip(expected, found, strict=True))
    whole = sum(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    count = options.tokens * len(prompts)
    print(f"{datetime.date.today()}, {machine()}\n")
    print(f"engine {options.engine}, {len(prompts)} questions, {options.tokens} new tokens each, float32, greedy\n")
    print(f"- tokens equal to plaintext PEFT's: {equal} of {count}; whole answers: {whole} of {len(prompts)}")
    print(f"- tokens that the adapter changes at their places: {changed} of {count}")
    print(f"- smallest gap between PEFT's two best logits: {gap:.2e}")
    print(f"- largest deviation of a logit, first answer: {deviation:.2e}")
    print(f"- {seconds / count:.2f} s a new token, the prompts' included")


def load() -> torch.nn.Module:
    """The embedded base, which never ends a text by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder("base"), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def greedy(model: torch.nn.Module, prompt: Tensor, tokens: int) -> Tensor:
    """(1, tokens) ids that continue the prompt (1, length)."""
    whole = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False
    )
    return whole[:, prompt.shape[1] :]


@torch.no_grad()
def read_by(model: torch.nn.Module, text: Tensor, length: int) -> Tensor:
    """(1, tokens, vocabulary) logits of the tokens that follow the first ``length`` of the text."""
    return model(input_ids=text, use_cache=False).logits[:, length - 1 : -1].float()


if __name__ == "__main__":
    main()
