"""InfoNCE: a lower bound from how well a learned critic picks the true partner out of all held-out ones.

With B candidates it cannot report more than log2 B bits, however much there is, and it falls short of the truth some
bits before that. The limit is reported with the figure, and a figure within one bit of it says so.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from splitveil.errors import NonFiniteError
from splitveil.information.estimate import Claim, Estimate, refusal
from splitveil.information.pairs import bootstrap, checked, folds, generator, permuted, standardised, without

_LARGEST_ALPHABET = 512
_FEWEST = 128
_MOST_CANDIDATES = 4096
_RIDGES = (1e-3, 0.03, 0.3)
_MIXTURES = (0.001, 0.01, 0.05, 0.2)
_SCALES = (0.03, 0.1, 0.3, 0.6, 1.0)
_HIDDEN, _SHARED = 128, 64
_BATCH = 256
_EVERY, _PATIENCE = 10, 3
_FLAT = 1e-3  # of a whitened direction: it does not vary, and scaling it up would only scale rounding up

_Pairs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class InfoNCE:
    """Half of the pairs teach the critic, the other half is scored.

    Of the teaching half, three fifths are learnt from, one says how strong the correlations are that were found, and
    one which critic is best and when to stop: each must be fresh, or permuted pairs would seem to be worth something.

    The critic starts as the density ratio of the jointly Gaussian pairs that fit best, and learns a network on top. It
    picks with its softmax mixed with a uniform guess, and guesses altogether (0 bits) unless the checking pairs show by
    two standard errors that it is worth listening to: the bound holds for any way to pick.
    """

    steps: int = 300
    """Gradient steps at most."""

    name: ClassVar[str] = "infonce"
    source: ClassVar[str] = "van den Oord, Li and Vinyals 2018; limit: McAllester and Stratos 2020; Poole et al. 2019"
    applies: ClassVar[str] = "any pairs; at least so many bits, and never more than log2 of the held-out pairs"

    def estimate(self, x: Tensor, y: Tensor, *, seed: int = 0, groups: Tensor | None = None) -> Estimate:
        """See ``Estimator``. Ids in ``y`` are read as one-hot vectors.

        Interval: bootstrap over the held-out pairs with the critic and the candidates as they are, so what learning
        from other pairs would change is not in it.
        """
        x, y, ids = checked(x, y, groups)
        pairs = x.shape[0]
        if y.ndim == 1:
            y = torch.unique(y, return_inverse=True)[1]
            alphabet = int(y.max()) + 1
            if alphabet > _LARGEST_ALPHABET:
                reason = f"{alphabet} different ids, at most {_LARGEST_ALPHABET}: give the vectors that they stand for"
                return refusal(self.name, pairs, reason)
            y = nn.functional.one_hot(y).double()
        if pairs < _FEWEST or int(ids.max()) + 1 < 10:
            return refusal(self.name, pairs, f"{pairs} pairs; needs at least {_FEWEST}, in ten groups")
        draw = generator(seed)
        half = folds(ids, 2, draw)[0]
        taught = without(half, pairs)
        held = half[torch.randperm(len(half), generator=draw)[:_MOST_CANDIDATES]]
        values = self._score(x, y, ids, taught, held, draw)
        low, high = bootstrap(values, ids[held], draw)
        floor = self._score(x, permuted(y, draw), ids, taught, held, draw).mean().item()
        bits, limit = values.mean().item(), math.log2(len(held))
        reason = ""
        if bits > limit - 1:
            reason = f"within one bit of the limit log2 {len(held)}: there may be far more"
        elif not values.any():
            reason = "the critic was not clearly better than guessing; with more pairs it might be"
        return Estimate(self.name, Claim.AT_LEAST, bits, low, high, floor, pairs, limit, reason)

    def _score(self, x: Tensor, y: Tensor, ids: Tensor, taught: Tensor, held: Tensor, draw: torch.Generator) -> Tensor:
        """Bits of each held-out pair, (held,)."""
        inner = torch.unique(ids[taught], return_inverse=True)[1]
        fifths = folds(inner, 5, draw)
        learning, tuning, checking = taught[torch.cat(fifths[2:])], taught[fifths[0]], taught[fifths[1]]
        x, y = standardised(x, x[learning]), standardised(y, y[learning])
        known, tuned, checked_on = ((x[part], y[part]) for part in (learning, tuning, checking))
        critic = _learnt(_gaussian_start(known, tuned, checked_on, draw), known, checked_on, self.steps, draw)
        mixture = _mixture(critic.scores(*checked_on))
        return _values(critic.scores(x[held], y[held]), mixture)


class _Critic(nn.Module):
    """Log of the density ratio p(y|x)/p(y), up to what depends on x alone, for all pairs of rows."""

    def __init__(self, left: Tensor, right: Tensor, correlations: Tensor, scale: float, draw: torch.Generator) -> None:
        super().__init__()
        self.left = left.float()
        self.right = right.float()
        squares = correlations.square()
        self.product = (correlations / (1 - squares)).float()
        self.penalty = (0.5 * squares / (1 - squares)).float()
        self.scale = nn.Parameter(torch.tensor(scale))
        # The start is the Gaussian's ratio exactly: what the networks add is 0 there, but their gradient is not.
        self.of_x = _network(left.shape[0], torch.zeros(_SHARED, _HIDDEN), draw)
        self.of_y = _network(
            right.shape[0], torch.cat([_uniform(_SHARED, _HIDDEN, draw), torch.zeros(1, _HIDDEN)]), draw
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(rows of x, rows of y)."""
        u, v = x @ self.left, y @ self.right
        gaussian = (u * self.product) @ v.T - (v.square() * self.penalty).sum(1)
        features = self.of_y(y)
        result: Tensor = self.scale * gaussian + self.of_x(x) @ features[:, :-1].T + features[:, -1]
        return result

    @torch.no_grad()
    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """The same without gradients, in float64. Raises ``NonFiniteError`` where it overflows."""
        scores: Tensor = self(x.float(), y.float())
        if not bool(torch.isfinite(scores).all()):
            raise NonFiniteError(
                "the critic's scores are not finite; the pairs may be of very unequal sizes: scale them"
            )
        return scores.double()


def _network(width: int, last: Tensor, draw: torch.Generator) -> nn.Sequential:
    """One hidden layer; ``last`` is where the last layer's weight starts. Leaves torch's own generator alone."""
    into = nn.utils.skip_init(nn.Linear, width, _HIDDEN)  # type: ignore[no-untyped-call]
    out = nn.utils.skip_init(nn.Linear, _HIDDEN, len(last))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        into.weight.copy_(_uniform(_HIDDEN, width, draw))
        out.weight.copy_(last)
        into.bias.zero_()
        out.bias.zero_()
    return nn.Sequential(into, nn.GELU(), out)


def _uniform(out: int, width: int, draw: torch.Generator) -> Tensor:
    return (2 * torch.rand(out, width, generator=draw) - 1) / math.sqrt(width)


def _values(scores: Tensor, mixture: float = 0.01) -> Tensor:
    """Bits of each pair on the diagonal: log2 of B × its probability among the row's B candidates."""
    ratio = scores.diagonal() - scores.logsumexp(1) + math.log(len(scores))
    return torch.log2((1 - mixture) * ratio.exp() + mixture)


def _mixture(scores: Tensor) -> float:
    """The share of guessing that does best on ``scores``; 1 where the best is not clearly better than guessing."""
    tried = {mixture: _values(scores, mixture) for mixture in _MIXTURES}
    best = max(tried, key=lambda mixture: tried[mixture].mean().item())
    error = tried[best].std().item() / math.sqrt(len(scores))
    return best if tried[best].mean().item() > 2 * error else 1.0


def _learnt(critic: _Critic, pairs: _Pairs, checking: _Pairs, steps: int, draw: torch.Generator) -> _Critic:
    """The critic as it was when it did best on the pairs for checking."""
    x, y = (part.float() for part in pairs)
    optimiser = torch.optim.Adam(critic.parameters(), 2e-3)
    best, waited = _values(critic.scores(*checking)).mean().item(), 0
    kept = {name: value.clone() for name, value in critic.state_dict().items()}
    for step in range(1, steps + 1):
        picked = torch.randperm(len(x), generator=draw)[:_BATCH]
        loss = nn.functional.cross_entropy(critic(x[picked], y[picked]), torch.arange(len(picked)))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step % _EVERY:
            continue
        score = _values(critic.scores(*checking)).mean().item()
        if score > best:
            best, waited = score, 0
            kept = {name: value.clone() for name, value in critic.state_dict().items()}
        else:
            waited += 1
            if waited == _PATIENCE:
                break
    critic.load_state_dict(kept)
    return critic


def _gaussian_start(learning: _Pairs, tuning: _Pairs, checking: _Pairs, draw: torch.Generator) -> _Critic:
    """The critic without a network yet, of the ridge and scale that do best on the pairs for checking."""
    tried = []
    for ridge in _RIDGES:
        left, right = _canonical(*learning, ridge)
        u, v = tuning[0] @ left, tuning[1] @ right
        # Correlations of the pairs learnt from are too large where features are many; those of others are not.
        spread_u, spread_v = u.square().mean(0).sqrt(), v.square().mean(0).sqrt()
        kept = (spread_u > _FLAT) & (spread_v > _FLAT)
        u, v, spread_u, spread_v = u[:, kept], v[:, kept], spread_u[kept], spread_v[kept]
        correlations = ((u * v).mean(0) / (spread_u * spread_v)).clamp(0, 0.99999)
        left, right = left[:, kept] / spread_u, right[:, kept] / spread_v
        for scale in _SCALES:
            critic = _Critic(left, right, correlations, scale, draw)
            tried.append((critic, _values(critic.scores(*checking)).mean().item()))
    return max(tried, key=lambda pair: pair[1])[0]


def _canonical(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Directions (width of x, r) and (width of y, r) of the regularised canonical correlations."""
    of_x, of_y = _whitener(x, ridge), _whitener(y, ridge)
    left, _, right = torch.linalg.svd(of_x.T @ (x.T @ y / len(x)) @ of_y, full_matrices=False)
    return of_x @ left, of_y @ right.T


def _whitener(x: Tensor, ridge: float) -> Tensor:
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    whitener: Tensor = vectors / (values + ridge).sqrt()
    return whitener
