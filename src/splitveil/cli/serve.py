"""``splitveil serve``."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from splitveil.cli.keys import ledger_option
from splitveil.cli.tls import server_options, server_tls
from splitveil.embedded import resolve
from splitveil.errors import ConfigurationError

if TYPE_CHECKING:
    from splitveil.serving.server import Server

_OPTIONS: list[Callable[..., Callable[..., None]]] = [
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        required=True,
        metavar="NAME=DIR",
        help="An adapter to serve under a name: a PEFT folder, or embedded:clinic. May be repeated.",
    ),
    click.option(
        "--listen", default="127.0.0.1:7433", show_default=True, metavar="HOST:PORT", help="Port 0 picks one."
    ),
    click.option(
        "--noise",
        default=0.0,
        show_default=True,
        metavar="FRACTION",
        help="Noise added to every answer, as a fraction of a typical one (0.01 = 1 %). It buys little: SECURITY.md.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["lattice", "sealed"]),
        default="lattice",
        show_default=True,
        help="sealed: CKKS, which publishes nothing of the weights and is a thousand times slower.",
    ),
    *server_options,
    ledger_option,
    click.option(
        "--limit",
        type=click.IntRange(1),
        metavar="ROWS",
        help="Answer no client more rows than this at any layer, ever. A layer of d inputs is learned from d, or half.",
    ),
    click.option("--sessions", default=32, show_default=True, type=click.IntRange(1, 1024), help="Clients at once."),
    click.option("--metrics", metavar="HOST:PORT", help="Serve figures for Prometheus there, below /metrics."),
    click.option("--log-json", is_flag=True, help="Log one JSON object a line instead of text."),
    click.option("--log-identities", is_flag=True, help="Name clients in the log; without it nothing does."),
    click.option(
        "--gauge-key",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="A secret that is kept from start to start, made where there is none; by default below ~/.local/state.",
    ),
    click.option(
        "--drain",
        default=10.0,
        show_default=True,
        type=click.FloatRange(0),
        metavar="SECONDS",
        help="How long SIGTERM lets generations go on before it ends them.",
    ),
]


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@_options
def serve(
    adapters: tuple[str, ...],
    listen: str,
    noise: float,
    engine: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    allow_plaintext: bool,
    ledger: str | None,
    limit: int | None,
    sessions: int,
    metrics: str | None,
    log_json: bool,
    log_identities: bool,
    gauge_key: Path | None,
    drain: float,
) -> None:
    """Serve private adapters until interrupted.

    The weights stay in this process. Clients receive a publication (which hides the weights behind lattice noise) and
    answers to encrypted queries. What this does not protect is the first section of SECURITY.md: above all, a client
    that may ask for as many rows as the layers are wide can rebuild the adapter from the answers.

    With --ledger or --limit, clients need an API key (splitveil keys create), and their rows are counted before they
    are answered. Without, whoever reaches the address is answered, and nothing is counted. Either is warned of at the
    start: that nothing is counted, and a limit that the best known attack needs no more than.

    Addresses beyond this machine need TLS (--tls-cert, --tls-key).

    SIGTERM and Ctrl-C let generations under way go on for a while, then end. SIGHUP reads the adapters' folders and
    the certificate again and publishes what has changed; its clients connect again, and their rows stay counted.

    \b
    splitveil serve --adapter clinic=./my-lora
    splitveil serve --adapter clinic=./my-lora --limit 1024
    splitveil serve --adapter clinic=./my-lora --listen 0.0.0.0:7433 \\
        --tls-cert server.crt --tls-key server.key --limit 1024
    splitveil serve --adapter clinic=embedded:clinic --listen 127.0.0.1:0
    """
    from splitveil.serving.operations.logs import configure
    from splitveil.serving.operations.signals import run
    from splitveil.serving.serve import reload
    from splitveil.serving.serve import serve as start

    tls = server_tls(tls_cert, tls_key, tls_client_ca)
    configure(as_json=log_json)
    folders = parse_adapters(adapters)
    server = start(
        folders,
        listen,
        noise=noise,
        engine=engine,
        sessions=sessions,
        ledger=ledger,
        limit=limit,
        tls=tls,
        allow_plaintext=allow_plaintext,
        metrics=metrics,
        log_identities=log_identities,
        gauge_key=gauge_key,
    )
    with server:
        run(
            server,
            drain=drain,
            reload=lambda told: reload(server, folders, noise=noise, engine=engine, gauge_key=gauge_key, stop=told),
            announce=lambda: _announce(server),
        )


def _announce(server: "Server") -> None:
    for line in server.summary():
        click.echo(line)
    if server.metrics_address is not None:
        click.echo(f"metrics on http://{server.metrics_address}/metrics")
    click.echo(f"listening on {server.address} ({server.transport}); stop with Ctrl-C")


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
