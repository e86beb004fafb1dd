"""The vendor's half of the lattice engine: publish once, then answer queries (protocol design, sections 3 and 4)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError, ProtocolError
from splitveil.lattice import sampling
from splitveil.lattice.parameters import ParameterSet
from splitveil.lattice.randomness import public_element
from splitveil.lattice.ring import LANES, FixedElement, Transformed, check_small, multiply_add, reflect
from splitveil.private.bound import budget
from splitveil.private.core import IntegerCore, LayerSpec, gauged, integer_core
from splitveil.private.kernels import answer_rows
from splitveil.private.noise import AnswerNoise
from splitveil.private.published import MAX_NOISE, Publication, PublicLayer

I32 = NDArray[np.int32]
U32 = NDArray[np.uint32]


_MOST_SITES = 4096


@dataclass(frozen=True)
class _SecretLayer:
    """What never leaves the vendor: the integer core and its pad, side by side, (rank, d + n_pad)."""

    matrix: I32 = field(repr=False)
    noise: AnswerNoise = field(repr=False)


def _reflected(id_: bytes, seed: bytes, width: int, parameters: ParameterSet) -> list[FixedElement]:
    """ā_0 … ā_{K−1} and ā_pad for layers of that width, ready for products."""
    return [
        FixedElement.of(reflect(public_element(id_, seed, width, index, parameters.ring_degree)))
        for index in range(parameters.blocks(width) + 1)
    ]


def hints(core: I32, pad: I32, error: U32, elements: Sequence[FixedElement], parameters: ParameterSet) -> U32:
    """hint_j = Σ_k ā_k·C_{j,k} + ā_pad·P_j(X^t) + f_j, for all rows: uint32 (rows, N).

    ``core`` is (rows, d), ``pad`` (rows, n_pad), ``error`` (rows, N), ``elements`` the reflected ā_0 … ā_{K−1}, ā_pad.
    """
    rows, width = core.shape
    degree = parameters.ring_degree
    blocks = np.zeros((rows, len(elements), degree), dtype=np.int32)
    blocks[:, :-1].reshape(rows, -1)[:, :width] = core
    blocks[:, -1, :: parameters.pad_stride] = pad
    check_small(blocks)
    out = error.copy()
    for first in range(0, rows, LANES):
        part = slice(first, first + LANES)
        for index, element in enumerate(elements):
            multiply_add(element, Transformed.of(blocks[part, index]), out[part])
    return out


class LatticeServed:
    """All private layers of one adapter, ready to answer. Holds the vendor's secrets; its ``repr`` shows none."""

    def __init__(self, publication: Publication, secret: Sequence[_SecretLayer]) -> None:
        self._publication = publication
        self._secret = tuple(secret)
        self._row_sizes: dict[tuple[int, ...], int] = {}

    def __repr__(self) -> str:
        return f"LatticeServed({len(self._secret)} layers)"

    def __reduce__(self) -> str:
        raise TypeError("a served half holds the vendor's secrets and is not pickled")

    def check(self, layers: Sequence[int], rows: int, size: int) -> None:
        """Raises ``ProtocolError``, with one constant text each, unless the query fits."""
        size_of_row = self._row_sizes.get(tuple(layers)) or self._row_size(layers)
        if rows < 1 or size != rows * size_of_row:
            raise ProtocolError("the query's length does not fit its layers and rows")

    def _row_size(self, layers: Sequence[int]) -> int:
        """Bytes of a query row for these layers, remembered: sites are few. Raises ``ProtocolError``."""
        published = self._publication.layers
        if not layers or len(set(layers)) != len(layers) or not all(0 <= i < len(published) for i in layers):
            raise ProtocolError("the query names a layer that the publication does not have, or one twice, or none")
        widths = {published[i].width for i in layers}
        if len(widths) != 1:
            raise ProtocolError("the query names layers of different input widths")
        size = 4 * self._publication.parameters.query_width(widths.pop())
        if len(self._row_sizes) < _MOST_SITES:  # a client may name layers in any order
            self._row_sizes[tuple(layers)] = size
        return size

    def answer(self, layers: Sequence[int], rows: int, query: bytes) -> bytes:
        """answer_j = ⟨[C_j | P_j], query⟩ + g_j: little-endian uint32, the layers' (rows, rank) blocks one by one."""
        self.check(layers, rows, len(query))
        words = np.frombuffer(query, dtype="<u4").reshape(rows, -1)
        parts = []
        for index in layers:
            layer = self._secret[index]
            out = layer.noise.take(rows, layer.matrix.shape[0])
            answer_rows(layer.matrix, words, out)
            parts.append(out.astype("<u4", copy=False).tobytes())
        return b"".join(parts)


def publish(
    specs: Sequence[LayerSpec], *, noise: float, parameters: ParameterSet, gauge_key: bytes | None = None
) -> tuple[LatticeServed, Publication]:
    """Splits private maps into what is served and what is published.

    Every call draws a fresh id, seed, pad and hint error: publishing changed weights under old randomness would
    publish their difference. The gauge is fresh too, or, with ``gauge_key``, that of these weights (``core.gauged``).
    Raises ``ConfigurationError`` for a noise outside [0, 10], ``NonFiniteError`` for weights
    that are not finite.
    """
    if not 0 <= noise <= MAX_NOISE:
        raise ConfigurationError(f"noise {noise} is outside [0, {MAX_NOISE:g}]; it is a fraction, 0.01 means 1 %")
    id_, seed = os.urandom(16), os.urandom(32)
    elements: dict[int, list[FixedElement]] = {}
    public, secret = [], []
    for spec in specs:
        q, real = gauged(spec, gauge_key)
        core: IntegerCore = integer_core(real)
        rank, width = core.values.shape
        if width not in elements:
            elements[width] = _reflected(id_, seed, width, parameters)
        pad = sampling.uniform(rank * parameters.pad_width, parameters.pad_bound).astype(np.int32).reshape(rank, -1)
        error = sampling.discrete_gaussian(rank * parameters.ring_degree, parameters.hint_sigma).reshape(rank, -1)
        hint = hints(core.values, pad, (error & 0xFFFFFFFF).astype(np.uint32), elements[width], parameters)
        sigma = budget(parameters, width, core.norm_bound, noise).answer_sigma
        public.append(
            PublicLayer(
                width,
                rank,
                core.step,
                core.norm_bound,
                spec.outputs,
                None if q is None else q.astype(np.float32),
                hint,
            )
        )
        secret.append(_SecretLayer(np.hstack([core.values, pad]), AnswerNoise(sigma)))
    publication = Publication(id_, seed, "lattice", parameters, noise, tuple(public))
    return LatticeServed(publication, secret), publication
