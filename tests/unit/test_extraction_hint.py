"""Lattice reduction on the published half: it breaks what it should, and not the real thing."""

import math
import re
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from splitveil.cli import cli
from splitveil.errors import ConfigurationError
from splitveil.extraction import reductions
from splitveil.extraction.hardness import Line, lines, problems, verdicts
from splitveil.extraction.hint import Reduced, System, attack_layer, columns, system
from splitveil.lattice import sampling
from splitveil.lattice.hardness import LweInstance, estimate
from splitveil.lattice.parameters import DEFAULT, INSECURE_TEST, REQUIRED_BITS, Q, parameter_sets
from splitveil.lattice.randomness import public_element
from splitveil.lattice.ring import FixedElement, reflect
from splitveil.private import ckks_parameters
from splitveil.private.core import LayerSpec, core_rms
from splitveil.private.lattice_served import LatticeServed, hints, publish
from splitveil.private.published import Publication

NARROW, EQUATIONS = 64, 72


def published(width: int, insecure: bool) -> tuple[LatticeServed, Publication]:
    weights = np.random.default_rng(width).standard_normal((2, width)).astype(np.float32)
    parameters = INSECURE_TEST if insecure else DEFAULT
    return publish([LayerSpec(weights, None, 1.0, (("m", 2),))], noise=0.0, parameters=parameters)


def test_an_insecure_set_gives_its_core_away() -> None:
    width = 16
    served, publication = published(width, insecure=True)
    found = attack_layer(publication, 0)
    assert found is not None
    assert found.tolist() == served._secret[0].matrix[:, :width].tolist()


class Broken:
    """The broken pad: it has a ring element and a client's secret of its own, so C is hidden by f alone."""

    def __init__(self) -> None:
        served, publication = published(NARROW, insecure=False)
        self.core = served._secret[0].matrix[:, :NARROW]
        element = public_element(publication.id, publication.seed, NARROW, 0, DEFAULT.ring_degree)
        pads = public_element(publication.id, publication.seed, NARROW, 1, DEFAULT.ring_degree)
        error = sampling.discrete_gaussian(2 * DEFAULT.ring_degree, DEFAULT.hint_sigma).reshape(2, -1)
        elements = [FixedElement.of(reflect(one)) for one in (element, pads)]
        none = np.zeros((2, DEFAULT.pad_width), dtype=np.int32)
        self.hints = hints(self.core, none, (error & 0xFFFFFFFF).astype(np.uint32), elements, DEFAULT)
        self.real: NDArray[np.uint32] | None = publication.layers[0].hint
        matrix = columns(element, NARROW)
        self.equations = System(matrix, np.full(NARROW, core_rms(NARROW)), DEFAULT.hint_sigma)


def test_the_broken_pad_falls_and_the_real_one_does_not() -> None:
    broken = Broken()
    reduced = Reduced(broken.equations.taken(EQUATIONS))
    for row, hint in zip(broken.core, broken.hints, strict=True):
        found = reduced.solve(hint)
        assert found is not None, "the attack must work here, or its failure on the real pad says nothing"
        assert found.tolist() == row.tolist()
        assert broken.equations.fits(found, hint)
    assert broken.real is not None
    assert reduced.solve(broken.real[0]) is None
    for row, hint in zip(broken.core, broken.real, strict=True):
        # Whoever knew the row could not even tell: the pad covers every coefficient.
        assert not broken.equations.fits(row.astype(np.int64), hint)


def test_the_real_lattice_is_out_of_reach_and_the_estimate_says_how_far() -> None:
    _, publication = published(NARROW, insecure=False)
    with pytest.raises(ConfigurationError, match=r"dimension 3137.*149 bits"):
        attack_layer(publication, 0)
    with pytest.raises(ConfigurationError, match="out of reach"):
        Reduced(system(publication, 0))


def test_without_flint_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _, publication = published(16, insecure=True)
    monkeypatch.setitem(sys.modules, "flint", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'splitveil\[extract\]'"):
        attack_layer(publication, 0)


def test_a_system_holds_for_the_truth_and_for_nothing_near_it() -> None:
    width = 100  # two blocks, of which the second is not full
    served, publication = published(width, insecure=True)
    equations, hint = system(publication, 0), publication.layers[0].hint
    assert hint is not None
    secret = served._secret[0].matrix[0].astype(np.int64)
    assert equations.fits(secret, hint[0])
    secret[width - 1] += 1
    assert not equations.fits(secret, hint[0])


def test_every_set_that_is_not_insecure_has_128_bits_in_every_problem_and_both_models() -> None:
    found = lines()
    known = {one.name for one in parameter_sets()}
    assert {DEFAULT.name, INSECURE_TEST.name} <= known
    assert {line.parameters for line in found} == known | {ckks_parameters.NAME}
    for line in found:
        if not line.parameters.startswith("insecure_"):
            assert line.bits_core_svp >= REQUIRED_BITS
            assert line.bits_he_standard > line.bits_core_svp
        else:
            assert line.bits_core_svp < 40
    # Three problems, two attacks.
    assert len([line for line in found if line.parameters == DEFAULT.name]) == 6
    assert [name for name, _ in problems(DEFAULT)] == ["query", "hint", "answers to random queries"]


def test_asking_for_the_pad_costs_more_than_the_core_until_what_is_left_is_out_of_reach() -> None:
    """A client may ask for a row's pad; the hint is then LWE with the core as secret, whatever the answer noise."""
    pad_bits = DEFAULT.pad_width * math.log2(2 * DEFAULT.pad_bound + 1)

    def left(width: int) -> float:
        spread = core_rms(width)
        instance = LweInstance("hint", width, Q, spread, DEFAULT.hint_sigma, samples=DEFAULT.ring_degree)
        return estimate(instance).bits_core_svp

    worth = [d for d in range(64, 2049, 8) if d * math.log2(core_rms(d) * math.sqrt(2 * math.pi * math.e)) > pad_bits]
    assert 640 < worth[0] < 720
    assert min(left(d) for d in worth) > 90
    assert left(256) < 20, "it is the price of the pad that protects here, not the lattice"


def test_the_verdict_names_the_easiest_problem_and_what_is_below_128() -> None:
    found = {line.partition(":")[0]: line for line in verdicts(lines())}
    assert "148.9 bits" in found[DEFAULT.name]
    assert "below" not in found[DEFAULT.name]
    assert f"{ckks_parameters.hardness().bits_core_svp:.1f} bits" in found[ckks_parameters.NAME]
    assert "below 128 by core-SVP. For tests; it hides nothing." in found[INSECURE_TEST.name]
    (weak,) = verdicts([Line("of old", "query", "primal", 400, 127.99, 160.0), Line("of old", "a", "dual", 1, 200, 1)])
    assert weak == "of old: 128.0 bits by core-SVP, below 128 by core-SVP."


@pytest.fixture
def narrower(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same trials in a second or two."""
    monkeypatch.setattr(reductions, "WEAK_WIDTHS", (16,))
    monkeypatch.setattr(reductions, "BROKEN_WIDTH", 32)


@pytest.mark.usefixtures("narrower")
def test_trials_break_what_is_weak_and_nothing_that_is_served() -> None:
    broken, hints, real = (f"{DEFAULT.name}, {words}" for words in ("the pad broken", "the real hints", "the real pad"))
    found = {(trial.what, trial.width): trial for trial in reductions.trials(256)}
    assert {key for key, trial in found.items() if trial.found} == {("insecure_64", 16), (broken, 32)}
    assert {key for key, trial in found.items() if trial.found is False} == {(f"{hints} of the same layer", 32)}
    untried = {key: trial.dimension for key, trial in found.items() if trial.found is None}
    assert untried[real, 32] == 3105
    assert untried[f"{DEFAULT.name}, this adapter's narrowest", 256] == 3329
    assert "149 bits" in found[real, 32].effort
    assert "18 bits" in found[broken, 256].effort


@pytest.mark.usefixtures("narrower")
def test_the_command_line_shows_what_falls_without_an_adapter() -> None:
    result = CliRunner().invoke(cli, ["extract", "--attack", "published"], catch_exceptions=False)
    assert result.exit_code == 0
    outcomes = re.findall(r"\d +(broken|withstood|not attempted) ", result.output)
    assert outcomes == ["broken", "broken", "withstood", *["not attempted"] * 3]
