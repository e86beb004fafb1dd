"""Regularisers: penalties that a device half is trained with, so that what crosses tells less of the text.

They are no defences of their own. A device half that was trained with one sends other states than the public base
does, and has to be attacked as it is: by an attacker who has learnt from that device half, penalty and all.

There is no information bottleneck here (a penalty on the states' power, in nats, beside noise of a fixed size): the
noise that this project adds, ``gaussian``, is in proportion to each state's own size, so that smaller states would
carry exactly as much; the penalty would cost something and hide nothing.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from splitveil.errors import ConfigurationError, NonFiniteError

LEAST = 4
"""Rows that the bias-corrected estimate needs: it divides by n(n − 3)."""
MOST = 512
"""Rows of a micro-batch that are compared. Their distances take 1 MB a matrix in float32, a dozen of which are held."""


class Regulariser(Protocol):
    """A penalty on what crosses. The loss that a device half is trained with is its own plus ``weight · penalty``."""

    @property
    def name(self) -> str:
        """What the command line calls it."""

    @property
    def weight(self) -> float:
        """How much of it is added to the loss; ``penalty`` itself is without it."""

    @property
    def summary(self) -> str:
        """One line for people who have never seen it."""

    def penalty(self, embeddings: Tensor, hidden: Tensor, text: Tensor) -> Tensor:
        """A scalar, the lower the better, differentiable by ``hidden``; ``embeddings`` are taken as they are.

        ``embeddings`` (batch, position, width) went into the device half, ``hidden`` (batch, position, width) came out
        of it, ``text`` (batch, position) of bool says where there is text.
        """


class DistanceCorrelation:
    """Squared distance correlation between the input embeddings and the states that cross.

    Distance correlation is 0 for independent variables only, and 1 for one that is a scaled rotation of the other
    (Székely, Rizzo, Bakirov, Annals of Statistics 2007); as a regulariser of split learning: NoPeek (Vepakomma et al.,
    ICDM workshops 2020). Taken here is the bias-corrected estimate of its square (Székely, Rizzo, J. Multivariate
    Analysis 2013): that of 2007 tends to 1 where the width exceeds the rows, whatever the variables are. Around
    independence it is as often below 0 as above; that is no error.

    A row is a position of text, and rows of one text are not independent: the estimate is a penalty, and no test.

    At most ``rows`` positions are compared, drawn anew for every micro-batch: for n of them the cost is O(n² · width)
    time and O(n²) memory. The draw is a function of the embeddings, so that training that was interrupted and resumed
    makes the same draws as training that was not.
    """

    name: ClassVar[str] = "dcor"
    summary: ClassVar[str] = "distance correlation between the input embeddings and what crosses, added to the loss"

    def __init__(self, weight: float, rows: int = MOST) -> None:
        """Raises ``ConfigurationError`` if ``weight`` is not positive and finite, or ``rows`` too few."""
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigurationError(
                f"a regulariser's weight is a positive number, got {weight}; for none leave it out"
            )
        if rows < LEAST:
            raise ConfigurationError(f"distance correlation compares at least {LEAST} rows, got {rows}")
        self.weight = weight
        self._rows = rows

    def penalty(self, embeddings: Tensor, hidden: Tensor, text: Tensor) -> Tensor:
        """See ``Regulariser``. Between −1 and 1; float32, or float64 where the states are.

        Raises ``ConfigurationError`` for fewer than four positions of text, and for shapes that do not fit;
        ``NonFiniteError`` where a state or an embedding is NaN or infinite.
        """
        if not embeddings.shape[:2] == hidden.shape[:2] == text.shape:
            shapes = f"{tuple(embeddings.shape)}, {tuple(hidden.shape)} and {tuple(text.shape)}"
            raise ConfigurationError(f"embeddings, states and text have the same batch and positions, got {shapes}")
        inputs, states = embeddings[text].detach(), hidden[text]
        if len(states) < LEAST:
            raise ConfigurationError(
                f"distance correlation needs {LEAST} positions of text in a micro-batch, got {len(states)}; "
                "put more texts into a micro-batch"
            )
        if not bool(inputs.isfinite().all() and states.isfinite().all()):
            raise NonFiniteError("an embedding or a hidden state is NaN or infinite; it has no distance to others")
        if len(states) > self._rows:
            kept = _drawn(inputs, self._rows).to(states.device)
            inputs, states = inputs[kept], states[kept]
        return distance_correlation(inputs, states)


def distance_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Bias-corrected squared distance correlation of x (rows, width) and y (rows, another width); four rows or more.

    A scalar; 0, with zero gradients, where either has no variance at all (the definition of 2007 has it so).
    """
    a, b = (_centred(_distances(v.to(torch.promote_types(v.dtype, torch.float32)))) for v in (x, y))
    # Scaled first: the sum of products of four distances would leave the range of float32 for large states.
    a, b = (m / m.detach().abs().amax().clamp_min(torch.finfo(m.dtype).tiny) for m in (a, b))
    product = (a * a).sum() * (b * b).sum()
    if not bool(product > 0):
        return (y * 0.0).sum()
    return (a * b).sum() / product.sqrt()


def create_regulariser(spec: str) -> Regulariser:
    """The regulariser that ``spec`` describes, as in ``dcor:0.5``: its name and its weight.

    Raises ``ConfigurationError`` for an unknown name, and for a weight that is missing or not in range.
    """
    name, _, number = spec.strip().partition(":")
    if name not in _KNOWN:
        raise ConfigurationError(f"unknown regulariser {spec!r}; known: {_listed()}")
    try:
        weight = float(number)
    except ValueError:
        raise ConfigurationError(f"regulariser {name!r} needs a weight, got {spec!r}; known: {_listed()}") from None
    return _KNOWN[name](weight)


_KNOWN: dict[str, Callable[[float], Regulariser]] = {c.name: c for c in (DistanceCorrelation,)}


def _listed() -> str:
    return ", ".join(f"{name}:WEIGHT" for name in _KNOWN)


def _distances(rows: Tensor) -> Tensor:
    """(n, n) Euclidean distances; the gradient of a distance of 0 is 0.

    Not by matrix products: those leave equal rows a little apart, with gradients that are all rounding.
    """
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def _centred(distances: Tensor) -> Tensor:
    """U-centred: every row and every column sums to 0, and so does the diagonal (Székely, Rizzo, 2014)."""
    n = len(distances)
    by_row = distances.sum(1, keepdim=True) / (n - 2)
    centred = distances - by_row - by_row.T + distances.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag_embed(centred.diagonal())


def _drawn(inputs: Tensor, rows: int) -> Tensor:
    """``rows`` different indices. A fixed stride would let a model learn to hide every other position only."""
    checksum = inputs.double().sum(0).cpu().view(torch.int64).sum() & (2**63 - 1)
    return torch.randperm(len(inputs), generator=torch.Generator().manual_seed(int(checksum)))[:rows]
