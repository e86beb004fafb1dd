"""``splitveil keys``, and where a client's key is read from."""

import datetime
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import click

from splitveil.cli.standings import as_json as standings_as_json
from splitveil.cli.standings import by_name, clients, print_clients
from splitveil.errors import ConfigurationError
from splitveil.metering import Account, Database, Key, Keyring, accounts, is_key, locate
from splitveil.serving.secret_file import require_own

VARIABLE = "SPLITVEIL_API_KEY"
_MOST_BYTES = 4096  # of a key file; a key has 59

ledger_option = click.option(
    "--ledger",
    metavar="URL",
    help="sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE; without it $SPLITVEIL_LEDGER, else a file "
    "below ~/.local/state. A password belongs into ~/.pgpass or $SPLITVEIL_LEDGER, not here.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def keys() -> None:
    """Make, list and revoke the API keys of clients.

    A key names its client: rows are counted for the NAME, so a new key under an old name carries on the same account.
    Keys are shown once, when they are made; only digests are kept.

    \b
    (umask 077; splitveil keys create acme --adapter clinic --expires 90 > acme.key)
    splitveil keys list
    splitveil keys revoke acme
    """


@keys.command()
@click.argument("name")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME", help="Allow this adapter only; may be repeated.")
@click.option("--expires", type=float, metavar="DAYS", help="Refuse the key after so many days.")
@ledger_option
def create(name: str, adapters: tuple[str, ...], expires: float | None, ledger: str | None) -> None:
    """Make a key for the client NAME and print it, this once.

    The key alone goes to standard output, everything else to standard error. The client puts it into
    $SPLITVEIL_API_KEY or into a file that nobody else may read, never on a command line.
    """
    with Database(locate(ledger)) as database:
        keyring = Keyring(database)
        others = [key for key in keyring.records() if key.name == name]
        secret, key = keyring.create(name, adapters=adapters or None, days=expires)
        spent = _most_rows([account for account in accounts(database) if account.identity == name])
    click.echo(secret)
    click.echo(f"key {key.id} of {name}: {_scope(key)}, expires {_date(key.expires)}. It is not shown again.", err=True)
    if others or spent:
        click.echo(f"{name} had {len(others)} keys before and carries on with {spent:,} rows spent.", err=True)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a key instead of a table.")
@ledger_option
def list_keys(as_json: bool, ledger: str | None) -> None:
    """List all keys and what their clients were answered; never the keys themselves.

    Rows are counted for every layer, a lease ahead of the answers; shown are the layer with most, and how many rows
    are left where fewest are. Beside them stands what the best attack that is known makes of so many rows, at the
    layer of which it knows most: a relative error of the weights, which is no bound. Of the sealed engine it says in
    words that one answer may be enough: there it depends on how honestly a client made its keys. Learned is how many
    layers were asked for as many rows as they have inputs, or give an error of 10 % or less: consider them known to the
    client.
    """
    with Database(locate(ledger)) as database:
        found = Keyring(database).records()
        answered = clients(database)
    if as_json:
        own = by_name(answered)
        for key in found:
            click.echo(json.dumps({**asdict(key), **standings_as_json(own.get(key.name, []))}))
        return
    _table(found)
    if answered:
        click.echo()
        print_clients(answered)


@keys.command()
@click.argument("which", metavar="ID|NAME")
@ledger_option
def revoke(which: str, ledger: str | None) -> None:
    """Revoke the key of an ID, or all keys of a NAME, for ever.

    Servers that share the ledger refuse it at once, and end open sessions within seconds.
    """
    with Database(locate(ledger)) as database:
        revoked = Keyring(database).revoke(which)
    for key in revoked:
        click.echo(f"key {key.id} of {key.name} is revoked")
    if not revoked:
        click.echo("nothing to do: revoked before")


def read_key(file: Path | None) -> str | None:
    """The client's key: that of a key file if one is named, else ``$SPLITVEIL_API_KEY``, else None.

    Raises ``ConfigurationError`` for a file that cannot be read, or that others can, and for what is no key; never
    repeats what it read.
    """
    if file is None:
        text, place = os.environ.get(VARIABLE), f"${VARIABLE}"
    else:
        try:
            require_own(file, "key file")
            with file.open("rb") as stream:
                text, place = stream.read(_MOST_BYTES).decode("ascii", "replace"), str(file)
        except OSError as error:
            raise ConfigurationError(f"the key file {file} cannot be read: {error.strerror}") from None
    if not text:
        if file is None:
            return None
        raise ConfigurationError(f"the key file {file} is empty")
    if not is_key(text.strip()):
        raise ConfigurationError(f"{place} holds no API key; one begins with sv_, and the vendor makes it")
    return text.strip()


def _table(found: Iterable[Key]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("name", "adapters"):
        table.add_column(heading, overflow="fold")
    for heading in ("id", "created", "expires", "revoked"):
        table.add_column(heading, no_wrap=True)
    for key in found:
        table.add_row(
            key.name,
            "all" if key.adapters is None else ", ".join(key.adapters),
            key.id,
            _date(key.created),
            _date(key.expires),
            _date(key.revoked) if key.revoked is not None else "no",
        )
    Console().print(table)


def _most_rows(own: Iterable[Account]) -> int:
    return max((account.rows for account in own), default=0)


def _scope(key: Key) -> str:
    return "every adapter" if key.adapters is None else "adapters " + ", ".join(key.adapters)


def _date(moment: int | None) -> str:
    if moment is None:
        return "never"
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%d")
