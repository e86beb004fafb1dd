"""Defences: what they do to a crossing, and what the encrypted one leaves of it (nothing that these tests can see)."""

import math

import numpy as np
import pytest
import torch
from equivalence.support import random_model, tiny_llama
from scipy.stats import chisquare, gamma, kstest
from torch import Tensor

from splitveil.defences import catalogue
from splitveil.defences.defence import Defence
from splitveil.defences.encrypted import EncryptedQuery
from splitveil.errors import ConfigurationError, NonFiniteError
from splitveil.split import Crossing, cut
from splitveil.wire.tensors import pack

SPECS = ("none", "gaussian:0.1", "dchi:4", "int8", "int4", "bfloat16", "topk:0.25", "permutation", "encrypted")
FALSE_ALARM = 1e-9


def some(batch: int = 3, positions: int = 7, width: int = 32, seed: int = 0) -> Crossing:
    """Random states with positions of very different sizes, and padding on the left of all prompts but the first."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.rand(batch, positions, 1, generator=draw) * 10 + 0.1
    mask = torch.ones(batch, positions, dtype=torch.long)
    for row in range(batch):
        mask[row, :row] = 0
    return Crossing(torch.randn(batch, positions, width, generator=draw) * size, mask)


def test_the_catalogue_has_every_name_and_builds_it() -> None:
    assert set(catalogue.names()) == {spec.partition(":")[0] for spec in SPECS}
    for spec in SPECS:
        defence = catalogue.create(spec)
        assert defence.name == spec.partition(":")[0]
        assert defence.summary
    assert catalogue.create("gaussian:0.1").params == {"sigma": 0.1}
    assert catalogue.create("int4").params == {"bits": 4}
    assert catalogue.create("dchi:4").params == {"eta": 4.0}
    assert catalogue.create("topk:0.25").params == {"share": 0.25}


@pytest.mark.parametrize(
    "spec",
    [
        *("", "rot13", "gaussian", "gaussian:", "gaussian:much", "gaussian:-1", "gaussian:0", "gaussian:nan", "int8:3"),
        *("dchi", "dchi:0", "dchi:-1", "dchi:inf", "topk:0", "topk:1.5", "topk:nan", "permutation:2"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(spec: str) -> None:
    with pytest.raises(ConfigurationError, match=r"int8|positive|at most 1"):
        catalogue.create(spec)


@pytest.mark.parametrize("spec", SPECS)
def test_shapes_mask_and_input_are_kept(spec: str) -> None:
    crossing = some()
    before = crossing.hidden.clone()
    defence = catalogue.create(spec)
    after = defence.protect(crossing)
    assert torch.equal(crossing.hidden, before)
    assert after.hidden.shape == (3, 7, defence.width(32))  # type: ignore[attr-defined]
    assert torch.equal(after.mask, crossing.mask)
    assert bool(after.hidden.isfinite().all())


@pytest.mark.parametrize("spec", SPECS)
def test_one_position_after_a_cache_crosses_too(spec: str) -> None:
    step = Crossing(torch.randn(2, 1, 32), torch.ones(2, 9, dtype=torch.long))
    assert catalogue.create(spec).protect(step).hidden.shape[:2] == (2, 1)


@pytest.mark.parametrize("spec", [s for s in SPECS if s != "encrypted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_padding_stay(spec: str, dtype: torch.dtype) -> None:
    crossing = some()
    crossing = crossing.with_hidden(crossing.hidden.to(dtype))
    after = catalogue.create(spec).protect(crossing)
    assert after.hidden.dtype == dtype
    assert torch.equal(after.hidden[~after.text], crossing.hidden[~crossing.text])


@pytest.mark.parametrize("spec", [s for s in SPECS if s not in ("none", "permutation")])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_states_that_are_not_finite_are_refused_where_there_is_text_only(spec: str, bad: float) -> None:
    crossing = some()
    crossing.hidden[2, 0, 0] = bad  # padding: some models leave NaN there
    catalogue.create(spec).protect(crossing)
    crossing.hidden[2, 6, 0] = bad
    with pytest.raises(NonFiniteError):
        catalogue.create(spec).protect(crossing)


# What crosses, in bytes: stated by the defence, and what the wire makes of it.


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        *(("none", 400), ("gaussian:0.1", 400), ("dchi:4", 400), ("permutation", 400), ("bfloat16", 200)),
        *(("int8", 104), ("int4", 54), ("topk:0.25", 154), ("topk:0.01", 10), ("topk:0.9", 400)),
    ],
)
def test_bytes_of_a_position_are_those_of_the_wire(spec: str, expected: int) -> None:
    crossing = some(width=100)
    defence = catalogue.create(spec)
    assert defence.bytes_a_position(100) == expected
    rows = defence.protect(crossing).hidden[crossing.text]
    assert pack(rows.numpy()).size == expected * len(rows)


def test_an_odd_width_is_rounded_up_to_whole_bytes() -> None:
    crossing = some(width=33)
    rows = catalogue.create("int4").protect(crossing).hidden[crossing.text]
    assert pack(rows.numpy()).size == len(rows) * catalogue.create("int4").bytes_a_position(33) == len(rows) * 21


def test_an_encrypted_position_is_a_query_row() -> None:
    states = some().hidden[0]
    query, _ = EncryptedQuery()._layer(32).query(states.numpy())
    assert EncryptedQuery().bytes_a_position(32) == len(query) / len(states) > 4 * 1024


def noise_of(defence: Defence, crossing: Crossing) -> Tensor:
    """(rows, width): what was added to the text positions."""
    return (defence.protect(crossing).hidden - crossing.hidden)[crossing.text]


def test_gaussian_noise_has_the_size_that_was_asked_for_at_every_position() -> None:
    crossing = some(batch=2, positions=4, width=20_000)
    rms = crossing.hidden[crossing.text].square().mean(-1).sqrt()
    measured = noise_of(catalogue.create("gaussian:0.25"), crossing).std(-1) / rms
    # A standard deviation from n draws is within 1/√(2n) of the true one; six of these.
    assert bool(((measured / 0.25 - 1).abs() < 6 / math.sqrt(2 * 20_000)).all())


def test_gaussian_noise_of_a_position_does_not_depend_on_its_neighbours() -> None:
    crossing = some(batch=1, positions=4)
    loud = crossing.hidden.clone()
    loud[0, 0] *= 1e4  # an attention sink
    noise = noise_of(catalogue.create("gaussian:0.1", seed=5), crossing)
    beside = noise_of(catalogue.create("gaussian:0.1", seed=5), crossing.with_hidden(loud))
    assert torch.allclose(noise[1:], beside[1:])


def test_noise_repeats_under_a_seed_and_only_then() -> None:
    crossing = some()
    first, second = (catalogue.create("gaussian:0.1", seed=11) for _ in range(2))
    a, b = noise_of(first, crossing), noise_of(first, crossing)
    assert torch.equal(a, noise_of(second, crossing))
    assert torch.equal(b, noise_of(second, crossing))
    assert not torch.equal(a, b)
    assert not torch.equal(a, noise_of(catalogue.create("gaussian:0.1", seed=12), crossing))
    free = catalogue.create("gaussian:0.1")
    assert not torch.equal(noise_of(free, crossing), noise_of(free, crossing))


@pytest.mark.parametrize(("spec", "top"), [("int8", 127), ("int4", 7)])
def test_integers_are_within_half_a_step_and_reach_the_extremes(spec: str, top: int) -> None:
    crossing = some(width=256)
    plain, after = crossing.hidden[crossing.text], catalogue.create(spec).protect(crossing).hidden[crossing.text]
    step = plain.abs().amax(-1, keepdim=True) / top
    error = (after - plain).abs() / step
    assert float(error.max()) <= 0.5 + 1e-4
    assert float(error.max()) > 0.4  # it did round
    assert torch.allclose(after.abs().amax(-1), plain.abs().amax(-1))
    assert all(len(row.unique()) <= 2 * top + 1 for row in after)


def test_integers_leave_zeros_alone() -> None:
    zeros = Crossing(torch.zeros(1, 2, 8), torch.ones(1, 2, dtype=torch.long))
    assert torch.equal(catalogue.create("int4").protect(zeros).hidden, zeros.hidden)


def test_bfloat16_is_within_its_own_rounding() -> None:
    crossing = some()
    after = catalogue.create("bfloat16").protect(crossing)
    relative = ((after.hidden - crossing.hidden) / crossing.hidden).abs()[crossing.text]
    assert 2**-12 < float(relative.max()) <= 2**-8
    assert torch.equal(catalogue.create("bfloat16").protect(after).hidden, after.hidden)


def test_metric_noise_has_the_lengths_of_a_gamma_and_no_direction() -> None:
    eta, width, count = 2.0, 24, 40_000
    crossing = some(batch=1, positions=count, width=width)
    noise = noise_of(catalogue.create("dchi:2", seed=3), crossing).double()
    length = noise.norm(dim=-1)
    # ‖z‖ is Gamma(width, 1/η) where the density of z is proportional to exp(−η‖z‖).
    assert kstest(length.numpy(), gamma(width, scale=1 / eta).cdf).pvalue > FALSE_ALARM
    assert kstest(length.numpy(), gamma(width, scale=1.02 / eta).cdf).pvalue < FALSE_ALARM
    mean = (noise / length[:, None]).mean(0)
    assert float(mean.norm()) < 6 / math.sqrt(count)
    second = (noise / length[:, None]).T @ (noise / length[:, None]) / count
    assert float((second - torch.eye(width, dtype=torch.float64) / width).abs().max()) < 6 / width / math.sqrt(count)


def test_metric_noise_does_not_depend_on_the_state() -> None:
    crossing = some()
    other = crossing.with_hidden(crossing.hidden * 100)
    first, second = (noise_of(catalogue.create("dchi:2", seed=3), c) for c in (crossing, other))
    assert torch.allclose(first, second, atol=1e-3)
    assert float(first.norm()) > 1


@pytest.mark.parametrize(("share", "kept"), [(1.0, 32), (0.25, 8), (0.001, 1)])
def test_the_largest_entries_cross_and_nothing_else(share: float, kept: int) -> None:
    crossing = some()
    plain, after = crossing.hidden[crossing.text], catalogue.create(f"topk:{share}").protect(crossing).hidden
    after = after[crossing.text]
    crossed = after != 0
    assert bool((crossed.sum(-1) == kept).all())
    assert torch.equal(after[crossed], plain[crossed])
    smallest = plain.abs().masked_fill(~crossed, math.inf).amin(-1)
    largest_left = plain.abs().masked_fill(crossed, 0.0).amax(-1)
    assert bool((smallest >= largest_left).all())


def test_a_permutation_is_one_secret_order() -> None:
    crossing = some()
    defence = catalogue.create("permutation")
    plain, after = crossing.hidden[crossing.text], defence.protect(crossing).hidden[crossing.text]
    order = [int((plain[0] == value).nonzero()) for value in after[0]]
    assert sorted(order) == list(range(32))
    assert order != sorted(order)
    assert torch.equal(plain[:, order], after)
    assert torch.equal(defence.protect(crossing).hidden[crossing.text], after)
    assert not torch.equal(catalogue.create("permutation").protect(crossing).hidden[crossing.text], after)
    # An audit that is resumed meets the device that it began with.
    again = [catalogue.create("permutation", seed=4).protect(crossing).hidden for _ in range(2)]
    assert torch.equal(*again)


# What an eavesdropper can see in encrypted crossings: tests that must fire on plain ones, and not here.


def uniformity(rows: Tensor) -> float:
    """p-value of a chi-square: are the entries, brought to [0, 1], uniform over 256 bins?"""
    low, high = rows.min(), rows.max()
    bins = ((rows - low) / (high - low) * 256).long().clamp(0, 255).flatten()
    return float(chisquare(torch.bincount(bins, minlength=256).numpy()).pvalue)


def strongest_correlation(rows: Tensor, with_: Tensor) -> float:
    """The largest |correlation| of any column with any other, over what chance allows in that many tries (1 = all)."""

    def standard(columns: Tensor) -> Tensor:
        centred = columns.double() - columns.double().mean(0)
        return centred / centred.norm(dim=0).clamp_min(1e-12)

    found = float((standard(rows).T @ standard(with_)).abs().max())
    tries = rows.shape[1] * with_.shape[1]
    return found / math.sqrt(2 * math.log(2 * tries / FALSE_ALARM) / len(rows))


@pytest.fixture(scope="module")
def plain() -> Crossing:
    """What really crosses: 2,048 positions of a small random Llama, cut after its first block."""
    model = random_model(tiny_llama())
    tokens = torch.randint(2, model.config.vocab_size, (64, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return cut(model, 1).device(tokens)


@pytest.fixture(scope="module")
def encrypted() -> EncryptedQuery:
    return EncryptedQuery()


def test_encrypted_words_are_uniform_and_plain_states_are_not(plain: Crossing, encrypted: EncryptedQuery) -> None:
    rows = encrypted.protect(plain).hidden
    assert rows.dtype == torch.float32
    assert -0.5 <= float(rows.min()) < -0.499
    assert 0.499 < float(rows.max()) <= 0.5
    for part in (rows[..., : plain.width], rows[..., plain.width :]):  # the masked values, and the pad
        assert uniformity(part) > FALSE_ALARM
    assert uniformity(plain.hidden) < FALSE_ALARM


def test_encrypted_words_do_not_correlate_with_what_they_hide(plain: Crossing, encrypted: EncryptedQuery) -> None:
    states = plain.hidden[plain.text]
    assert strongest_correlation(encrypted.protect(plain).hidden[plain.text], states) < 1
    for weak in ("none", "int4", "gaussian:3"):
        assert strongest_correlation(catalogue.create(weak).protect(plain).hidden[plain.text], states) > 1


def test_the_same_states_twice_give_unrelated_words(plain: Crossing, encrypted: EncryptedQuery) -> None:
    first, second = (encrypted.protect(plain).hidden[plain.text] for _ in range(2))
    assert float((first == second).float().mean()) < 1e-4
    aligned = first.flatten().double() @ second.flatten().double() / (first.double().norm() * second.double().norm())
    assert abs(float(aligned)) < 6.5 / math.sqrt(first.numel())
    # Differences mod 1 of two uniform words are uniform; a mask used twice would leave them at zero.
    assert uniformity((first - second).remainder(1.0)) > FALSE_ALARM
    assert uniformity((first - first).remainder(1.0) + torch.tensor([0.0, 1.0]).repeat(len(first), 544)) < FALSE_ALARM


def test_encrypted_rows_are_the_queries_that_a_server_reads(encrypted: EncryptedQuery) -> None:
    """The words without their mask are the states: what crosses is the real thing, not noise of its own."""
    crossing = some(batch=1, positions=5)
    layer = encrypted._layer(32)
    site = layer.site
    masks = site.make_masks(5)
    peek = [mask._content[0][0].copy() for mask in masks]  # type: ignore[attr-defined]
    query, pending = site.query(crossing.hidden[0].numpy(), masks)
    words = np.frombuffer(query, dtype="<u4").reshape(5, encrypted.width(32))
    unmasked = (words - np.array(peek)).view(np.int32)[:, :32] / pending.factors[:, None]
    assert np.allclose(unmasked, crossing.hidden[0].numpy(), atol=1e-3)


def test_padding_of_an_encrypted_crossing_is_zero_and_text_is_not(encrypted: EncryptedQuery) -> None:
    crossing = some()
    after = encrypted.protect(crossing)
    assert not bool(after.hidden[~after.text].any())
    assert bool((after.hidden[after.text].norm(dim=-1) > 1).all())
    nobody = encrypted.protect(Crossing(torch.randn(1, 2, 32), torch.zeros(1, 2, dtype=torch.long)))
    assert not bool(nobody.hidden.any())
