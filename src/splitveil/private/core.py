"""The low-rank core of a private map, in a random orthonormal gauge, as integers (protocol design, section 1)."""

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import NonFiniteError
from splitveil.lattice.parameters import Q
from splitveil.lattice.randomness import derived_key, secret_normals
from splitveil.lattice.ring import MAX_SMALL_NORM
from splitveil.private.published import MAX_STEP

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class LayerSpec:
    """One private map ``x ↦ scale·B·A·x`` and the modules that its outputs belong to, in order.

    ``A`` is (r, d_in), ``B`` is (d_out, r); ``B = None`` stands for the identity (a full-rank layer: A is the weight).
    ``outputs`` names (module, rows of B) pairs; their rows add up to d_out.
    """

    A: NDArray[np.float32] = field(repr=False)
    B: NDArray[np.float32] | None = field(repr=False)
    scale: float
    outputs: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class IntegerCore:
    """The core rounded to integers: ``core ≈ step·values``; secret, hence absent from ``repr``."""

    values: NDArray[np.int32] = field(repr=False)
    step: float
    norm_bound: int
    """ρ: no row of ``values`` is longer, in the 2-norm."""


def haar_orthogonal(size: int, key: bytes | None = None) -> F64:
    """A (size, size) orthogonal matrix from the Haar measure, out of secret randomness (Mezzadri 2007).

    A fresh one, unless ``key`` says which (``randomness.secret_bytes``).
    """
    q, r = np.linalg.qr(secret_normals(size * size, key).reshape(size, size))
    result: F64 = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return result


def gauged(spec: LayerSpec, gauge_key: bytes | None = None) -> tuple[F64 | None, F64]:
    """(Q, C) with orthonormal Q and ``scale·B·A = Q·C``, Q showing span(B) and nothing else of B.

    Q is (d_out, k), C is (k, d_in), k = min(r, d_out). Without the random rotation the QR's triangular order and row
    norms would be published too. For ``B = None`` Q is None, which stands for the identity.

    The rotation is fresh, or, with ``gauge_key`` (32 secret bytes of the vendor's), a function of that key and the
    weights. What is published of a core depends on the rotation a little, and many publications of the same weights
    under fresh ones add up; under one, they say no more than the first. Other weights get an unrelated rotation.

    Raises ``NonFiniteError`` for NaN or infinity in A, B or the scale.
    """
    if not math.isfinite(spec.scale):
        raise NonFiniteError(f"the scale of a private map is {spec.scale}; repair the adapter before serving it")
    for matrix in (spec.A, spec.B):
        if matrix is not None and not np.isfinite(matrix).all():
            raise NonFiniteError("a weight matrix has NaN or infinite entries; repair the adapter before serving it")
    a = spec.A.astype(np.float64) * spec.scale
    if spec.B is None:
        return None, a
    q, r = np.linalg.qr(spec.B.astype(np.float64))
    key = None if gauge_key is None else derived_key(gauge_key, b"gauge", _fingerprint(spec))
    rotation = haar_orthogonal(q.shape[1], key)
    return q @ rotation, rotation.T @ (r @ a)


def _fingerprint(spec: LayerSpec) -> bytes:
    """A hash of everything that the map is; secret, as the weights are."""
    digest = hashlib.sha256(np.float64(spec.scale).tobytes())
    for matrix in (spec.A, spec.B):
        if matrix is not None:
            digest.update(np.array(matrix.shape, dtype="<u8").tobytes())
            digest.update(np.ascontiguousarray(matrix, dtype="<f4").tobytes())
    return digest.digest()


def core_rms(width: int) -> float:
    """c(d): the r.m.s. entry that balances the core's rounding against the query's noise (σ_e = 1)."""
    return math.sqrt(0.289 * Q / (2 * width))


def integer_core(core: F64) -> IntegerCore:
    """Rounds ``core`` (rows, d) to integers of r.m.s. ``core_rms(d)``; the step of an all-zero core is 1.

    A core in which one row dwarfs the others gets a coarser step, so that every row stays within the length for which
    ring products are proven exact. Raises ``NonFiniteError`` for NaN, and for entries whose products with common
    inputs overflow float32.
    """
    if not np.abs(core).max() <= MAX_STEP:
        raise NonFiniteError("a private map has NaN or entries beyond 1e30; repair the adapter before serving it")
    rms = float(np.sqrt(np.mean(core**2)))
    longest = float(np.sqrt((core**2).sum(axis=1).max()))
    room = MAX_SMALL_NORM - math.sqrt(core.shape[1])
    step = max(rms / core_rms(core.shape[1]), longest / room) or 1.0
    values = np.rint(core / step).astype(np.int32)
    longest_square = int((values.astype(np.int64) ** 2).sum(axis=1).max())
    bound = math.isqrt(longest_square)
    return IntegerCore(values, step, max(1, bound if bound * bound == longest_square else bound + 1))
