"""Hardness of every parameter set, by problem, attack and cost model."""

from collections.abc import Iterable
from dataclasses import dataclass

from splitveil.lattice.hardness import LweInstance, dual, primal
from splitveil.lattice.parameters import DEFAULT, INSECURE_TEST, REQUIRED_BITS, ParameterSet, Q

SETS = (DEFAULT, INSECURE_TEST)
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
    instance: LweInstance
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


def lines(sets: Iterable[ParameterSet] = SETS) -> list[Line]:
    """Every set, problem and attack. Takes milliseconds."""
    return [
        Line(parameters.name, name, one, found.attack, found.block_size, found.bits_core_svp, found.bits_he_standard)
        for parameters in sets
        for name, one in problems(parameters)
        for found in (primal(one), dual(one))
    ]


def verdict(parameters: ParameterSet) -> str:
    """One sentence on a set."""
    bits = min(line.bits_core_svp for line in lines([parameters]))
    if parameters.is_insecure:
        return f"{parameters.name}: {bits:.0f} bits by core-SVP. For tests; it hides nothing."
    return f"{parameters.name}: {bits:.0f} bits by core-SVP at least, {REQUIRED_BITS:.0f} are required."
