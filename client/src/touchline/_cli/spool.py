"""``touchline spool``: show a robot's spool, put refused episodes back into its queue, send what is pending."""

from __future__ import annotations

import logging
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from touchline._actor.refusal_summary import RefusalSummary, add_refusal
from touchline._cli.grouped_help import GroupedCommand
from touchline._cli.options import SERVER, AsJson
from touchline._cli.progress import ProgressDisplay
from touchline._cli.terminal import (
    EXIT_FAILED,
    check_reachable,
    exit_with,
    format_rate,
    pluralize,
    print_error,
    print_json,
    print_line,
    print_reasons,
    report_errors,
)
from touchline_protos.log_lines import escape

if TYPE_CHECKING:
    from touchline._spool.maintenance import SendReport, SpooledEpisode, SpoolReport

# Commands import touchline._spool when they run: `touchline load` and `export` must work without the standard library's sqlite3.

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Spool folder: the spool_dir of an EpisodeWriter.")]


@app.callback()
def _root() -> None:
    """Show a robot's spool, send what is pending in it, retry what was refused.

    \b
    Examples:
      touchline spool show /var/lib/robot/spool
      touchline spool retry /var/lib/robot/spool
      touchline spool send /var/lib/robot/spool replay-host:50051
    """


@app.command(cls=GroupedCommand)
def show(folder: Folder, as_json: AsJson = False) -> None:
    """Show what is pending, and what was refused and why.

    Changes nothing, and is safe while a writer uses the spool.

    \b
    Examples:
      touchline spool show /var/lib/robot/spool

    \b
    Exit status:
      0  the spool is shown
      1  the folder is not a spool, or cannot be read
    """
    from touchline._spool import maintenance

    with report_errors("interrupted"):
        report = maintenance.inspect(folder)
    if as_json:
        print_json(report)
    else:
        _print_spool(report)


@app.command(cls=GroupedCommand)
def retry(folder: Folder, as_json: AsJson = False) -> None:
    """Put refused episodes back into the queue.

    For example after the server's schema or limits were corrected. Each returns to its former position; the next writer that uses the
    spool sends it, or `touchline spool send` does. No writer may be using the spool. Damaged episodes are left as they are.

    \b
    Examples:
      touchline spool retry /var/lib/robot/spool

    \b
    Exit status:
      0  they are pending again, or none was refused
      1  the folder is not a spool, is in use, or cannot be written
    """
    from touchline._spool import maintenance

    with report_errors("interrupted"):
        count = maintenance.retry(folder)
    if as_json:
        print_json({"folder": folder, "pending_again": count})
    elif not count:
        print_line(f"{folder}: no refused episodes")
    else:
        print_line(f"{folder}: {pluralize(count, 'refused episode')} pending again")
        print_line(f"  the next writer that uses the spool sends them; or run: touchline spool send {folder} HOST:PORT")


@app.command(cls=GroupedCommand)
def send(
    folder: Folder,
    address: Annotated[
        str, typer.Argument(metavar="HOST:PORT|unix:/PATH", envvar="TOUCHLINE_ADDRESS", help="Address of the server.", show_envvar=True)
    ] = "127.0.0.1:50051",
    timeout_s: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="How long to wait for an unreachable server.", min=0.1, rich_help_panel=SERVER),
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Send what is pending, oldest first, each episode exactly once.

    For a robot whose program no longer runs; a running writer sends its spool by itself. Episodes keep their keys, so whatever the server
    has already stored is not stored again, and an interrupted command can be run again. No writer may be using the spool. Refused episodes
    stay in the spool, with the reason.

    \b
    Examples:
      touchline spool send /var/lib/robot/spool replay-host:50051

    \b
    Exit status:
      0    nothing is left to send
      1    some were refused (stdout says why), some are still pending, or sending failed
      2    the command line is wrong
      130  interrupted; what was not acknowledged is still pending
    """
    from touchline._spool import maintenance

    started_s = time.monotonic()
    logging.getLogger("touchline").addHandler(_Traces())
    interrupted = "interrupted; what was not acknowledged is still pending, run the same command again to continue"
    with report_errors(interrupted) as check_interrupted, ProgressDisplay(Console(stderr=True)) as display:
        maintenance.check_free(folder)
        check_reachable(address)
        retrying = False

        def show_progress(report: SendReport) -> None:
            nonlocal retrying
            check_interrupted()
            if (report.error is not None) != retrying:
                retrying = not retrying
                display.hide()
                print_error(f"retrying: {escape(str(report.error))}" if retrying else "the server answers again")
            done = report.sent + report.refused
            display.show(f"send {folder}", done, report.total, unit="episodes", size_bytes=report.size_bytes)

        report = maintenance.send(folder, address, timeout_s=timeout_s, progress=show_progress)
        display.hide()
        if as_json:
            print_json({"folder": folder, "address": address, "report": report})
        else:
            _print_sent(folder, address, report, time.monotonic() - started_s)
    if report.error is not None:
        exit_with(f"gave up: {escape(str(report.error))}\nRun the same command again to continue.", EXIT_FAILED)
    if report.refused or report.pending:
        raise typer.Exit(EXIT_FAILED)


class _Traces(logging.Handler):
    """Prints those log records of the client that carry a traceback; the command itself reports everything else."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None:
            print_error(self.format(record))


def _print_spool(report: SpoolReport) -> None:
    user = "not in use" if report.holder is None else f"in use by process {report.holder}" if report.holder else "in use"
    print_line(f"{report.folder}: {user}; {_size(report.disk_bytes)} on the disk")
    _print_count("pending", report.waiting)
    _print_count("refused", report.refused, style="bold red")
    if report.refused:
        print_reasons(_reasons(report.refused))
        print_line(f"    touchline spool retry {report.folder}: puts them back into the queue")
    if report.damaged:
        _print_count("damaged", report.damaged, style="bold red")
        print_reasons(_reasons(report.damaged))
    if report.missing:
        reason = "the newest of the spool: its log was damaged or cut; they may have been acknowledged before"
        print_line(f"  missing     {report.missing:>10,}  {reason}", style="bold red")


def _print_count(what: str, episodes: list[SpooledEpisode], style: str = "") -> None:
    line = f"  {what:<10}  {len(episodes):>10,}"
    if episodes:
        steps, size_bytes = sum(episode.length for episode in episodes), sum(episode.size_bytes for episode in episodes)
        oldest_s = min(episode.time_s for episode in episodes)
        line += f"  {pluralize(steps, 'step')}, {_size(size_bytes)}, oldest of {_moment(oldest_s)}"
    print_line(line, style if episodes else "")
    tables = Counter(episode.table for episode in episodes)
    if any(tables):
        print_line("    " + ", ".join(f"{count:,} for {_table(name)}" for name, count in sorted(tables.items())))


def _table(name: str) -> str:
    return f"the table {escape(name)!r}" if name else "the default table"


def _print_sent(folder: Path, address: str, report: SendReport, seconds: float) -> None:
    if not report.total:
        print_line(f"{folder}: nothing is pending")
        return
    rate = format_rate(report.sent + report.refused, report.size_bytes, seconds)
    print_line(f"{folder} to {address}: {pluralize(report.sent, 'episode')}, {pluralize(report.steps, 'step')}{rate}")
    print_line(f"  acknowledged  {report.sent:>8,}")
    if report.refused:
        print_line(
            f"  refused     {report.refused:>10,}  still in the spool; touchline spool retry {folder} puts them back", style="bold red"
        )
        print_reasons(report.reasons)
        from touchline._spool.queue import MAX_REFUSED

        if report.refused > MAX_REFUSED:
            print_line(f"    a writer that uses this spool keeps only the newest {MAX_REFUSED} of them: put them back first")
    if report.pending:
        print_line(f"  left        {report.pending:>10,}  still pending", style="bold red")


def _reasons(episodes: list[SpooledEpisode]) -> dict[str, RefusalSummary]:
    reasons: dict[str, RefusalSummary] = {}
    for episode in episodes:
        add_refusal(reasons, episode.number, episode.reason)
    return reasons


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:,.1f} kB"


def _moment(time_s: float) -> str:
    """Returns a time as text, and how long ago it was, unless this machine's clock says it is yet to come."""
    ago_s = time.time() - time_s
    text = datetime.fromtimestamp(time_s).isoformat(sep=" ", timespec="seconds")
    for seconds, unit in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")):
        if ago_s >= 2 * seconds:
            return f"{text}, {ago_s / seconds:,.0f} {unit} ago"
    return text
