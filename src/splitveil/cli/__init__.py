"""The command line: one thin file per command group, loaded when it is called."""

import importlib
import os
import sys
from typing import NoReturn

import click

import splitveil
from splitveil.errors import SplitveilError

# name → (module, attribute, one line for the overview); importing torch for --help would take seconds
COMMANDS = {
    "demo": ("splitveil.cli.demo", "demo", "See it work: a private clinic adapter answers, on this machine."),
    "serve": ("splitveil.cli.serve", "serve", "Serve private adapters (the vendor's side)."),
    "generate": (
        "splitveil.cli.generate",
        "generate",
        "Answer one prompt privately (the customer's side).",
    ),
    "chat": ("splitveil.cli.generate", "chat", "Talk to a base model with a private adapter."),
    "split": (
        "splitveil.cli.split",
        "split",
        "Use and train a model in two halves, the upper one in the cloud.",
    ),
    "audit": (
        "splitveil.cli.audit",
        "audit",
        "How much of a prompt leaks where a model is split?",
    ),
    "keys": ("splitveil.cli.keys", "keys", "Make, list and revoke the API keys of clients (the vendor's side)."),
    "extract": ("splitveil.cli.extract", "extract", "How much of an adapter can a client rebuild?"),
    "inspect": ("splitveil.cli.inspect", "inspect", "Can this adapter be served? What would it cost?"),
    "convert": ("splitveil.cli.convert", "convert", "ChatGLM checkpoints and adapters without remote code."),
    "bench": ("splitveil.cli.bench", "bench", "Measure speed and size on this machine, both sides in one run."),
}


class _Commands(click.Group):
    """Loads a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(splitveil.__version__, prog_name="splitveil")
def cli() -> None:
    """Private LoRA adapters for open language models.

    The vendor keeps the adapter, the customer keeps the prompt: the base model runs at the customer, its activations
    leave encrypted, and the vendor computes on them without seeing them.

    Begin with `splitveil demo`.
    """


def main() -> None:
    """Runs the command line; errors of ours are one line on stderr and exit status 1."""
    if sys.argv[1:2] in [[name] for name in ("generate", "chat", "demo", "bench")]:
        _spin_less()
    status = _run()
    if sys.argv[1:2] in (["generate"], ["chat"]) or sys.argv[1:3] in (["split", "train"], ["split", "generate"]):
        _leave(status)
    if status:
        sys.exit(status)


def _run() -> int:
    """The exit status."""
    try:
        cli(standalone_mode=False)
    except SplitveilError as error:
        click.echo(f"splitveil: {error}", err=True)
        return 1
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("splitveil: interrupted", err=True)
        return 130
    return 0


def _spin_less() -> None:
    """Before torch is there: its idle OpenMP threads go to sleep within microseconds.

    By default they spin for milliseconds, on the processors that a query and its answer need to get on their way
    (docs/design/round-trips.md). Who has chosen otherwise is left alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _leave(status: int) -> NoReturn:
    """Ends a client's process at once, with everything shown: the server sees the connection close.

    Clearing up, a process that has used torch and gRPC is aborted now and then ("terminate called without an active
    exception"), after its work was done, also with all threads of ours ended.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
