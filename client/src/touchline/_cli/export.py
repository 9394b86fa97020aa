"""``touchline export``: write a server's episodes to a data set."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console

from touchline import datasets
from touchline._cli.options import COLUMNS, EPISODES, OUTPUT, REFUSED, Address, AsJson, FormatName, TableName, Timeout
from touchline._cli.progress import ProgressDisplay
from touchline._cli.terminal import EXIT_FAILED, check_reachable, format_rate, pluralize, print_json, print_line, report_errors
from touchline.client import ReplayClient
from touchline.datasets import ExportReport

MAX_IDS = 5
"""Maximum number of ids printed for one reason."""


def export(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="File (.h5, .hdf5, .npz, .pt), or Minari data set (minari:ID).")],
    address: Address = "127.0.0.1:50051",
    timeout_s: Timeout = 60.0,
    table: TableName = "",
    first: Annotated[
        int | None,
        typer.Option(metavar="ID", help="Only episodes with this id or a higher one.", min=0, rich_help_panel=EPISODES),
    ] = None,
    last: Annotated[
        int | None, typer.Option(metavar="ID", help="Only episodes with this id or a lower one.", min=0, rich_help_panel=EPISODES)
    ] = None,
    newest: Annotated[
        int | None, typer.Option(metavar="N", help="Only the newest N of the episodes that match.", min=1, rich_help_panel=EPISODES)
    ] = None,
    actor: Annotated[str | None, typer.Option(metavar="NAME", help="Only episodes of this actor.", rich_help_panel=EPISODES)] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Only this column (obs includes obs.*). Repeatable.", rich_help_panel=COLUMNS),
    ] = None,
    format: Annotated[
        FormatName | None,
        typer.Option(help="Format of the data set. Default: derived from its name.", show_choices=True, rich_help_panel=OUTPUT),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing data set.", rich_help_panel=OUTPUT)] = False,
    compress: Annotated[
        bool, typer.Option("--compress", help="HDF5 and NPZ: compress; smaller and slower.", rich_help_panel=OUTPUT)
    ] = False,
    allow_refused: Annotated[
        bool, typer.Option("--allow-refused", help="Exit with status 0 even if episodes were left out.", rich_help_panel=REFUSED)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the episodes of a table to a data set, oldest first.

    `touchline load` restores them bit for bit. The data set is written under a hidden name and renamed once it is complete. Episodes that
    the server evicts before they are read are not in it. A .pt file holds episodes of equal length; --format tdmpc2 writes a folder with
    one file per length.

    \b
    Examples:
      touchline export everything.h5 --address replay-host:50051
      touchline export newest.npz --table demos --newest 100 --compress
      touchline export minari:soccer/striker-v0 --actor striker
      touchline export chunks --format tdmpc2

    \b
    Exit status:
      0    the data set is written
      1    the format cannot represent some of the episodes (stdout says why), or the export failed
      2    the command line is wrong
      130  interrupted; nothing was written
    """
    started_s = time.monotonic()
    with report_errors("interrupted; nothing was written") as check_interrupted, ProgressDisplay(Console(stderr=True)) as display:
        check_reachable(address, table=table)

        def progress(done: int, total: int, report: ExportReport) -> None:
            check_interrupted()
            display.show(f"export {target}", done, total, unit="episodes", size_bytes=report.size_bytes)

        with ReplayClient(address, table=table, timeout_s=timeout_s) as client:
            report = datasets.export(
                client,
                target,
                format=format,
                force=force,
                compress=compress,
                progress=progress,
                first=first,
                last=last,
                newest=newest,
                actor=actor,
                columns=column or None,
            )
        display.hide()
        if as_json:
            print_json({"address": address, "table": table, "target": target, "report": report})
        else:
            _print_exported(target, report, time.monotonic() - started_s)
    if report.left_out and not allow_refused:
        raise typer.Exit(EXIT_FAILED)


def _print_exported(target: str, report: ExportReport, seconds: float) -> None:
    rate = format_rate(report.written, report.size_bytes, seconds)
    print_line(f"{target}: {pluralize(report.written, 'episode')}, {pluralize(report.steps, 'step')}{rate}")
    if report.evicted:
        print_line(f"  evicted     {report.evicted:>10,}  before they were read")
    if report.left_out:
        print_line(f"  left out    {report.left_out:>10,}", style="bold red")
    for reason, ids in report.reasons.items():
        more = f" and {len(ids) - MAX_IDS:,} more" if len(ids) > MAX_IDS else ""
        print_line(f"    {len(ids):,} × {reason}: episodes {', '.join(map(str, ids[:MAX_IDS]))}{more}")
