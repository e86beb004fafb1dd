"""``splitveil extract``."""

import hashlib
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from splitveil.cli.models import load_base
from splitveil.embedded import resolve
from splitveil.errors import ConfigurationError


class _Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers with commas between them."""

    name = "numbers"

    def __init__(self, kind: Callable[[str], float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 256,512 or 0,0.01", param, ctx)


@click.command()
@click.option("--base", metavar="DIR", help="Hugging Face folder of the base model, or embedded:base.")
@click.option("--adapter", metavar="DIR", help="PEFT folder of the adapter to attack, or embedded:clinic.")
@click.option("--data", metavar="FILE", help="Held-out text: .txt, .csv, .tsv, .json, .jsonl.")
@click.option("--column", metavar="NAME", help="Which column or field of the data holds the text.")
@click.option("--rows", type=_Numbers(int), metavar="N,…", help="Rows that the attacker gets answered, per layer.")
@click.option("--noise", "noises", type=_Numbers(float), default="0,0.01", show_default=True, metavar="X,…")
@click.option("--attack", "attacks", metavar="NAME,…", help="Only these; see above.")
@click.option("--hardness", is_flag=True, help="Bits of every parameter set against the known lattice attacks.")
@click.option("--calibrate", is_flag=True, help="Propose the largest noise that the adapter's gain bears.")
@click.option("--fraction", default=0.05, show_default=True, help="Of the gain, that noise may cost (--calibrate).")
@click.option("--tokens", default=8192, show_default=True, metavar="N", help="Of the text, to read.")
@click.option("--length", default=256, show_default=True, metavar="N", help="Of a window of text, in tokens.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Where rows.jsonl goes.")
def extract(
    base: str | None,
    adapter: str | None,
    data: str | None,
    column: str | None,
    rows: tuple[int, ...] | None,
    noises: tuple[float, ...],
    attacks: str | None,
    hardness: bool,
    calibrate: bool,
    fraction: float,
    tokens: int,
    length: int,
    out: Path | None,
) -> None:
    """How much of a private adapter can be rebuilt from what a client sees?

    Publishes the adapter as `splitveil serve` does, attacks it as a client, and says how far each clone is from the
    truth and what it is worth: the held-out perplexity of the base model with it.

    \b
    chosen     queries of the attacker's choice: columns, then the modular ladder
    directed   queries along the activations' main directions (needs --data)
    honest     the client's own code on real text (needs --data)
    known-A    A's row space is known: r rows are enough
    span       what the first answers tell of span(B) (needs --data)
    published  lattice reduction on the published half alone

    \b
    splitveil extract --base embedded:base --adapter embedded:clinic --data held-out.jsonl --out extraction
    splitveil extract --base DIR --adapter DIR --data FILE --calibrate
    splitveil extract --hardness

    Half of the text's windows are the attacker's, the other half judge. DIR gets rows.jsonl, one object a measurement,
    and report.html; the same command goes on where an interrupted one was. --calibrate writes no file.
    """
    if hardness:
        _hardness()
        if base is None and adapter is None:
            return
    if base is None or adapter is None or (out is None and not calibrate):
        raise ConfigurationError(
            "--base, --adapter and --out are needed to attack an adapter (--calibrate needs no --out, --hardness none)"
        )
    if calibrate and data is None:
        raise ConfigurationError("--calibrate measures perplexity on held-out text; give --data")
    from splitveil.adapters import load_adapter
    from splitveil.auditing.data import read_texts
    from splitveil.extraction.run import ATTACKS, Subject, default_rows, run
    from splitveil.extraction.worth import Text

    loaded = load_adapter(resolve(adapter))
    model, tokenizer = load_base(base, dtype="float32")
    text = None
    if data is not None:
        texts = [one.text for one in read_texts(data, column)]
        text = Text.of(tokenizer, texts, tokens=tokens, length=length)
    if calibrate:
        from splitveil.extraction.calibrate import calibrate as measure

        if text is None:
            raise ConfigurationError("--calibrate measures perplexity on held-out text; give --data")
        with _status() as watch:
            found = measure(model, loaded, text, fraction=fraction, watch=watch)
        _dials(found)
        return
    if out is None:
        raise ConfigurationError("--out is needed: a folder for the rows and the report")
    from splitveil.extraction.page import write_page

    subject = Subject(model, loaded, text, resolve(adapter).name, _digest(model, loaded.digest, text))
    chosen = tuple(ATTACKS) if attacks is None else tuple(attacks.split(","))
    with _status() as watch:
        measured = run(subject, rows=rows or default_rows(loaded), noises=noises, out=out, attacks=chosen, watch=watch)
    page = write_page(measured, out, shlex.join(["splitveil", *sys.argv[1:]]))
    _table(measured)
    click.echo(f"rows    {out / 'rows.jsonl'}\nreport  {page}")


def _digest(model: Any, adapter: str, text: Any) -> str:
    """Tells one subject from another: weights of base and adapter, and the text."""
    found = hashlib.sha256(adapter.encode())
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    found.update(b"" if text is None else text.windows.numpy().tobytes())
    return found.hexdigest()


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """What is being measured, on stderr; nothing where stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("publishing") as status:
        yield status.update


def _hardness() -> None:
    from splitveil.extraction.hardness import METHODS, MODELS, SETS, lines, verdict

    rows = [
        (
            line.parameters,
            line.problem,
            line.attack,
            str(line.block_size),
            f"{line.bits_core_svp:.1f}",
            f"{line.bits_he_standard:.1f}",
        )
        for line in lines()
    ]
    _print(("set", "problem", "attack", "β", "bits, core-SVP", "bits, HE standard"), rows, left=3)
    for parameters in SETS:
        click.echo(verdict(parameters))
    for name, source in (METHODS | MODELS).items():
        click.echo(f"{name:<12}{source}")
    click.echo("Not modelled: hybrid dual attacks with modulus switching (MATZOV 2022), quantum sieves, guessing.\n")


def _table(rows: Sequence[Any]) -> None:
    """One line for each attack, noise and number of rows."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        lines.setdefault(row.key, {"row": row})[row.metric] = row
    out = []
    for line in lines.values():
        row = line["row"]
        values = [_percent(line.get(name)) for name in ("error", "error on text", "exact", "span unknown")]
        worth = line.get("perplexity")
        shown = "" if worth is None else f"{worth.value:.2f} ({worth.low:.2f} – {worth.high:.2f})"
        out.append((row.attack, f"{100 * row.noise:g} %", f"{row.rows:,}", *values, shown, row.error or ""))
    heads = (
        "attack",
        "noise",
        "rows",
        "error of ΔW",
        "on text",
        "layers exact",
        "span unknown",
        "perplexity",
        "failed",
    )
    _print(heads, out, left=1)


def _percent(row: Any) -> str:
    if row is None:
        return ""
    if math.isnan(row.value):
        return "not measured"
    value = 100 * row.value
    return f"{value:.3g} %" if value < 99.95 else f"{value:.0f} %"


def _dials(found: Any) -> None:
    click.echo(f"perplexity without the adapter {found.base.value:.2f}, with it {found.dials[0].perplexity.value:.2f}")
    rows = [
        (
            f"{100 * dial.noise:.3g} %",
            f"{dial.perplexity.value:.2f}",
            f"{100 * dial.lost:.2f} %",
            *("not found" if rows is None else f"{rows:,}" for rows in dial.rows),
        )
        for dial in found.dials
    ]
    _print(("noise", "perplexity", "of the gain lost", "rows to 10 %", "rows to 1 %", "rows to exact"), rows, left=0)
    click.echo(found.sentence())


def _print(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
    """A table; the first ``left`` columns hold words."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=200)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < left or head == "failed" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)
    console.print()
