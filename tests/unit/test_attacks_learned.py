"""The attacks that look things up or learn: they recover what crosses, and only because of what crosses."""

import pytest
import torch
from attack_support import LONGER, SHORT, VOCABULARY, Target

from splitveil.attacks.attack import Effort, silent
from splitveil.attacks.catalogue import create
from splitveil.attacks.knowledge import Access
from splitveil.attacks.learning import CURVE, Curve, Point, learn
from splitveil.attacks.mlp import Mlp
from splitveil.attacks.networks import Block, Pasts
from splitveil.attacks.pooled import Decoder
from splitveil.attacks.revert import SAY, Inverter, Revert, reduced
from splitveil.attacks.samples import Samples, Scale
from splitveil.errors import NonFiniteError
from splitveil.split import Crossing

EFFORT = Effort(seconds=60, steps=20)
# What each recovers on the random model of these tests at least, well below what it does recover.
LEAST = {"lens": 0.8, "nearest": 0.9, "ridge": 0.9, "mlp": 0.4, "revert": 0.95}
CHANCE = 0.05


@pytest.fixture(scope="module")
def target() -> Target:
    return Target()


@pytest.fixture(scope="module")
def short() -> Target:
    return Target(**SHORT)


@pytest.fixture(scope="module")
def fitted(target: Target, short: Target) -> dict[str, object]:
    attacks = {}
    for name in (*LEAST, "floor", "floor:commonest", "pooled"):
        attack = attacks[name] = create(name)
        there, effort = (short, LONGER) if name == "pooled" else (target, EFFORT)
        attack.fit(there.knowledge().restricted(attack.needs), effort, silent)
    return attacks


@pytest.mark.parametrize("name", LEAST)
def test_tokens_are_recovered(target: Target, fitted: dict, name: str) -> None:
    score = target.accuracy(fitted[name].recover(target.crossing, silent).tokens)
    assert score > LEAST[name]


@pytest.mark.parametrize("name", [*LEAST, "floor", "floor:commonest"])
def test_noise_gives_chance(target: Target, fitted: dict, name: str) -> None:
    """What is recovered comes from the states, not from knowing the victims."""
    assert target.accuracy(fitted[name].recover(target.noise(), silent).tokens) < CHANCE


def test_pooled_reads_short_texts_and_of_noise_nothing(short: Target, fitted: dict) -> None:
    assert short.accuracy(fitted["pooled"].recover(short.crossing, silent).tokens) > 0.2
    assert short.accuracy(fitted["pooled"].recover(short.noise(), silent).tokens) < CHANCE


def test_the_floor_does_not_look(target: Target, fitted: dict) -> None:
    blind = Crossing(torch.zeros_like(target.crossing.hidden), target.crossing.mask)
    for name in ("floor", "floor:commonest"):
        first, second = (fitted[name].recover(c, silent).tokens for c in (target.crossing, blind))
        assert torch.equal(first, second)


def test_the_oracle_scores_one(target: Target) -> None:
    attack = create("oracle")
    attack.fit(target.knowledge().restricted(attack.needs), EFFORT, silent)
    assert target.accuracy(attack.recover(target.crossing, silent).tokens) == 1.0


@pytest.mark.parametrize("name", [*LEAST, "floor", "floor:commonest", "pooled"])
def test_what_was_learnt_survives_the_disk(target: Target, fitted: dict, name: str) -> None:
    again = create(name)
    state = {key: value.clone() for key, value in fitted[name].state().items()}
    again.restore(state, target.knowledge().restricted(again.needs))
    tokens = [attack.recover(target.crossing, silent).tokens for attack in (fitted[name], again)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["nearest", "ridge", "mlp", "revert", "pooled"])
def test_padding_on_the_left_is_no_obstacle(fitted: dict, name: str) -> None:
    """States at positions without text change nothing."""
    left = Target(padding="left")
    noisy = left.crossing.hidden.clone()
    noisy[~left.crossing.text] = 1e3
    for hidden in (left.crossing.hidden, noisy):
        found = fitted[name].recover(Crossing(hidden, left.crossing.mask), silent).tokens
        assert torch.equal(found >= 0, left.crossing.text)
        assert left.accuracy(found) > LEAST.get(name, -1)


def test_an_attacker_adapts_to_the_defence() -> None:
    """Trained under the same defence it succeeds where an attacker that does not know of it fails."""
    secret = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(7)))[0]
    defended = Target(protect=lambda crossing: crossing.with_hidden(crossing.hidden @ secret))
    adapted, unaware = create("ridge"), create("ridge")
    adapted.fit(defended.knowledge().restricted(adapted.needs), EFFORT, silent)
    unaware.fit(Target().knowledge().restricted(unaware.needs), EFFORT, silent)
    assert defended.accuracy(adapted.recover(defended.crossing, silent).tokens) > LEAST["ridge"]
    assert defended.accuracy(unaware.recover(defended.crossing, silent).tokens) < CHANCE


def test_stage_two_writes_what_it_would_write_with_the_text_in_hand(target: Target, fitted: dict) -> None:
    """Generation with a cache = the learning pass over the generated text."""
    net = fitted["revert"].net
    whole = Crossing(target.crossing.hidden, torch.ones_like(target.crossing.mask))
    written = net.generate(whole)
    with torch.no_grad():
        together = net.scores(net.write(whole.hidden, net.project(whole.hidden), written)).log_softmax(-1)
        alone = net.alone(whole.hidden).log_softmax(-1)
    assert torch.equal((together + SAY * alone).argmax(-1), written)


def test_stage_two_sees_earlier_tokens_only(target: Target, fitted: dict) -> None:
    net = fitted["revert"].net
    hidden = target.crossing.hidden[:2]
    tokens = target.victims[:2].clamp(min=0)
    other = tokens.clone()
    other[:, 9] = (other[:, 9] + 1) % VOCABULARY
    with torch.no_grad():
        a, b = (net.write(hidden, net.project(hidden), t) for t in (tokens, other))
    assert torch.equal(a[:, :10], b[:, :10])
    assert not torch.equal(a[:, 10:], b[:, 10:])


def test_pooled_sees_one_vector_only(target: Target) -> None:
    net = Decoder(target.crossing.width, reduced(target.knowledge().embeddings))
    order = [3, 1, 2, 0, *range(4, 16)]
    full = Crossing(target.crossing.hidden, torch.ones_like(target.crossing.mask))
    shuffled = Crossing(full.hidden[:, order], full.mask)
    assert torch.allclose(net.pool(full), net.pool(shuffled), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_with_a_cache_is_the_block(causal: bool) -> None:
    torch.manual_seed(0)
    block = Block(32, causal=causal).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        whole = block(x)
        if not causal:
            assert not torch.allclose(block(x[:, :4]), whole[:, :4], atol=1e-3)
            return
        pasts = Pasts.of(torch.nn.ModuleList([block]))
        steps = torch.cat([block(x[:, i : i + 1], None, pasts.blocks[0]) for i in range(7)], 1)
    assert torch.allclose(steps, whole, atol=1e-5)


def test_the_projector_begins_as_ridge_regression(target: Target) -> None:
    """Before any step, stage 1 reads what a linear map reads."""
    knowledge = target.knowledge()
    net = Inverter(knowledge.width, reduced(knowledge.embeddings))
    net.begin(Samples(knowledge, 0))
    with torch.no_grad():
        named = net.scores(net.project(target.crossing.hidden, target.crossing.text)[1]).argmax(-1)
    assert target.accuracy(named) > LEAST["ridge"]


def test_wide_embeddings_are_reduced_along_their_main_directions() -> None:
    draw = torch.Generator().manual_seed(8)
    wide = torch.randn(500, 40, generator=draw) @ torch.randn(40, 300, generator=draw)
    small = reduced(wide)
    assert small.shape == (500, 256)
    assert torch.allclose(small.norm(dim=1), torch.ones(500), atol=1e-4)
    assert torch.allclose(small @ small.T, reduced(wide @ torch.eye(300)[:, :300]) @ small.T, atol=1e-2)


def test_shadow_texts_are_partly_random(target: Target) -> None:
    tokens, crossing = Samples(target.knowledge(), 0).batch(200)
    outside = (tokens >= 80).float().mean(1)
    assert (outside == 0).float().mean() > 0.15
    assert 0.05 < outside.mean() < 0.25
    assert crossing.hidden.shape == (200, 16, 64)


def test_scaled_states_have_mean_zero_and_deviation_one() -> None:
    states = torch.randn(400, 6) * torch.tensor([1.0, 10, 100, 0.1, 5, 0.0]) + 3
    scale = Scale(6)
    scale.measure(states)
    out = scale(states)
    assert torch.allclose(out.mean(0), torch.zeros(6), atol=1e-3)
    assert torch.allclose(out.std(0)[:5], torch.ones(5), atol=1e-3)


# -- the loop that all learned attackers share ---


def nothing() -> tuple[torch.Tensor, Crossing]:
    return torch.zeros(1, 1), Crossing(torch.zeros(1, 1, 1), torch.ones(1, 1))


def test_learning_stops_when_the_score_is_flat() -> None:
    net = torch.nn.Linear(2, 1)
    curve = learn(
        net,
        nothing,
        lambda tokens, crossing: net(torch.ones(4, 2)).square().mean(),
        lambda: 0.5,
        Effort(60, steps=4000),
        silent,
    )
    assert curve.flat()
    assert curve.plateau
    assert not curve.rising
    assert curve.points[-1].step < 500


def test_learning_goes_on_where_it_may_not_stop() -> None:
    net = torch.nn.Linear(2, 1)
    loss = lambda tokens, crossing: net(torch.ones(4, 2)).square().mean()  # noqa: E731
    curve = learn(net, nothing, loss, lambda: 0.5, Effort(60, steps=800, plateau=False), silent)
    assert curve.points[-1].step >= 800
    assert not curve.plateau
    assert not curve.rising  # it had flattened all the same


def test_learning_keeps_the_best_weights() -> None:
    net = torch.nn.Linear(1, 1)
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.1, *[0.1] * 50])
    seen: list[tuple[float, float]] = []

    def validate() -> float:
        seen.append((next(scores), net.weight.item()))
        return seen[-1][0]

    loss = lambda tokens, crossing: (net(torch.ones(1, 1)) - 5).square().sum()  # noqa: E731
    learn(net, nothing, loss, validate, Effort(60, steps=400), silent)
    assert net.weight.item() == dict(seen)[0.9]


def test_learning_ends_with_its_steps_and_its_time() -> None:
    net = torch.nn.Linear(1, 1)
    scores = iter(i / 1e6 for i in range(1_000_000))
    loss = lambda tokens, crossing: net(torch.ones(1, 1)).square().sum()  # noqa: E731
    assert learn(net, nothing, loss, lambda: 0.5, Effort(60, steps=30), silent).points[-1].step <= 31
    curve = learn(net, nothing, loss, lambda: next(scores) * 1e5, Effort(seconds=0.5), silent)
    assert curve.points[-1].seconds < 5


def test_nan_is_an_error_not_a_low_score() -> None:
    net = torch.nn.Linear(1, 1)
    with pytest.raises(NonFiniteError, match="nan"):
        learn(
            net,
            nothing,
            lambda tokens, crossing: net(torch.full((1, 1), torch.nan)).sum(),
            lambda: 0.0,
            Effort(5, steps=3),
            silent,
        )


def test_the_same_seed_gives_the_same_attacker(target: Target) -> None:
    states = []
    for _ in range(2):
        attack = Mlp()
        attack.fit(target.knowledge().restricted(attack.needs), Effort(seconds=60, steps=5, seed=3), silent)
        states.append(attack.state())
        states[-1].pop(CURVE)  # it holds seconds
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_curve_is_kept_for_the_report() -> None:
    curve = Curve([Point(1.0, 25, 0.2), Point(2.0, 50, 0.6)])
    assert curve.best == 0.6
    assert curve.halfway == 0.2
    assert curve.rising
    assert Curve.of(curve.tensor()).points[1].step == 50
    assert Curve([Point(1.0, 25, 1.0)]).best == 1.0
    assert not Curve([Point(1.0, 25, 1.0)]).rising
    assert curve.tensor().tolist() == [[1.0, 25.0, pytest.approx(0.2)], [2.0, 50.0, pytest.approx(0.6)]]


def test_revert_needs_no_weights_but_the_public_embeddings() -> None:
    assert Access.WEIGHTS not in Revert.needs
    assert Access.EMBEDDINGS in Revert.needs
