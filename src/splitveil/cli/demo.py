"""``splitveil demo``."""

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.option("--question", metavar="TEXT", help="A patient's question; the default is fixed.")
@click.option(
    "--max-new-tokens", default=80, show_default=True, type=click.IntRange(8, 256), help="Tokens of the answer at most."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where the report goes, by default a temporary folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the screen.")
def demo(question: str | None, max_new_tokens: int, out: Path | None, as_json: bool) -> None:
    """See it work, on this machine, in under two minutes, without a network or an account.

    Starts a vendor's server process with a private clinic adapter, and asks it a patient's question from this process,
    over a real socket: the base model alone, with plaintext PEFT, and with the private adapter. Shows both texts,
    whether the private tokens equal the plaintext ones, the speed, what the server saw, what was published, and how
    far the conversation went towards giving the adapter away. Ends with what the same question would have leaked, had
    the model been split in its middle without encryption.
    """
    from rich.console import Console
    from transformers.utils import logging

    from splitveil.demo.run import QUESTION, demonstrate
    from splitveil.demo.screen import show

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    console = Console(stderr=True)
    with console.status("a vendor's process, a customer's process, a socket between them …"):
        result = demonstrate(question or QUESTION, max_new_tokens, out)
    if as_json:
        click.echo(json.dumps({**asdict(result), "identical": result.identical}))
    else:
        show(result, Console())
