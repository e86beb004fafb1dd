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
@click.option(
    "--noise",
    "noises",
    type=_Numbers(float),
    metavar="X,…",
    help="Fractions of a typical answer that are added as noise, as in `serve`: 0,0.01 if not given. With --calibrate "
    "where to begin: 0,0.01,0.03,0.1,0.3,1.",
)
@click.option("--attack", "attacks", metavar="NAME,…", help="Only these; see above.")
@click.option(
    "--initial",
    metavar="SEEDS|DIR",
    help="Where to look for A before training: seeds, 0-99 if not given, or a PEFT folder.",
)
@click.option("--hardness", is_flag=True, help="Bits of every parameter set against the known lattice attacks.")
@click.option("--calibrate", is_flag=True, help="Propose the largest noise that the adapter's gain bears.")
@click.option("--directions", is_flag=True, help="Measure what directions are worth to an attacker; see below.")
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
    noises: tuple[float, ...] | None,
    attacks: str | None,
    initial: str | None,
    hardness: bool,
    calibrate: bool,
    directions: bool,
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
    trained-A  the trained A is known (frozen, published, shared): r rows are enough
    initial-A  A before training is known, or its seed guessed (--initial)
    span       what the first answers tell of span(B) (needs --data)
    published  lattice reduction on the published half alone; what it breaks, and what not

    \b
    splitveil extract --base embedded:base --adapter embedded:clinic --data held-out.jsonl --out extraction
    splitveil extract --base DIR --adapter DIR --data FILE --calibrate
    splitveil extract --base DIR --adapter DIR --data FILE --directions
    splitveil extract --attack published
    splitveil extract --hardness

    Half of the text's windows are the attacker's, the other half judge. DIR gets rows.jsonl, one object a measurement,
    and report.html; the same command goes on where an interrupted one was. --calibrate writes no file, and takes no
    --rows and no --attack. --directions writes splitveil_directions.json into the adapter's folder, over what was
    there: with it, `splitveil keys list` says the error of an attacker who has the base model, as everybody may.
    `--attack published` reduces lattices that are there to be broken, under a parameter set that is never served; it
    needs no adapter.
    """
    names = None if attacks is None else tuple(attacks.split(","))
    if hardness:
        _hardness()
    if base is None and adapter is None:
        if names == ("published",):
            _reductions(None)
        if hardness or names == ("published",):
            return
    if base is None or adapter is None or (out is None and not calibrate and not directions):
        raise ConfigurationError(
            "--base, --adapter and --out are needed to attack an adapter (--calibrate and --directions need no --out; "
            "--hardness and --attack published by itself need none)"
        )
    if calibrate and directions:
        raise ConfigurationError("--calibrate and --directions are two measurements; give one of them at a time")
    for flag, given in (("--calibrate", calibrate), ("--directions", directions)):
        if given and data is None:
            raise ConfigurationError(f"{flag} measures on held-out text; give --data")
        if given and (rows is not None or names is not None):
            raise ConfigurationError(f"{flag} takes no --rows and no --attack: it attacks nothing by itself")
    if directions and (noises is not None or out is not None):
        raise ConfigurationError(
            "--directions takes no --noise and no --out: what is measured holds for every noise, and is kept in the "
            "adapter's folder"
        )
    from splitveil.adapters import load_adapter
    from splitveil.auditing.data import read_texts
    from splitveil.extraction.guessed import SEEDS
    from splitveil.extraction.run import ATTACKS, Subject, default_rows, run
    from splitveil.extraction.worth import Text

    loaded = load_adapter(resolve(adapter))
    model, tokenizer = load_base(base, dtype="float32")
    text = None
    if data is not None:
        texts = [one.text for one in read_texts(data, column)]
        text = Text.of(tokenizer, texts, tokens=tokens, length=length)
    if calibrate:
        from splitveil.extraction.calibrate import GRID
        from splitveil.extraction.calibrate import calibrate as measure

        if text is None:
            raise ConfigurationError("--calibrate measures perplexity on held-out text; give --data")
        with _status() as watch:
            found = measure(
                model, loaded, text, fraction=fraction, grid=noises or GRID, initial=initial or SEEDS, watch=watch
            )
        _dials(found)
        return
    if directions:
        with _status() as watch:
            watch("directions")
            _directions(model, loaded, text, initial)
        return
    if out is None:
        raise ConfigurationError("--out is needed: a folder for the rows and the report")
    from splitveil.extraction.page import write_page

    digest = _digest(model, loaded.digest, text)
    subject = Subject(model, loaded, text, resolve(adapter).name, digest, initial or SEEDS)
    with _status() as watch:
        measured = run(
            subject,
            rows=rows or default_rows(loaded),
            noises=noises or (0.0, 0.01),
            out=out,
            attacks=names or tuple(ATTACKS),
            watch=watch,
        )
    page = write_page(measured, out, shlex.join(["splitveil", *sys.argv[1:]]))
    _table(measured)
    if names is not None and "published" in names:
        _reductions(min(module.d_in for module in loaded.modules))
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
    from splitveil.extraction.hardness import METHODS, MODELS, lines, verdicts

    found = lines()
    rows = [
        (
            line.parameters,
            line.problem,
            line.attack,
            str(line.block_size),
            f"{line.bits_core_svp:.1f}",
            f"{line.bits_he_standard:.1f}",
        )
        for line in found
    ]
    _print(("set", "problem", "attack", "β", "bits, core-SVP", "bits, HE standard"), rows, left=3)
    for verdict in verdicts(found):
        click.echo(verdict)
    for name, source in (METHODS | MODELS).items():
        click.echo(f"{name:<12}{source}")
    click.echo("Not modelled: hybrid dual attacks with modulus switching (MATZOV 2022), quantum sieves, guessing.\n")


def _reductions(width: int | None) -> None:
    """What lattice reduction does to published halves, from the weakest up to those that are served."""
    from splitveil.extraction.hint import MOST_DIMENSIONS
    from splitveil.extraction.reductions import trials

    rows = []
    with _status() as watch:
        watch("lattice reduction")
        for trial in trials(width):
            watch(f"lattice reduction: {trial.what}, d = {trial.width}")
            result = {True: "broken", False: "withstood", None: "not attempted"}[trial.found]
            seconds = "" if trial.found is None else f"{trial.seconds:.1f}"
            rows.append((trial.what, f"{trial.width:,}", f"{trial.dimension:,}", result, seconds, trial.effort))
    _print(("hints of a layer under", "d", "lattice", "outcome", "s of one core", "estimated"), rows, left=1)
    click.echo(
        "Weights at random. The pad broken: it has a ring and a client's secret of its own, so that it covers nothing. "
        f"Lattice: its dimension; this attack (LLL) reduces up to {MOST_DIMENSIONS}.\n"
    )


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


def _directions(model: Any, adapter: Any, text: Any, initial: str | None) -> None:
    """Raises ``ConfigurationError`` where ``initial`` makes no sense, and for a folder that cannot be written to."""
    from splitveil.extraction.guessed import SEEDS, Guesses
    from splitveil.extraction.measure import Judge, worth_of_directions
    from splitveil.extraction.target import publish_target
    from splitveil.serving.directions import write_directions_file

    target = publish_target(adapter, 0.0)
    judge = Judge(model, target, text, Guesses(model, adapter.path, initial or SEEDS))
    try:
        known = judge.recognised
        words = (
            f"A before training: {known.name} is recognised, and reckoned with."
            if known.sure
            else f"A before training is not among {initial or SEEDS}: it is not reckoned with. If others know it, give "
            "--initial."
        )
    except ConfigurationError as why:
        if initial is not None:
            raise
        judge, words = Judge(model, target, text), f"A before training is not reckoned with: {why}"
    found = worth_of_directions(judge)
    shares = (8, 4, 2)
    rows = []
    for name, own in found.items():
        width = own[0].counts[-1]
        left = [f"{100 * math.sqrt(min(one.left(width // part) for one in own)):.3g} %" for part in shares]
        rows.append((name, f"{width:,}", *left))
    heads = ("layer", "d", *(f"error after d/{part} rows" for part in shares))
    _print(heads, rows, left=1)
    click.echo(words)
    blind = ", ".join(f"{100 * math.sqrt(1 - 1 / part):.3g}" for part in shares)
    click.echo(
        f"One direction a row, by noise that is not in the way. Directions that say nothing of the weights would leave "
        f"{blind} %; columns without noise are two to a row, and leave less from d/2 rows on. With this file in the "
        "adapter's folder, the ledger's figure is that of an attacker who has the base model.\n"
        f"written {write_directions_file(adapter, found)}"
    )


def _dials(found: Any) -> None:
    click.echo(f"perplexity without the adapter {found.base.value:.2f}, with it {found.dials[0].perplexity.value:.2f}")
    rows = [
        (
            f"{100 * dial.noise:.3g} %",
            f"{dial.perplexity.value:.2f}",
            f"{100 * dial.lost:.2f} % ({100 * dial.low:.2f} – {100 * dial.high:.2f})",
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
