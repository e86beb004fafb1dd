"""Distance correlation as a penalty: by hand, at its two ends, its gradient, and what training with it does."""

import itertools
import math

import pytest
import torch
from equivalence.support import random_model, tiny_llama
from torch import Tensor

from splitveil.defences.regularise import (
    LEAST,
    DistanceCorrelation,
    create_regulariser,
    distance_correlation,
)
from splitveil.errors import ConfigurationError, NonFiniteError
from splitveil.split import cut


def drawn(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x: Tensor, y: Tensor) -> float:
    """The bias-corrected estimate as it is printed (Székely, Rizzo 2013), one entry at a time."""

    def centred(points: Tensor) -> list[list[float]]:
        n = len(points)
        d = [[math.dist(points[i].tolist(), points[j].tolist()) for j in range(n)] for i in range(n)]
        rows, everything = [sum(row) for row in d], sum(map(sum, d))
        return [
            [
                0.0 if i == j else d[i][j] - (rows[i] + rows[j]) / (n - 2) + everything / ((n - 1) * (n - 2))
                for j in range(n)
            ]
            for i in range(n)
        ]

    a, b = centred(x), centred(y)
    pairs = list(itertools.product(range(len(x)), repeat=2))

    def inner(p: list[list[float]], q: list[list[float]]) -> float:
        return sum(p[i][j] * q[i][j] for i, j in pairs)

    return inner(a, b) / math.sqrt(inner(a, a) * inner(b, b))


@pytest.mark.parametrize("rows", [LEAST, 5, 9])
def test_it_is_what_is_printed(rows: int) -> None:
    x, y = drawn(rows, 3, 1), drawn(rows, 5, 2)
    y[:, 0] += x[:, 0]
    assert float(distance_correlation(x, y)) == pytest.approx(by_hand(x, y), abs=1e-12)


def test_four_points_on_a_line_and_a_square() -> None:
    """Computed on paper: with x the corners of a square, U-centred sides are t, diagonals −2t (each row sums to 0).

    y takes the same value at the two ends of the first side, another at the others: distances 0, 0 on two sides and 1
    elsewhere, U-centred −2s on these sides and s elsewhere. R* = (−2s·t·2 + s·t·2 − 2t·s·2)/√(12t²·12s²)·(signs) = ½.
    """
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
    assert float(distance_correlation(x, y)) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("change", ["same", "scaled", "turned", "shifted"])
def test_a_scaled_rotation_of_the_input_has_one(change: str) -> None:
    x = drawn(40, 6, 3)
    turn = torch.linalg.qr(drawn(6, 6, 4)).Q
    y = {"same": x, "scaled": 1e4 * x, "turned": x @ turn, "shifted": x + 7}[change]
    assert float(distance_correlation(x, y)) == pytest.approx(1.0, abs=1e-9)
    assert float(distance_correlation(x.float(), y.float())) == pytest.approx(1.0, abs=1e-4)


def test_independent_variables_have_zero_even_in_many_dimensions() -> None:
    values = [float(distance_correlation(drawn(64, 256, 2 * i), drawn(64, 256, 2 * i + 1))) for i in range(40)]
    assert max(map(abs, values)) < 0.15
    assert abs(sum(values)) / len(values) < 0.02
    assert min(values) < 0 < max(values)  # unbiased: around zero, and not above it


def test_it_sees_what_a_linear_correlation_does_not() -> None:
    x = drawn(400, 1, 5)
    y = x.square()
    assert abs(float(torch.corrcoef(torch.cat([x, y], 1).T)[0, 1])) < 0.25
    assert float(distance_correlation(x, y)) > 0.15


def test_gradients_are_those_of_finite_differences_also_where_rows_are_equal() -> None:
    x, y = drawn(7, 3, 6), drawn(7, 4, 7)
    x[1] = x[0]
    assert torch.autograd.gradcheck(lambda v: distance_correlation(x, v), y.requires_grad_(True))
    same = y.detach().clone()
    same[3] = same[2]
    same.requires_grad_(True)
    (gradient,) = torch.autograd.grad(distance_correlation(x, same), same)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 1e-3


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_very_small_and_very_large_states_are_measured_alike(size: float) -> None:
    x, y = drawn(30, 8, 8), drawn(30, 8, 9) + drawn(30, 8, 8)
    expected = float(distance_correlation(x, y))
    scaled = (size * y).float().requires_grad_(True)
    found = distance_correlation(x.float(), scaled)
    assert float(found.detach()) == pytest.approx(expected, abs=1e-4)
    (gradient,) = torch.autograd.grad(found, scaled)
    assert bool(gradient.isfinite().all())


def test_states_that_are_all_equal_have_zero_and_a_zero_gradient() -> None:
    same = torch.ones(6, 4, requires_grad=True)
    found = distance_correlation(drawn(6, 3, 1).float(), same)
    (gradient,) = torch.autograd.grad(found, same)
    assert float(found.detach()) == 0.0
    assert not bool(gradient.any())


# The penalty: rows of text.


def test_padding_does_not_count_and_embeddings_get_no_gradient() -> None:
    embeddings, hidden = drawn(12, 3, 1).reshape(3, 4, 3), drawn(12, 5, 2).reshape(3, 4, 5)
    text = torch.ones(3, 4, dtype=torch.bool)
    text[0, :2] = False
    embeddings.requires_grad_(True)
    hidden.requires_grad_(True)
    found = create_regulariser("dcor:1").penalty(embeddings, hidden, text)
    assert float(found.detach()) == float(distance_correlation(embeddings[text], hidden[text]).detach())
    found.backward()
    assert embeddings.grad is None
    assert hidden.grad is not None
    assert not bool(hidden.grad[~text].any())
    assert bool((hidden.grad[text].norm(dim=-1) > 0).all())
    loud = torch.where(text[..., None], hidden.detach(), math.nan)
    assert float(create_regulariser("dcor:1").penalty(embeddings, loud, text)) == float(found.detach())


def test_no_more_rows_are_compared_than_allowed_and_the_draw_repeats() -> None:
    embeddings, hidden = drawn(300, 4, 1).reshape(3, 100, 4), drawn(300, 4, 2).reshape(3, 100, 4)
    text = torch.ones(3, 100, dtype=torch.bool)
    hidden.requires_grad_(True)
    few = DistanceCorrelation(1.0, rows=50)
    first = few.penalty(embeddings, hidden, text)
    (gradient,) = torch.autograd.grad(first, hidden)
    touched = gradient.norm(dim=-1) > 0
    assert int(touched.sum()) == 50
    assert float(few.penalty(embeddings, hidden, text).detach()) == float(first.detach())
    (other,) = torch.autograd.grad(few.penalty(embeddings + 1, hidden, text), hidden)
    assert not torch.equal(other.norm(dim=-1) > 0, touched)  # other texts, other rows
    places = touched.flatten().nonzero().flatten()
    assert len(set((places[1:] - places[:-1]).tolist())) > 2  # no fixed stride


@pytest.mark.parametrize("spec", ["", "dcor", "dcor:", "dcor:much", "dcor:0", "dcor:-1", "dcor:nan", "bottleneck:1"])
def test_what_cannot_be_built_is_refused(spec: str) -> None:
    with pytest.raises(ConfigurationError, match=r"dcor:WEIGHT|positive"):
        create_regulariser(spec)


def test_what_cannot_be_measured_is_refused() -> None:
    penalty = create_regulariser("dcor:0.5").penalty
    states, text = drawn(8, 3, 1).reshape(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ConfigurationError, match="needs 4 positions of text in a micro-batch, got 3"):
        penalty(states, states, text & (torch.arange(8).reshape(2, 4) < 3))
    with pytest.raises(ConfigurationError, match="same batch and positions"):
        penalty(states[:1], states, text)
    with pytest.raises(NonFiniteError):
        penalty(states, torch.where(states == states[0, 0, 0], math.inf, states), text)
    with pytest.raises(ConfigurationError, match="at least 4 rows"):
        DistanceCorrelation(1.0, rows=3)


def test_it_says_what_it_is() -> None:
    found = create_regulariser("dcor:0.5")
    assert (found.name, found.weight) == ("dcor", 0.5)
    assert "distance correlation" in found.summary


def trained(weight: float, steps: int = 25) -> tuple[float, float]:
    """(penalty on other texts, loss in the end) of a tiny model whose lower blocks learn with that weight."""
    model = random_model(tiny_llama()).train(False)
    with torch.no_grad():  # so that the states are close to the embeddings, as a trained model's lower ones are
        model.get_input_embeddings().weight.mul_(5)
    split = cut(model, 1)
    draw = torch.Generator().manual_seed(1)
    texts, others = (torch.randint(2, model.config.vocab_size, (8, 16), generator=draw) for _ in range(2))
    text = torch.ones(8, 16, dtype=torch.bool)
    embed = model.get_input_embeddings()
    parameters = [p for block in model.model.layers[:1] for p in block.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    measure = DistanceCorrelation(1.0).penalty
    for _ in range(steps):
        optimiser.zero_grad()
        crossing = split.device(texts)
        logits = split.cloud(crossing)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), texts[:, 1:].flatten())
        (loss + weight * measure(embed(texts), crossing.hidden, text)).backward()
        optimiser.step()
    with torch.no_grad():
        return float(measure(embed(others), split.device(others).hidden, text)), float(loss.detach())


def test_training_with_it_lowers_it_on_other_texts_too() -> None:
    without, plain_loss = trained(0.0)
    with_it, loss = trained(10.0)
    assert without > 0.15
    assert with_it < 0.6 * without
    assert plain_loss < loss < 2  # of 4.8 in the beginning: it has learnt, if less
