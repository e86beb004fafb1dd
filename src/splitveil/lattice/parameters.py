"""Checked parameter sets (protocol design, section 2).

A set is a frozen dataclass that validates itself: malformed sets cannot exist, and sets below 128 bits exist only under
a name that begins with ``insecure_``. Looking a set up by the name that came over the wire never returns such a set,
unless code, not a flag, asks for it.
"""

from dataclasses import dataclass

from splitveil.errors import InsecureParametersError, ParameterError
from splitveil.lattice.hardness import LweInstance, estimate, ternary_sigma, uniform_sigma
from splitveil.lattice.ring import MAX_DEGREE

LOG_Q = 32  # the modulus is 2^32 throughout: sums wrap around in machine words
Q = 1 << LOG_Q
QUERY_SIGMA = 1.0  # centred binomial, η = 2
INSECURE_PREFIX = "insecure_"
REQUIRED_BITS = 128.0


@dataclass(frozen=True)
class ParameterSet:
    """One set of lattice parameters. Raises ``ParameterError`` if malformed, ``InsecureParametersError`` if weak."""

    name: str
    ring_degree: int = 2048
    """N: ring elements have N coefficients."""
    pad_width: int = 1024
    """n_pad: secret coordinates that hide a row of the hint."""
    pad_bound: int = 128
    """The pad is uniform in [−pad_bound, pad_bound]."""
    hint_sigma: float = 256.0
    """σ_f of the hint's discrete Gaussian error."""
    answer_sigma: float = 256.0
    """The least σ_g of an answer's discrete Gaussian noise."""

    def __post_init__(self) -> None:
        n, pad = self.ring_degree, self.pad_width
        if any(type(value) is not int for value in (n, pad, self.pad_bound)):
            raise ParameterError(f"{self.name}: ring degree, pad width and pad bound are integers")
        if n & (n - 1) or not 4 <= n <= MAX_DEGREE:
            raise ParameterError(f"{self.name}: ring degree {n} is not a power of two from 4 to {MAX_DEGREE}")
        if pad < 1 or n % pad:
            raise ParameterError(f"{self.name}: pad width {pad} does not divide the ring degree {n}")
        if not 1 <= self.pad_bound < 1 << 14:
            raise ParameterError(f"{self.name}: pad bound {self.pad_bound} is outside [1, 2^14)")
        if not 1 <= self.hint_sigma <= self.answer_sigma < 2.0**20:
            raise ParameterError(
                f"{self.name}: 1 ≤ hint sigma ≤ answer sigma < 2^20 is needed (answers must be at least as noisy as "
                f"hints), got {self.hint_sigma} and {self.answer_sigma}"
            )
        if not self.is_insecure:
            bits = self.security_bits()
            if bits < REQUIRED_BITS:
                raise InsecureParametersError(
                    f"{self.name}: {bits:.0f} bits by core-SVP, at least {REQUIRED_BITS:.0f} needed; "
                    f"sets for tests must be named {INSECURE_PREFIX}…"
                )

    @property
    def is_insecure(self) -> bool:
        """Whether the set is one of those for tests, by its name."""
        return self.name.startswith(INSECURE_PREFIX)

    @property
    def pad_stride(self) -> int:
        """t = N / n_pad: the pad is a polynomial in X^t."""
        return self.ring_degree // self.pad_width

    @property
    def pad_sigma(self) -> float:
        """Standard deviation of a pad coordinate."""
        return uniform_sigma(self.pad_bound)

    def blocks(self, width: int) -> int:
        """K = ⌈d/N⌉: ring elements that cover ``width`` inputs."""
        return -(-width // self.ring_degree)

    def query_width(self, width: int) -> int:
        """Words in one query row: d + n_pad."""
        return width + self.pad_width

    def instances(self) -> tuple[LweInstance, LweInstance]:
        """The two LWE problems the set stands on: a client's query, and a row of the published hint.

        A query row offers d + n_pad samples, of any d, hence without limit here; a hint row offers t samples of degree
        n_pad, which is N.
        """
        return (
            LweInstance("query", self.ring_degree, Q, ternary_sigma(), QUERY_SIGMA),
            LweInstance("hint", self.pad_width, Q, self.pad_sigma, self.hint_sigma, samples=self.ring_degree),
        )

    def security_bits(self) -> float:
        """Bits of the easier of the two problems, by core-SVP."""
        return min(estimate(instance).bits_core_svp for instance in self.instances())


DEFAULT = ParameterSet("lattice-2048-1024")
INSECURE_TEST = ParameterSet("insecure_64", ring_degree=64, pad_width=32)

_KNOWN = {parameters.name: parameters for parameters in (DEFAULT, INSECURE_TEST)}


def parameter_sets() -> tuple[ParameterSet, ...]:
    """All of them, those for tests included: for estimates, not for use."""
    return tuple(_KNOWN.values())


def parameter_set(name: str, *, allow_insecure: bool = False) -> ParameterSet:
    """The set of that name. Raises ``ParameterError`` if unknown, ``InsecureParametersError`` if for tests only."""
    known = _KNOWN.get(name)
    if known is None:
        raise ParameterError(f"unknown parameter set {name[:64]!r}; known: {DEFAULT.name}")
    if known.is_insecure and not allow_insecure:
        raise InsecureParametersError(f"parameter set {name!r} is for tests only and hides nothing")
    return known
