"""The command line's root: global options, and one module per command."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from touchline._cli import episodes, spool, table
from touchline._cli.bench import bench
from touchline._cli.clear import clear
from touchline._cli.doctor.command import doctor
from touchline._cli.export import export
from touchline._cli.grouped_help import GroupedCommand, GroupedGroup
from touchline._cli.load import load
from touchline._cli.snapshot import snapshot
from touchline._cli.status import status
from touchline._cli.top import top

LOOK, DATA, SERVER, ROBOTS = "Look at a server", "Move data", "Change a server", "Robots"
"""Groups of commands in the help text."""

app = typer.Typer(
    name="touchline",
    cls=GroupedGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command(cls=GroupedCommand, rich_help_panel=LOOK)(status)
app.command(cls=GroupedCommand, rich_help_panel=LOOK)(top)
app.command(cls=GroupedCommand, rich_help_panel=LOOK)(doctor)
app.command(cls=GroupedCommand, rich_help_panel=LOOK)(bench)
app.command(cls=GroupedCommand, rich_help_panel=DATA)(load)
app.command(cls=GroupedCommand, rich_help_panel=DATA)(export)
app.command(cls=GroupedCommand, rich_help_panel=DATA)(snapshot)
app.add_typer(episodes.app, name="episodes", rich_help_panel=LOOK)
app.add_typer(table.app, name="table", rich_help_panel=SERVER)
app.command(cls=GroupedCommand, rich_help_panel=SERVER)(clear)
app.add_typer(spool.app, name="spool", rich_help_panel=ROBOTS)


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
    """Look at a replay server, check the way to it, move data, and manage its tables.

    Every command has its own --help, with examples and exit statuses. TLS and tokens are set by environment variables: TOUCHLINE_TLS_CA,
    TOUCHLINE_TOKEN. With --json a command prints one JSON document on stdout; errors are sentences on stderr.

    \b
    Examples:
      touchline status --address replay-host:50051
      touchline doctor --address replay-host:50051
      touchline load mt30/*.pt --address replay-host:50051
      touchline export everything.h5 --address replay-host:50051
      touchline table create demos buffer_size=100_000
      touchline spool show /var/lib/robot/spool

    \b
    Exit status of every command:
      0    done
      1    it failed, or something was refused
      2    the command line is wrong
      130  interrupted
    """
