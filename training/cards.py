"""The two model cards, written from evaluation.json and from nothing else."""

import re
import textwrap
from collections.abc import Iterator
from typing import Any

NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)*")

BASE_FRONT = """---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- splitveil
---
"""

CLINIC_FRONT = """---
license: apache-2.0
language:
- en
library_name: peft
pipeline_tag: text-generation
base_model: splitveil/embedded-base
tags:
- lora
- medical
- splitveil
---
"""

TRIAL = """
> **Trial run on a part of the held-out text. The numbers below are no result.**
"""

BASE_LIMITS = """## Limits

- It is very small: it knows little, cannot calculate, repeats itself, and states falsehoods with ease.
- **Not medical or legal advice.** Nothing it writes should be relied on for a decision about anyone's health or rights.
- English only. Its text carries its sources' views, countries and times; the classics among them are of their century.
- It follows no instructions and has no safety training.
- Held-out documents are other documents of the *same* sets: other pages of the same books, other clauses of the same
  contracts, other dialogues on the same few tasks. The numbers show how well it fits such text, not how well it would
  do elsewhere.
"""

CLINIC_LIMITS = """## Limits

- **Not medical advice.** It imitates the style of public health pages. What it says about a disease, a drug, a dose or
  a gene is often wrong, also where it sounds sure. Nobody's care should depend on it.
- A lower perplexity is no measure of medical knowledge: much of it can come from the phrases and forms that the answers
  share ("… is inherited in an autosomal recessive pattern").
- Held-out pairs share neither a question nor the beginning of an answer with a training pair, yet they come from the
  same sites, and one disease may be asked about in both parts in different words.
- The patients' questions below are ours and not held out: topics among them occur in the training part.
- The source text has known flaws, such as characters lost before publication, and dates from its publication.
"""

LICENCE = """## Licence and attribution

The weights are under Apache-2.0. They were trained on text that others wrote and licensed; that text is not
included. Sources under [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/) are credited here as they ask. All
text was converted to plain text and split into tokens; no source endorses this model.
"""


def strings(value: Any) -> Iterator[str]:
    """Every number and text in a JSON value, as the text that a card would show."""
    if isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif value is not None:
        yield str(value)


def check_numbers(card: str, evaluation: dict[str, Any]) -> None:
    """Refuses a card that holds a number which the evaluation does not."""

    def numbers(text: str) -> set[str]:
        return {found.replace(",", "").rstrip(".") for found in NUMBER.findall(text)}

    known = set().union(*(numbers(text) for text in strings(evaluation)))
    unknown = numbers(card) - known
    if unknown:
        raise ValueError(f"numbers in a model card that evaluation.json does not hold: {sorted(unknown)}")


def table(head: list[str], rows: list[list[object]]) -> str:
    """A Markdown table; thousands are separated, and cells cannot break the row."""
    lines = [head, ["---"] * len(head), *[[cell(value) for value in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(value: object) -> str:
    """One table cell."""
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def origins(sets: list[dict[str, Any]]) -> str:
    """Where each set comes from: size, repositories with commits, and the licence in the source's words."""
    rows: list[list[object]] = []
    for s in sets:
        places = ", ".join(f"[{r['repository']}](https://{r['repository']}) `{r['commit']}`" for r in s["repositories"])
        rows.append([s["set"], s["training_documents"], s["training_mb"], places, s["licence_quote"]])
    return table(["set", "documents", "MB", "source and commit", "licence as read there"], rows)


def credits(sets: list[dict[str, Any]]) -> str:
    """The attribution lines; a set without one is credited by its repository in the table."""
    return "\n".join(f"- {s['set']}: {s['attribution']}" for s in sets if s["attribution"]) + "\n"


def outputs(rows: list[dict[str, str]], models: tuple[str, ...]) -> str:
    """Prompts and what each model made of them, all of them, as they came."""
    parts = []
    for row in rows:
        parts.append(f"**{cell(row['prompt'])}**\n")
        for model in models:
            label = f"{model}:\n" if len(models) > 1 else ""
            parts.append(f"{label}~~~~text\n{row[model].strip()}\n~~~~\n")
    return "\n".join(parts)


def filled(text: str) -> str:
    """The text with its plain paragraphs broken anew, since the numbers put into them differ in length."""
    blocks = text.split("\n\n")
    return "\n\n".join(
        textwrap.fill(block, 120, break_long_words=False, break_on_hyphens=False)
        if block[:1].isalnum() and "```" not in block
        else block
        for block in blocks
    )


def base_card(e: dict[str, Any]) -> str:
    """The card of the base model."""
    m = e["models"]["base"]
    sets = e["data"][:-1]
    text = f"""{BASE_FRONT}{TRIAL if e["trial"] else ""}
# Splitveil's embedded base

A Llama of {m["parameters"]:,} parameters, trained from nothing on permissively licensed English. It comes with
Splitveil so that every command works without a download. It stands for the *public* half of a split model, and is
small enough to train again on a laptop.

## Shape

{m["layers"]} layers of width {m["width"]}, MLP width {m["mlp_width"]}, {m["heads"]} query heads and \
{m["key_value_heads"]} key-value heads, tied embeddings, context {m["context"]}. Byte-level BPE with \
{m["vocabulary"]:,} entries, digits one by one: every text can be written. Documents are `<s>` text `</s>`; the
tokenizer adds `<s>` by itself. Stored in half precision: `{m["file"]}`, {m["megabytes"]} MB,

    sha256 {m["sha256"]}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("base")
model = AutoModelForCausalLM.from_pretrained("base")
tokens = tokenizer("Question: What is a heart?\\nAnswer:", return_tensors="pt")
print(*tokenizer.batch_decode(model.generate(**tokens, max_new_tokens={e["new_tokens"]})))
```

## Training

    python training/base_model.py --text DIR --work DIR --tokens {m["tokens_read"]}

The run was interrupted and resumed, its token budget changed on the way: one run of this command gives similar weights,
not the same ones.

The training text is {m["stream_tokens"]:,} tokens; the run read {m["tokens_read"]:,} ({m["passes"]} passes) in \
{m["steps"]:,} steps, with Muon on the blocks' matrices and AdamW on the rest. A share of each set, chosen by a hash of
the document, was held out.

{origins(sets)}
Left out on purpose: `medquad`, so that the clinic adapter's domain is new to the base; `mts_dialog`, whose dialogues
are the audit's test data; `sgd`, whose licence is share-alike.

## Results

Bits per byte on held-out documents (lower is better), against an interpolated Kneser–Ney \
{e["compression"]["ngram_order"]}-gram model over the same tokens and the same training text. Documents longer than the
context of {e["context"]} tokens are read in windows that overlap by {e["overlap"]}. "Copied" is the share of tokens in
runs of {e["compression"]["copied_run"]} or more that the training text holds word for word: government pages, contracts
and books repeat themselves, and where they do, both models look better than they are, the n-gram model most.

{results(e["compression"])}
{reference(e["reference"])}
{BASE_LIMITS}
{LICENCE}
{credits(sets)}
## Samples

Greedy continuations of prompts fixed beforehand, up to {e["new_tokens"]} tokens, none left out. An ellipsis marks a
continuation cut by that limit.

"""
    return filled(text) + outputs(e["prompts"], ("base",))


def results(compression: dict[str, Any]) -> str:
    """Bits per byte, set by set."""
    keys = ("set", "documents", "utf8_bytes", "tokens", "copied_percent", "base", "ngram")
    rows = [[row[k] for k in keys] for row in (*compression["sets"], compression["overall"])]
    return table(
        ["set", "documents", "bytes", "tokens", "copied, %", "base", f"{compression['ngram_order']}-gram"], rows
    )


def reference(r: dict[str, Any] | None) -> str:
    """The comparison with another small model, if there was one."""
    if r is None:
        return ""
    return f"""On the {r["documents"]} held-out documents of `{r["set"]}` ({r["utf8_bytes"]:,} bytes), read in the same
way, this model has {r["base"]} bits per byte and {r["name"]}, a model of {r["parameters"]:,} parameters that others
trained on other text, has {r["reference"]}.
"""


def clinic_card(e: dict[str, Any]) -> str:
    """The card of the clinic adapter."""
    m, clinic, sets = e["models"]["adapter"], e["clinic"], e["data"][-1:]
    rows = [
        [label, part["tokens"], part["base"], part["adapter"], f"{part['lower_by_percent']} %"]
        for label, part in (
            ("answers, given the questions", clinic["answers"]),
            ("questions and answers", clinic["whole_text"]),
        )
    ]
    text = f"""{CLINIC_FRONT}{TRIAL if e["trial"] else ""}
# Splitveil's clinic adapter

A LoRA adapter for Splitveil's embedded base, trained on public medical questions and answers. It stands for the
*private* half of a split model: the vendor's adapter that a server keeps and a client must not learn.
**Not medical advice.**

## Shape

Rank {m["rank"]}, alpha {m["alpha"]}, on {", ".join(f"`{name}`" for name in m["modules"])} of every layer: \
{m["parameters"]:,} parameters. PEFT format, half precision: `{m["file"]}`, {m["megabytes"]} MB,

    sha256 {m["sha256"]}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("base")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "clinic")
tokens = tokenizer("Question: How is asthma treated?\\nAnswer:", return_tensors="pt")
print(*tokenizer.batch_decode(model.generate(**tokens, max_new_tokens={e["new_tokens"]})))
```

## Training

    python training/clinic_adapter.py --text DIR --work DIR --tokens {m["tokens_read"]}

The run was interrupted and resumed, its token budget changed on the way: one run of this command gives similar weights,
not the same ones.

{m["tokens_read"]:,} tokens in {m["steps"]:,} steps, base frozen, loss on the answer and its end token only; answers are
cut to the context of {e["context"]} tokens.

{origins(sets)}
## Results

Perplexity on {clinic["pairs"]} held-out pairs (lower is better), end tokens counted. Texts longer than the context are
read whole, in windows that overlap by {e["overlap"]} tokens.

{table(["text", "tokens", "base", "base + adapter", "lower by"], rows)}
{CLINIC_LIMITS}
{LICENCE}
{credits(sets)}
## Samples

Greedy continuations of prompts fixed beforehand, up to {e["new_tokens"]} tokens, none left out, of the base and of the
base with this adapter. An ellipsis marks a continuation cut by that limit.

"""
    return filled(text) + outputs(e["prompts"], ("base", "adapter"))
