"""The sealed engine's one parameter set, its noise analysis and its flooding ratio (docs/design/sealed.md).

Sizes of phases and errors are in units of the largest value that an answer's slot can have, 1.0 being the bound that
no input can exceed. An error is a *component*: the real or the imaginary part of a slot.
"""

import math

from splitveil.lattice.hardness import Hardness, LweInstance, estimate, ternary_sigma

NAME = "ckks-8192-176"
DEGREE = 8192
SLOTS = DEGREE // 2
MODULI = (37, 35, 34, 34, 36)
"""Bits of the primes: what an answer arrives under; dropped after the noise is added; two dropped before; key
switching. As many small ones as that are slower than a few large ones, and keep the sum at what 128 bits allow."""
DATA_PRIMES = len(MODULI) - 1
DROPPED_BEFORE_NOISE = 2
INPUT_SCALE = 2.0**41
A_SCALE = 2.0**36
B_BITS = 61
FLOOD = 2.0**-21.5
"""Standard deviation of the noise in every component of every slot."""
MAX_RANK = 256
REQUIRED_FLOOD_BITS = 30.0
FEATURES = 2 * SLOTS
"""Inputs in one query ciphertext, outputs in one answer ciphertext: real parts first, then imaginary parts."""
MAX_ROWS = 16
"""Rows in one message, so that an answer is not minutes away."""

ERROR_SIGMA = math.sqrt(21 / 2)
"""SEAL's errors: a centred binomial of 21 pairs of coins."""
TAIL = 8.0
"""Standard deviations that count as the worst case: a Gaussian exceeds them with probability 2^-49."""


def ciphertexts(features: int) -> int:
    """How many ciphertexts hold so many inputs, or so many outputs."""
    return -(-features // FEATURES)


def padded_rank(rank: int) -> int:
    """k: the power of two that the layout works with."""
    return 1 << (rank - 1).bit_length()


def _rounding_sigma() -> float:
    """Standard deviation of a coefficient's error when a modulus is dropped: rounding of c0, and of c1 times s."""
    return math.sqrt((1 + 2 / 3 * DEGREE) / 12)


def _key_switch_sigma() -> float:
    """… of a rotation or conjugation: digits uniform below each prime times fresh errors, over the special prime."""
    *data, special = MODULI
    digits = sum(DEGREE * 4.0 ** (bits - special) / 12 * ERROR_SIGMA**2 for bits in data)
    return math.sqrt(digits + _rounding_sigma() ** 2)


def evaluation_error(rank: int) -> float:
    """What the decrypted sum may deviate from the product by, for any honest query: a bound at ``TAIL`` σ.

    Three parts (docs/design/sealed.md, section 3): key switching in A's product and the folds, which accumulates the
    same whatever the rank; the rounding of B's plaintexts, against the least favourable Ax; and the primes dropped
    before the noise is added, of which the last counts.
    """
    component = math.sqrt(DEGREE / 2)
    rotation = component * _key_switch_sigma()
    k = padded_rank(rank)
    folded = 2 * math.sqrt(SLOTS - 1 + 1 / 4 + k) * rotation / (INPUT_SCALE * A_SCALE)
    row = component / math.sqrt(12) * (math.sqrt(k) + TAIL) * 2.0**-B_BITS
    before = MODULI[DATA_PRIMES - DROPPED_BEFORE_NOISE : DATA_PRIMES]
    dropped = component * _rounding_sigma() / (INPUT_SCALE * A_SCALE * 2.0 ** (B_BITS - sum(before)))
    return TAIL * folded + row + TAIL * dropped


def flood_bits(rank: int) -> float:
    """log2 of the noise's standard deviation over the worst evaluation error."""
    return math.log2(FLOOD / evaluation_error(rank))


def hardness() -> Hardness:
    """The ring LWE problem that hides inputs and keys: uniform ternary secret, all primes in the modulus."""
    return estimate(LweInstance(NAME, DEGREE, 1 << sum(MODULI), ternary_sigma(), ERROR_SIGMA))
