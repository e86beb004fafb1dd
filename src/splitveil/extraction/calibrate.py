"""The noise dial: how much answer noise the adapter's gain bears, and how few rows of protection that buys."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from splitveil.adapters import Adapter
from splitveil.errors import ConfigurationError
from splitveil.extraction.target import Target, publish_target
from splitveil.extraction.through import served
from splitveil.extraction.worth import Perplexity, Text, perplexity
from splitveil.private.leakage import Channel, peak_ratio, rows_until

GRID = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
_STEPS = 4  # bisections, each halving the proposal's uncertainty on a logarithmic scale


@dataclass(frozen=True)
class Dial:
    """One setting of the noise, measured through the protocol, and what the best known attack needs under it."""

    noise: float
    perplexity: Perplexity
    lost: float
    """Share of the adapter's gain in perplexity that the noise costs."""
    rows: tuple[int, int, int | None]
    """Rows after which the best known attack is expected within 10 %, within 1 %, and exact, at the layer learned
    first; None where exactness is beyond what is searched."""


@dataclass(frozen=True)
class Calibration:
    """What was measured, and the proposal."""

    base: Perplexity
    dials: tuple[Dial, ...]
    """By noise."""
    fraction: float
    proposal: Dial
    """The largest noise found that costs at most ``fraction`` of the gain."""

    def sentence(self) -> str:
        """The proposal, and in the same breath how little it buys."""
        found, quiet = self.proposal, self.dials[0]
        exact = "more" if found.rows[2] is None else f"{found.rows[2]:,}"
        return (
            f"Noise {found.noise:.3g} costs {100 * found.lost:.1f} % of the adapter's gain (limit "
            f"{100 * self.fraction:.3g} %). It buys: the best known attack needs {found.rows[0]:,} rows for an error "
            f"of 10 %, {found.rows[1]:,} for 1 % and {exact} for the exact weights, where without noise it needs "
            f"{quiet.rows[0]:,}, {quiet.rows[1]:,} and {quiet.rows[2]:,}. A row is a token."
        )


def calibrate(
    model: Any,
    adapter: Adapter,
    text: Text,
    *,
    fraction: float = 0.05,
    grid: Sequence[float] = GRID,
    watch: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Perplexity of held-out ``text`` by noise, and the largest noise within ``fraction`` of the adapter's gain.

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
    gain = base.value - best.value
    if not gain > 0:
        raise ConfigurationError(
            f"the adapter gains nothing on this text (perplexity {base.value:.2f} without it, {best.value:.2f} with "
            "it); give text of the kind that it was trained for"
        )

    def dial(noise: float, target: Target, found: Perplexity) -> Dial:
        return Dial(noise, found, (found.value - best.value) / gain, rows_needed(target))

    dials = [dial(0.0, quiet, best)]
    dials += [dial(noise, *measure(noise)) for noise in sorted(set(grid) - {0.0})]
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


def rows_needed(target: Target) -> tuple[int, int, int | None]:
    """Rows for 10 %, 1 % and exact, of the layer that the best known attack learns first."""
    found = []
    for channel in {channel_of(target, index) for index in range(len(target.publication.layers))}:
        try:
            exact: int | None = rows_until(channel, 0.0)
        except OverflowError:
            exact = None
        found.append((rows_until(channel, 0.1), rows_until(channel, 0.01), exact))
    exacts = [one[2] for one in found if one[2] is not None]
    return min(one[0] for one in found), min(one[1] for one in found), min(exacts) if exacts else None


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
