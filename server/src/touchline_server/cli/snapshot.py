"""``touchline-server snapshot``: copies a durable store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from touchline_server.cli.options import AsJson, ConfigPath, DataDir, TableName, resolve_data_dir, resolve_store
from touchline_server.cli.terminal import print_json, report_errors


def snapshot(
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the copy; created if it does not exist.")],
    data_dir: DataDir = None,
    table: TableName = None,
    config: ConfigPath = None,
    as_json: AsJson = False,
) -> None:
    """Copy a durable store as it is at one moment.

    Copies every table, each at a moment of its own, or with --table one. Works while a server is running on the store. A server can start
    with the copy's folder as its data_dir; after --table, the table is its default table.

    \b
    Examples:
      touchline-server snapshot --data-dir /data /backup/monday
      touchline-server snapshot --data-dir /data --table demos /backup/demos

    \b
    Exit status:
      0    the copy is complete and on disk
      1    the copy could not be made
      2    the configuration or the command line is wrong
      130  interrupted; the copy is incomplete
    """
    from touchline_server.durability import maintenance

    with report_errors(interrupted="interrupted; the copy is incomplete"):
        folder = resolve_data_dir(data_dir, config)
        copy_all = table is None
        files = maintenance.snapshot_all(folder, target) if copy_all else [maintenance.snapshot(resolve_store(folder, table or ""), target)]
    if as_json:
        print_json({"data_dir": str(folder), "files": [str(file) for file in files]})
        return
    for file in files:
        typer.echo(str(file))
