"""The sealed engine: private layers under CKKS, with nothing of A or B published.

Scheme: Cheon, Kim, Kim, Song, ASIACRYPT 2017, as Microsoft SEAL implements it. Every answer is made independent of how
it came about: a fresh encryption of zero under the client's public key is added, and Gaussian noise in every slot that
drowns what evaluation leaves behind. docs/design/sealed.md has the analysis, and what it does not cover.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError, NonFiniteError
from splitveil.lattice.parameters import DEFAULT
from splitveil.lattice.randomness import secret_bytes
from splitveil.private.ckks_layout import columns, power_of_two, stepped
from splitveil.private.ckks_library import library
from splitveil.private.ckks_parameters import (
    A_SCALE,
    B_BITS,
    FEATURES,
    MAX_RANK,
    REQUIRED_FLOOD_BITS,
    SLOTS,
    ciphertexts,
    flood_bits,
)
from splitveil.private.ckks_served import SealedLayer, SealedServed
from splitveil.private.core import LayerSpec, gauged, haar_orthogonal
from splitveil.private.published import ENGINE_SEALED, MAX_STEP, Publication, PublicLayer

F64 = NDArray[np.float64]
GRID = 4
"""The published size of a layer is rounded up to a power of 2^(1/4)."""


def publish(specs: Sequence[LayerSpec], *, noise: float) -> tuple[SealedServed, Publication]:
    """Splits private maps into what is served and what is published: names, shapes, and one rounded size a layer.

    Raises ``ConfigurationError`` where seal-python is not installed, for a rank beyond 256, and for a noise other than
    0: this engine's noise is its own. Raises ``NonFiniteError`` for weights that are not finite.
    """
    if noise:
        raise ConfigurationError(f"the sealed engine adds noise of its own; noise {noise:g} must be 0")
    library()
    served, public = [], []
    for spec in specs:
        a, b, size = factored(spec)
        served.append(_encoded(a, b))
        public.append(PublicLayer(a.shape[1], b.shape[0], size, 1, spec.outputs, None, None))
    publication = Publication(
        secret_bytes(16).tobytes(), secret_bytes(32).tobytes(), ENGINE_SEALED, DEFAULT, 0.0, tuple(public)
    )
    return SealedServed(served), publication


def factored(spec: LayerSpec) -> tuple[F64, F64, float]:
    """(A, B, size) with ``scale·B·A = size·B·A`` of the result: A's rows orthonormal, B's rows at most 1 long.

    A random rotation stands between them, so that they say no more than the product does. ``size`` is the length of
    the product's longest row, rounded up: no unit vector x makes an entry of B(Ax) larger than 1.
    """
    q, core = gauged(spec)
    basis, triangle = np.linalg.qr(core.T)
    rotation = haar_orthogonal(basis.shape[1])
    a = rotation.T @ basis.T
    b = triangle.T @ rotation if q is None else q @ (triangle.T @ rotation)
    longest = float(np.linalg.norm(b, axis=1).max())
    if not longest <= MAX_STEP:
        raise NonFiniteError("a private map has NaN or rows longer than 1e30; repair the adapter before serving it")
    if longest == 0.0:
        return a, b, 1.0
    size = 2.0 ** (math.ceil(GRID * math.log2(longest * (1 + 1e-9))) / GRID)
    return a, b / size, size


def _encoded(a: F64, b: F64) -> SealedLayer:
    """The plaintexts of a layer: A (r, d_in) and B (d_out, r). Raises ``ConfigurationError`` for a rank beyond 256."""
    (rank, width), outputs = a.shape, b.shape[0]
    if rank > MAX_RANK:
        raise ConfigurationError(
            f"the sealed engine serves ranks up to {MAX_RANK}, this layer has {rank}; use the lattice engine"
        )
    if flood_bits(rank) < REQUIRED_FLOOD_BITS:
        raise ConfigurationError(f"rank {rank} leaves {flood_bits(rank):.1f} bits of flooding, 30 are needed")
    sealing, k = library(), power_of_two(rank)
    wide = np.zeros((k, ciphertexts(width) * FEATURES))
    wide[:rank, :width] = a / 2  # the other half comes with the conjugate
    tall = np.zeros((ciphertexts(outputs) * FEATURES, k))
    tall[:outputs, :rank] = b
    inputs = [part[:, :SLOTS] - 1j * part[:, SLOTS:] for part in np.split(wide, ciphertexts(width), axis=1)]
    sums = [part[:SLOTS] + 1j * part[SLOTS:] for part in np.split(tall, ciphertexts(outputs))]
    return SealedLayer(
        width,
        outputs,
        k,
        [[_unless_zero(sealing.encode(columns(part, index), A_SCALE)) for part in inputs] for index in range(k)],
        [_giants(part) for part in sums],
    )


def _giants(matrix: NDArray[np.complex128]) -> list[list[Any]]:
    """[giant step][baby step] plaintexts of one output ciphertext's rows (4096, k) of B."""
    giants: dict[int, list[Any]] = {}
    for giant, _, diagonal in stepped(matrix, SLOTS, matrix.shape[1]):
        giants.setdefault(giant, []).append(_unless_zero(library().encode_exactly(diagonal, B_BITS)))
    return list(giants.values())


def _unless_zero(plain: Any) -> Any:
    return None if plain.is_zero() else plain
