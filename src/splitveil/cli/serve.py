"""``splitveil serve``."""

import logging

import click

from splitveil.cli.keys import ledger_option
from splitveil.embedded import resolve
from splitveil.errors import ConfigurationError


@click.command()
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    required=True,
    metavar="NAME=DIR",
    help="An adapter to serve under a name: a PEFT folder, or embedded:clinic. May be repeated.",
)
@click.option("--listen", default="127.0.0.1:7433", show_default=True, metavar="HOST:PORT", help="Port 0 picks one.")
@click.option(
    "--noise",
    default=0.0,
    show_default=True,
    metavar="FRACTION",
    help="Noise added to every answer, as a fraction of a typical one (0.01 = 1 %). It buys little: see SECURITY.md.",
)
@click.option("--engine", type=click.Choice(["lattice"]), default="lattice", show_default=True)
@ledger_option
@click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="ROWS",
    help="Answer no client more rows than this at any layer, ever. A layer of d inputs is learned from d.",
)
@click.option("--sessions", default=32, show_default=True, type=click.IntRange(1, 1024), help="Clients at once.")
def serve(
    adapters: tuple[str, ...],
    listen: str,
    noise: float,
    engine: str,
    ledger: str | None,
    limit: int | None,
    sessions: int,
) -> None:
    """Serve private adapters until interrupted.

    The weights stay in this process. Clients receive a publication (which hides the weights behind lattice noise) and
    answers to encrypted queries. What this does not protect is the first section of SECURITY.md: above all, a client
    that may ask for as many rows as the layers are wide can rebuild the adapter from the answers.

    With --ledger or --limit, clients need an API key (splitveil keys create), and their rows are counted before they
    are answered. Without, whoever reaches the address is answered.

    \b
    splitveil serve --adapter clinic=./my-lora
    splitveil serve --adapter clinic=./my-lora --limit 2048
    splitveil serve --adapter clinic=embedded:clinic --listen 127.0.0.1:0
    """
    from splitveil.serving.serve import serve as start

    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    folders = parse_adapters(adapters)
    server = start(folders, listen, noise=noise, engine=engine, sessions=sessions, ledger=ledger, limit=limit)
    with server:
        for line in server.summary():
            click.echo(line)
        click.echo(f"listening on {server.address} (plaintext transport, this machine only); stop with Ctrl-C")
        server.wait()


def parse_adapters(adapters: tuple[str, ...]) -> dict[str, str]:
    """NAME=DIR pairs as a mapping. Raises ``ConfigurationError``."""
    folders: dict[str, str] = {}
    for entry in adapters:
        name, equals, folder = entry.partition("=")
        if not equals or not name or not folder:
            raise ConfigurationError(f"--adapter {entry!r} is not NAME=DIR, such as clinic=./my-lora")
        if name in folders:
            raise ConfigurationError(f"two adapters are called {name!r}; names must differ")
        folders[name] = str(resolve(folder))
    return folders
