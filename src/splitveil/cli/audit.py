"""``splitveil audit``."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from splitveil.cli.models import load_base
from splitveil.embedded import resolve
from splitveil.errors import BaseModelError, ConfigurationError, SplitveilError


class _Names(click.ParamType[tuple[str, ...]]):
    """NAME,NAME,…"""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in value.split(","))
        if not all(names):
            self.fail(f"{value!r} is not NAME or NAME,NAME with no spaces between", param, ctx)
        return names


class _Cuts(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them."""

    name = "cuts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of blocks such as 1,3", param, ctx)


_FILE = "FILE"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model")
_OPTIONS: list[Callable[..., Any]] = [
    click.option("--model", required=True, metavar="DIR", help="Hugging Face folder with tokenizer, or embedded:base."),
    click.option(
        "--data", required=True, metavar=_FILE, help="The prompts to attack: .txt, .csv, .tsv, .json, .jsonl."
    ),
    click.option("--column", metavar="NAME", help="Which column or field of the data holds the prompts."),
    click.option("--shadow", multiple=True, metavar=_FILE, help="The attacker's own text. May be repeated."),
    click.option("--shadow-column", metavar="NAME", help="As --column, for all --shadow files."),
    click.option(
        "--cut",
        "cuts",
        required=True,
        type=_Cuts(),
        metavar="N,…",
        help="Split after these blocks; 0: before the first.",
    ),
    click.option("--attack", "attacks", required=True, type=_Names(), metavar="NAME,…", help="See above."),
    click.option(
        "--defence", "defences", default="none", show_default=True, type=_Names(), metavar="NAME,…", help="See above."
    ),
    click.option("--information", is_flag=True, help="Also estimate, in bits, what each block tells of its input."),
    click.option("--personal", metavar="DIR", help="The victims' device half: what `split train` wrote, or a LoRA."),
    click.option(
        "--attacker-knows",
        type=click.Choice(["base", "personal"]),
        default="base",
        show_default=True,
        help="Of --personal: nothing, or all of it (an upper bound).",
    ),
    click.option("--training", is_flag=True, help="The prompts are being trained on: gradients cross as well."),
    click.option(
        "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Where rows and report go."
    ),
    click.option("--prompts", default=100, show_default=True, metavar="N", help="Prompts to attack, a random sample."),
    click.option("--tokens", default=48, show_default=True, metavar="N", help="Of each prompt, from its beginning."),
    click.option(
        "--windows", default=6000, show_default=True, metavar="N", help="Shadow text to learn from, of --tokens each."
    ),
    click.option(
        "--budget", default=540.0, show_default=True, metavar="SECONDS", help="To learn, for each attack at each cut."
    ),
    click.option(
        "--steps",
        type=int,
        metavar="N",
        help="Also end learning after so many gradient steps: comparable on busy machines.",
    ),
    click.option(
        "--ray", metavar="ADDRESS", help="Measure on a Ray cluster: local, auto, HOST:PORT or ray://HOST:PORT."
    ),
    click.option("--ray-cpus", default=1, show_default=True, metavar="N", help="Processors for each of its tasks."),
    click.option("--seed", default=0, show_default=True, help="For samples, shadow text and learning."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table."),
]


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@_options
def audit(
    model: str,
    data: str,
    column: str | None,
    shadow: tuple[str, ...],
    shadow_column: str | None,
    out: Path,
    as_json: bool,
    **how: Any,
) -> None:
    """How much of a prompt can be read from what a split model sends?

    The model is split after the given blocks. Each attack sees the hidden states that cross there, and what it declares
    to know, and tries to recover the prompt. Its score is the share of tokens at their places, with an interval of
    95 %. Controls always run: floor, the levels of chance (guessing by frequency, or always the commonest token), and
    oracle, which must reach 100 %.

    \b
    splitveil audit --model ./qwen --data prompts.txt --cut 1,12,24 \\
        --attack lens,ridge,revert --out audit
    splitveil audit --model ./qwen --data notes.csv --column note --cut 4 \\
        --shadow other.jsonl --attack revert \\
        --defence none,gaussian:0.5,int4,encrypted --out audit
    splitveil audit --model embedded:base --data prompts.jsonl --cut 3 \\
        --attack search --information --out audit

    \b
    Attacks, by what they take:
      the output head                 lens
      queries to the device half      nearest
      queries, and text of their own  ridge, mlp, pooled, revert (the strongest)
      and the public base itself      beam (what revert reads, made likely text)
      queries, text, head, and the gradients of --training
                                      gradient
      the device half's weights       search (exact, certified), optimise
    Defences, which attackers know and adapt to:
      none, gaussian:SIGMA, dchi:ETA, int8, int4, bfloat16, topk:SHARE,
      permutation, encrypted, regularised:DIR (a device half trained to
      tell less; attackers have it too). Gradients cross undefended.

    Data: .txt has one prompt a line. Tables and objects: --column, or the one called text, full_text, prompt, question,
    dialogue or content. Objects may mark personal data, which is then scored by itself:

    \b
      {"text": "I am Ann.", "spans": [{"start_position": 5,
         "end_position": 8, "entity_type": "PERSON"}]}

    Without --shadow, the attacker's text is sampled from the model itself, and uniformly random tokens. Text that
    shares 12 words in a row with a prompt under attack is refused.

    With --ray, attacks run as tasks on a cluster; DIR stays here and is the same. Prompts and model travel to its
    workers, and whoever reaches a Ray cluster runs code there: use one on a network that you trust.

    DIR gets rows.jsonl (one object a measurement), report.html, texts.jsonl and what attackers learnt (fitted/). THE
    REPORT AND TEXTS.JSONL CONTAIN PROMPTS from the data: keep them as you keep the data. An interrupted audit goes on
    where it was when the same command is given again; more cuts or attacks may be added in the same way.
    """
    from splitveil.auditing.data import read_texts

    if shadow_column is not None and not shadow:
        raise ConfigurationError("--shadow-column without --shadow")
    texts = read_texts(data, column)
    own = [text for file in shadow for text in read_texts(file, shadow_column)] if shadow else None

    from splitveil.auditing.audit import audit as run  # takes seconds, and comes after what fails at once
    from splitveil.auditing.meta import Names

    _check_tokenizer(model)
    loaded, tokenizer = load_base(model, dtype="float32")
    names = Names(model.rstrip("/").rpartition("/")[2], Path(data).name, shlex.join(["splitveil", *sys.argv[1:]]))
    try:
        with _bar() as watch:
            report = run(loaded, tokenizer, texts, own, out=out, names=names, watch=watch, **how)
    except KeyboardInterrupt:
        click.echo(f"splitveil: what was measured is in {out}; the same command goes on from there", err=True)
        raise
    report.to_html(out)
    if as_json:
        click.echo(json.dumps(report.summary(), allow_nan=False))
    else:
        _print(report, out)
    if not report.valid:
        raise SplitveilError(f"the report is INVALID: {'; '.join(report.meta['invalid'])}")


def _check_tokenizer(model: str) -> None:
    """Raises ``BaseModelError`` for a model folder without one, which transformers says less plainly."""
    folder = resolve(model)
    if (folder / "config.json").is_file() and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise BaseModelError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}); an audit needs the model's own: save it there too"
        )


@contextmanager
def _bar() -> Iterator[Callable[[Any], None]]:
    """A bar on stderr for the attack that is running; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("preparing", total=1.0)
        shown: list[tuple[int, str]] = []

        def watch(step: Any) -> None:
            if shown != [(step.unit, step.label)]:
                shown[:] = [(step.unit, step.label)]
                bar.reset(task, total=1.0)
            note = f" ({step.note})" if step.note else ""
            bar.update(task, completed=step.done, description=f"{step.unit + 1}/{step.units} {step.label}{note}")

        yield watch


def _print(report: Any, out: Path) -> None:
    """What leaks, where, to whom."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from splitveil.auditing.outcome import is_control

    # Lines are as wide as a terminal where there is one; a file takes what the table needs.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    meta, scores = report.meta, report.scores
    (described,) = meta["data"].items()
    _line(console, f"{meta['model']} ({meta['blocks']} blocks) on {': '.join(described)}")
    if meta["attackers"]:
        _line(console, meta["attackers"])
    _line(console, f"The attackers' text: {meta['shadow']}")
    console.print()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("cut", "defence", "attack", "tokens right", "interval of 95 %", "seconds", "takes"):
        table.add_column(heading, justify="left" if heading in {"defence", "attack", "takes"} else "right")
    for row in sorted(
        scores, key=lambda row: (row.cut, row.defence != "none", row.defence, not is_control(row.attack))
    ):
        value = ("failed", "") if row.error else (_percent(row.value), f"{_percent(row.low)} – {_percent(row.high)}")
        takes = ", ".join(meta["attacks"][row.attack]["needs"]) or "nothing"
        table.add_row(str(row.cut), escape(row.defence), row.attack, *value, f"{row.seconds:.0f}", escape(takes))
    console.print(table)
    console.print()
    for row in scores:
        if row.error:
            _line(console, f"failed: {row.attack} at cut {row.cut}, {row.defence}: {row.error}")
    for entry in meta["correlation"]:
        if not entry["reason"]:
            interval = f"{entry['low']:.2f} – {entry['high']:.2f}"
            _line(console, f"{entry['estimator']}: rank correlation with the attacks {entry['rho']:.2f} ({interval})")
    for line in _verdicts(report):
        _line(console, line)
    _line(console, f"rows    {out / 'rows.jsonl'}")
    _line(console, f"report  {out / 'report.html'} (contains prompts)")


def _line(console: Any, text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _verdicts(report: Any) -> Iterator[str]:
    """One sentence for each cut and defence: the best attack, what it takes, and the level of chance."""
    from splitveil.auditing.outcome import is_control

    places = sorted({(row.cut, row.defence) for row in report.scores}, key=lambda p: (p[0], p[1] != "none", p[1]))
    for cut, defence in places:
        here = {row.attack: row for row in report.scores if (row.cut, row.defence) == (cut, defence)}
        tried = [row for row in here.values() if not is_control(row.attack) and row.error is None]
        floors = [row.value for name, row in here.items() if name.startswith("floor") and row.error is None]
        where = f"After block {cut}" + (f", defended by {defence}" if defence != "none" else "")
        if not tried:
            yield f"{where}: no attack was measured."
            continue
        best = max(tried, key=lambda row: row.value)
        needs = _listed(report.meta["attacks"][best.attack]["needs"])
        chance = max(floors, default=float("nan"))
        yield (
            f"{where}: an attacker with {needs} reads {_percent(best.value)} of the tokens ({best.attack}); "
            f"chance is {_percent(chance)}."
        )


def _listed(needs: list[str]) -> str:
    *most, last = needs or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else last


def _percent(value: float) -> str:
    return "not measured" if value != value else f"{100 * value:.1f} %"
