"""``splitveil bench``."""

import datetime
import json
from dataclasses import asdict
from statistics import median
from typing import Any

import click

NAMES = ("layer", "transport", "ckks", "decode")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["float32", "bfloat16"]), help="For decode.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Rounds of decode.")
def bench(names: tuple[str, ...], as_json: bool, dtypes: tuple[str, ...], rounds: int) -> None:
    """Measure speed and size on this machine; NAMES chooses, all are run without one.

    \b
    layer      one private LoRA layer of several shapes: microseconds, bytes, error; warm in blocks of
               one step, cold with the steps in turn
    transport  one round trip to a server process over gRPC, and over a plain socket
    ckks       the same layer by the sealed engine, and by SEAL's CKKS unprotected (pip install 'splitveil[sealed]')
    decode     whole tokens of a model of Qwen2-0.5B's shape, beside plaintext PEFT (10 minutes, 7 GB)

    Medians of alternating runs; the machine should be otherwise idle. Tables are Markdown.
    """
    from splitveil.bench.timing import machine

    chosen = names or NAMES
    results: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": machine()}
    if not as_json:
        click.echo(f"{results['date']}, {results['machine']}\n")
    for name in chosen:
        rows = _measure(name, dtypes, rounds)
        results[name] = rows
        if not as_json:
            _table(name, rows)
    if as_json:
        click.echo(json.dumps(results))


def _measure(name: str, dtypes: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    match name:
        case "layer":
            return _layer()
        case "transport":
            return _transport()
        case "ckks":
            return _ckks()
    return _decode(dtypes, rounds)


def _layer() -> list[dict[str, Any]]:
    from splitveil.bench.layer import SHAPE, measure

    rows = []
    for width, features, rank in ((192, 192, 8), (896, 896, 8), SHAPE, (14336, 4096, 8)):
        for block in (25, 1):
            result = measure(width, features, rank, block=block)
            name = f"{width}→{features}, r={rank}, {'warm' if block > 1 else 'cold'}"
            rows.append({"layer": name, "online µs": result.online_us, **_layer_row(result)})
    return rows


def _layer_row(result: Any) -> dict[str, Any]:
    return {
        "client µs": result.client_us,
        "server µs": result.server_us,
        "recover µs": result.recover_us,
        "offline µs": result.offline_us,
        "offline, one at a time µs": result.offline_single_us,
        "plaintext µs": result.plaintext_us,
        "up bytes": result.sent,
        "down bytes": result.received,
        "relative error": result.error,
        "published bytes": result.publication_bytes,
    }


def _transport() -> list[dict[str, Any]]:
    from splitveil.bench.transport import measure

    return measure()


def _ckks() -> list[dict[str, Any]]:
    from splitveil.bench.versus_ckks import measure

    return measure()


def _decode(dtypes: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    import torch

    from splitveil.bench.decode import measure

    rows = []
    for name in dtypes or ("float32", "bfloat16"):
        result = asdict(measure(getattr(torch, name), rounds=rounds))
        for kind, words in (
            ("to_unmerged", "private ÷ unmerged"),
            ("to_merged", "private ÷ merged"),
            ("socket_to_unmerged", "over a plain socket ÷ unmerged"),
        ):
            ratios = sorted(result.pop(kind))
            result[f"{words}, median of rounds"] = median(ratios)
            result[f"{words}, lowest and highest"] = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        rows.append(result)
    return rows


def _table(name: str, rows: list[dict[str, Any]]) -> None:
    click.echo(f"### {name}\n")
    click.echo("| " + " | ".join(rows[0]) + " |")
    click.echo("|" + "---|" * len(rows[0]))
    for row in rows:
        click.echo("| " + " | ".join(_cell(value) for value in row.values()) + " |")
    click.echo()


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.05 else f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return str(value)
