"""The sealed engine computes B(Ax) like float64, wraps for no x, and errs within its analysis."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sealed_support import Ends, ends, polynomials, product, random_spec

from splitveil.errors import ConfigurationError, NonFiniteError, ParameterError, ProtocolError, PublicationError
from splitveil.private import ckks, ckks_library, ckks_parameters, ckks_served
from splitveil.private.ckks_layout import coefficients, columns, small_slots
from splitveil.private.ckks_library import forms, library
from splitveil.private.ckks_parameters import FLOOD, SLOTS, evaluation_error, flood_bits, hardness
from splitveil.private.core import LayerSpec
from splitveil.private.engine import WRONG_LENGTH
from splitveil.private.layer import public_half, publish
from splitveil.private.published import Publication

draw = np.random.default_rng(1)


def rows(count: int, width: int) -> np.ndarray:
    return draw.normal(size=(count, width)).astype(np.float32)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def allowed(spec: LayerSpec, x: np.ndarray) -> float:
    """The noise that is added, as a part of this answer: σ·size·‖x‖·√m ÷ ‖ΔWx‖, and a half more for chance."""
    expected = product(spec, x)
    size = 2 ** (1 / ckks.GRID) * np.linalg.norm(spec.scale * spec.B.astype(float) @ spec.A, axis=1).max()
    return 1.5 * FLOOD * size * np.linalg.norm(x) * math.sqrt(expected.shape[1]) / np.linalg.norm(expected) + 1e-6


# -- equal to float64 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "outputs", "rank"),
    [(4096, 4608, 8), (1, 1, 1), (5, 3, 9), (8193, 8193, 1), (4097, 4096, 3), (64, 64, 20)],
)
def test_equals_float64(width: int, outputs: int, rank: int) -> None:
    spec, x = random_spec(width, outputs, rank), rows(1, width)
    (got,) = ends([spec]).ask([0], x)
    assert got.shape == (1, outputs)
    assert got.dtype == np.float32
    assert relative(got, product(spec, x)) < allowed(spec, x)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 6), st.integers(1, 2))
def test_any_shape(width: int, outputs: int, rank: int, count: int) -> None:
    spec, x = random_spec(width, outputs, rank), rows(count, width)
    (got,) = ends([spec]).ask([0], x)
    for one, exact in zip(got, product(spec, x), strict=True):
        # Of one output little may be left by chance, so the bound is that of the largest possible one.
        size = (
            np.linalg.norm(spec.scale * spec.B.astype(float) @ spec.A, axis=1).max() * np.linalg.norm(x, axis=1).max()
        )
        assert np.abs(one - exact).max() < 2 ** (1 / ckks.GRID) * 6 * FLOOD * size + 1e-6 * np.abs(exact).max()


def test_the_shipped_setting_meets_its_promise() -> None:
    """Error 1e-4 of a typical answer, at 30 bits of flooding, at 4096 → 4608 and rank 8."""
    for seed in range(2):
        spec = random_spec(4096, 4608, 8, seed)
        x = np.random.default_rng(seed).normal(size=(3, 4096)).astype(np.float32)
        (got,) = ends([spec]).ask([0], x)
        assert relative(got, product(spec, x)) < 1e-4
    assert flood_bits(8) > 30.8


def test_several_layers_several_rows_and_a_full_matrix() -> None:
    a, b = random_spec(70, 40, 3, name="a"), random_spec(70, 90, 2, name="b")
    full = LayerSpec(a.A, None, 2.0, (("full", 3),))
    both, x = ends([a, b, full]), rows(3, 70)
    x[1] = 0
    for spec, got in zip((full, a, b), both.ask([2, 0, 1], x), strict=True):
        expected = product(spec, x)
        assert got.shape == expected.shape
        np.testing.assert_array_equal(got[1], 0)
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_a_fresh_adapter_whose_second_matrix_is_zero() -> None:
    spec = LayerSpec(rows(2, 30), np.zeros((50, 2), np.float32), 1.0, (("m", 50),))
    (got,) = ends([spec]).ask([0], rows(1, 30))
    assert np.abs(got).max() < 1e-3  # noise, and nothing else


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_no_x_wraps(size: float) -> None:
    """The worst case: x along A's direction, and all outputs at the bound in both halves."""
    direction = rows(1, 50)
    # 100·2^(−1e-6): just below a point of the grid to which sizes are rounded up.
    length = float(np.linalg.norm(direction.astype(float)))
    spec = LayerSpec(direction, np.full((8192, 1), 2.0**7 / length * (1 - 1e-6), np.float32), 1.0, (("m", 8192),))
    both = ends([spec])
    assert both.half.publication.layers[0].step == 2.0**7
    for sign in (1, -1):
        x = (sign * size * direction).astype(np.float32)
        (got,) = both.ask([0], x)
        np.testing.assert_allclose(got, product(spec, x), rtol=1e-5)


def test_rows_that_are_not_finite_are_sent_as_zeros_and_raise_afterwards() -> None:
    both, x = ends([random_spec(20, 20, 2)]), rows(2, 20)
    x[1, 3] = np.inf
    site = both.half.site([0])
    data, pending = site.query(x, site.make_masks(2))
    assert len(data) == 2 * site.query_size
    with pytest.raises(NonFiniteError):
        site.recover(pending, both.session.answer([0], 2, data))


# -- the noise analysis ------------------------------------------------------------------------------------------------


def measured_error(rank: int, seed: int) -> float:
    """The largest component of (decrypted bare sum − product of the same operands), before noise is added.

    The product is of what the query decrypts to and of A as its plaintexts decode; only B is taken as it was given.
    """
    sealing = library()
    spec = random_spec(4096, 4608, rank, seed)
    a, b, _ = ckks.factored(spec)
    layer = ckks._encoded(a, b)
    both = ends(ckks_served.SealedServed([layer]))
    x = rows(1, 4096)[0].astype(float)
    query = sealing.load("a query", "query", both.half.encrypt(x / np.linalg.norm(x) + 0j))
    decoded = sealing.encoder.decode_complex
    held = decoded(both.half._decryptor.decrypt(query))
    diagonals = np.array([decoded(row[0]) for row in layer.a])
    column = np.arange(SLOTS)
    folded = [2 * (diagonals[(column - j) % layer.rank, column] * held).sum().real for j in range(layer.rank)]
    tall = np.zeros((8192, layer.rank))
    tall[: len(b), :rank] = b
    exact = (tall[:SLOTS] + 1j * tall[SLOTS:]) @ np.array(folded)
    (total,) = both.session.evaluate(0, [query])
    error = decoded(both.half._decryptor.decrypt(total)) - exact
    return float(max(np.abs(error.real).max(), np.abs(error.imag).max()))


@pytest.mark.parametrize("rank", [1, 8])
def test_the_measured_error_is_within_the_analysis(rank: int) -> None:
    worst = max(measured_error(rank, seed) for seed in range(3))
    assert worst < evaluation_error(rank)
    assert worst > evaluation_error(rank) / 32, "the analysis is so generous that it says nothing"
    assert math.log2(FLOOD / worst) > 30


def test_every_rank_that_is_served_has_thirty_bits() -> None:
    assert min(flood_bits(rank) for rank in range(1, ckks_parameters.MAX_RANK + 1)) >= 30


def test_plaintexts_are_off_by_half_a_unit_in_every_coefficient() -> None:
    slots = draw.normal(size=SLOTS) * 0.2 + 0j
    exact = coefficients(slots, 61)
    assert np.abs(exact).max() < 2**61
    # What SEAL decodes from the plaintext is what the integers stand for: in double precision here.
    decoded = library().encoder.decode_complex(library().encode_exactly(slots, 61))
    assert np.abs(decoded - slots).max() < 2.0**-49
    # Halves of 31 bits are within reach of doubles, so the rest can be looked at closely.
    high = exact >> 31
    rest = slots - small_slots(high) / 2.0**30
    again = small_slots(exact - (high << 31)) / 2.0**61
    assert np.abs(rest - again).max() < 2.0**-50
    # At a scale where SEAL's own encoder is exact, both make the same plaintext.
    ours, theirs = library().encode_exactly(slots, 40), library().encode(slots, 2.0**40)
    assert ours.to_bytes() == theirs.to_bytes()


def test_the_noise_is_gaussian_in_every_component_and_fresh() -> None:
    """Protected minus bare, over all slots: used, unused, real and imaginary alike."""
    both = ends([random_spec(100, 100, 2)])
    bare = both.served.opened(both.keys, insecure_unprotected=True)
    site = both.half.site([0])
    data, _ = site.query(rows(1, 100), site.make_masks(1))
    reference = both.half.decrypt(bare.answer([0], 1, data))
    found = []
    for _ in range(2):
        difference = both.half.decrypt(both.session.answer([0], 1, data)) - reference
        found.append(np.concatenate([difference.real, difference.imag]) / FLOOD)
        for part in np.split(found[-1], 8):
            assert abs(part.std() - 1) < 0.12  # 1024 values: five standard deviations
            assert abs(part.mean()) < 0.16
        assert abs(found[-1].std() - 1) < 0.05  # rounding at the smallest modulus adds 2^-5
        assert abs((found[-1] ** 4).mean() / found[-1].var() ** 2 - 3) < 0.4
    assert abs(np.corrcoef(found)[0, 1]) < 0.06


def test_the_noise_fills_doubles_without_exceeding_them() -> None:
    units = FLOOD * library().noise_scale * math.sqrt(2 / ckks_parameters.DEGREE)
    assert 2.0**42 < units < 2.0**43.1
    assert 8.6 * units < 2.0**53.2


def test_answers_to_equal_queries_have_unrelated_and_uniform_second_polynomials() -> None:
    both = ends([random_spec(10, 10, 1)])
    site = both.half.site([0])
    data, _ = site.query(rows(1, 10), site.make_masks(1))
    prime = library().primes[0]
    one, other = (polynomials(both.session.answer([0], 1, data), 1)[1, 0] / prime for _ in range(2))
    for values in (one, other, (one - other) % 1.0):
        counts = np.histogram(values, 16, (0, 1))[0]
        chi = ((counts - 512) ** 2 / 512).sum()
        assert chi < 60, chi  # 15 degrees of freedom


def test_hardness() -> None:
    """Not below what the lattice engine's sets must have."""
    assert hardness().bits_core_svp >= 128
    assert hardness().bits_he_standard >= 160


# -- what is published, and what is refused ----------------------------------------------------------------------------


def test_a_publication_has_names_shapes_and_one_rounded_size_a_layer() -> None:
    spec = random_spec(30, 20, 2, name="model.q")
    _, publication = publish([spec], engine="sealed")
    data = publication.to_bytes()
    assert len(data) < 700
    read = Publication.from_bytes(data)
    assert read == publication
    (layer,) = read.layers
    assert (layer.width, layer.rank, layer.norm_bound, layer.Q, layer.hint) == (30, 20, 1, None, None)
    assert (math.log2(layer.step) * ckks.GRID) % 1 == 0
    longest = np.linalg.norm(spec.scale * spec.B.astype(float) @ spec.A, axis=1).max()
    assert longest <= layer.step <= longest * 2 ** (1 / ckks.GRID) * (1 + 1e-6)
    assert read.parameters_name == ckks_parameters.NAME


def test_publications_of_other_parameters_or_with_a_basis_are_refused() -> None:
    _, publication = publish([random_spec(30, 20, 2)], engine="sealed")
    data = publication.to_bytes()
    with pytest.raises(ParameterError, match=ckks_parameters.NAME):
        Publication.from_bytes(data.replace(b"ckks-8192-176", b"ckks-8192-111"))
    (layer,) = publication.layers
    object.__setattr__(layer, "Q", np.zeros((20, 20), np.float32))
    with pytest.raises(PublicationError, match="has a Q"):
        Publication.from_bytes(publication.to_bytes())


def test_what_the_layout_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="ranks up to 256"):
        publish([random_spec(300, 300, 257)], engine="sealed")
    with pytest.raises(ConfigurationError, match="must be 0"):
        publish([random_spec(3, 3, 1)], engine="sealed", noise=0.1)
    bad = random_spec(3, 3, 1)
    bad.A[0, 0] = np.nan
    with pytest.raises(NonFiniteError):
        publish([bad], engine="sealed")


def test_without_seal_the_error_has_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    _, publication = publish([random_spec(3, 3, 1)], engine="sealed")
    monkeypatch.setitem(sys.modules, "seal", None)
    library.cache_clear()
    try:
        for attempt in (lambda: publish([random_spec(3, 3, 1)], engine="sealed"), lambda: public_half(publication)):
            with pytest.raises(ConfigurationError, match=r"pip install 'splitveil\[sealed\]'"):
                attempt()
    finally:
        monkeypatch.undo()
        library.cache_clear()
        forms.cache_clear()


def test_without_extended_precision_the_server_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Double:
        nmant = 52

    monkeypatch.setattr(np, "finfo", lambda kind: Double)
    with pytest.raises(ConfigurationError, match="long double"):
        publish([random_spec(3, 3, 1)], engine="sealed")


# -- what the other side sends -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Ends:
    return ends([random_spec(12, 9, 1), random_spec(13, 9, 1, name="other")])


def test_queries_that_do_not_fit(small: Ends) -> None:
    site = small.half.site([0])
    data, _ = site.query(rows(1, 12), site.make_masks(1))
    for layers, count, sent in (
        ([], 1, data),
        ([2], 1, data),
        ([-1], 1, data),
        ([0, 0], 1, data),
        ([0, 1], 1, data),
        ([0], 0, b""),
        ([0], 2, data),
        ([0], 1, data[:-1]),
    ):
        with pytest.raises(ProtocolError):
            small.session.answer(layers, count, sent)
    with pytest.raises(ProtocolError, match="keys"):
        small.served.answer([0], 1, data)


def test_every_byte_outside_polynomials_must_be_as_expected(small: Ends) -> None:
    """Compressed, seeded, of other parameters or sizes: nothing of that kind gets as far as SEAL."""
    site = small.half.site([0])
    data, pending = site.query(rows(1, 12), site.make_masks(1))
    answer = small.session.answer([0], 1, data)
    for at in range(113):
        with pytest.raises(ProtocolError, match="form"):
            small.session.answer([0], 1, flipped(data, at))
        with pytest.raises(ProtocolError, match="form"):
            site.recover(pending, flipped(answer, at))
    with pytest.raises(ProtocolError, match=f"^{WRONG_LENGTH}$"):
        site.recover(pending, answer[:-1])
    public = forms()["public key"].size
    # The public key's header; the table's header, parameters and length; its first row, which is empty; the second
    # row's length; the header of the first ciphertext there, and the header of the second.
    second = public + 72 + forms()["public key"].size
    table = [public + at for at in (0, 5, 20, 50, 57, 66, 72, 77, 72 + 112)]
    for at in (5, 112, *table, second, second + 5, second + 112):
        with pytest.raises(ProtocolError, match="form"):
            small.served.opened(flipped(small.keys, at))
    for wrong in (b"", small.keys[:-1], small.keys + b"\0"):
        with pytest.raises(ProtocolError, match="bytes"):
            small.served.opened(wrong)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def test_coefficients_beyond_their_prime_and_unencrypted_queries(small: Ends) -> None:
    size = forms()["query"].size
    site = small.half.site([0])
    data, pending = site.query(rows(1, 12), site.make_masks(1))
    answer = small.session.answer([0], 1, data)
    for broken in (data[:113] + b"\xff" * (size - 113), data[: size // 2] + b"\xff" * 8 + data[size // 2 + 8 :]):
        with pytest.raises(ProtocolError, match="below its prime"):
            small.session.answer([0], 1, broken)
    with pytest.raises(ProtocolError, match="below its prime"):
        site.recover(pending, answer[:-8] + b"\xff" * 8)
    with pytest.raises(ProtocolError, match="not encrypted"):
        small.session.answer([0], 1, data[:113] + bytes(size - 113))


def test_halves_with_secrets_are_not_pickled_and_show_nothing(small: Ends) -> None:
    import pickle

    for held in (small.half, small.served, small.session):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(held)
        assert len(repr(held)) < 40


def test_columns_is_the_layout_that_evaluation_expects() -> None:
    matrix = np.arange(12.0).reshape(2, 6)
    np.testing.assert_array_equal(columns(matrix, 1), [6, 1, 8, 3, 10, 5])
    assert ckks_library.STEPS[-1] * 2 == SLOTS
