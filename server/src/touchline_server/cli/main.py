"""The command ``touchline-server``: its root, and one module a command.

Commands import what they need themselves: ``--help`` and the server's first line of log need neither the configuration's classes nor gRPC,
and a health check needs only gRPC.
"""

from __future__ import annotations

from typing import Annotated

import typer

from touchline_server import __version__
from touchline_server.cli.check import check
from touchline_server.cli.healthcheck import healthcheck
from touchline_server.cli.recover import recover
from touchline_server.cli.serve import serve
from touchline_server.cli.snapshot import snapshot

app = typer.Typer(
    name="touchline-server",
    no_args_is_help=True,
    # Plain text: it preserves the lines of the examples, and reads the same in a container's log.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (serve, healthcheck, check, recover, snapshot):
    app.command()(command)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"touchline-server {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Touchline's replay server: actors push whole episodes, learners pull batches of slices, over gRPC.

    serve and healthcheck run and check a server; check, recover and snapshot maintain its durable store. Every command has its own --help,
    with examples.

    \b
    Examples:
      touchline-server serve
      touchline-server serve --config cfg/default.toml --port 0
      touchline-server healthcheck --address 127.0.0.1:50051
      touchline-server check --data-dir /data
      touchline-server snapshot --data-dir /data /backup/monday
    """


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    app()
