"""``splitveil generate`` and ``splitveil chat``: the customer's side."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from splitveil.cli.keys import read_key
from splitveil.cli.models import DTYPES, load_base
from splitveil.cli.tls import client_options as tls_options
from splitveil.cli.tls import client_tls
from splitveil.errors import ConfigurationError, SplitveilError

_OPTIONS = [
    click.option("--base", required=True, metavar="DIR", help="The base model: a local folder, or embedded:base."),
    click.option("--server", required=True, metavar="HOST:PORT", help="Where the vendor serves the adapter."),
    click.option("--adapter", required=True, metavar="NAME", help="The adapter's name there."),
    click.option(
        "--key-file",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Holds the API key, where the vendor asks for one; without it, $SPLITVEIL_API_KEY.",
    ),
    *tls_options,
    click.option(
        "--max-new-tokens", default=128, show_default=True, type=click.IntRange(1), help="Tokens of the answer at most."
    ),
    click.option(
        "--engine",
        type=click.Choice(["lattice", "sealed"]),
        default="lattice",
        show_default=True,
        help="How the adapter must be served; another one is refused.",
    ),
    click.option(
        "--fixed-length",
        is_flag=True,
        help="Always take --max-new-tokens steps, so that the server cannot see where an answer ends.",
    ),
    click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0 means greedy."),
    click.option("--seed", type=int, help="Seed for sampling."),
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Of the base model."),
    click.option("--device", default="cpu", show_default=True, help="Where the base model runs, such as cuda."),
]


def _common(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@_common
@click.option("--prompt", required=True, metavar="TEXT|-", help="The prompt; - reads it from standard input.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def generate(
    prompt: str, as_json: bool, max_new_tokens: int, temperature: float, seed: int | None, **where: Any
) -> None:
    """Answer one prompt with a base model on this machine and an adapter that stays with its vendor.

    The text is streamed to standard output. With --json: text, tokens (ids of the new tokens), tokens_per_second,
    bytes_sent, bytes_received.

    \b
    splitveil generate --base ./qwen --server 127.0.0.1:7433 --adapter clinic --prompt "What is anaemia?"
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ConfigurationError("the prompt is empty")
    model, tokenizer = _connected(where)
    result = _answer(model, tokenizer, text, max_new_tokens, temperature, seed, stream=not as_json)
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(
            f"{len(result['tokens'])} tokens, {result['tokens_per_second']:.1f} a second, "
            f"{result['bytes_sent']:,} bytes sent, {result['bytes_received']:,} received",
            err=True,
        )


@click.command()
@_common
def chat(max_new_tokens: int, temperature: float, seed: int | None, **where: Any) -> None:
    """Talk to a base model with a private adapter; an empty line, or end of file, ends it.

    The tokenizer's chat template is used where it has one. Without one, every line is asked on its own in the form
    "Question: … Answer:", which the embedded default understands; nothing is remembered between lines.

    \b
    splitveil chat --base embedded:base --server 127.0.0.1:7433 --adapter clinic
    """
    model, tokenizer = _connected(where)
    history: list[dict[str, str]] = []
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        history.append({"role": "user", "content": line})
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        else:
            text = f"Question: {line}\nAnswer:"
        result = _answer(model, tokenizer, text, max_new_tokens, temperature, seed, stream=True)
        history.append({"role": "assistant", "content": result["text"]})


def _connected(where: dict[str, Any]) -> tuple[Any, Any]:
    """The base model, connected to the server's adapter, and its tokenizer."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from splitveil.serving.connect import connect

    key = read_key(where["key_file"])
    tls = client_tls(where)
    model, tokenizer = load_base(where["base"], dtype=where["dtype"], device=where["device"])
    columns = TextColumn("downloading the publication"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)
        connect(
            model,
            where["server"],
            where["adapter"],
            api_key=key,
            tls=tls,
            allow_plaintext=where["allow_plaintext"],
            fixed_length=where["fixed_length"],
            engine=where["engine"],
            progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
        )
    return model, tokenizer


def _streamer(tokenizer: Any) -> Any:
    """Prints the answer as it comes; to a terminal, without control characters, which a server could steer towards."""
    from transformers import TextStreamer

    class Printed(TextStreamer):  # type: ignore[misc]  # transformers has no types
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(harmless(text) if sys.stdout.isatty() else text, stream_end)

    return Printed(tokenizer, skip_prompt=True, skip_special_tokens=True)


def harmless(text: str) -> str:
    """``text`` with nothing in it that a terminal would obey, but line breaks and tabs."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def _answer(
    model: Any, tokenizer: Any, text: str, max_new_tokens: int, temperature: float, seed: int | None, *, stream: bool
) -> dict[str, Any]:
    """Generates, and measures what it took."""
    import torch

    from splitveil.serving.connect import connection

    if seed is not None:
        torch.manual_seed(seed)
    tokens = tokenizer(text, return_tensors="pt").to(model.device)
    length = tokens["input_ids"].shape[1]
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length + max_new_tokens > limit:
        raise ConfigurationError(
            f"{length} prompt tokens and {max_new_tokens} new ones are more than the model's {limit}; "
            "shorten the prompt, or give a smaller --max-new-tokens"
        )
    traffic = connection(model).session.traffic
    sent, received = traffic.sent, traffic.received
    streamer = _streamer(tokenizer) if stream else None
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    begun = time.perf_counter()
    try:
        output = model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **sampling,
        )
    except SplitveilError:
        if stream:
            click.echo()  # the error begins on a line of its own
        raise
    seconds = time.perf_counter() - begun
    new = output[0, length:].tolist()
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": new,
        "tokens_per_second": len(new) / seconds,
        "bytes_sent": traffic.sent - sent,
        "bytes_received": traffic.received - received,
    }
