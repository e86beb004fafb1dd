"""What rows answered give away: the error of the best known attack on a layer, as a function of the rows.

Known, not possible: this is what the attacks of ``splitveil.extraction`` reach, which plan their queries with this very
module and are measured against it. A better attack may exist; nothing here is a lower bound on an error.

The attacker chooses the queries, so lattice problems do not protect the weights: with the secret 0 the answer to
the query x̂ is ⟨C_j, x̂⟩ + g_j mod q, with nothing between them but the answer noise of σ_g. Two ways of asking are
reckoned with:

* *columns*, in one row or several each, or several in one row (``private.columns``);
* *directions*, one a row: whoever has the public base model asks along the main directions of its activations, along
  which training moved the layer. Below d rows, with noise, that leaves less than columns do (``private.directions``).
  It takes figures that only who has base and adapter can measure; without them columns are all that is reckoned with,
  and the error said is too large for such an attacker.

Everything is relative: an error is ‖Ĉ − C‖₂/‖C‖₂ of a core, which is that of ΔW. On real text the same clone does
better than that, most of all one made along directions (docs/design/extraction.md, "Directions"). Who knows A as it was
trained needs r rows, and is not reckoned with; who knows what A was before training asks along that first, which is one
more order of directions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from splitveil.private.columns import Channel, direct_multiplier, plan, schemes
from splitveil.private.core import core_rms
from splitveil.private.directions import Directions, error_along

LEARNED = 0.1
"""A relative error of ΔW at which a clone does the original's job; the layer then counts as learned."""


@dataclass(frozen=True)
class Leakage:
    """What the best known attack makes of some rows."""

    error: float
    """Relative error of ΔW to be expected, from 1 (nothing) down to 0 (the integer core itself)."""
    exact: bool
    """Whether the integer core is recovered in full as likely as not."""
    learned: bool
    """T ≥ d rows, whatever the noise; and fewer where the attack needs fewer for an error of ``LEARNED``."""


def leakage(channel: Channel, rows: int, directions: Sequence[Directions] = ()) -> Leakage:
    """The error of the best known attack on a layer after ``rows`` rows.

    ``directions`` are orders in which an attacker may ask, as measured; without any it is the error of one who has not
    even the base model. Raises ``ValueError`` for negative rows.
    """
    found = plan(channel, rows)
    error = min([found.error, *(directed_error(channel, one, rows) for one in directions)])
    return Leakage(error, found.exact, rows >= channel.width or error <= LEARNED)


def directed_error(channel: Channel, directions: Directions, rows: int) -> float:
    """Of queries along directions, one a row; 1 where the noise leaves no room for a query."""
    size = direct_multiplier(channel.sigma, Channel.rounded_peak(directions.peak) * core_rms(channel.width))
    if not size:
        return 1.0
    return error_along(directions, channel.width, channel.sigma / size / channel.rms, rows)


def rows_until(channel: Channel, error: float, directions: Sequence[Directions] = ()) -> int:
    """The fewest rows after which the best known attack is expected within ``error``; for 0, the core is exact as
    likely as not. ``directions`` as in ``leakage``.

    Raises ``ValueError`` for an ``error`` outside [0, 1), ``OverflowError`` where no searched scheme gets there.
    """
    if not 0 <= error < 1:
        raise ValueError(f"an error from 0 up to 1 was expected, got {error}")

    def reached(rows: int) -> bool:
        found = leakage(channel, rows, directions)
        return found.exact if error == 0 else found.error <= error

    last = schemes(channel)[-1]
    if not (last.exact if error == 0 else math.sqrt(last.square) <= error):
        raise OverflowError(f"no known way to an error of {error} within {last.rows:.0f} rows a column")
    high = math.ceil(channel.width * last.rows)
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def rows_until_along(channel: Channel, directions: Directions, error: float) -> int | None:
    """The fewest rows after which queries along directions are expected within ``error``; None for more than d."""
    low, high = 0, channel.width + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if directed_error(channel, directions, middle) <= error else (middle, high)
    return high if high <= channel.width else None
