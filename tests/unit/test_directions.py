"""What directions are worth: the curve, the formula, the file, and the attack that the ledger's figure is of."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from extraction_support import small

from splitveil.errors import ConfigurationError, DataError
from splitveil.extraction.chosen import chosen
from splitveil.extraction.client import Client
from splitveil.extraction.directed import ask_along, initial_first, main_directions
from splitveil.extraction.honest import relative_error
from splitveil.lattice.parameters import DEFAULT
from splitveil.private.columns import Channel
from splitveil.private.core import LayerSpec, core_rms
from splitveil.private.directions import Directions, along
from splitveil.private.exposure import Facts, facts_of, leakage_of
from splitveil.private.lattice_served import publish
from splitveil.private.leakage import LEARNED, directed_error, leakage, rows_until, rows_until_along
from splitveil.serving.directions import FILE, read_directions_file, write_directions_file

RANK, WIDTH = 4, 128
F64 = np.ndarray


def basis(seed: int = 3) -> F64:
    """Directions at random, (d, d)."""
    found: F64 = np.linalg.qr(np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)))[0].T
    return found


def weights(decay: float, seed: int = 4) -> F64:
    """(rank, d): what it holds along ``basis`` falls to e^(-2·decay) from first to last."""
    along_them = np.random.default_rng(seed).standard_normal((RANK, WIDTH)) * np.exp(-decay * np.arange(WIDTH) / WIDTH)
    found: F64 = along_them @ basis()
    return found


def served(noise: float, decay: float) -> tuple[Client, F64, Directions, Facts]:
    """A client of such a layer, its integer core, and what its vendor knows of it."""
    spec = LayerSpec(weights(decay).astype(np.float32), None, 1.0, (("m", RANK),))
    half, publication = publish([spec], noise=noise, parameters=DEFAULT)
    core = half._secret[0].matrix[:, :WIDTH].astype(np.float64)
    found = along(core, basis())
    (facts,) = facts_of(half, publication, directions={"m": (found,)})
    assert facts is not None
    return Client(publication, half.answer), core, found, facts


def peak_of(core: F64) -> float:
    """Of this publication's gauge: the number that the attacker is taken to have guessed."""
    return float(np.abs(core @ basis().T).max()) / core_rms(WIDTH)


class Loud(Client):
    """Of a server whose answers are as wide as the modulus; none that can be started is."""

    def sigma(self, index: int) -> float:
        return 2.0**31 / 3


def channel(noise: float) -> Channel:
    return Channel.of(DEFAULT, WIDTH, RANK, round(1.2 * core_rms(WIDTH) * math.sqrt(WIDTH)), noise, 4.5)


# -- the curve ---------------------------------------------------------------------------------------------------------


def test_the_curve_says_what_the_core_holds_outside() -> None:
    core = weights(2.0) * core_rms(WIDTH)
    found = along(core, basis())
    assert found.counts[-1] == WIDTH
    assert found.outside[-1] == 0.0
    assert found.left(0) == 1.0
    for asked in (1, 5, 17, 64, 100, 127, WIDTH, 2 * WIDTH):
        inside = basis()[:asked]
        true = relative_error(core @ inside.T @ inside, core) ** 2
        assert found.left(asked) == pytest.approx(true, abs=0.02)
    assert found.peak == pytest.approx(np.abs(core @ basis().T).max() / core_rms(WIDTH), rel=0.25)


def test_between_its_points_the_curve_is_a_line_and_never_rises() -> None:
    found = Directions((2, 6), (0.5, 0.1), 1.0)
    assert [found.left(asked) for asked in (0, 1, 2, 3, 4, 6, 99)] == pytest.approx([1, 0.75, 0.5, 0.4, 0.3, 0.1, 0.1])
    assert all(a >= b for a, b in pairwise(along(weights(1.0), basis()).left(asked) for asked in range(WIDTH + 9)))


def test_of_a_core_of_zeros_no_direction_stands_out() -> None:
    found = along(np.zeros((2, 8)), np.eye(8))
    assert [found.left(asked) for asked in (0, 2, 8)] == [1.0, 0.75, 0.0]


@pytest.mark.parametrize(
    ("counts", "outside", "peak"),
    [
        ((), (), 1.0),
        ((0, 1), (1.0, 0.5), 1.0),
        ((2, 2), (0.5, 0.4), 1.0),
        ((1, 2), (0.4, 0.5), 1.0),
        ((1,), (-0.1,), 1.0),
        ((1,), (math.nan,), 1.0),
        ((1,), (0.5,), 0.0),
        ((1,), (0.5,), math.inf),
    ],
)
def test_what_is_no_curve_is_refused(counts: tuple[int, ...], outside: tuple[float, ...], peak: float) -> None:
    with pytest.raises(ValueError, match="curve"):
        Directions(counts, outside, peak)


def test_main_directions_are_orthonormal_and_ordered() -> None:
    rng = np.random.default_rng(0)
    inputs = (rng.standard_normal((400, WIDTH)) * np.r_[30, np.linspace(3, 0.1, WIDTH - 1)]) @ basis()
    found = main_directions(inputs.astype(np.float32))
    assert np.allclose(found @ found.T, np.eye(WIDTH), atol=1e-9)
    sizes = np.linalg.norm(inputs @ found.T, axis=0)
    assert all(a >= b - 1e-6 for a, b in pairwise(sizes))
    assert abs(found[0] @ basis()[0]) > 0.9


def test_the_initial_row_space_comes_first_and_the_main_directions_after_it() -> None:
    initial = np.linalg.qr(np.random.default_rng(8).standard_normal((WIDTH, 5)))[0].T
    found = initial_first(initial, basis())
    assert found.shape == (WIDTH, WIDTH)
    assert np.allclose(found @ found.T, np.eye(WIDTH), atol=1e-9)
    assert np.allclose(found[:5].T @ found[:5], initial.T @ initial)
    both = np.vstack([initial, basis()[:20]])
    assert np.allclose(both @ found[:25].T @ found[:25], both), "25 of them span A and the first 20"


# -- the ledger's figure, and the attack -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0])
def test_the_attack_reaches_the_ledgers_figure_and_no_less(noise: float) -> None:
    """Of the two attacks that ask for rows as they like, the better one: at every number of rows, for every noise."""
    for rows in (8, 32, 64, 96, 120, WIDTH, 160):
        client, core, _, facts = served(noise, decay=1.5)
        errors = {
            "directed": relative_error(ask_along(client, 0, rows, basis(), peak_of(core)), core),
            "chosen": relative_error(chosen(client, 0, rows, peak_ratio=facts.peak_ratio).values, core),
        }
        assert min(errors.values()) == pytest.approx(leakage_of(facts, WIDTH, noise, rows).error, rel=0.2, abs=6e-4), (
            rows,
            errors,
        )


def test_without_what_was_measured_the_ledgers_figure_is_too_large() -> None:
    """The attack that the curve is there for: it must beat the figure of an attacker without the base model."""
    client, core, _, facts = served(0.01, decay=1.5)
    error = relative_error(ask_along(client, 0, 64, basis(), peak_of(core)), core)
    blind = leakage_of(replace(facts, directions=()), WIDTH, 0.01, 64).error
    assert error < 0.75 * blind
    assert leakage_of(facts, WIDTH, 0.01, 64).error < 0.75 * blind


def test_where_no_direction_stands_out_nothing_is_gained() -> None:
    _, core, _, facts = served(0.1, decay=0.0)
    chance = along(core, np.eye(WIDTH))
    for rows in (16, 64, 112):
        blind = leakage_of(replace(facts, directions=()), WIDTH, 0.1, rows).error
        assert leakage_of(replace(facts, directions=(chance,)), WIDTH, 0.1, rows).error == pytest.approx(
            blind, rel=0.05
        )


def test_more_rows_never_leave_more_and_more_noise_never_less() -> None:
    found = along(weights(1.5) * core_rms(WIDTH), basis())
    for noise in (0.0, 0.1, 1.0, 3.0, 10.0):
        errors = [leakage(channel(noise), rows, (found,)).error for rows in range(0, 2 * WIDTH, 3)]
        assert all(after <= before + 1e-9 for before, after in pairwise(errors))
    for rows in (16, 64, WIDTH):
        by_noise = [leakage(channel(noise), rows, (found,)).error for noise in (0.0, 0.1, 0.3, 1.0)]
        assert by_noise == sorted(by_noise)


def test_rows_until_count_directions_too() -> None:
    found = along(weights(4.0) * core_rms(WIDTH), basis())
    one = channel(0.1)
    rows = rows_until(one, 0.3, (found,))
    assert rows == rows_until_along(one, found, 0.3) < rows_until(one, 0.3)
    assert directed_error(one, found, rows) <= 0.3 < directed_error(one, found, rows - 1)
    assert rows_until_along(channel(1.0), found, 1e-4) is None
    assert leakage(one, rows_until(one, LEARNED, (found,)), (found,)).learned


def test_noise_that_leaves_no_room_for_a_query() -> None:
    found = along(weights(1.0) * core_rms(WIDTH), basis())
    loud = Channel(WIDTH, RANK, core_rms(WIDTH), 4.5 * core_rms(WIDTH), 2.0**31 / 3)
    assert directed_error(loud, found, WIDTH) == 1.0
    quiet, _, _, _ = served(0.0, decay=1.0)
    client = Loud(quiet.publication, lambda *_: b"")
    with pytest.raises(ConfigurationError, match="tells nothing"):
        ask_along(client, 0, 4, basis()[:4], 4.0)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_facts_with_directions_are_read_as_written_and_those_without_as_before() -> None:
    plain = Facts(DEFAULT.name, RANK, 60_000, 4.2)
    assert "directions" not in str(plain)
    assert Facts.read(str(plain)) == plain
    full = replace(plain, directions=(along(weights(1.0), basis()), along(weights(1.0), np.eye(WIDTH))))
    assert Facts.read(str(full)) == full


@pytest.mark.parametrize(
    "broken",
    [
        "null",
        '["x"]',
        "[{}]",
        '[{"counts": [1], "outside": [0.5], "peak": 1.0, "more": 0}]',
        '[{"counts": [1, 2], "outside": [0.5], "peak": 1.0}]',
        '[{"counts": [1.5], "outside": [0.5], "peak": 1.0}]',
        '[{"counts": [true], "outside": [0.5], "peak": 1.0}]',
        '[{"counts": [1], "outside": ["a"], "peak": 1.0}]',
        '[{"counts": [1], "outside": [NaN], "peak": 1.0}]',
        '[{"counts": [2, 1], "outside": [0.5, 0.4], "peak": 1.0}]',
        '[{"counts": 1, "outside": [0.5], "peak": 1.0}]',
    ],
)
def test_directions_that_cannot_be_read(broken: str, tmp_path: Path) -> None:
    facts = str(Facts(DEFAULT.name, RANK, 60_000, 4.2))[:-1] + f', "directions": {broken}}}'
    with pytest.raises(DataError, match="facts of a layer"):
        Facts.read(facts)
    adapter = small(tmp_path).adapter
    head = f'"format": 1, "adapter": "{adapter.digest}"'
    (tmp_path / FILE).write_text(f'{{{head}, "layers": {{"m": {broken}}}}}')
    with pytest.raises(DataError, match="measure again"):
        read_directions_file(adapter)


def test_the_file_holds_what_was_measured_of_these_weights_and_no_others(tmp_path: Path) -> None:
    adapter = small(tmp_path).adapter
    assert read_directions_file(adapter) is None
    measured = {"m": (along(weights(1.0), basis()), along(weights(1.0), np.eye(WIDTH)))}
    assert write_directions_file(adapter, measured) == tmp_path / FILE
    assert read_directions_file(adapter) == measured
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".new"} == set()
    with pytest.raises(DataError, match="other weights"):
        read_directions_file(replace(adapter, digest="0" * 64))


@pytest.mark.parametrize("broken", ["", "{", "[]", "null", '{"format": 2, "adapter": "", "layers": {}}', "[" * 100_000])
def test_a_file_that_is_none_is_refused(broken: str, tmp_path: Path) -> None:
    adapter = small(tmp_path).adapter
    (tmp_path / FILE).write_text(broken)
    with pytest.raises(DataError, match="measure again"):
        read_directions_file(adapter)


def test_a_file_too_large_is_not_read_to_its_end(tmp_path: Path) -> None:
    adapter = small(tmp_path).adapter
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="enough for any adapter"):
        read_directions_file(adapter)


def test_the_curves_of_the_default_adapter_are_of_its_weights() -> None:
    from splitveil.adapters import load_adapter
    from splitveil.embedded import resolve

    adapter = load_adapter(resolve("embedded:clinic"))
    found = read_directions_file(adapter)
    assert found is not None
    assert found.keys() == {module.name for module in adapter.modules}
    assert all(len(own) == 2 for own in found.values()), "its seed can be guessed"
    assert json.loads((adapter.path / FILE).read_text())["adapter"] == adapter.digest
    assert np.mean([own[0].left(128) for own in found.values()]) < 0.4, "they hold more than columns do"
