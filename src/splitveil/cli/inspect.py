"""``splitveil inspect``."""

import json
from typing import Any

import click

from splitveil.embedded import resolve


@click.command()
@click.argument("adapter")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def inspect(adapter: str, as_json: bool) -> None:
    """Can this ADAPTER folder be served, and what would it cost?

    Lists the adapted modules with their ranks, how many rows a client may ask for before the layer must be considered
    learned (its width), after how many the best attack that is known has it where there is no noise beyond the floor
    (fewer), the bytes of one token, and the size of the publication. Exit status 1, with the reason, for an adapter
    that cannot be served. ADAPTER may be embedded:clinic.
    """
    from splitveil.adapters import load_adapter
    from splitveil.serving.costs import cost_of
    from splitveil.serving.exposure import rows_without_noise

    folder = resolve(adapter)
    loaded = load_adapter(folder)
    cost = cost_of(loaded)
    attack = rows_without_noise(loaded)
    if as_json:
        rows = dict(zip(("error_10_percent", "error_1_percent", "exact"), attack, strict=True))
        facts = {"adapter": str(folder), "base_model": loaded.base_model, **cost.as_dict()}
        click.echo(json.dumps({**facts, "rows_of_best_known_attack_without_noise": rows}))
        return
    _table(folder.name, loaded, cost, attack)


def _table(title: str, loaded: Any, cost: Any, attack: tuple[int, int, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{title}[/bold] can be served. Base model, as it says: {loaded.base_model or 'not stated'}")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("modules", "number", "rank", "inputs", "outputs"):
        table.add_column(heading, justify="left" if heading == "modules" else "right")
    for kind in cost.kinds:
        table.add_row(kind.name, str(kind.count), kind.ranks, str(kind.width), str(kind.features))
    console.print(table)
    facts = (
        ("publication", f"{cost.publication_bytes:,} bytes, sent once to every client"),
        ("a token", f"{cost.sent_bytes_grouped:,} bytes up if children of one parent share a query,"),
        ("", f"{cost.sent_bytes:,} if every module sends its own; {cost.received_bytes:,} down"),
        ("learned after", f"{cost.rows_until_learned:,} tokens of one client, at the narrowest layer."),
        ("", "Fewer are enough without noise: the best known attack has a layer"),
        ("", f"within 10 % after {attack[0]:,}, within 1 % after {attack[1]:,} and exactly after {attack[2]:,}"),
    )
    for name, fact in facts:
        console.print(f"{name:<14}{fact}")
