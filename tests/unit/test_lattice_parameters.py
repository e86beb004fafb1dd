"""Parameter sets: malformed ones cannot exist, weak ones only under a name that says so."""

from typing import Any

import pytest

from splitveil.errors import InsecureParametersError, ParameterError
from splitveil.lattice import parameters
from splitveil.lattice.parameters import DEFAULT, ParameterSet, parameter_set


def test_every_set_that_is_not_for_tests_has_128_bits_by_both_problems() -> None:
    for name, known in parameters._KNOWN.items():
        assert name == known.name
        if known.is_insecure:
            assert known.security_bits() < parameters.REQUIRED_BITS
            with pytest.raises(InsecureParametersError):
                parameter_set(name)
            assert parameter_set(name, allow_insecure=True) is known
        else:
            assert known.security_bits() >= 128
            assert parameter_set(name) is known
    query, hint = DEFAULT.instances()
    assert (query.dimension, query.secret_sigma, query.samples) == (2048, pytest.approx(0.8165, abs=1e-3), None)
    assert (hint.dimension, hint.error_sigma, hint.samples) == (1024, 256.0, 2048)


@pytest.mark.parametrize(
    "change",
    [{"ring_degree": 1024}, {"pad_width": 512}, {"pad_bound": 1, "hint_sigma": 2.0}],
    ids=str,
)
def test_a_weak_set_cannot_be_made_under_an_honest_name(change: dict[str, Any]) -> None:
    with pytest.raises(InsecureParametersError, match="named insecure_"):
        ParameterSet("fast", **change)
    assert ParameterSet("insecure_fast", **change).is_insecure


@pytest.mark.parametrize(
    "change",
    [
        {"ring_degree": 0},
        {"ring_degree": 2},
        {"ring_degree": 96},
        {"ring_degree": 4096},
        {"ring_degree": -64},
        {"ring_degree": 64.0},
        {"ring_degree": True},
        {"pad_width": 0},
        {"pad_width": 3},
        {"pad_width": 128},
        {"pad_width": -32},
        {"pad_width": 32.0},
        {"pad_bound": 0},
        {"pad_bound": 1 << 14},
        {"pad_bound": 128.5},
        {"hint_sigma": 0.5},
        {"hint_sigma": float("nan")},
        {"hint_sigma": 300.0},
        {"answer_sigma": 255.0},
        {"answer_sigma": float("inf")},
        {"answer_sigma": 2.0**20},
    ],
    ids=str,
)
def test_malformed_sets_cannot_exist(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        ParameterSet("insecure_x", **{"ring_degree": 64, "pad_width": 32, **change})


@pytest.mark.parametrize("name", ["", "unknown", "insecure_", "insecure_65", "x" * 10_000, "lattice-2048-1024\n"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ParameterError) as caught:
        parameter_set(name, allow_insecure=True)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200
