"""The client's half of the lattice engine: masks ahead of time, then query and recover (protocol design, section 3)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import NonFiniteError, ProtocolError
from splitveil.lattice import sampling
from splitveil.lattice.randomness import public_element
from splitveil.lattice.ring import LANES, FixedElement, Transformed, multiply_add
from splitveil.private.bound import HALF, budget
from splitveil.private.engine import WRONG_LENGTH, Mask, Pending, Site
from splitveil.private.kernels import encode_row, inner_products, unmask
from splitveil.private.masks import OneTimeMask
from splitveil.private.published import Publication

U32 = NDArray[np.uint32]
NOT_FINITE = "the input of a private layer is NaN or infinite; the zero query was sent in its place"


class LatticePublic:
    """What a client holds: the publication, and the public randomness expanded by itself."""

    def __init__(self, publication: Publication) -> None:
        self.publication = publication
        self._elements: dict[int, list[FixedElement]] = {}

    def site(self, layers: Sequence[int]) -> Site:
        """The view of some layers of equal width. Raises ``ValueError`` if their widths differ."""
        widths = {self.publication.layers[i].width for i in layers}
        if len(widths) != 1:
            raise ValueError(f"layers of one site read inputs of one width, got {sorted(widths)}")
        return LatticeSite(self.publication, layers, self._public(widths.pop()))

    def keys(self) -> bytes:
        """None: every query has a secret of its own."""
        return b""

    def _public(self, width: int) -> list[FixedElement]:
        """a_0 … a_{K−1} and a_pad for inputs of that width."""
        if width not in self._elements:
            p = self.publication
            degree = p.parameters.ring_degree
            self._elements[width] = [
                FixedElement.of(public_element(p.id, p.seed, width, index, degree))
                for index in range(p.parameters.blocks(width) + 1)
            ]
        return self._elements[width]


class LatticeSite:
    """One site: some layers that read the same tensor. Safe for several threads."""

    def __init__(self, publication: Publication, layers: Sequence[int], elements: Sequence[FixedElement]) -> None:
        chosen = [publication.layers[i] for i in layers]
        self._parameters = publication.parameters
        self._elements = elements
        self.width = chosen[0].width
        self.ranks = tuple(layer.rank for layer in chosen)
        self._hints = np.ascontiguousarray(np.vstack([layer.hint for layer in chosen if layer.hint is not None]))
        self._units = np.repeat([layer.step for layer in chosen], self.ranks)
        budgets = [budget(self._parameters, self.width, layer.norm_bound, publication.noise) for layer in chosen]
        # One query serves layers with different ρ: the most demanding one sets its size.
        self._size = min(b.theta * HALF / layer.norm_bound for b, layer in zip(budgets, chosen, strict=True))
        # ρ²·Σx̂² ≤ limit for every layer, as one bound on Σx̂².
        self._largest = min(b.limit_square // layer.norm_bound**2 for b, layer in zip(budgets, chosen, strict=True))
        self.query_size = 4 * self._parameters.query_width(self.width)
        self.answer_size = 4 * sum(self.ranks)
        self.mask_size = self.query_size + self.answer_size

    def make_masks(self, rows: int) -> list[Mask]:
        """Fresh masks: mask = (a_k·s)_k cut to d, + e; the pad's part likewise; corrections = ⟨hint_j, s⟩."""
        masks: list[Mask] = []
        for first in range(0, rows, LANES):
            masks.extend(self._eight(min(LANES, rows - first)))
        return masks

    def _eight(self, rows: int) -> list[OneTimeMask]:
        p, width = self._parameters, self.width
        degree = p.ring_degree
        secret = sampling.ternary(rows * degree).reshape(rows, degree).astype(np.int32)
        words = p.query_width(width)
        # The error first; the products are added to it.
        mask = sampling.centred_binomial_2(rows * words).reshape(rows, words).astype(np.uint32)
        transformed = Transformed.of(secret)
        for index, element in enumerate(self._elements):
            product = np.zeros((rows, degree), dtype=np.uint32)
            multiply_add(element, transformed, product)
            if index < len(self._elements) - 1:
                first = index * degree
                mask[:, first : min(first + degree, width)] += product[:, : width - first]
            else:
                mask[:, width:] += product[:, :: p.pad_stride]
        corrections = np.empty((rows, len(self._hints)), dtype=np.uint32)
        inner_products(secret, self._hints, corrections)
        return [OneTimeMask(mask[i], corrections[i]) for i in range(rows)]

    def query(self, x: NDArray[np.float32], masks: Sequence[Mask]) -> tuple[bytes, Pending]:
        """Scales, rounds and masks the rows of ``x`` (float32, (rows, d)); rows that are zero or not finite included.

        The no-wrap bound is checked in exact integers for every row and every layer.
        """
        rows = len(x)
        if x.shape != (rows, self.width) or len(masks) != rows:
            raise ValueError(f"got x of shape {x.shape} and {len(masks)} masks, expected ({rows}, {self.width})")
        out = np.empty((rows, self.query_size // 4), dtype=np.uint32)
        factors = np.empty(rows)
        corrections = np.empty((rows, self.answer_size // 4), dtype=np.uint32)
        square = np.empty(2, dtype=np.uint64)
        finite = True
        for i, mask in enumerate(masks):
            if not isinstance(mask, OneTimeMask):
                raise TypeError(f"a one-time mask is needed, got {type(mask).__name__}")
            content, correction = mask.consume()
            # The kernel does not check its indices, and a short mask would leave features uncovered.
            if len(content) != out.shape[1] or len(correction) != corrections.shape[1]:
                raise ValueError("a one-time mask of another site was given")
            corrections[i] = correction
            factor = encode_row(x[i], content, out[i], self._size, square)
            factors[i] = factor
            finite &= factor == factor  # NaN is not
            high, low = square.tolist()
            total = (high << 32) + low
            if total > self._largest:
                raise ArithmeticError("a query exceeds the no-wrap bound; nothing was sent")
        return out.astype("<u4", copy=False).tobytes(), Pending(rows, factors, corrections, finite)

    def recover(self, pending: Pending, answer: bytes) -> list[NDArray[np.float32]]:
        """C·x of every layer: (rows, rank) float32 each."""
        if len(answer) != pending.rows * self.answer_size:
            raise ProtocolError(WRONG_LENGTH)
        if not pending.finite:
            raise NonFiniteError(NOT_FINITE)
        out, first = [], 0
        for rank in self.ranks:
            words = np.frombuffer(answer, dtype="<u4", count=pending.rows * rank, offset=4 * pending.rows * first)
            core = np.empty((pending.rows, rank), dtype=np.float32)
            part = slice(first, first + rank)
            # One row's part is contiguous as it is.
            corrections = pending.corrections[:, part] if pending.rows == 1 else pending.corrections[:, part].copy()
            unmask(words.reshape(pending.rows, rank), corrections, pending.factors, self._units[part], core)
            out.append(core)
            first += rank
        return out
