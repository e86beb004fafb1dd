"""Hardness of every parameter set, by problem, attack and cost model."""

from collections.abc import Sequence
from dataclasses import dataclass

from splitveil.lattice.hardness import Hardness, LweInstance, estimate
from splitveil.lattice.parameters import INSECURE_PREFIX, REQUIRED_BITS, ParameterSet, Q, parameter_sets
from splitveil.private import ckks_parameters

METHODS = {
    "primal": "uSVP in Bai and Galbraith's embedding, 2016 estimate (ADPS16 §6.3, AGVW17)",
    "dual": "distinguishing with all short vectors of one sieve (ADPS16 §6.4)",
}
MODELS = {
    "core-SVP": "0.292·β (ADPS16 §6.1)",
    "HE standard": "0.292·β + 16.4 + log2(8·dim) (HES18)",
}


@dataclass(frozen=True)
class Line:
    """One problem of one set against one attack."""

    parameters: str
    problem: str
    attack: str
    block_size: int
    bits_core_svp: float
    bits_he_standard: float


def problems(parameters: ParameterSet) -> tuple[tuple[str, LweInstance], ...]:
    """The three things that hide something.

    (i) a client's query; (ii) a row of the published hint; (iii) answers to random queries, seen by an eavesdropper,
    who may have as many as there are: LWE samples ⟨P_j, a⟩ + g with the row's pad as secret. In (iii) the core's d
    coordinates are taken as known, which can only help the attacker.
    """
    query, hint = parameters.instances()
    answers = LweInstance("answers", parameters.pad_width, Q, parameters.pad_sigma, parameters.answer_sigma)
    return (("query", query), ("hint", hint), ("answers to random queries", answers))


def lines() -> list[Line]:
    """Every set of the lattice engine, then the sealed engine's, by problem and attack. Takes milliseconds."""
    found: list[tuple[str, str, Hardness]] = [
        (one.name, name, estimate(instance)) for one in parameter_sets() for name, instance in problems(one)
    ]
    found.append((ckks_parameters.NAME, "queries and keys (sealed engine)", ckks_parameters.hardness()))
    return [
        Line(name, problem, one.attack, one.block_size, one.bits_core_svp, one.bits_he_standard)
        for name, problem, hardness in found
        for one in (hardness.primal, hardness.dual)
    ]


def verdicts(found: Sequence[Line]) -> list[str]:
    """One sentence on each set: its easiest problem."""
    least: dict[str, float] = {}
    for line in found:
        least[line.parameters] = min(line.bits_core_svp, least.get(line.parameters, line.bits_core_svp))
    return [_verdict(name, bits) for name, bits in least.items()]


def _verdict(name: str, bits: float) -> str:
    text = f"{name}: {bits:.1f} bits by core-SVP"
    if bits >= REQUIRED_BITS:
        return f"{text} at least, {REQUIRED_BITS:.0f} are required."
    below = f"{text}, below {REQUIRED_BITS:.0f} by core-SVP."
    return f"{below} For tests; it hides nothing." if name.startswith(INSECURE_PREFIX) else below
