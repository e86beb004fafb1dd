"""Options that the commands of ``splitveil split`` share."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitveil.cli.keys import read_key
from splitveil.cli.tls import client_options, client_tls

if TYPE_CHECKING:
    from splitveil.splitlearning.run import Server

DTYPES = ("float32", "bfloat16", "float16")
KINDS = click.Choice(["nothing", "lora", "full"])
FOLDER = click.Path(path_type=Path, file_okay=False)
shape = click.option(
    "--shape",
    type=click.Choice(["u", "straight"]),
    default="u",
    show_default=True,
    help="u: norm and head on the device. straight: in the cloud; training then SENDS THE TEXT as labels.",
)
dtype = click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="The same on both sides."
)
place = click.option(
    "--torch-device", "place", default="cpu", show_default=True, help="Where this half runs, such as cuda."
)
there = [
    click.option("--base", required=True, metavar="DIR", help="The public model: a local folder, or embedded:base."),
    click.option("--server", required=True, metavar="HOST:PORT", help="Where the upper blocks are served."),
    click.option(
        "--key-file",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Holds the API key, where the server asks for one; without it, $SPLITVEIL_API_KEY.",
    ),
    *client_options,
    dtype,
    place,
]
defence = click.option(
    "--defence",
    default="none",
    show_default=True,
    metavar="NAME",
    help="Done to every state before it leaves: gaussian:SIGMA, dchi:ETA, int8, int4, bfloat16, topk:SHARE, "
    "permutation.",
)


def options_of(options: list[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds these, in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def server(how: dict[str, Any]) -> "Server":
    """Where the cloud is, as the options say. Raises ``ConfigurationError``."""
    from splitveil.splitlearning.run import Server

    return Server(how["server"], read_key(how["key_file"]), client_tls(how), how["allow_plaintext"])


def quiet() -> None:
    """What libraries announce about their own next versions is not for people at a terminal."""
    warnings.filterwarnings("ignore", category=FutureWarning)
