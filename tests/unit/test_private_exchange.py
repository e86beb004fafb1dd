"""Publish, query, answer, recover with the real samplers, whose draws are recorded, against the reference."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import reference
from numpy.typing import NDArray

from splitveil.errors import NonFiniteError, ProtocolError
from splitveil.lattice import sampling
from splitveil.lattice.parameters import DEFAULT, INSECURE_TEST, ParameterSet
from splitveil.private.core import LayerSpec
from splitveil.private.engine import WRONG_LENGTH
from splitveil.private.lattice_public import LatticePublic
from splitveil.private.lattice_served import LatticeServed, publish
from splitveil.private.masks import OneTimeMask
from splitveil.private.published import Publication

F32 = NDArray[np.float32]

SETS = {
    "N = 64, t = 2": INSECURE_TEST,
    "N = 32, t = 1": ParameterSet("insecure_32", ring_degree=32, pad_width=32),
    "N = 16, t = 8": ParameterSet("insecure_16", ring_degree=16, pad_width=2),
    "N = 4, t = 4": ParameterSet("insecure_4", ring_degree=4, pad_width=1, pad_bound=3, hint_sigma=2.0),
}
WIDTHS = {"d < N": 3, "d = N": None, "d > N": 150, "N divides d": 128}


@dataclass
class Recorder:
    """What the samplers drew, in order."""

    drawn: dict[str, list[list[int]]] = field(default_factory=dict)

    def watch(self, patch: pytest.MonkeyPatch, name: str) -> None:
        real: Callable[..., Any] = getattr(sampling, name)

        def spy(*arguments: Any) -> Any:
            values = real(*arguments)
            self.drawn.setdefault(name, []).append(values.tolist())
            return values

        patch.setattr(sampling, name, spy)

    def rows(self, name: str, call: int, width: int) -> list[list[int]]:
        values = self.drawn[name][call]
        return [values[first : first + width] for first in range(0, len(values), width)]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    for name in ("ternary", "centred_binomial_2", "uniform", "discrete_gaussian"):
        made.watch(monkeypatch, name)
    return made


def specs(width: int, *ranks: int) -> list[LayerSpec]:
    """Layers with a low-rank map each, except the first, which is of full rank."""
    rng = np.random.default_rng(width)
    made = []
    for i, rank in enumerate(ranks):
        a = rng.standard_normal((rank, width)).astype(np.float32)
        b = None if i == 0 else rng.standard_normal((rank + 3, rank)).astype(np.float32)
        made.append(LayerSpec(a, b, 0.5, ((f"m{i}", rank if b is None else rank + 3),)))
    return made


def secrets(served: LatticeServed, layer: int, width: int) -> tuple[list[list[int]], list[list[int]]]:
    """(core, pad) of one layer."""
    matrix = served._secret[layer].matrix
    return matrix[:, :width].tolist(), matrix[:, width:].tolist()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("parameters", SETS.values(), ids=SETS)
def test_everything_equals_the_reference(recorder: Recorder, parameters: ParameterSet, width: int | None) -> None:
    degree, pad_width = parameters.ring_degree, parameters.pad_width
    width = width or degree
    layers, rows = [2, 0], 10  # two of three layers, in another order; one batch of eight rows and a part of another
    served, publication = publish(specs(width, 3, 2, 9), noise=0.0, parameters=parameters)
    a = reference.public_elements(publication.id, publication.seed, width, degree)
    hints: list[list[int]] = []
    errors: list[list[int]] = []
    cores: list[list[int]] = []
    pads: list[list[int]] = []
    for layer in layers:
        core, pad = secrets(served, layer, width)
        assert pad == recorder.rows("uniform", layer, pad_width)
        error = recorder.rows("discrete_gaussian", layer, degree)
        hint = publication.layers[layer].hint
        assert hint is not None
        assert hint.tolist() == [reference.hint(*row, a[:-1], a[-1]) for row in zip(core, pad, error, strict=True)]
        hints, errors, cores, pads = hints + hint.tolist(), errors + error, cores + core, pads + pad

    site = LatticePublic(publication).site(layers)
    contents = [mask.consume() for mask in site.make_masks(rows) if isinstance(mask, OneTimeMask)]
    secret = recorder.rows("ternary", 0, degree) + recorder.rows("ternary", 1, degree)
    noise = recorder.rows("centred_binomial_2", 0, width + pad_width)
    noise += recorder.rows("centred_binomial_2", 1, width + pad_width)
    for (mask, corrections), s, e in zip(contents, secret, noise, strict=True):
        data, pad_mask = reference.mask(a[:-1], a[-1], s, e[:width], e[width:])
        assert mask.tolist() == data + pad_mask
        assert corrections.tolist() == [reference.dot(hint, s) % reference.Q for hint in hints]

    x = np.random.default_rng(1).standard_normal((rows, width)).astype(np.float32)
    query, _ = site.query(x, [OneTimeMask(*content) for content in contents])
    sent = np.frombuffer(query, dtype="<u4").reshape(rows, width + pad_width)
    encoded = [
        [reference.centred(word) for word in reference.subtract(row.tolist(), content[0].tolist())][:width]
        for row, content in zip(sent, contents, strict=True)
    ]
    given = record_noise(served, layers)
    answered = answers(served.answer(layers, rows, query), rows, site.ranks)
    for i in range(rows):
        g = [value for layer in layers for value in given[layer][i]]
        for j in range(len(cores)):
            assert answered[i][j] == reference.answer(cores[j], pads[j], sent[i].tolist(), g[j])
            got = reference.recovered(answered[i][j], hints[j], secret[i])
            e, e_pad = noise[i][:width], noise[i][width:]
            assert got == reference.expected(cores[j], pads[j], errors[j], encoded[i], secret[i], e, e_pad, g[j])


def record_noise(served: LatticeServed, layers: list[int]) -> dict[int, list[list[int]]]:
    """Will hold the answer noise of each layer, as signed integers, once the next answer is made."""
    given: dict[int, list[list[int]]] = {}
    for layer in layers:
        source = served._secret[layer].noise
        real = source.take

        def spy(rows: int, width: int, layer: int = layer, real: Callable[..., Any] = real) -> Any:
            values = real(rows, width)
            given[layer] = values.view(np.int32).tolist()
            return values

        source.take = spy  # type: ignore[method-assign]
    return given


def answers(data: bytes, rows: int, ranks: tuple[int, ...]) -> list[list[int]]:
    """The bytes of an answer, which come layer by layer, as one list a row."""
    words = np.frombuffer(data, dtype="<u4")
    parts = np.split(words, np.cumsum([rows * rank for rank in ranks])[:-1])
    return list(np.hstack([part.reshape(rows, -1) for part in parts]).tolist())


def published(parameters: ParameterSet, *given: LayerSpec, noise: float = 0.0) -> tuple[LatticeServed, Publication]:
    """Both halves, the public one as a client gets it."""
    served, publication = publish(given, noise=noise, parameters=parameters)
    return served, Publication.from_bytes(publication.to_bytes(), allow_insecure=True)


@pytest.mark.parametrize("width", [192, 2048, 2049, 5000])
def test_the_default_set_is_exact_too(recorder: Recorder, width: int) -> None:
    served, publication = published(DEFAULT, *specs(width, 1, 2))
    site = LatticePublic(publication).site([1])
    (mask,) = site.make_masks(1)
    assert isinstance(mask, OneTimeMask)
    content, corrections = mask.consume()
    query, _ = site.query(specs(width, 1)[0].A, [OneTimeMask(content, corrections)])
    sent = np.frombuffer(query, dtype="<u4")
    encoded = [reference.centred(value) for value in (sent[:width] - content[:width]).tolist()]
    given = record_noise(served, [1])
    (row,) = answers(served.answer([1], 1, query), 1, site.ranks)
    (secret,), (noise,) = recorder.drawn["ternary"], recorder.drawn["centred_binomial_2"]
    core, pad = secrets(served, 1, width)
    for j, error in enumerate(recorder.rows("discrete_gaussian", 1, DEFAULT.ring_degree)):
        got = reference.centred(row[j] - int(corrections[j]))
        assert got == reference.expected(
            core[j], pad[j], error, encoded, secret, noise[:width], noise[width:], given[1][0][j]
        )


def test_the_pads_share_of_a_hint_is_plain_rlwe_of_degree_n_pad() -> None:
    """For every i < t, its coefficients at i, i + t, … are the product of those of ā_pad with P: all are covered."""
    for parameters in SETS.values():
        degree, stride = parameters.ring_degree, parameters.pad_stride
        a_pad = reference.reflect(reference.public_element(bytes(16), bytes(32), 9, 1, degree))
        pad = sampling.uniform(parameters.pad_width, parameters.pad_bound).tolist()
        whole = reference.multiply(a_pad, reference.spread(pad, degree))
        for i in range(stride):
            assert whole[i::stride] == reference.multiply(a_pad[i::stride], pad)


# What can go wrong at the front door.

SMALL = specs(30, 4, 2)


def test_rows_that_are_not_finite_are_sent_as_zero_and_raise_afterwards() -> None:
    served, publication = published(INSECURE_TEST, *SMALL)
    site = LatticePublic(publication).site([0, 1])
    x = np.ones((3, 30), dtype=np.float32)
    x[1, 7] = np.nan
    masks = [mask.consume() for mask in site.make_masks(3) if isinstance(mask, OneTimeMask)]
    query, pending = site.query(x, [OneTimeMask(*mask) for mask in masks])
    sent = np.frombuffer(query, dtype="<u4").reshape(3, -1)
    assert len(query) == 3 * site.query_size, "rows are never dropped"
    assert (sent[1] == masks[1][0]).all()
    assert (sent[0] != masks[0][0]).any()
    answer = served.answer([0, 1], 3, query)
    with pytest.raises(NonFiniteError, match="zero query"):
        site.recover(pending, answer)
    for wrong in (b"", answer[:-1], answer + b"x"):
        with pytest.raises(ProtocolError, match=f"^{WRONG_LENGTH}$"):
            site.recover(pending, wrong)


def test_zero_rows_give_exact_zeros() -> None:
    served, publication = published(INSECURE_TEST, *SMALL)
    site = LatticePublic(publication).site([0])
    x = np.zeros((2, 30), dtype=np.float32)
    x[1, 0] = 1
    query, pending = site.query(x, site.make_masks(2))
    (out,) = site.recover(pending, served.answer([0], 2, query))
    assert (out[0] == 0).all()
    assert (out[1] != 0).all()


def test_no_rows_are_a_query_that_the_server_refuses() -> None:
    served, publication = published(INSECURE_TEST, *SMALL)
    site = LatticePublic(publication).site([0])
    query, _ = site.query(np.zeros((0, 30), dtype=np.float32), [])
    assert query == b""
    with pytest.raises(ProtocolError):
        served.answer([0], 0, query)


@pytest.mark.parametrize(
    ("layers", "rows", "size"),
    [
        ([], 1, 4 * 62),
        ([0, 0], 1, 4 * 62),
        ([2], 1, 4 * 62),
        ([-1], 1, 4 * 62),
        ([0], 0, 0),
        ([0], -1, -4 * 62),
        ([0], 2, 4 * 62),
        ([0], 1, 4 * 62 - 1),
        ([0], 1, 4 * 62 + 4),
        ([0], 2**62, 4 * 62),
    ],
)
def test_queries_that_do_not_fit_are_refused_before_anything_is_computed(
    layers: list[int], rows: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, _ = published(INSECURE_TEST, *SMALL)
    monkeypatch.setattr(served._secret[0].noise, "take", None)
    with pytest.raises(ProtocolError):
        served.check(layers, rows, size)
    with pytest.raises(ProtocolError):
        served.answer(layers, rows, bytes(max(size, 0)))


def test_layers_of_two_widths_are_no_site() -> None:
    served, publication = published(
        INSECURE_TEST, specs(30, 2)[0], LayerSpec(specs(31, 2)[0].A, None, 1.0, (("n", 2),))
    )
    with pytest.raises(ValueError, match="one width"):
        LatticePublic(publication).site([0, 1])
    with pytest.raises(ProtocolError, match="different input widths"):
        served.answer([0, 1], 1, bytes(4 * 62))


def test_shapes_masks_and_layouts_of_the_input() -> None:
    _, publication = published(INSECURE_TEST, *SMALL)
    site = LatticePublic(publication).site([0])
    x = np.ones((2, 30), dtype=np.float32)
    for shape, masks in (((2, 29), 2), ((2, 31), 2), ((2, 30), 1), ((2, 30), 3), ((1, 2, 30), 1)):
        with pytest.raises(ValueError, match="masks, expected"):
            site.query(np.ones(shape, dtype=np.float32), site.make_masks(masks))
    with pytest.raises(TypeError, match="one-time mask"):
        site.query(x, [object(), object()])  # type: ignore[list-item]
    x.flags.writeable = False
    site.query(x, site.make_masks(2))


@pytest.mark.parametrize("other", [25, 35, 500])
def test_a_mask_of_another_site_is_refused(other: int) -> None:
    """A shorter one would leave features uncovered: the kernel does not check its indices."""
    _, publication = published(INSECURE_TEST, *SMALL)
    _, foreign = published(INSECURE_TEST, *specs(other, 4))
    site, foreign_site = LatticePublic(publication).site([0]), LatticePublic(foreign).site([0])
    with pytest.raises(ValueError, match="another site"):
        site.query(np.ones((1, 30), dtype=np.float32), foreign_site.make_masks(1))
    with pytest.raises(ValueError, match="another site"):
        site.query(np.ones((1, 30), dtype=np.float32), LatticePublic(publication).site([1]).make_masks(1))
