"""``touchline-server recover``: recovers the undamaged episodes of a damaged store."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from touchline_server.cli.options import AsJson, ConfigPath, DataDir, TableName, resolve_data_dir, resolve_store
from touchline_server.cli.terminal import EXIT_FAILED, exit_with, print_findings, print_json, progress_bar, report_errors


def recover(
    data_dir: DataDir = None,
    table: TableName = None,
    accept_loss: Annotated[
        bool,
        typer.Option("--accept-loss", help="Recover even if something is lost. Otherwise a loss changes nothing."),
    ] = False,
    config: ConfigPath = None,
    as_json: AsJson = False,
) -> None:
    """Recover the undamaged episodes of a damaged store.

    Of the default table, or with --table of another. Finds every episode whose own bytes are intact, whatever else in the file is damaged,
    cut off or missing. They go into a new file, which replaces the old one; the old one stays beside it, unchanged, as
    touchline.db.damaged. No server may be running on the store, and the disk needs space for both files.

    \b
    Examples:
      touchline-server recover --data-dir /data
      touchline-server recover --data-dir /data --accept-loss
      touchline-server recover --data-dir /data --table demos

    \b
    Exit status:
      0    a server can start on the store again, with everything, or with what
           is left after --accept-loss
      1    nothing was changed: something is lost (stdout lists it) without
           --accept-loss, or nothing is left
      2    the configuration or the command line is wrong
      130  interrupted; run it again
    """
    from touchline_server.durability import recovery

    with report_errors(interrupted="interrupted; run the command again"):
        folder = resolve_store(resolve_data_dir(data_dir, config), table or "")
        with progress_bar(f"recovering {folder}") as progress:
            found = recovery.recover(folder, progress, accept_loss=accept_loss)
    what = f"{found.episodes} episodes, {found.steps} steps"
    if as_json:
        print_json({"store": str(folder)} | asdict(found))
    else:
        done = "were recovered; the old file is kept beside the new one" if found.replaced else "can be kept"
        print_findings(found.lost, f"{what} {done}")
    if found.replaced:
        return
    exit_with(
        f"what is listed above is lost, and nothing was changed; restore a copy of {folder}, or accept the loss: "
        f"`touchline-server recover --accept-loss --data-dir {folder}`",
        EXIT_FAILED,
    )
