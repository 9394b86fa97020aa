"""``touchline load``: store data sets on a server."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Annotated, Any

import typer
from rich.console import Console

from touchline import datasets
from touchline._cli.options import COLUMNS, EPISODES, REFUSED, SERVER, Address, AsJson, FormatName, TableName, Timeout
from touchline._cli.progress import ProgressDisplay
from touchline._cli.terminal import (
    EXIT_FAILED,
    check_reachable,
    describe_place,
    format_rate,
    pluralize,
    print_columns,
    print_error,
    print_json,
    print_line,
    print_reasons,
    report_errors,
)
from touchline.client import ReplayClient
from touchline.datasets import DatasetError, LoadReport
from touchline.types import ColumnInfo
from touchline_protos.log_lines import escape

INTERRUPTED = "interrupted; run the same command again to continue, nothing is stored twice"


def load(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="Files (.pt, .h5, .hdf5, .npz), folders of .pt files, or Minari data sets (minari:ID)."),
    ],
    address: Address = "127.0.0.1:50051",
    timeout_s: Timeout = 60.0,
    table: TableName = "",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Read and check everything, report what would be stored; needs no server.", rich_help_panel=SERVER),
    ] = False,
    format: Annotated[
        FormatName | None,
        typer.Option(help="Format of the sources. Default: derived from their names.", show_choices=True, rich_help_panel=EPISODES),
    ] = None,
    first: Annotated[int, typer.Option(metavar="N", help="Skip the first N episodes of each source.", min=0, rich_help_panel=EPISODES)] = 0,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Load at most N episodes of each source.", min=0, rich_help_panel=EPISODES)
    ] = None,
    again: Annotated[
        str,
        typer.Option(
            metavar="LABEL",
            help="Store episodes again that were stored before, once for each label.",
            rich_help_panel=EPISODES,
        ),
    ] = "",
    actor: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Actor to store the episodes under. Default: as in the source.", rich_help_panel=EPISODES),
    ] = None,
    task: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", help="Add a column `task` (int64) that holds this number.", rich_help_panel=COLUMNS),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN", help="Leave out a column and everything below it (obs.rgb, info). Repeatable.", rich_help_panel=COLUMNS
        ),
    ] = None,
    float32: Annotated[bool, typer.Option("--float32", help="Store float64 columns as float32.", rich_help_panel=COLUMNS)] = False,
    infos: Annotated[
        bool,
        typer.Option("--infos", help="Minari: also store infos that are arrays, as columns info.<name>.", rich_help_panel=COLUMNS),
    ] = False,
    max_episode_bytes: Annotated[
        int | None,
        typer.Option(
            metavar="BYTES",
            help="Refuse larger episodes without reading them. Default: the server's limit.",
            min=1,
            rich_help_panel=REFUSED,
        ),
    ] = None,
    allow_refused: Annotated[
        bool, typer.Option("--allow-refused", help="Exit with status 0 even if episodes were refused.", rich_help_panel=REFUSED)
    ] = False,
    trust_pickle: Annotated[
        bool,
        typer.Option("--trust-pickle", help="Unpickle whatever a .pt file contains. RUNS ANY CODE IN IT."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Store data sets in a table of a server, each episode exactly once.

    To continue an interrupted load, run the same command again: episodes that are already stored are recognised by the content of the
    source, whatever its name, and count as duplicates. So do episodes that have been evicted since; --again stores them once more.

    \b
    Examples:
      touchline load mt30/*.pt --address replay-host:50051
      touchline load minari:D4RL/door/human-v2 --float32 --task 3
      touchline load demos.h5 --table demos --actor teleoperation --limit 100
      touchline load demos.npz --dry-run

    \b
    Exit status:
      0    every episode is stored
      1    some were refused (stdout says which and why), or the load failed
      2    the command line is wrong
      130  interrupted
    """
    transforms = datasets.ColumnTransforms(task=task, drop=tuple(drop or ()), float32=float32)
    options: dict[str, Any] = {"format": format, "transforms": transforms, "first": first, "limit": limit, "infos": infos}
    options |= {"trust_pickle": trust_pickle, "max_episode_bytes": max_episode_bytes}
    failed = False
    document: dict[str, Any] = {"address": None if dry_run else address, "table": table, "sources": []}
    with report_errors(INTERRUPTED) as check_interrupted, ProgressDisplay(Console(stderr=True)) as display, ExitStack() as stack:
        client = None
        if not dry_run:
            check_reachable(address, table=table)
            client = stack.enter_context(ReplayClient(address, table=table, timeout_s=timeout_s))
        for source in sources:

            def progress(stage: str, done: int, total: int, report: LoadReport, source: str = source) -> None:
                check_interrupted()
                in_bytes = stage == "fingerprint"
                size_bytes = done if in_bytes else report.size_bytes
                display.show(f"{stage} {source}", done, total, unit="bytes" if in_bytes else "episodes", size_bytes=size_bytes)

            started_s = time.monotonic()
            columns: dict[str, ColumnInfo] = {}
            try:
                if client is None:
                    report, columns = datasets.inspect(source, progress=progress, **options)
                else:
                    report = datasets.load(client, source, actor=actor, reload_label=again, progress=progress, **options)
            except DatasetError as error:
                failed = True
                display.hide()
                print_error(escape(str(error)))
                document["sources"].append({"source": source, "report": None, "error": error})
                continue
            failed |= bool(report.refused) and not allow_refused
            display.hide()
            document["sources"].append({"source": source, "report": report, "error": None})
            if as_json:
                continue
            if client is None:
                _print_inspected(source, report, columns)
            else:
                _print_loaded(source, report, time.monotonic() - started_s)
        if client is not None:
            counts = document["counts"] = client.counts()
            stored = f"{pluralize(counts.episodes_stored, 'episode')}, {pluralize(counts.steps_stored, 'step')}"
            if not as_json:
                print_line(f"{describe_place(address, table)} has {stored}")
    if as_json:
        print_json(document)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _print_loaded(source: str, report: LoadReport, seconds: float) -> None:
    rate = format_rate(report.read, report.size_bytes, seconds)
    print_line(f"{source}: {pluralize(report.read, 'episode')}, {pluralize(report.steps, 'step')}{rate}")
    print_line(f"  stored      {report.stored:>10,}")
    if report.duplicates:
        print_line(f"  duplicates  {report.duplicates:>10,}  stored before, even if evicted since; --again LABEL stores them once more")
    _print_refused(report)


def _print_inspected(source: str, report: LoadReport, columns: dict[str, ColumnInfo]) -> None:
    size = f"{report.size_bytes / 1e6:,.1f} MB"
    print_line(f"{source}: {pluralize(report.read, 'episode')}, {pluralize(report.steps, 'step')}, {size}; nothing was sent")
    print_columns(columns)
    _print_refused(report)


def _print_refused(report: LoadReport) -> None:
    if report.refused:
        print_line(f"  refused     {report.refused:>10,}", style="bold red")
        print_reasons(report.reasons)
