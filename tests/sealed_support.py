"""The two ends of the sealed engine in one process, and what attackers and tests do to its bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from splitveil.private.ckks import publish
from splitveil.private.ckks_library import library
from splitveil.private.ckks_parameters import DEGREE
from splitveil.private.ckks_public import SealedPublic
from splitveil.private.ckks_served import SealedServed, SealedSession
from splitveil.private.core import LayerSpec
from splitveil.private.published import Publication

F64 = NDArray[np.float64]


def random_spec(width: int, outputs: int, rank: int, seed: int = 0, name: str = "m") -> LayerSpec:
    """A map with random matrices."""
    draw = np.random.default_rng([seed, width, outputs, rank])
    a = draw.normal(size=(rank, width)).astype(np.float32)
    b = draw.normal(size=(outputs, rank)).astype(np.float32)
    return LayerSpec(a, b, 0.5, ((name, outputs),))


def product(spec: LayerSpec, x: NDArray[np.float32]) -> F64:
    """What the layer adds to the module's output, in float64: (rows, d_out)."""
    core = spec.scale * (x.astype(np.float64) @ spec.A.astype(np.float64).T)
    return core if spec.B is None else core @ spec.B.astype(np.float64).T


@cache
def _keyed() -> tuple[SealedPublic, bytes]:
    """One client's keys, for all tests of a process: making them takes a fifth of a second."""
    _, publication = publish([random_spec(4, 4, 1)], noise=0.0)
    half = SealedPublic(publication)
    return half, half.keys()


@dataclass
class Ends:
    """A client's half, its keys, and the served half opened with them."""

    half: SealedPublic
    keys: bytes
    served: SealedServed
    session: SealedSession

    def ask(self, layers: Sequence[int], x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """One exchange."""
        site = self.half.site(layers)
        data, pending = site.query(x, site.make_masks(len(x)))
        return site.recover(pending, self.session.answer(layers, len(x), data))


def ends(specs: Sequence[LayerSpec] | SealedServed, *, insecure_unprotected: bool = False) -> Ends:
    """Both ends for some layers, or for a served half that exists."""
    half, keys = _keyed()
    if isinstance(specs, SealedServed):
        served = specs
    else:
        served, publication = publish(specs, noise=0.0)
        half = with_publication(half, publication)
    return Ends(half, keys, served, served.opened(keys, insecure_unprotected=insecure_unprotected))


def with_publication(half: SealedPublic, publication: Publication) -> SealedPublic:
    """The same keys for another publication."""
    other = SealedPublic.__new__(SealedPublic)
    other.__dict__.update(half.__dict__, publication=publication)
    return other


def polynomials(data: bytes, primes: int) -> NDArray[np.uint64]:
    """The two polynomials of a ciphertext by value at the roots of unity: (2, primes, N), writable."""
    count = 2 * primes * DEGREE
    return np.frombuffer(data[-8 * count :], dtype="<u8").reshape(2, primes, DEGREE).astype(np.uint64)


def with_polynomials(data: bytes, values: NDArray[np.uint64]) -> bytes:
    """The ciphertext with other polynomials."""
    return data[: len(data) - values.nbytes] + values.astype("<u8").tobytes()


def slots_of(values: NDArray[np.uint64]) -> NDArray[np.complex128]:
    """The slots, at scale 1, of a polynomial (N,) modulo an answer's prime that is given at the roots of unity."""
    sealing = library()
    plain = sealing.encode(np.ones(DEGREE // 2), 2.0, level=2)
    plain.scale(1.0)
    data = plain.to_bytes()
    plain.load_bytes(sealing.context, data[: len(data) - values.nbytes] + values.astype("<u8").tobytes())
    slots: NDArray[np.complex128] = sealing.encoder.decode_complex(plain)
    return slots
