"""``splitveil split generate``."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from splitveil.cli import split_options as options
from splitveil.cli.generate import harmless
from splitveil.cli.models import load_base
from splitveil.errors import ConfigurationError, SplitveilError

_GENERATE = [
    *options.there,
    click.option(
        "--personal",
        type=options.FOLDER,
        metavar="DIR",
        help="What `split train` wrote: its --out.",
    ),
    click.option("--cut", type=click.IntRange(0), metavar="N", help="Blocks that are here; a run knows its own."),
    click.option("--shape", type=click.Choice(["u", "straight"]), help="As served; a run knows its own. [default: u]"),
    click.option(
        "--defence",
        metavar="NAME",
        help="Done to every state before it leaves, as in split train. [default: what the run was trained with]",
    ),
    click.option("--prompt", required=True, metavar="TEXT|-", help="The prompt; - reads it from standard input."),
    click.option(
        "--max-new-tokens", default=128, show_default=True, type=click.IntRange(1), help="Tokens of the answer at most."
    ),
    click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0 means greedy."),
    click.option(
        "--top-p",
        default=1.0,
        show_default=True,
        type=click.FloatRange(0, 1, min_open=True),
        help="Sample from the fewest tokens that have this probability together.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Seed for sampling."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text."),
]


@click.command()
@options.options_of(_GENERATE)
def generate(
    prompt: str,
    personal: Path | None,
    cut: int | None,
    shape: str | None,
    defence: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Answer one prompt with the lower blocks here and the upper blocks in the cloud.

    THE CLOUD CAN READ FROM THE HIDDEN STATES of prompt and answer what `splitveil audit` measures for this model, cut
    and defence. In the straight shape it computes the next token itself.

    --personal adds what `split train` learnt; where the run trained the cloud's part, too, its token has the cloud use
    that. With --json: text, tokens (ids of the new tokens), tokens_per_second, bytes_sent, bytes_received.

    \b
    splitveil split generate --base embedded:base --server 127.0.0.1:7435 --cut 2 --prompt "Hello"
    splitveil split generate --base ./qwen --server cloud.example:7435 --tls \\
        --personal ./mine --temperature 0.7 --top-p 0.9 --prompt -
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ConfigurationError("the prompt is empty")
    server = options.server(how)
    options.quiet()
    base, tokenizer = load_base(how["base"], dtype=how["dtype"], device=how["place"])

    import torch

    from splitveil.splitlearning.generation import Sampling
    from splitveil.splitlearning.generation import generate as run
    from splitveil.splitlearning.run import open_for_use

    sampling = Sampling(temperature, top_p=top_p, seed=seed) if temperature else None
    told = _told(personal, cut, shape)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    device, cloud = open_for_use(base, server, told, defence=defence)
    printer = _Printer(tokenizer, shown=not as_json)

    def each(chosen: Any) -> None:
        printer.add(int(chosen[0]))

    begun = time.perf_counter()
    try:
        end = _ends(base, tokenizer)
        with torch.no_grad():
            output = run(device, cloud, tokens, max_new_tokens=max_new_tokens, sampling=sampling, end=end, each=each)
    except SplitveilError:
        printer.end()
        raise
    finally:
        cloud.close()
    seconds = time.perf_counter() - begun
    printer.end()
    new = output[0, tokens.shape[1] :].tolist()
    traffic = cloud.traffic
    if as_json:
        result = {
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "tokens": new,
            "tokens_per_second": len(new) / seconds,
            "bytes_sent": traffic.sent,
            "bytes_received": traffic.received,
        }
        click.echo(json.dumps(result))
        return
    click.echo(
        f"{len(new)} tokens, {len(new) / seconds:.1f} a second, {traffic.sent:,} bytes sent, "
        f"{traffic.received:,} received",
        err=True,
    )


class _Printer:
    """Prints an answer as it comes, as far as its tokens make whole characters."""

    def __init__(self, tokenizer: Any, *, shown: bool) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._tokens: list[int] = []
        self._printed = 0

    def add(self, token: int) -> None:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if self._shown and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            new = text[self._printed :]
            self._printed = len(text)
            click.echo(harmless(new) if sys.stdout.isatty() else new, nl=False)

    def end(self) -> None:
        if self._shown and self._tokens:
            click.echo()  # what follows begins on a line of its own


def _told(personal: Path | None, cut: int | None, shape: str | None) -> Any:
    """What is known of the run, or of no run. Raises ``ConfigurationError`` where that contradicts the options."""
    from splitveil.splitlearning.interface import Shape
    from splitveil.splitlearning.run import Told, read_run

    if personal is None:
        if cut is None:
            raise ConfigurationError("give --cut, or --personal with the folder of a run")
        return Told(cut, Shape(shape or "u"), None, None)
    told = read_run(personal)
    if (cut is not None and cut != told.cut) or (shape is not None and shape != told.shape):
        raise ConfigurationError(f"the run in {personal} is of cut {told.cut} in the {told.shape} shape")
    return told


def _ends(base: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text, by the model's configuration or its tokenizer's."""
    found = getattr(base.generation_config, "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    return set() if found is None else {found} if isinstance(found, int) else set(found)
