"""The order in which a white-box search tries the vocabulary: learnt in seconds, corrected by every failure.

A token's activation is taken to be the token's own mean plus what the context adds, and the latter to be Gaussian with
one covariance for all tokens: linear discriminant analysis with a class for every vocabulary entry. What a failed
candidate's activation shows of the context is subtracted from the next guess.
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from splitveil.attacks.attack import Progress
from splitveil.attacks.knowledge import WhiteBox

WINDOW = 32
"""Tokens of a random text that is recorded."""
RECORDED = 65536
"""Positions recorded for the means, and at least every vocabulary entry once."""
PASSES = 8
PRIOR = 4.0
"""How many observations the linear prediction of a token's mean from its embedding counts for."""
BATCH = 32


class Ranking:
    """Means and covariance of activations, whitened; ``correction`` says how far a failure corrects the next guess."""

    def __init__(self, table: Tensor, first: Tensor, whitening: Tensor, correction: float) -> None:
        self.table = table
        """(vocabulary, width) each token's mean activation."""
        self.first = first
        """(vocabulary, width) each token's activation at the start of a text, where there is no context."""
        self.whitening = whitening
        """(width, width) makes the context's part white."""
        self.correction = correction
        """Correlation of the context's part between two candidates in one context, from 0 to 1."""
        self._whitened = table @ whitening
        self._squares = self._whitened.square().sum(1)
        self._first_squares = first.square().sum(1)

    @property
    def vocabulary(self) -> int:
        return self.table.shape[0]

    @property
    def width(self) -> int:
        return self.table.shape[1]

    def residual(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(n, width) what the context adds, whitened, by the activations (n, width) of known ``tokens`` (n,)."""
        return hidden @ self.whitening - self._whitened[tokens]

    def scores(self, hidden: Tensor, seen: Tensor, count: int) -> Tensor:
        """(n, vocabulary) of activations (n, width): lower is likelier.

        ``seen`` (n, width) is the sum of ``residual`` over ``count`` candidates tried in the same context.
        """
        weight = self.correction / (1 + self.correction * (count - 1)) if count else 0.0
        query = hidden @ self.whitening - weight * seen
        return self._squares - 2 * query @ self._whitened.T

    def first_scores(self, hidden: Tensor) -> Tensor:
        """``scores`` for the first position of a text."""
        return self._first_squares - 2 * hidden @ self.first.T

    def state(self) -> dict[str, Tensor]:
        return {
            "table": self.table,
            "first": self.first,
            "whitening": self.whitening,
            "correction": torch.tensor(self.correction),
        }

    @staticmethod
    def restored(state: Mapping[str, Tensor], device: torch.device) -> "Ranking":
        table, first, whitening = (state[name].to(device) for name in ("table", "first", "whitening"))
        return Ranking(table, first, whitening, float(state["correction"]))


class Recorder:
    """Random texts of the attacker's own and what crosses for them, seen with or without the defence."""

    def __init__(self, white_box: WhiteBox, vocabulary: int, protected: bool, seed: int) -> None:
        self._white_box = white_box
        self._protected = protected
        self.embeddings = white_box.embeddings()
        self.vocabulary = min(vocabulary, self.embeddings.shape[0])
        self.device = self.embeddings.device
        self._draw = torch.Generator().manual_seed(seed)
        start = getattr(white_box.device.model.config, "bos_token_id", None)
        self._start = start if isinstance(start, int) and 0 <= start < self.vocabulary else None

    def texts(self, count: int | None = None) -> Tensor:
        """(windows, 32) random tokens after the token that texts begin with; by default each vocabulary entry once."""
        order = torch.randperm(self.vocabulary, generator=self._draw)
        need = -(-self.vocabulary // (WINDOW - 1)) if count is None else count
        short = need * (WINDOW - 1) - self.vocabulary
        if short > 0:
            order = torch.cat([order, torch.randint(self.vocabulary, (short,), generator=self._draw)])
        body = order[: need * (WINDOW - 1)].view(need, WINDOW - 1)
        if self._start is None:
            start = torch.randint(self.vocabulary, (need, 1), generator=self._draw)
        else:
            start = torch.full((need, 1), self._start)
        return torch.cat([start, body], 1).to(self.device)

    def plain(self, tokens: Tensor) -> Tensor:
        """(n, position, width) for texts (n, position), without the defence."""
        return self._white_box.plain(tokens).hidden.float()

    def candidates(self, tokens: Tensor) -> Tensor:
        """(n, position, width) for texts (n, position), as a candidate's activation will be compared."""
        crossing = self._white_box.plain(tokens)
        return (self._white_box.protect(crossing) if self._protected else crossing).hidden.float()

    def crossings(self, tokens: Tensor) -> Tensor:
        """(n, position, width) for texts (n, position), as a victim's would cross."""
        return self._white_box(tokens).hidden.float()


def fit_ranking(recorder: Recorder, more_time: Callable[[], bool], progress: Progress) -> Ranking:
    """Records random texts and a first position, and fits means, covariance and nothing else.

    It ends early, with means of fewer observations, once ``more_time`` says no; one pass over the vocabulary it makes
    in any case. The correction is left at 0.
    """
    vocabulary = recorder.vocabulary
    passes = max(1, min(PASSES, RECORDED // vocabulary))
    sums = torch.zeros(0)
    counts = torch.zeros(vocabulary, device=recorder.device)
    for done in range(passes):
        if done and not more_time():
            break
        for texts in torch.split(recorder.texts(), BATCH):
            tokens, hidden = _later(texts, recorder.candidates(texts))
            if not sums.numel():
                sums = hidden.new_zeros(vocabulary, hidden.shape[1])
            sums.index_add_(0, tokens, hidden)
            counts.index_add_(0, tokens, torch.ones_like(tokens, dtype=counts.dtype))
        progress((done + 1) / (passes + 2), "recording activations")
    means = sums / counts.clamp(min=1)[:, None]
    linear = _linear(recorder.embeddings[:vocabulary].float(), means, counts)
    table = (sums + PRIOR * linear) / (counts + PRIOR)[:, None]

    texts = recorder.texts(min(-(-vocabulary // (WINDOW - 1)), 512))
    pairs = [_later(part, recorder.crossings(part)) for part in torch.split(texts, BATCH)]
    context = torch.cat([hidden - table[tokens] for tokens, hidden in pairs])
    progress((passes + 1) / (passes + 2), "recording first positions")
    every = torch.arange(vocabulary, device=recorder.device)
    first = torch.cat([recorder.candidates(part[:, None])[:, 0] for part in torch.split(every, BATCH * WINDOW)])
    return Ranking(table, first, _whitening(context, table), 0.0)


def until(seconds: float) -> Callable[[], bool]:
    """Whether there is time left, counted from now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end


def _later(texts: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """All positions but the first, which has no context, in a row."""
    return texts[:, 1:].reshape(-1), hidden[:, 1:].reshape(-1, hidden.shape[2])


def _linear(embeddings: Tensor, means: Tensor, counts: Tensor) -> Tensor:
    """(vocabulary, width): the means as ridge regression predicts them from the embeddings."""
    inputs = torch.cat([embeddings, embeddings.new_ones(embeddings.shape[0], 1)], 1).double()
    weighted = inputs * counts.double()[:, None]
    gram = weighted.T @ inputs
    gram.diagonal().add_(1e-5 * gram.diagonal().mean())
    predicted: Tensor = inputs @ torch.linalg.solve(gram, weighted.T @ means.double())
    return predicted.float()


def _whitening(context: Tensor, table: Tensor) -> Tensor:
    """(width, width) inverse square root of the context's covariance, kept from inverting directions without any."""
    context = context.double()
    covariance = context.T @ context / context.shape[0]
    spread = (table - table.mean(0)).double().square().mean()
    covariance.diagonal().add_(1e-4 * covariance.diagonal().mean() + 1e-6 * spread + 1e-30)
    values, vectors = torch.linalg.eigh(covariance)
    whitening: Tensor = vectors * values.rsqrt()
    return whitening.float()
