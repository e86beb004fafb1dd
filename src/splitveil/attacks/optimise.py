"""``optimise``: gradient descent on soft embeddings until the device half makes of them what crossed."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from splitveil.attacks.attack import Effort, Progress, Recovery
from splitveil.attacks.knowledge import Access, Knowledge, WhiteBox
from splitveil.errors import ConfigurationError
from splitveil.split import Crossing

Prior = Callable[[Tensor, Tensor], Tensor]
"""A language model: token ids and mask (texts, positions) → log-probabilities (texts, vocabulary) of the token that
follows."""

BATCH = 16
RATE = 0.1
"""Adam's step, in standard deviations of the embedding matrix."""
SETTLED = 1e-2
"""Relative distance below which a token that leads an exact prefix is kept and no longer optimised."""


class Optimise:
    """Relaxes the tokens of all positions to free input embeddings, descends to the crossing, and takes tokens.

    It works in rounds. After each, every embedding becomes a token, the texts run through the device half, and the
    leading positions whose activation is the crossing's are fixed: a wrong token spoils the gradients of all that
    follow it, since they read it. Relations between positions need no enumeration, which is what this attack has over
    ``search``; it pays with no exactness.

    A token is the best by −‖x − e‖² / (2 σ²) + log p(token | tokens before it), with σ the root mean square, in each
    dimension, of the distances to the nearest embeddings: where descent has come near, the nearest embedding decides,
    elsewhere what the text is likely to say has a part in it. p is the prior, by default the whole model: whoever runs
    the cloud half and has the device half's weights has that.

    The comparison is with activations before the defence, whose rounding has no gradient. Where the defence widens the
    crossing, as an encrypted query with its pad does, the leading columns are compared: that is where the states are
    masked in place. ``recover`` reports ``distance``, ‖crossing − text's activation‖ / ‖crossing‖ at every position, of
    the tokens returned.
    """

    name: ClassVar[str] = "optimise"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Access]] = frozenset({Access.WEIGHTS, Access.CLOUD, Access.HEAD})
    source: ClassVar[str] = "gradient inversion of representations: Song & Raghunathan, CCS 2020, section 3"
    summary: ClassVar[str] = "bends made-up embeddings until the device half makes of them what crossed"

    def __init__(self, *, rounds: int = 4, steps: int = 100, prior: Prior | None = None) -> None:
        """``steps`` of descent a round, the same for every text; ``prior`` takes the place of the model's own."""
        if rounds < 1 or steps < 1:
            raise ConfigurationError(f"optimise needs at least one round and one step, got {rounds} and {steps}")
        self.rounds = rounds
        self.steps = steps
        self._given = prior
        self._prior: Prior | None = None
        self._white_box: WhiteBox | None = None
        self._vocabulary = 0
        self.width = 0
        """Columns of the crossing that are compared: as many as the activations before the defence have."""

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        """Takes the weights; there is nothing to learn."""
        self.restore({}, knowledge)
        progress(1.0, "nothing to learn")

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        """Token ids by descent. Raises ``ConfigurationError`` before ``fit``, and for a crossing of another width."""
        if self._white_box is None or self._prior is None:
            raise ConfigurationError("optimise has no device half yet: call fit or restore first")
        table = self._white_box.embeddings()[: self._vocabulary]
        parts = []
        count = crossing.hidden.shape[0]
        for start in range(0, count, BATCH):
            part = crossing.rows(start, min(start + BATCH, count))

            def within(done: float, note: str, start: int = start) -> None:
                progress((start + done * min(BATCH, count - start)) / count, note)

            parts.append(_Descent(self, self._white_box, self._prior, table, part).run(within))
        if not parts:
            return Recovery(
                torch.full(crossing.text.shape, -1), {"distance": torch.full(crossing.text.shape, torch.nan)}
            )
        return Recovery(
            torch.cat([tokens for tokens, _ in parts]).cpu(), {"distance": torch.cat([away for _, away in parts]).cpu()}
        )

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        """Takes the place of ``fit``."""
        self._white_box = knowledge.white_box
        self._vocabulary = knowledge.vocabulary
        self._prior = self._given or whole_model(knowledge)
        start = torch.zeros(1, 1, dtype=torch.long, device=knowledge.white_box.embeddings().device)
        self.width = knowledge.white_box.plain(start).width


def whole_model(knowledge: Knowledge) -> Prior:
    """The model that was cut, put together again: device half, cloud half and head."""
    device, cloud, head = knowledge.white_box, knowledge.cloud, knowledge.head

    def prior(tokens: Tensor, mask: Tensor) -> Tensor:
        following: Tensor = head(cloud(device.plain(tokens, mask))[:, -1]).float().log_softmax(-1)
        return following[:, : knowledge.vocabulary]

    return prior


class _Descent:
    """One batch of texts."""

    def __init__(self, attack: Optimise, white_box: WhiteBox, prior: Prior, table: Tensor, crossing: Crossing) -> None:
        self._attack = attack
        self._white_box = white_box
        self._prior = prior
        self._table = table
        self._text = crossing.text.to(table.device)
        self._mask = crossing.mask.to(table.device)
        self._target = crossing.hidden.to(table.device).float()[:, :, : attack.width]
        self._norms = self._target.norm(dim=2).clamp(min=torch.finfo(torch.float32).tiny)

    def run(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """(texts, positions) token ids, -1 for padding, and relative distances, NaN there."""
        table, attack = self._table, self._attack
        soft = table.mean(0).expand(*self._text.shape, -1).clone()
        settled = ~self._text
        best = torch.full(self._text.shape, -1, device=table.device)
        nearest = torch.full(self._text.shape, torch.inf, device=table.device)
        for number in range(attack.rounds):
            soft = self._descend(soft, settled, number, progress)
            tokens = self._tokens(soft)
            away = self._distances(tokens)
            # A text is replaced as a whole: what follows a token was found reading it.
            better = (away.masked_fill(~self._text, 0).sum(1) < nearest.masked_fill(~self._text, 0).sum(1))[:, None]
            best, nearest = torch.where(better, tokens, best), torch.where(better, away, nearest)
            leading = ((away < SETTLED) | ~self._text).int().cumprod(1).bool()
            settled = leading | ~self._text
            soft = torch.where(leading[:, :, None], table[tokens], soft)
            if bool(settled.all()):
                break
        progress(1.0, f"distance {nearest[self._text].mean():.1e}" if bool(self._text.any()) else "no text")
        return best.masked_fill(~self._text, -1), nearest.masked_fill(~self._text, torch.nan)

    def _descend(self, start: Tensor, settled: Tensor, number: int, progress: Progress) -> Tensor:
        attack = self._attack
        free = ~settled[:, :, None]
        soft = start.clone().requires_grad_(True)
        rate = RATE * float(self._table.float().std())
        optimiser = torch.optim.Adam([soft], lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, attack.steps, eta_min=rate / 20)
        for step in range(attack.steps):
            with torch.enable_grad():
                misses = self._misses(torch.where(free, soft, start))
                loss = misses[self._text].square().sum()
                (soft.grad,) = torch.autograd.grad(loss, [soft])
            optimiser.step()
            schedule.step()
            if step % 10 == 0:
                done = (number + step / attack.steps) / attack.rounds
                progress(done, f"loss {float(loss.detach()) / max(int(self._text.sum()), 1):.1e}")
        return torch.where(free, soft.detach(), start)

    def _misses(self, embeds: Tensor) -> Tensor:
        hidden = self._white_box.soft(embeds, self._mask).hidden.float()
        if hidden.shape != self._target.shape:
            raise ConfigurationError(
                f"the device half gives crossings of shape {tuple(hidden.shape)}, got {tuple(self._target.shape)}"
            )
        return self._relative(hidden)

    @torch.no_grad()
    def _distances(self, tokens: Tensor) -> Tensor:
        hidden = self._white_box.plain(tokens, self._mask).hidden.float()
        return self._relative(hidden)

    def _relative(self, hidden: Tensor) -> Tensor:
        away: Tensor = (hidden - self._target).norm(dim=2) / self._norms
        return away

    @torch.no_grad()
    def _tokens(self, soft: Tensor) -> Tensor:
        table = self._table.float()
        away = [torch.cdist(row.float(), table) for row in soft]
        nearest = torch.stack([row.min(1).values for row in away])
        variance = (nearest[self._text].square().mean() / table.shape[1]).clamp(min=torch.finfo(torch.float32).tiny)
        tokens = torch.zeros(self._text.shape, dtype=torch.long, device=table.device)
        for position in range(tokens.shape[1]):
            fit = -torch.stack([row[position] for row in away]).square() / (2 * variance)
            # Of a text that begins further to the right, nothing is known yet.
            begun = self._text[:, :position].any(1)
            if bool(begun.any()):
                likely = self._prior(tokens[:, :position], self._mask[:, :position])
                fit = fit + likely.masked_fill(~begun[:, None], 0)
            tokens[:, position] = fit.argmax(1)
        return tokens
