"""Between the ledger, which counts, and the leakage function, which says what a count is worth to an attacker."""

import math
from collections.abc import Iterator, Mapping

from splitveil.adapters import Adapter
from splitveil.lattice.parameters import DEFAULT, ParameterSet
from splitveil.metering import Account, Site
from splitveil.private import exposure
from splitveil.private.exposure import Facts, facts_of, leakage_of
from splitveil.private.published import ENGINE_SEALED, PublicLayer
from splitveil.serving.publishing import ServedAdapter, layer_shape, layer_specs

WEIGHTS_DIGITS = 16
SEALED = "sealed"
"""In place of a layer's facts, for the sealed engine: what rows are worth there depends on how the client made its
keys, not on how many they are (docs/design/sealed.md)."""


def sites_of(adapter: ServedAdapter, limit: int | None) -> Mapping[str, Site]:
    """The layers of an adapter as a ledger counts them, by the names of their first modules."""
    publication = adapter.publication
    unmeasured = SEALED if publication.engine == ENGINE_SEALED else ""
    return {
        layer.outputs[0][0]: Site(layer.width, publication.noise, limit, unmeasured if facts is None else str(facts))
        for layer, facts in _with_facts(adapter)
    }


def rows_until_learned(adapter: ServedAdapter) -> int:
    """Rows after which the first of the narrowest layers counts as learned."""
    publication = adapter.publication
    width = min(layer.width for layer in publication.layers)
    known = [facts for layer, facts in _with_facts(adapter) if layer.width == width and facts is not None]
    return exposure.rows_until_learned(known, width, publication.noise) if known else width


def _with_facts(adapter: ServedAdapter) -> Iterator[tuple[PublicLayer, Facts | None]]:
    facts = facts_of(adapter.half, adapter.publication, adapter.source[:WEIGHTS_DIGITS], adapter.directions)
    return zip(adapter.publication.layers, facts, strict=True)


def rows_without_noise(adapter: Adapter, parameters: ParameterSet = DEFAULT) -> tuple[int, int, int]:
    """Rows for 10 %, for 1 % and for the exact weights at the layer that falls first, with the noise floor only."""
    shapes = {layer_shape(spec)[:2] for spec in layer_specs(adapter.modules)}
    found = [exposure.rows_without_noise(parameters, width, rank) for width, rank in shapes]
    ten, one, exact = (min(column) for column in zip(*found, strict=True))
    return ten, one, exact


def known_attack_error(account: Account) -> float:
    """Relative error of the weights after the best *known* attack on an account's layer: ``metering.Leakage``.

    As if all rows had been answered by the most telling of the publications that answered any, under the least noise
    that was ever in force. NaN where the ledger does not know the layer, whose rows were counted by an earlier version,
    and where ``one_answer_may_be_enough`` is all that is known. Raises ``DataError`` or ``ParameterError`` for facts
    that this version cannot read.
    """
    found = [
        leakage_of(Facts.read(text), account.width, account.noise, account.rows)
        for text in account.facts
        if text != SEALED
    ]
    return min((one.error for one in found), default=math.nan)


def base_model_reckoned_with(account: Account) -> bool:
    """Whether ``known_attack_error`` is that of an attacker who has the public base model.

    That takes directions which the vendor measured, of all weights that answered rows of the account; when, is the
    same: the error is the least of all that was declared of them, for all rows.
    """
    found = [Facts.read(text) for text in account.facts if text != SEALED]
    measured = {facts.weights for facts in found if facts.directions}
    return bool(found) and all(facts.directions or (facts.weights and facts.weights in measured) for facts in found)


def one_answer_may_be_enough(account: Account) -> bool:
    """Whether any row was answered by the sealed engine.

    A client that makes its keys dishonestly reads a layer of rank 1 from one of its answers.
    """
    return SEALED in account.facts
