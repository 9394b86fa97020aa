"""The command line's root: global options, and one module per command."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from touchline._cli import spool, table
from touchline._cli.clear import clear
from touchline._cli.export import export
from touchline._cli.load import load
from touchline._cli.options import GroupedCommand

app = typer.Typer(
    name="touchline",
    no_args_is_help=True,
    add_completion=False,
    # Plain text: it preserves the lines of the examples, and reads the same in a log.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command(cls=GroupedCommand)(load)
app.command(cls=GroupedCommand)(export)
app.command(cls=GroupedCommand)(clear)
app.add_typer(spool.app, name="spool")
app.add_typer(table.app, name="table")


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"touchline {version('touchline')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Touchline's client: load and export data sets, empty a server, manage its tables and the spools of robots.

    Every command has its own --help, with examples. TLS and tokens are set by environment variables: TOUCHLINE_TLS_CA, TOUCHLINE_TOKEN.

    \b
    Examples:
      touchline load mt30/*.pt --address replay-host:50051
      touchline load minari:D4RL/door/human-v2
      touchline export everything.h5 --address replay-host:50051
      touchline clear --address replay-host:50051
      touchline table create demos buffer_size=100_000 --address replay-host:50051
      touchline spool show /var/lib/robot/spool
    """
