"""The noise dial: how much answer noise the adapter's gain bears, and how few rows of protection that buys."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from splitveil.adapters import Adapter
from splitveil.errors import ConfigurationError
from splitveil.extraction.guessed import SEEDS, Guesses
from splitveil.extraction.measure import Judge, worth_of_directions
from splitveil.extraction.target import Target, publish_target
from splitveil.extraction.through import served
from splitveil.extraction.worth import Perplexity, Text, perplexity, share_lost
from splitveil.private.columns import Channel, peak_ratio
from splitveil.private.directions import ByLayer
from splitveil.private.leakage import rows_until, rows_until_along
from splitveil.private.published import MAX_NOISE

GRID = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
_STEPS = 4  # bisections, each halving the proposal's uncertainty on a logarithmic scale
_FARTHER = 3.0  # factor by which the grid is prolonged where its loudest noise is still within the fraction


@dataclass(frozen=True)
class Dial:
    """One setting of the noise, measured through the protocol, and what the best known attack needs under it."""

    noise: float
    perplexity: Perplexity
    lost: float
    """Share of the adapter's gain in perplexity that the noise costs."""
    low: float
    high: float
    """Its interval of 95 %, over windows of the text, each with and without the noise."""
    rows: tuple[int | None, int | None, int | None]
    """Rows after which the best known attack is expected within 10 %, within 1 %, and exact, at the layer learned
    first; None where that is beyond what is searched."""

    def shown(self, place: int) -> str:
        """One of ``rows`` in words."""
        rows = self.rows[place]
        return "an unknown number" if rows is None else f"{rows:,}"


@dataclass(frozen=True)
class Calibration:
    """What was measured, and the proposal."""

    base: Perplexity
    dials: tuple[Dial, ...]
    """By noise."""
    fraction: float
    proposal: Dial
    """The largest noise found that costs at most ``fraction`` of the gain, as does every smaller noise measured."""

    @property
    def beyond(self) -> Dial | None:
        """The next louder noise measured, which costs more than ``fraction``; None if the proposal is the loudest."""
        return next((one for one in self.dials if one.noise > self.proposal.noise), None)

    def sentence(self) -> str:
        """The proposal, and in the same breath how little it buys."""
        found, quiet, beyond = self.proposal, self.dials[0], self.beyond
        more = (
            "it is the loudest that can be set"
            if beyond is None
            else f"the next louder noise measured, {beyond.noise:.3g}, costs {100 * beyond.lost:.1f} %"
        )
        return (
            f"Proposed: --noise {found.noise:.3g}. It costs {100 * found.lost:.1f} % of the adapter's gain "
            f"({100 * found.low:.1f} – {100 * found.high:.1f} % over windows of text; allowed: "
            f"{100 * self.fraction:.3g} %); {more}. It buys little: the best known attack needs {found.shown(0)} rows "
            f"for an error of 10 %, {found.shown(1)} for 1 % and {found.shown(2)} for the exact weights, where without "
            f"noise it needs {quiet.shown(0)}, {quiet.shown(1)} and {quiet.shown(2)}. A row is a token of one client."
        )


def calibrate(
    model: Any,
    adapter: Adapter,
    text: Text,
    *,
    fraction: float = 0.05,
    grid: Sequence[float] = GRID,
    initial: str = SEEDS,
    watch: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Perplexity of held-out ``text`` by noise, and the largest noise within ``fraction`` of the adapter's gain.

    ``grid`` is where to begin, 0 always among it: it is prolonged and refined around the proposal. ``initial`` is where
    the best known attacker looks for A as it was before training (``guessed.Guesses``).

    Raises ``ConfigurationError`` where the adapter does not gain anything on this text: then no noise has a price.
    """
    if not 0 < fraction < 1:
        raise ConfigurationError(f"the fraction of the gain that noise may cost is between 0 and 1, got {fraction}")
    base = perplexity(model, text)

    def measure(noise: float) -> tuple[Target, Perplexity]:
        watch(f"noise {noise:.3g}")
        target = publish_target(adapter, noise)
        with served(model, target):
            return target, perplexity(model, text)

    quiet, best = measure(0.0)
    if not base.value > best.value:
        raise ConfigurationError(
            f"the adapter gains nothing on this text (perplexity {base.value:.2f} without it, {best.value:.2f} with "
            "it); give text of the kind that it was trained for"
        )

    def dial(noise: float, target: Target, found: Perplexity) -> Dial:
        return Dial(noise, found, *share_lost(base, best, found), rows_needed(target, directions))

    watch("directions")
    directions = directions_if_known(model, quiet, text, Guesses(model, adapter.path, initial))
    dials = [dial(0.0, quiet, best)]
    dials += [dial(noise, *measure(noise)) for noise in sorted(set(grid) - {0.0})]
    while all(one.lost <= fraction for one in dials) and dials[-1].noise < MAX_NOISE:
        louder = min(MAX_NOISE, max(dials[-1].noise * _FARTHER, GRID[1]))
        dials.append(dial(louder, *measure(louder)))
    for _ in range(_STEPS):
        dials.sort(key=lambda one: one.noise)
        last = max(i for i, one in enumerate(dials) if all(d.lost <= fraction for d in dials[: i + 1]))
        if last + 1 == len(dials):
            break
        low, high = dials[last].noise, dials[last + 1].noise
        between = math.sqrt(low * high) if low else high / 4
        dials.append(dial(between, *measure(between)))
    dials.sort(key=lambda one: one.noise)
    within = [one for i, one in enumerate(dials) if all(d.lost <= fraction for d in dials[: i + 1])]
    return Calibration(base, tuple(dials), fraction, within[-1])


def directions_if_known(model: Any, target: Target, text: Text, guesses: Guesses) -> ByLayer:
    """What directions are worth; nothing with too little text for that: then columns count, which need a few more."""
    if text.halves()[0].tokens < max(layer.width for layer in target.publication.layers):
        return {}
    return worth_of_directions(Judge(model, target, text, guesses))


def rows_needed(target: Target, directions: ByLayer) -> tuple[int | None, int | None, int | None]:
    """Rows for 10 %, 1 % and exact, of the layer that the best known attack learns first.

    ``directions``, by the name of a layer's first module, are what they are worth to an attacker with the base model.
    """
    layers = target.publication.layers
    channels = {layer.outputs[0][0]: channel_of(target, index) for index, layer in enumerate(layers)}

    def fewest(error: float) -> int | None:
        along = [rows_until_along(channels[name], one, error) for name, own in directions.items() for one in own]
        found = [rows for rows in along if rows is not None and error > 0]
        for channel in set(channels.values()):
            try:
                found.append(rows_until(channel, error))
            except OverflowError:  # no searched scheme gets there at this layer
                continue
        return min(found, default=None)

    return fewest(0.1), fewest(0.01), fewest(0.0)


def channel_of(target: Target, layer: int) -> Channel:
    """What determines how fast a layer leaks, with the true peak of its core: the vendor can know it."""
    published = target.publication.layers[layer]
    return Channel.of(
        target.publication.parameters,
        published.width,
        published.rank,
        published.norm_bound,
        target.publication.noise,
        peak_ratio([target.core(layer)]),
    )
