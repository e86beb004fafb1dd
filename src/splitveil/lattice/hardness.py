"""How hard an LWE or RLWE instance is, by the primal and the dual lattice attack, in two cost models.

Both attacks reduce a lattice with BKZ of block size β. The cost models differ in what one reduction costs, in bits:

* *core-SVP* [ADPS16, §6.1]: 0.292·β, one call to a sieve in dimension β and nothing else. The stricter one.
* *HE standard* [HES18; BDGL16 sieve]: 0.292·β + 16.4 + log2(8·dim), 8·dim sieve calls, dim being the lattice's.

What is counted: the primal attack with the 2016 estimate and the dual attack that keeps all short vectors of its sieve.
The ring structure is ignored, as is usual: an RLWE sample of degree N counts as N samples in dimension N.
What is not counted: hybrid dual attacks with modulus switching [MATZOV22], which claim up to about ten bits less and
whose heuristics are disputed [DP23]; quantum sieves (0.265·β); and guessing, which matters for sparse secrets and
errors, so that those are refused.

[ACPS09]   Applebaum, Cash, Peikert, Sahai: Fast cryptographic primitives and circular-secure encryption. CRYPTO 2009.
[ADPS16]   Alkim, Ducas, Pöppelmann, Schwabe: Post-quantum key exchange – a new hope. USENIX Security 2016.
[AGVW17]   Albrecht, Göpfert, Virdia, Wunderer: Revisiting the expected cost of solving uSVP. ASIACRYPT 2017.
[APS15]    Albrecht, Player, Scott: On the concrete hardness of learning with errors. J. Math. Cryptology 9, 2015.
[BDGL16]   Becker, Ducas, Gama, Laarhoven: New directions in nearest neighbor searching. SODA 2016.
[BG14]     Bai, Galbraith: Lattice decoding attacks on binary LWE. ACISP 2014.
[Chen13]   Chen: Réduction de réseau et sécurité concrète du chiffrement complètement homomorphe. Thesis, 2013.
[DP23]     Ducas, Pulles: Does the dual-sieve attack on learning with errors even work? CRYPTO 2023.
[HES18]    Albrecht et al.: Homomorphic encryption security standard. 2018.
[MATZOV22] MATZOV: Report on the security of LWE: improved dual lattice attack. 2022.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from splitveil.errors import ParameterError

_SIEVE = 0.292  # log2 of a sieve's time, per unit of block size [BDGL16]
_SIEVE_VECTORS = 0.2075  # log2 of the short vectors that a sieve leaves behind, per unit of block size [ADPS16]
_HE_CONSTANT = 16.4  # log2 of a sieve's time at block size 0, fitted to experiments [APS15]

# Root Hermite factors of small blocks, measured; Chen's formula holds for large ones only. The lattice-estimator of
# Albrecht and others takes the same.
_SMALL_BLOCKS = np.array([2.0, 5.0, 10.0, 15.0, 20.0, 25.0, 28.0, 40.0])
_SMALL_DELTAS = np.array([1.02190, 1.01862, 1.01616, 1.01485, 1.01420, 1.01342, 1.01331, 1.01295])

_NARROWEST = 0.5  # standard deviation of uniform bits; narrower means sparse
_MAX_DIMENSION = 1 << 17
_MAX_MODULUS_BITS = 1000  # a float still holds q
_MAX_LOG_TAU = 100.0  # far beyond where the advantage is 0, and e^200 is still finite


def ternary_sigma() -> float:
    """Standard deviation of the uniform distribution on {-1, 0, 1}."""
    return uniform_sigma(1)


def uniform_sigma(bound: int) -> float:
    """Standard deviation of the uniform distribution on the integers in [-bound, bound]."""
    return math.sqrt(bound * (bound + 1) / 3)


def modular_sigma(modulus: int) -> float:
    """Standard deviation of the uniform distribution on Z_q, written with representatives around 0."""
    return modulus / math.sqrt(12)


def centred_binomial_sigma(eta: int) -> float:
    """Standard deviation of the centred binomial distribution: η coins minus η coins."""
    return math.sqrt(eta / 2)


@dataclass(frozen=True)
class LweInstance:
    """An LWE instance: `samples` pairs (a, ⟨a, s⟩ + e mod q) with `s` in Z_q^dimension.

    `secret_sigma` and `error_sigma` are standard deviations per coordinate. `samples` is what the attacker holds; None
    means as many as the attack likes. A query row of the private layer offers d + n_pad samples, and the attack wants
    about N: None is right for wide layers and on the safe side for narrow ones. A hint row offers t = N/n_pad RLWE
    samples of degree n_pad, N samples in all.

    Raises ParameterError for numbers that make no instance, and for sparse secrets or errors (sigma below 0.5).
    """

    name: str
    dimension: int
    modulus: int
    secret_sigma: float
    error_sigma: float
    samples: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.dimension <= _MAX_DIMENSION:
            raise ParameterError(f"{self.name}: dimension is {self.dimension}, expected 2 to {_MAX_DIMENSION}")
        if self.modulus < 2 or self.modulus.bit_length() > _MAX_MODULUS_BITS:
            bits = self.modulus.bit_length()
            raise ParameterError(f"{self.name}: modulus has {bits} bits, expected 2 to {_MAX_MODULUS_BITS}")
        if self.samples is not None and self.samples < 1:
            raise ParameterError(f"{self.name}: samples is {self.samples}, expected at least 1, or None for unlimited")
        widest = modular_sigma(self.modulus)
        for field, sigma in (("secret_sigma", self.secret_sigma), ("error_sigma", self.error_sigma)):
            if not _NARROWEST <= sigma <= widest:
                raise ParameterError(
                    f"{self.name}: {field} is {sigma:g}, expected {_NARROWEST} (uniform bits; attacks on sparser "
                    f"vectors are not modelled) to {widest:g} (uniform mod q)"
                )


@dataclass(frozen=True)
class Estimate:
    """What one attack costs: the BKZ block size, the dimension of the lattice reduced, and bits in both cost models.

    An attack that no block size makes succeed has infinite bits; `block_size` is then the largest one tried.
    """

    attack: str
    block_size: int
    dimension: int
    bits_core_svp: float
    bits_he_standard: float


@dataclass(frozen=True)
class Hardness:
    """What both attacks cost. The instance is as hard as the cheaper one, in each cost model by itself."""

    primal: Estimate
    dual: Estimate

    @property
    def bits_core_svp(self) -> float:
        """Bits by core-SVP, the cheaper attack."""
        return min(self.primal.bits_core_svp, self.dual.bits_core_svp)

    @property
    def bits_he_standard(self) -> float:
        """Bits in the homomorphic encryption standard's cost model, the cheaper attack."""
        return min(self.primal.bits_he_standard, self.dual.bits_he_standard)


def estimate(instance: LweInstance) -> Hardness:
    """The cost of the primal and of the dual attack on `instance`. Takes about a millisecond at degree 2048."""
    return Hardness(primal(instance), dual(instance))


def primal(instance: LweInstance) -> Estimate:
    """The primal attack: find (ν·s, e, σ_e) as the unique shortest vector of Bai and Galbraith's embedding.

    The lattice has dimension D = m + n + 1 for m samples and volume q^m·ν^n·σ_e, where ν = σ_e/σ_s makes secret and
    error equally long [BG14]. BKZ with block size β finds the vector once its projection is shorter than what stands in
    that place of the reduced basis, the 2016 estimate [ADPS16, §6.3; AGVW17]: √β·σ_e ≤ δ^(2β−D−1)·Vol^(1/D).
    The smallest such β counts, and with it the smallest D.
    """
    return min((_primal(form) for form in _forms(instance)), key=lambda found: found.bits_core_svp)


def dual(instance: LweInstance) -> Estimate:
    """The dual attack: distinguish LWE from uniform samples by short vectors of the dual lattice.

    The lattice {(x, σ_s/σ_e·y): y = Aᵀx mod q} has dimension D = m + n and volume (q·σ_s/σ_e)^n; BKZ finds a vector of
    length ℓ = δ^D·Vol^(1/D). With τ = ℓ·σ_e/q it distinguishes with advantage ε = 4·exp(−2π²τ²). The sieve leaves
    2^(0.2075·β) vectors that count as equally short, ε^−2 are needed, and the reduction is repeated until they are
    there [ADPS16, §6.4].
    """
    return min((_dual(form) for form in _forms(instance)), key=lambda found: found.bits_core_svp)


def _forms(instance: LweInstance) -> tuple[LweInstance, ...]:
    """The instance, and its normal form if the secret is wider than the error.

    n of the samples turn the secret into one that is distributed like the error [ACPS09]. That is the way to attack a
    secret that is uniform mod q.
    """
    if instance.secret_sigma <= instance.error_sigma:
        return (instance,)
    if instance.samples is None:
        return (instance, replace(instance, secret_sigma=instance.error_sigma))
    left = instance.samples - instance.dimension
    if left < 1:
        return (instance,)
    return (instance, replace(instance, secret_sigma=instance.error_sigma, samples=left))


def _primal(instance: LweInstance) -> Estimate:
    n, q, sigma = instance.dimension, math.log(instance.modulus), math.log(instance.error_sigma)
    beta, delta = _blocks(n)
    # ln Vol = D·q − volume, so the condition reads ln δ·D² − slope·D + volume ≤ 0.
    volume = (n + 1) * q - n * (sigma - math.log(instance.secret_sigma)) - sigma
    slope = (2 * beta - 1) * delta + q - sigma - np.log(beta) / 2
    least = np.maximum(beta, n + 2)
    most = math.inf if instance.samples is None else n + instance.samples + 1
    best = np.rint(np.clip(np.sqrt(volume / delta), least, most))
    succeeds = (delta * best**2 - slope * best + volume <= 0) & (least <= most)
    if not succeeds.any():
        return Estimate("primal", int(beta[-1]), int(best[-1]), math.inf, math.inf)
    i = int(np.argmax(succeeds))
    root = (slope[i] - math.sqrt(max(slope[i] ** 2 - 4 * delta[i] * volume, 0.0))) / (2 * delta[i])
    dimension = int(np.clip(math.ceil(root), least[i], best[i]))
    return _cost("primal", int(beta[i]), dimension, repetitions=0.0)


def _dual(instance: LweInstance) -> Estimate:
    n, q, sigma = instance.dimension, math.log(instance.modulus), math.log(instance.error_sigma)
    beta, delta = _blocks(n)
    volume = n * (q + math.log(instance.secret_sigma) - sigma)
    least = np.maximum(beta, n + 1)
    most = math.inf if instance.samples is None else n + instance.samples
    best = np.rint(np.clip(np.sqrt(volume / delta), least, most))
    log_tau = np.minimum(best * delta + volume / best + sigma - q, _MAX_LOG_TAU)
    log2_advantage = np.minimum(2 - 2 * math.pi**2 * np.exp(2 * log_tau) / math.log(2), 0)
    repetitions = np.maximum(-2 * log2_advantage - _SIEVE_VECTORS * beta, 0)
    bits = np.where(least <= most, _SIEVE * beta + repetitions, math.inf)
    i = int(np.argmin(bits))
    return _cost("dual", int(beta[i]), int(best[i]), repetitions=float(repetitions[i]))


def _cost(attack: str, block_size: int, dimension: int, repetitions: float) -> Estimate:
    """The bits of `2^repetitions` reductions in both cost models."""
    core = _SIEVE * block_size + repetitions
    return Estimate(attack, block_size, dimension, core, core + _HE_CONSTANT + math.log2(8 * dimension))


def _blocks(dimension: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """All block sizes worth a try, and for each the natural logarithm of its root Hermite factor δ.

    δ = ((πβ)^(1/β)·β/(2πe))^(1/(2(β−1))) [Chen13], measured values up to β = 40.
    """
    beta = np.arange(2, 4 * dimension + 65, dtype=np.float64)
    chen = (np.log(math.pi * beta) / beta + np.log(beta / (2 * math.pi * math.e))) / (2 * (beta - 1))
    small = np.log(np.interp(beta, _SMALL_BLOCKS, _SMALL_DELTAS))
    return beta, np.where(beta <= _SMALL_BLOCKS[-1], small, chen)
