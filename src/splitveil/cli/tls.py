"""The options for TLS, of both sides."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitveil.errors import ConfigurationError

if TYPE_CHECKING:
    from splitveil.serving.tls import ClientTLS, ServerTLS

_FILE = click.Path(path_type=Path, dir_okay=False)

plaintext_option = click.option(
    "--allow-plaintext-beyond-this-machine",
    "allow_plaintext",
    is_flag=True,
    help="Do without TLS on a network. Whoever is on the way reads API keys and can answer wrongly.",
)
server_options = [
    click.option("--tls-cert", type=_FILE, metavar="FILE", help="This server's certificate and its chain, PEM."),
    click.option("--tls-key", type=_FILE, metavar="FILE", help="The certificate's private key, PEM."),
    click.option(
        "--tls-client-ca",
        type=_FILE,
        metavar="FILE",
        help="Let in only clients with a certificate of this authority (mutual TLS), PEM.",
    ),
    plaintext_option,
]
client_options = [
    click.option("--tls", is_flag=True, help="Connect with TLS; trust the authorities that this machine trusts."),
    click.option("--tls-ca", type=_FILE, metavar="FILE", help="Connect with TLS; trust this authority alone, PEM."),
    click.option("--tls-cert", type=_FILE, metavar="FILE", help="Connect with TLS; show this certificate, PEM."),
    click.option("--tls-key", type=_FILE, metavar="FILE", help="The private key of --tls-cert, PEM."),
    plaintext_option,
]


def server_tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> "ServerTLS | None":
    """What the options say. Raises ``ConfigurationError`` for half of it."""
    from splitveil.serving.tls import ServerTLS

    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise ConfigurationError("TLS needs both --tls-cert and --tls-key")
    return ServerTLS(cert, key, client_ca)


def client_tls(options: dict[str, Any]) -> "ClientTLS | None":
    """What the options say. Raises ``ConfigurationError`` for half of it."""
    from splitveil.serving.tls import ClientTLS

    ca, cert, key = options["tls_ca"], options["tls_cert"], options["tls_key"]
    if not options["tls"] and ca is None and cert is None and key is None:
        return None
    if (cert is None) != (key is None):
        raise ConfigurationError("--tls-cert and --tls-key come together")
    return ClientTLS(ca, cert, key)
