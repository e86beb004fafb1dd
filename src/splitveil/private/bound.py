"""The no-wrap bound: how large a query may be so that no answer exceeds the modulus (protocol design, section 3).

|⟨C_j, x̂⟩| ≤ ρ‖x̂‖₂, and the noises stay within 8 σ except with probability 2^-49 per answer coordinate, by the
    Gaussian tail (2^-45 by the sub-Gaussian bound, which is proven for a sum like this).
"""

import math
from dataclasses import dataclass

from splitveil.lattice.parameters import QUERY_SIGMA, ParameterSet, Q

HALF = Q // 2
SIGMAS = 8.0


@dataclass(frozen=True)
class Budget:
    """What one layer's queries may use of the modulus. Both sides derive it from published numbers alone."""

    theta: float
    """θ: the share of q/2 that the signal may fill."""
    answer_sigma: float
    """σ_g: standard deviation of the noise in each answer coordinate, in integer units."""
    limit_square: int
    """ρ²·Σx̂² may not exceed this; checked in exact integers for every row."""


def budget(parameters: ParameterSet, width: int, norm_bound: int, noise: float) -> Budget:
    """θ, σ_g and the limit for a layer of ``width`` inputs, ρ = ``norm_bound`` and noise δ (a fraction)."""
    spread = (
        (norm_bound * QUERY_SIGMA) ** 2
        + parameters.pad_width * (parameters.pad_sigma * QUERY_SIGMA) ** 2
        + 2 / 3 * parameters.ring_degree * parameters.hint_sigma**2
        + parameters.answer_sigma**2
    )
    rounding = norm_bound * math.sqrt(width) / 2
    lost = rounding + SIGMAS * math.sqrt(spread)
    theta = (1 - lost / HALF) / (1 + SIGMAS * noise / math.sqrt(width))
    typical = theta * HALF / math.sqrt(width)
    return Budget(theta, max(parameters.answer_sigma, noise * typical), math.ceil(theta * HALF + rounding) ** 2)
