"""What clients were answered, and what the best attack that is known makes of it: for ``splitveil keys list``."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from splitveil.metering import Database, Standing, accounts, limits, standing

CAPTION = (
    "Best known attack: the relative error to which it is expected to rebuild the weights of the client's most "
    "advanced layer, from the rows spent there and under the least noise that was ever in force. It is the best that "
    "is known, and no bound. Where the vendor measured directions it reckons with the public base model, and with what "
    "one of the adapter's two factors, A, was before training, if that could be guessed; never with A as it was "
    "trained, with which as many rows as the rank are enough. Before the rows reach a layer's inputs, most of what the "
    "adapter is worth may be gone already. Learned: layers asked for as many rows as they have inputs, or for so many "
    "that this error is 10 % or less."
)
WITHOUT_BASE = (
    "* Of an attacker without the public base model, and too large for everybody else: of weights that answered, no "
    "directions were measured. Measure with `splitveil extract --directions`, and serve them again."
)
ONE_ANSWER = "one answer may be enough"
ABOUT_ONE_ANSWER = (
    f"{ONE_ANSWER[0].upper()}{ONE_ANSWER[1:]}: the sealed engine hides the weights from clients that make their keys "
    "honestly. One that does not reads a layer of rank 1 from a single answer, and others from a few, as far as we can "
    "tell; rows and limits say nothing about it. Serve those only whom you trust to run the program as it is."
)


@dataclass(frozen=True)
class Client:
    """One client at one adapter: what it was answered at all layers together."""

    name: str
    adapter: str
    standings: tuple[Standing, ...]
    limits: tuple[int | None, ...]
    """In force, layer by layer; None where there is no limit, or where no server of this version declared one yet."""
    base_known: bool = False
    """Whether the error is that of an attacker who has the base model."""
    one_answer: bool = False
    """Whether the sealed engine answered it: what it knows depends on its keys' honesty, not on its rows."""

    @property
    def advanced(self) -> Standing:
        """The layer of which most was learned: the least error that is known, then the most rows for its width."""

        def order(one: Standing) -> tuple[float, float]:
            error = one.known_attack_error
            return (math.inf if math.isnan(error) else error, -one.account.rows / one.account.width)

        return min(self.standings, key=order)

    @property
    def rows(self) -> int:
        """Spent at the layer with most."""
        return max(one.account.rows for one in self.standings)

    @property
    def left(self) -> int | None:
        """Of the limit, at the layer where least is left; None where there is no limit."""
        return min((one.remaining for one in self.standings if one.remaining is not None), default=None)

    @property
    def learned(self) -> int:
        """Layers."""
        return sum(one.learned for one in self.standings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: None where there is no limit, and where no attack's error is known."""
        error = self.advanced.known_attack_error
        return {
            "adapter": self.adapter,
            "rows_spent": self.rows,
            "rows_limit": min((limit for limit in self.limits if limit is not None), default=None),
            "rows_left": self.left,
            "layers_asked": len(self.standings),
            "layers_learned": self.learned,
            "best_known_attack_error": None if math.isnan(error) else error,
            "base_model_reckoned_with": self.base_known,
            "one_answer_may_be_enough": self.one_answer,
            "most_advanced_layer": self.advanced.account.site,
        }


def clients(database: Database) -> list[Client]:
    """Everybody who was answered anything, by name and adapter.

    Raises ``RefusedError`` if the database fails, ``DataError`` or ``ParameterError`` for a layer of which it holds
    what this version cannot read.
    """
    from splitveil.serving.exposure import base_model_reckoned_with, known_attack_error, one_answer_may_be_enough

    in_force = limits(database)
    found: defaultdict[tuple[str, str], list[Standing]] = defaultdict(list)
    for account in accounts(database):
        limit = in_force.get((account.adapter, account.site))
        found[account.identity, account.adapter].append(standing(account, known_attack_error, limit))
    return [
        Client(
            name,
            adapter,
            tuple(own),
            tuple(in_force.get((adapter, one.account.site)) for one in own),
            all(base_model_reckoned_with(one.account) for one in own),
            any(one_answer_may_be_enough(one.account) for one in own),
        )
        for (name, adapter), own in found.items()
    ]


def as_json(own: Iterable[Client]) -> dict[str, Any]:
    """One client, all adapters together and one by one. Without rows nothing is learned: an error of 1."""
    by_adapter = [client.as_dict() for client in own]
    errors = [one["best_known_attack_error"] for one in by_adapter if one["best_known_attack_error"] is not None]
    return {
        "rows_spent": max((one["rows_spent"] for one in by_adapter), default=0),
        "rows_left": min((one["rows_left"] for one in by_adapter if one["rows_left"] is not None), default=None),
        "layers_asked": sum(one["layers_asked"] for one in by_adapter),
        "layers_learned": sum(one["layers_learned"] for one in by_adapter),
        "best_known_attack_error": min(errors, default=None) if by_adapter else 1.0,
        "one_answer_may_be_enough": any(one["one_answer_may_be_enough"] for one in by_adapter),
        "by_adapter": by_adapter,
    }


def by_name(found: Iterable[Client]) -> Mapping[str, list[Client]]:
    """Client's name → one entry an adapter."""
    own: defaultdict[str, list[Client]] = defaultdict(list)
    for client in found:
        own[client.name].append(client)
    return own


def print_clients(found: Collection[Client]) -> None:
    """A table, one line a client and adapter, and what its words mean."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("client", "adapter"):
        table.add_column(heading, overflow="fold")
    for heading in ("rows", "left", "learned", "best known attack"):
        table.add_column(heading, justify="right")
    table.add_column("at its most advanced layer", overflow="fold")
    for client in found:
        table.add_row(
            client.name,
            client.adapter,
            f"{client.rows:,}",
            "no limit" if client.left is None else f"{client.left:,}",
            f"{client.learned} of {len(client.standings)}",
            _attack(client),
            client.advanced.account.site,
        )
    console.print(table)
    console.print(CAPTION, markup=False, highlight=False)
    if any(_marked(client) for client in found):
        console.print(WITHOUT_BASE, markup=False, highlight=False)
    if any(client.one_answer for client in found):
        console.print(ABOUT_ONE_ANSWER, markup=False, highlight=False)


def _attack(client: Client) -> str:
    if client.one_answer:
        return ONE_ANSWER
    return shown(client.advanced.known_attack_error) + (" *" if _marked(client) else "")


def _marked(client: Client) -> bool:
    return not (client.base_known or client.one_answer or math.isnan(client.advanced.known_attack_error))


def shown(error: float) -> str:
    """A relative error in words."""
    if math.isnan(error):
        return "not known"
    if error < 1e-4:
        return "error < 0.01 %"
    return f"error {100 * error:.3g} %"
