"""What the same question would have given away had the model been split without encryption."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitveil.auditing.audit import audit
from splitveil.auditing.meta import Names
from splitveil.errors import SplitveilError

# The search needs no text of its own. The control ``floor`` does, sampled from the model: a little will do.
WINDOWS = 32


@dataclass(frozen=True)
class PlainSplit:
    """The white-box search on the hidden states of the question at one cut."""

    cut: int
    blocks: int
    recovered: str
    """The question, as it was read from the hidden states alone."""
    accuracy: float
    """Share of its tokens."""
    certified: float
    """Share of the tokens that the search itself was sure of."""
    tries: float
    """Median of the candidates tried for a token, of ``vocabulary``."""
    vocabulary: int
    seconds: float
    report: str


def attack_plain_split(model: Any, tokenizer: Any, prompt: str, out: Path) -> PlainSplit:
    """Splits ``model`` in its middle, and attacks what would cross for ``prompt``; the report goes to ``out``."""
    begun = time.perf_counter()
    blocks = model.config.num_hidden_layers
    cut = blocks // 2
    length = len(tokenizer(prompt)["input_ids"])
    names = Names("the embedded base model", "your question", "splitveil demo")
    report = audit(
        model,
        tokenizer,
        [prompt],
        cuts=(cut,),
        attacks=("search",),
        out=out,
        tokens=length,
        windows=WINDOWS,
        names=names,
    )
    found = {row.metric: row for row in report.rows if row.attack == "search"}
    failed = [row.error for row in found.values() if row.error is not None]
    if failed:
        raise SplitveilError(f"the search on the plain split failed: {failed[0]}")
    shown = next(text for text in report.texts if text["attack"] == "search")
    return PlainSplit(
        cut=cut,
        blocks=blocks,
        recovered="".join(shown["recovered"]),
        accuracy=found["token_accuracy"].value,
        certified=found["certified"].value,
        tries=found["evaluations_median"].value,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        seconds=time.perf_counter() - begun,
        report=str(report.to_html(out)),
    )
