"""How much of the prompts came back: every metric from 0 to 1, with its interval over prompts.

- ``token_accuracy``: share of the positions with the right token. What tables call the attack score.
- ``exact_match``: share of the prompts with every token right.
- ``rouge_l``: ROUGE-L F of lower-case words (Lin 2004), mean over prompts.
- ``bleu``: sentence BLEU of sacrebleu with effective order (Post 2018), divided by 100, mean over prompts.
- ``cosine``: of the two texts' mean input embeddings, those of the audited model, mean over prompts. It is far above 0
  for any two English texts: read it beside the floor's.
- ``personal_recall``: share of the marked personal data of which every token is right.
- ``personal_characters``: share of the characters of personal data that lie in right tokens.

The last two are NaN where the data marks nothing. Tokens that a tokenizer adds by itself are not scored.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from splitveil.auditing.disjoint import words
from splitveil.auditing.intervals import Figure, mean, quantile, ratio
from splitveil.auditing.windows import Victims
from splitveil.errors import ConfigurationError

METRICS = (
    "exact_match",
    "rouge_l",
    "bleu",
    "cosine",
    "personal_recall",
    "personal_characters",
    "token_accuracy",
)
"""In the order of the rows of one attack; the last one tells that they are all there."""
SHARES = frozenset({"certified"})
"""Facts that attacks report as 1 or 0."""

Decode = Callable[[Sequence[int]], str]


def check_recovery(tokens: Tensor, victims: Victims, vocabulary: int) -> None:
    """Raises ``ConfigurationError`` unless an attack gave one token id for every position that holds text."""
    if tokens.shape != victims.tokens.shape:
        raise ConfigurationError(
            f"an attack answered with tokens {tuple(tokens.shape)}, expected {tuple(victims.tokens.shape)}"
        )
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ConfigurationError(f"an attack answered with {tokens.dtype}, expected whole token ids")
    text = tokens[victims.mask.bool()]
    if bool(((text < 0) | (text >= vocabulary)).any()):
        raise ConfigurationError(f"an attack answered with ids outside the vocabulary of {vocabulary} where text is")


def score(tokens: Tensor, victims: Victims, decode: Decode, embeddings: Tensor, seed: int) -> dict[str, Figure]:
    """All of ``METRICS`` for an attack's ``tokens`` (prompts, positions).

    ``decode`` turns ids into text; ``embeddings`` is (vocabulary, width).
    """
    scored, right = victims.scored, (tokens == victims.tokens) & victims.scored
    counts, hits = scored.sum(1).numpy(), right.sum(1).numpy()
    ones = np.ones(len(counts))
    rouges, bleus, cosines = [], [], []
    for truth, guess, where in zip(victims.tokens, tokens, scored, strict=True):
        original, recovered = decode(truth[where].tolist()), decode(guess[where].tolist())
        rouges.append(rouge_l(original, recovered))
        bleus.append(bleu(original, recovered))
        means = embeddings[truth[where]].double().mean(0), embeddings[guess[where]].double().mean(0)
        cosines.append(float(torch.cosine_similarity(*means, dim=0)))
    found = [sum(bool(right[row, s.start : s.end].all()) for s in spans) for row, spans in enumerate(victims.spans)]
    marks = [len(spans) for spans in victims.spans]
    figures = {
        "exact_match": ratio(hits == counts, ones, seed),
        "rouge_l": _mean(rouges, seed),
        "bleu": _mean(bleus, seed),
        "cosine": ratio(cosines, ones, seed),
        "personal_recall": ratio(found, marks, seed),
        "personal_characters": ratio((victims.personal * right).sum(1), victims.personal.sum(1), seed),
        "token_accuracy": ratio(hits, counts, seed),
    }
    return {name: figures[name] for name in METRICS}


def describe_facts(facts: Mapping[str, Tensor], victims: Victims, seed: int) -> dict[str, Figure]:
    """Mean, median and 99th percentile of what an attack says about its own work, over scored positions.

    Each fact is (prompts, positions), NaN where there is none; a row's metric is ``NAME_median`` and so on. Of one
    that is yes or no (``SHARES``), the metric ``NAME`` is the share of positions where it holds.
    Raises ``ConfigurationError`` for another shape.
    """
    figures = {}
    for name, values in facts.items():
        if values.shape != victims.tokens.shape:
            raise ConfigurationError(
                f"an attack's {name} has shape {tuple(values.shape)}, expected {tuple(victims.tokens.shape)}"
            )
        known = values.double().masked_fill(~victims.scored, float("nan")).numpy()
        if name in SHARES:
            figures[name] = mean(known, seed)
            continue
        figures[f"{name}_mean"] = mean(known, seed)
        figures[f"{name}_median"] = quantile(known, 0.5, seed)
        figures[f"{name}_p99"] = quantile(known, 0.99, seed)
    return figures


def rouge_l(original: str, recovered: str) -> float | None:
    """F of the longest common subsequence of words; None where the original has no word."""
    ours, theirs = words(original), words(recovered)
    if not ours:
        return None
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for place, other in enumerate(theirs, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(ours) + len(theirs))


def bleu(original: str, recovered: str) -> float | None:
    """Sentence BLEU from 0 to 1; None where the original is white space."""
    from sacrebleu.metrics.bleu import BLEU

    if not original.strip():
        return None
    return float(BLEU(effective_order=True).sentence_score(recovered, [original]).score) / 100


def _mean(values: Sequence[float | None], seed: int) -> Figure:
    return ratio([value or 0.0 for value in values], [value is not None for value in values], seed)
