"""``splitveil split train``."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from splitveil.cli import split_options as options
from splitveil.cli.models import load_base
from splitveil.errors import ConfigurationError, ConnectionFailedError

_TRAIN = [
    *options.there,
    click.option("--data", required=True, metavar="FILE", help="Text to learn from: .txt, .csv, .tsv, .json, .jsonl."),
    click.option("--column", metavar="NAME", help="Which column or field of the data holds the texts."),
    click.option("--cut", required=True, type=click.IntRange(0), metavar="N", help="Blocks that are here."),
    options.shape,
    click.option("--device", "here", type=options.KINDS, default="lora", show_default=True, help="What is trained."),
    click.option("--cloud", "there", type=options.KINDS, default="nothing", show_default=True, help="… in the cloud."),
    click.option("--freeze-embeddings", is_flag=True, help="Full training leaves the embeddings as they are."),
    click.option("--rank", default=8, show_default=True, type=click.IntRange(1, 1024), help="Of the adapters."),
    click.option("--alpha", default=16.0, show_default=True, help="The adapters' scale is alpha / rank."),
    click.option(
        "--targets", default="q_proj,v_proj", show_default=True, metavar="NAME,…", help="Modules with an adapter."
    ),
    click.option("--steps", type=click.IntRange(1), help="Steps of the optimiser in all, those before included."),
    click.option("--epochs", type=float, help="Instead: how often all text is seen."),
    click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Windows that cross at once."),
    click.option("--accumulate", default=1, show_default=True, type=click.IntRange(1), help="Batches in a step."),
    click.option("--tokens", default=128, show_default=True, type=click.IntRange(2), help="In a window of text."),
    click.option("--rate", default=1e-3, show_default=True, help="The highest learning rate."),
    click.option(
        "--schedule",
        type=click.Choice(["constant", "cosine"]),
        default="constant",
        show_default=True,
        help="The rate after the warmup; cosine falls to 0.",
    ),
    click.option("--warmup", default=0, show_default=True, type=click.IntRange(0), help="Steps of rising rate."),
    click.option("--weight-decay", default=0.0, show_default=True, help="Of AdamW."),
    click.option("--held-out", default=0.0, show_default=True, metavar="FRACTION", help="Of the text, only looked at."),
    options.defence,
    click.option("--regularise", metavar="NAME:WEIGHT", help="Added to the loss, such as dcor:1."),
    click.option(
        "--checkpoint-every",
        default=100,
        show_default=True,
        type=click.IntRange(1),
        metavar="STEPS",
        help="How much is done again at most after an interruption.",
    ),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of adapters and order."),
    click.option("--out", required=True, type=options.FOLDER, metavar="DIR", help="Where the run is kept."),
    click.option("--resume", is_flag=True, help="Only go on with a run that is in DIR."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end."),
]


@click.command()
@options.options_of(_TRAIN)
def train(data: str, column: str | None, out: Path, as_json: bool, resume: bool, **how: Any) -> None:
    """Train a personal part, with the upper blocks in the cloud.

    THE CLOUD LEARNS FROM WHAT CROSSES: hidden states of the text up, gradients down. `splitveil audit` measures what
    can be read from them. In the U shape the labels stay here; in the straight shape they are sent, AND LABELS ARE THE
    TEXT.

    DIR gets the run: its checkpoints, its losses, its token (whoever has it may go on with the run in the cloud: keep
    it as you keep a password), and in DIR/personal what was trained here; of adapters an ordinary PEFT folder. The
    same command goes on where a run was interrupted, to the same weights, bit for bit where the defence draws no noise.

    \b
    splitveil split train --base embedded:base --server 127.0.0.1:7435 --cut 2 \\
        --data notes.csv --column note --steps 200 --out ./mine
    splitveil split train --base ./qwen --server cloud.example:7435 --tls --cut 4 \\
        --data mail.jsonl --cloud lora --epochs 2 --schedule cosine --warmup 20 \\
        --held-out 0.1 --defence int8 --regularise dcor:1 --out ./mine
    """
    from splitveil.auditing.data import read_texts

    if (how["steps"] is None) == (how["epochs"] is None):
        raise ConfigurationError("give one of --steps and --epochs")
    if resume and not (out / "run.json").is_file():
        raise ConfigurationError(f"--resume, and {out} holds no run; leave it out to begin one")
    options.quiet()
    texts = [text.text for text in read_texts(data, column)]
    base, tokenizer = load_base(how["base"], dtype=how["dtype"], device=how["place"])

    from splitveil.splitlearning.course import Course, Decay
    from splitveil.splitlearning.interface import Optimiser, Plan, Shape, Trains
    from splitveil.splitlearning.run import train_remotely

    plan = Plan(
        how["cut"],
        Shape(how["shape"]),
        Trains(how["here"]),
        Trains(how["there"]),
        Optimiser(weight_decay=how["weight_decay"]),
        how["rank"],
        how["alpha"],
        tuple(name.strip() for name in how["targets"].split(",")),
        how["seed"],
        how["freeze_embeddings"],
    )
    course = Course(
        how["steps"] or 1,
        how["rate"],
        how["batch"],
        how["accumulate"],
        how["warmup"],
        Decay(how["schedule"]),
        save_every=how["checkpoint_every"],
        seed=how["seed"],
    )
    try:
        with _bar() as watch:
            outcome, traffic = train_remotely(
                base,
                tokenizer,
                texts,
                options.server(how),
                out,
                plan,
                course,
                epochs=how["epochs"],
                window=how["tokens"],
                held_out=how["held_out"],
                defence=how["defence"],
                regulariser=how["regularise"],
                watch=watch,
            )
    except (KeyboardInterrupt, ConnectionFailedError):
        if (out / "run.json").is_file():
            click.echo(f"splitveil: checkpoints are in {out}; the same command goes on from the last one", err=True)
        raise
    for note in outcome.notes:
        click.echo(f"splitveil: {note}", err=True)
    result = {
        "step": outcome.step,
        "resumed": outcome.resumed,
        "loss": _number(outcome.loss),
        "held_out_before": _number(outcome.held_out_before),
        "held_out": _number(outcome.held_out),
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "tokens_per_second": _number(outcome.tokens_per_second),
        "bytes_sent": traffic.sent,
        "bytes_received": traffic.received,
        "personal": None if outcome.personal is None else str(outcome.personal),
    }
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))
        return
    _print(result, out)


def _print(result: dict[str, Any], out: Path) -> None:
    def shown(value: float | None, form: str) -> str:
        return "not measured" if value is None else format(value, form)

    begun = f"went on from step {result['resumed']}" if result["resumed"] else "begun anew"
    click.echo(f"step {result['step']} ({begun}): loss {shown(result['loss'], '.4f')} nats a token")
    if result["held_out"] is not None:
        before = shown(result["held_out_before"], ".4f")
        click.echo(f"held-out text: {before} before, {shown(result['held_out'], '.4f')} after")
    click.echo(
        f"{result['tokens']:,} tokens, {shown(result['tokens_per_second'], ',.0f')} a second; "
        f"{result['bytes_sent']:,} bytes sent, {result['bytes_received']:,} received"
    )
    click.echo(f"run       {out}")
    if result["personal"] is not None:
        click.echo(f"personal  {result['personal']}")


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


@contextmanager
def _bar() -> Iterator[Callable[[Any], None]]:
    """A bar on stderr with loss and speed; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("connecting", total=None)

        def watch(progress: Any) -> None:
            shown = [] if math.isnan(progress.loss) else [f"loss {progress.loss:.3f}"]
            if not math.isnan(progress.tokens_per_second):
                shown.append(f"{progress.tokens_per_second:,.0f} tokens/s")
            note = ", ".join(shown) or "training"
            bar.update(task, completed=progress.step, total=progress.steps, description=note)

        yield watch
