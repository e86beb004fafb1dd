"""Attacks that must succeed on broken variants of the protocol, and must fail on the protocol.

An attack that only ever fails proves nothing: it may be a bad attack. So each one is shown to work first.
"""

from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import flint
import numpy as np
import pytest
import reference
from numpy.typing import NDArray
from scipy.stats import chisquare

from splitveil.errors import MaskReuseError
from splitveil.lattice import sampling
from splitveil.lattice.hardness import LweInstance, estimate
from splitveil.lattice.parameters import DEFAULT, INSECURE_TEST, Q
from splitveil.lattice.randomness import public_element
from splitveil.lattice.ring import FixedElement, multiply, reflect
from splitveil.private import lattice_served
from splitveil.private.core import LayerSpec, core_rms
from splitveil.private.lattice_public import LatticePublic
from splitveil.private.lattice_served import hints, publish
from splitveil.private.masks import OneTimeMask

U32 = NDArray[np.uint32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
FALSE_ALARM = 1e-9


def weights(rows: int, width: int) -> NDArray[np.float32]:
    return np.random.default_rng(width).standard_normal((rows, width)).astype(np.float32)


# 1. The hint of a narrow layer, and the pad that does not cover it.

WIDTH = 64
SAMPLES = 72
ID, SEED = bytes(16), bytes(32)


@dataclass(frozen=True)
class HintAttack:
    """Recovers a row C of a core from h = ā·C + f, by lattice reduction (Kannan's embedding, LLL).

    The first ``SAMPLES`` coefficients of h are LWE samples with C as the secret. In the lattice of all
    (w·(ā·c mod q), c) the vector nearest to (w·h, 0) differs from it by (w·f, −C), which is short: w = σ_C/σ_f makes
    both parts equally long. The basis depends on ā alone, so it is reduced once and for all.
    """

    a: I64  # the matrix of c ↦ ā·c, (N, WIDTH), mod q
    basis: flint.fmpz_mat
    weight: int
    error: float

    @classmethod
    def on(cls, element: U32, core_sigma: float, error_sigma: float) -> "HintAttack":
        """Against hints made with the public ``element``."""
        columns = np.eye(WIDTH, len(element), dtype=np.int32)
        a = multiply(FixedElement.of(reflect(element)), columns).astype(np.int64).T
        weight = round(core_sigma / error_sigma)
        modulus = np.hstack([Q * np.eye(SAMPLES, dtype=np.int64), np.zeros((SAMPLES, WIDTH), dtype=np.int64)])
        known = np.hstack([a[:SAMPLES].T, np.eye(WIDTH, dtype=np.int64)])
        basis = np.vstack([modulus, known])
        basis[:, :SAMPLES] *= weight
        return cls(a, flint.fmpz_mat(basis.tolist()).lll(), weight, error_sigma)

    def run(self, hint: U32) -> I64:
        """The best guess at the core's row."""
        mark = round(self.weight * self.error)
        rows = [[*map(int, row), 0] for row in self.basis.tolist()]
        rows.append([*(self.weight * hint[:SAMPLES].astype(np.int64)).tolist(), *[0] * WIDTH, mark])
        reduced = np.array([[int(v) for v in row] for row in flint.fmpz_mat(rows).lll().tolist()], dtype=object)
        marked = [row for row in reduced if abs(row[-1]) == mark]
        best = min(marked, key=lambda row: int((row**2).sum()))
        guess: I64 = (-np.sign(best[-1]) * best[SAMPLES:-1]).astype(np.int64)
        return guess

    def confirms(self, guess: I64, hint: U32) -> bool:
        """What an attacker can check without knowing C: all 2048 coefficients of h − ā·C are as small as f is."""
        left = (hint.astype(np.int64) - (self.a.astype(object) @ guess.astype(object)) % Q) % Q
        centred = np.where(left >= Q // 2, left - Q, left).astype(np.float64)
        return bool(np.sqrt((centred**2).mean()) < 2 * self.error)


@lru_cache(maxsize=1)
def narrow() -> SimpleNamespace:
    """A real publication of a narrow layer under the default parameters, what was secret in it, and the attack.

    Only the public id and seed are fixed, so that the attack's success does not depend on luck.
    """
    real = lattice_served.os
    lattice_served.os = SimpleNamespace(urandom=lambda size: {16: ID, 32: SEED}[size])  # type: ignore[attr-defined]
    try:
        served, publication = publish(
            [LayerSpec(weights(2, WIDTH), None, 1.0, (("m", 2),))], noise=0.0, parameters=DEFAULT
        )
    finally:
        lattice_served.os = real  # type: ignore[attr-defined]
    assert (publication.id, publication.seed) == (ID, SEED)
    matrix, hint = served._secret[0].matrix, publication.layers[0].hint
    elements = [public_element(ID, SEED, WIDTH, index, DEFAULT.ring_degree) for index in range(2)]
    attack = HintAttack.on(elements[0], core_rms(WIDTH), DEFAULT.hint_sigma)
    return SimpleNamespace(core=matrix[:, :WIDTH], pad=matrix[:, WIDTH:], hint=hint, elements=elements, attack=attack)


def fresh_error(rows: int) -> U32:
    values = sampling.discrete_gaussian(rows * DEFAULT.ring_degree, DEFAULT.hint_sigma)
    return (values & 0xFFFFFFFF).astype(np.uint32).reshape(rows, -1)


def make_hints(core: I32, pad: I32) -> U32:
    """The project's own hints, with a pad of the test's choice."""
    elements = [FixedElement.of(reflect(element)) for element in narrow().elements]
    return hints(core, pad, fresh_error(len(core)), elements, DEFAULT)


def test_a_pad_with_a_ring_and_secret_of_its_own_hides_nothing() -> None:
    """The broken pad. The attack succeeds.

    An earlier version of the protocol gave the pad a ring element a' and a client's secret s' of its own. The query was
    (x̂ + a·s + e ‖ a'·s' + e'), the answer ⟨C, ·⟩ + ⟨P, ·⟩ + g as now. It decrypts just as well: the client subtracts
    ⟨hint, s⟩ + ⟨hint', s'⟩. But for that it needs the two hints one by one,

        hint = ā·C + f    and    hint' = ā'·P + f',

    since it multiplies them with different secrets. So C is hidden by f alone: LWE whose secret is the row itself, of
    dimension d. For d = 64 it falls to LLL in seconds, whatever the ring degree, with f as wide as in the real
    protocol. In the real one the client's secret is shared, so one hint suffices, in which ā_pad·P covers every
    coefficient of ā·C + f, and what an attacker must solve has P's 1024 coordinates as well.
    """
    target = narrow()
    broken = make_hints(target.core, np.zeros((2, DEFAULT.pad_width), dtype=np.int32))
    for row, hint in zip(target.core, broken, strict=True):
        guess = target.attack.run(hint)
        assert guess.tolist() == row.tolist(), "the attack must work here, or its failure elsewhere says nothing"
        assert target.attack.confirms(guess, hint)


def test_the_estimator_knows_it() -> None:
    bare = LweInstance("a narrow hint without pad", WIDTH, Q, core_rms(WIDTH), DEFAULT.hint_sigma, DEFAULT.ring_degree)
    assert estimate(bare).bits_core_svp < 20
    assert estimate(DEFAULT.instances()[1]).bits_core_svp > 145


def test_the_real_hint_of_a_narrow_layer_withstands_the_same_attack() -> None:
    target = narrow()
    for row, hint in zip(target.core, target.hint, strict=True):
        guess = target.attack.run(hint)
        assert guess.tolist() != row.tolist()
        assert not target.attack.confirms(guess, hint)
        # Not even near: the guess has nothing to do with the row.
        assert abs(np.corrcoef(guess, row)[0, 1]) < 0.7


def test_it_is_the_pad_that_withstands() -> None:
    """The control: whoever knows the pad takes it off the very same hint, and the attack succeeds."""
    target = narrow()
    pad = np.zeros((2, DEFAULT.ring_degree), dtype=np.int32)
    pad[:, :: DEFAULT.pad_stride] = target.pad
    bare = target.hint - multiply(FixedElement.of(reflect(target.elements[1])), pad)
    assert target.attack.run(bare[1]).tolist() == target.core[1].tolist()


def test_a_pad_shared_by_two_rows_gives_their_difference_away() -> None:
    """Why every row has a pad of its own, and every publication new ones, even if f is fresh."""
    target = narrow()
    shared = make_hints(target.core, np.repeat(target.pad[:1], 2, axis=0))
    difference = shared[0] - shared[1]
    assert target.attack.run(difference).tolist() == (target.core[0] - target.core[1]).tolist()
    real = target.hint[0] - target.hint[1]
    guess = target.attack.run(real)
    assert guess.tolist() != (target.core[0] - target.core[1]).tolist()


# 2. New weights under old randomness.


def inverse(element: list[int]) -> list[int]:
    """1/element in Z_q[X]/(X^N + 1), for an element of odd coefficient sum: its order divides N·2^31."""
    power, out = element, [1] + [0] * (len(element) - 1)
    exponent = len(element) * 2**31 - 1
    while exponent:
        if exponent & 1:
            out = reference.multiply(out, power)
        power = reference.multiply(power, power)
        exponent >>= 1
    return out


def test_new_weights_under_an_old_seed_pad_and_error_publish_their_difference() -> None:
    parameters = INSECURE_TEST
    rng = np.random.default_rng(0)
    width, degree = 60, parameters.ring_degree
    seeds = (rng.bytes(32) for _ in range(100))
    element, seed = next(
        (element, seed) for seed in seeds if (element := public_element(ID, seed, width, 0, degree)).sum() % 2
    )
    elements = [FixedElement.of(reflect(e)) for e in (element, public_element(ID, seed, width, 1, degree))]
    old = rng.integers(-3000, 3000, (1, width)).astype(np.int32)
    new = old + rng.integers(-5, 6, (1, width)).astype(np.int32)
    pad = sampling.uniform(parameters.pad_width, parameters.pad_bound).astype(np.int32)[None]
    error = fresh_error(1)[:, :degree]
    first, second = (hints(core, pad, error, elements, parameters)[0] for core in (old, new))
    unit = inverse(reference.reflect(element.tolist()))

    def solve(difference: U32) -> list[int]:
        return [reference.centred(value) for value in reference.multiply(unit, difference.tolist())][:width]

    assert solve(second - first) == (new - old)[0].tolist()
    # A pad and an error of its own, and the difference says nothing.
    other_pad = sampling.uniform(parameters.pad_width, parameters.pad_bound).astype(np.int32)[None]
    third = hints(new, other_pad, fresh_error(1)[:, :degree], elements, parameters)[0]
    assert np.abs(solve(third - first)).max() > 2**20


def test_publishing_the_same_weights_again_shares_nothing() -> None:
    spec = LayerSpec(weights(2, 60), None, 1.0, (("m", 2),))
    (_, first), (_, second) = (publish([spec], noise=0.0, parameters=INSECURE_TEST) for _ in range(2))
    assert first.id != second.id
    assert first.seed != second.seed
    assert first.layers[0].norm_bound == second.layers[0].norm_bound, "it is the same core"
    assert not np.intersect1d(first.layers[0].hint, second.layers[0].hint).size  # type: ignore[arg-type]


# 3. Queries.


def site_of(width: int) -> LatticePublic:
    _, publication = publish([LayerSpec(weights(2, width), None, 1.0, (("m", 2),))], noise=0.0, parameters=DEFAULT)
    return LatticePublic(publication)


def looks_uniform(data: bytes) -> float:
    """The least p-value of chi-square tests: bytes in each of the four places of a word, and pairs of high nibbles."""
    table = np.frombuffer(data, dtype=np.uint8).reshape(-1, 4)
    counts = [np.bincount(table[:, place], minlength=256) for place in range(4)]
    high = table[: len(table) // 2 * 2, 3].reshape(-1, 2) >> 4
    counts.append(np.bincount(high[:, 0] * 16 + high[:, 1], minlength=256))
    return min(float(chisquare(count).pvalue) for count in counts)


INPUTS = {
    "normal": lambda n, d: np.random.default_rng(0).standard_normal((n, d)),
    "one and the same row": lambda n, d: np.tile(np.random.default_rng(0).standard_normal(d), (n, 1)),
    "constant": lambda n, d: np.ones((n, d)),
    "one hot": lambda n, d: np.tile(np.eye(1, d), (n, 1)),
    "zero": lambda n, d: np.zeros((n, d)),
    "not finite": lambda n, d: np.full((n, d), np.nan),
}


@pytest.mark.parametrize("name", INPUTS)
def test_queries_look_uniform_and_plain_activations_do_not(name: str) -> None:
    rows, width = 64, 896
    x = INPUTS[name](rows, width).astype(np.float32)
    site = site_of(width).site([0])
    query, _ = site.query(x, site.make_masks(rows))
    assert len(query) == rows * site.query_size
    assert looks_uniform(query) > FALSE_ALARM
    words = np.frombuffer(query, dtype="<u4").reshape(rows, -1)
    for part in (words[:, :width], words[:, width:], words[::2], words[:, ::2]):
        assert looks_uniform(part.tobytes()) > FALSE_ALARM
    # The control: what is hidden fails the same test, as floating-point numbers and as the integers that are masked.
    assert looks_uniform(x.tobytes()) < FALSE_ALARM
    nothing = np.zeros(site.query_size // 4, dtype=np.uint32), np.zeros(2, dtype=np.uint32)
    encoded, _ = site.query(x, [OneTimeMask(*nothing) for _ in range(rows)])
    assert looks_uniform(np.frombuffer(encoded, dtype="<u4").reshape(rows, -1)[:, :width].tobytes()) < FALSE_ALARM


def test_a_mask_used_twice_shows_the_difference_of_two_inputs() -> None:
    width = 896
    site = site_of(width).site([0])
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, width)).astype(np.float32)
    x[1] = x[0] + np.where(np.arange(width) == 17, 0.5, 0)  # two tokens that differ in one feature

    def difference(first: OneTimeMask, second: OneTimeMask) -> NDArray[np.int32]:
        sent = [site.query(row[None], [mask])[0] for row, mask in zip(x, (first, second), strict=True)]
        words = [np.frombuffer(data, dtype="<u4") for data in sent]
        return (words[1] - words[0]).view(np.int32)

    (drawn,) = site.make_masks(1)
    assert isinstance(drawn, OneTimeMask)
    content = drawn.consume()
    seen = np.abs(difference(OneTimeMask(*content), OneTimeMask(*content)))
    assert (seen[width:] == 0).all(), "equal masks are seen at once: the pad's part repeats"
    assert seen[:width].argmax() == 17
    assert np.delete(seen[:width], 17).max() < seen[17] / 20
    # The protocol: two masks, and the difference is uniform. The same mask twice is refused.
    fresh = difference(*site.make_masks(2))  # type: ignore[arg-type]
    assert looks_uniform(fresh.tobytes()) > FALSE_ALARM
    with pytest.raises(MaskReuseError):
        difference(drawn, drawn)


def test_masks_of_one_batch_are_unrelated() -> None:
    """Eight rows are made together; no two share a secret or an error."""
    site = site_of(192).site([0])
    contents = [mask.consume()[0] for mask in site.make_masks(16) if isinstance(mask, OneTimeMask)]
    assert len(contents) == 16
    for distance in (1, 8):
        pairs = [contents[i] - contents[i ^ distance] for i in range(16) if i < i ^ distance]
        assert looks_uniform(np.concatenate(pairs).tobytes()) > FALSE_ALARM
