"""``splitveil split serve``."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitveil.cli import split_options as options
from splitveil.cli.keys import ledger_option
from splitveil.cli.models import load_base
from splitveil.cli.tls import server_options, server_tls
from splitveil.embedded import PREFIX
from splitveil.errors import ConfigurationError

if TYPE_CHECKING:
    from splitveil.splitlearning.server import SplitServer

_SERVE = [
    click.option("--model", required=True, metavar="DIR", help="Hugging Face folder, or embedded:base."),
    click.option("--cut", required=True, type=click.IntRange(0), metavar="N", help="Blocks that devices have."),
    options.shape,
    click.option(
        "--listen", default="127.0.0.1:7435", show_default=True, metavar="HOST:PORT", help="Port 0 picks one."
    ),
    click.option("--name", metavar="NAME", help="What API keys call this model; without it the folder's name."),
    click.option(
        "--state", type=options.FOLDER, metavar="DIR", help="Keeps checkpoints; without it nothing is trained."
    ),
    click.option(
        "--train",
        "trains",
        type=options.KINDS,
        default="nothing",
        show_default=True,
        help="What devices may have trained here: nothing, adapters, or all weights of the upper blocks as well.",
    ),
    *server_options,
    click.option("--keys", is_flag=True, help="Ask for API keys (splitveil keys create); --ledger implies it."),
    ledger_option,
    click.option("--sessions", default=32, show_default=True, type=click.IntRange(1, 1024), help="Devices at once."),
    click.option(
        "--training",
        default=2,
        show_default=True,
        type=click.IntRange(1, 1024),
        help="… of which have trained weights of their own, in this process's memory.",
    ),
    click.option("--runs", default=1000, show_default=True, type=click.IntRange(1), help="Runs kept in --state."),
    click.option(
        "--silence",
        default=900.0,
        show_default=True,
        type=click.FloatRange(1),
        metavar="SECONDS",
        help="End sessions that ask nothing, or take no answer, for so long.",
    ),
    click.option("--log-json", is_flag=True, help="Log one JSON object a line instead of text."),
    click.option("--log-identities", is_flag=True, help="Name clients in the log; without it nothing does."),
    click.option(
        "--drain",
        default=10.0,
        show_default=True,
        type=click.FloatRange(0),
        metavar="SECONDS",
        help="How long SIGTERM lets sessions under way go on before it ends them.",
    ),
    options.dtype,
    options.place,
]


@click.command()
@options.options_of(_SERVE)
def serve(
    model: str,
    cut: int,
    shape: str,
    listen: str,
    name: str | None,
    state: Path | None,
    trains: str,
    keys: bool,
    ledger: str | None,
    sessions: int,
    training: int,
    runs: int,
    silence: float,
    log_json: bool,
    log_identities: bool,
    drain: float,
    dtype: str,
    place: str,
    **tls: Any,
) -> None:
    """Serve the blocks after a cut until interrupted.

    WHOEVER RUNS THIS CAN READ WHAT DEVICES SEND, as far as an audit of this model at this cut says (`splitveil audit`);
    in the straight shape training sends the labels, which are the text.

    With --state, devices may train (--train says what of this side). A run is kept below a name that does not tell who
    may go on with it: the device has its token. Keep DIR as you keep its users' data: what was learnt from text is in
    it. Without --keys or --ledger, whoever reaches the address is answered. Addresses beyond this machine need TLS.

    SIGTERM and Ctrl-C end sessions after a while; what is in DIR is whole at any time. SIGHUP reads the certificate.

    \b
    splitveil split serve --model embedded:base --cut 2
    splitveil split serve --model ./qwen --cut 4 --state ./cloud --train lora \\
        --listen 0.0.0.0:7435 --tls-cert server.crt --tls-key server.key --keys
    """
    from splitveil.serving.operations.logs import configure
    from splitveil.serving.operations.signals import run

    files = server_tls(tls["tls_cert"], tls["tls_key"], tls["tls_client_ca"])
    if trains != "nothing" and state is None:
        raise ConfigurationError(f"--train {trains} needs --state DIR, where the checkpoints of runs are kept")
    configure(as_json=log_json)
    options.quiet()
    base, _ = load_base(model, dtype=dtype, device=place)

    from splitveil.metering import Clock, Database, Keyring, locate
    from splitveil.serving.heartbeat import Heartbeat
    from splitveil.splitlearning.interface import Shape, Trains
    from splitveil.splitlearning.server import SplitServer

    kinds = list(Trains)
    resources = ExitStack()
    keyring: Keyring | None = None
    try:
        if keys or ledger is not None:
            database = resources.enter_context(Database(locate(ledger)))
            clock = Clock(database)
            resources.enter_context(Heartbeat(clock))
            keyring = Keyring(database, clock=clock)
        server = SplitServer(
            base,
            cut=cut,
            shape=Shape(shape),
            name=name or _name(model),
            state=state,
            trains=frozenset(kinds[: kinds.index(Trains(trains)) + 1]),
            listen=listen,
            tls=files,
            allow_plaintext=tls["allow_plaintext"],
            keys=keyring,
            sessions=sessions,
            training=training,
            runs=runs,
            silence=silence,
            log_identities=log_identities,
            on_close=resources.close,
        )
    except BaseException:
        resources.close()
        raise

    def reload(told: Callable[[], bool]) -> None:
        server.renew_certificate()

    with server:
        run(server, drain=drain, reload=reload, announce=lambda: _announce(server))


def _announce(server: "SplitServer") -> None:
    for line in server.summary():
        click.echo(line)
    click.echo(f"listening on {server.address} ({server.transport}); stop with Ctrl-C")


def _name(model: str) -> str:
    return model.removeprefix(PREFIX) if model.startswith(PREFIX) else Path(model).resolve().name
