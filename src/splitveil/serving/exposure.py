"""Between the ledger, which counts, and the leakage function, which says what a count is worth to an attacker."""

import math
from collections.abc import Mapping

from splitveil.adapters import Adapter
from splitveil.lattice.parameters import DEFAULT, ParameterSet
from splitveil.metering import Account, Site
from splitveil.private import exposure
from splitveil.private.exposure import Facts, facts_of, leakage_of
from splitveil.serving.publishing import ServedAdapter, layer_specs


def sites_of(adapter: ServedAdapter, limit: int | None) -> Mapping[str, Site]:
    """The layers of an adapter as a ledger counts them, by the names of their first modules."""
    publication = adapter.publication
    return {
        layer.outputs[0][0]: Site(layer.width, publication.noise, limit, "" if facts is None else str(facts))
        for layer, facts in zip(publication.layers, facts_of(adapter.half, publication), strict=True)
    }


def rows_without_noise(adapter: Adapter, parameters: ParameterSet = DEFAULT) -> tuple[int, int, int]:
    """Rows for 10 %, for 1 % and for the exact weights at the layer that falls first, with the noise floor only."""
    shapes = {
        (spec.A.shape[1], spec.A.shape[0] if spec.B is None else min(spec.B.shape))
        for spec in layer_specs(adapter.modules)
    }
    found = [exposure.rows_without_noise(parameters, width, rank) for width, rank in shapes]
    ten, one, exact = (min(column) for column in zip(*found, strict=True))
    return ten, one, exact


def known_attack_error(account: Account) -> float:
    """Relative error of the weights after the best *known* attack on an account's layer: ``metering.Leakage``.

    As if all rows had been answered by the most telling of the publications that answered any, under the least noise
    that was ever in force. NaN where the ledger does not know the layer: its rows were counted by an earlier version.
    Raises ``DataError`` or ``ParameterError`` for facts that this version cannot read.
    """
    found = [leakage_of(Facts.read(text), account.width, account.noise, account.rows) for text in account.facts]
    return min((one.error for one in found), default=math.nan)
