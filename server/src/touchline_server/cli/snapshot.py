"""``touchline-server snapshot``: copies a durable store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from touchline_server.cli.options import ConfigPath, DataDir, resolve_data_dir
from touchline_server.cli.terminal import report_errors


def snapshot(
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the copy; created if it does not exist.")],
    data_dir: DataDir = None,
    config: ConfigPath = None,
) -> None:
    """Copy a durable store as it is at one moment.

    Works while a server is running on the store. A server can start with the copy's folder as its data_dir.

    \b
    Examples:
      touchline-server snapshot --data-dir /data /backup/monday

    \b
    Exit status:
      0    the copy is complete and on disk
      1    the copy could not be made
      2    the configuration or the command line is wrong
      130  interrupted; the copy is incomplete
    """
    from touchline_server.durability import maintenance

    with report_errors(interrupted="interrupted; the copy is incomplete"):
        file = maintenance.snapshot(resolve_data_dir(data_dir, config), target)
    typer.echo(str(file))
