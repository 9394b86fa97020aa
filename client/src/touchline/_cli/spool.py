"""``touchline spool``: what lies in a robot's spool, having refused episodes sent again, and sending what waits."""

from __future__ import annotations

import logging
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from touchline._actor.rejections import Refusals, add_refusal
from touchline._cli.progress import Meter
from touchline._cli.terminal import EXIT_FAILED, amount, complain, fail, failing_well, probe, say, say_reasons, speed
from touchline_protos.log_lines import escape

if TYPE_CHECKING:
    from touchline._spool.maintenance import SendReport, SpooledEpisode, SpoolReport

# `touchline load` and `export` work where the standard library's sqlite3 is missing: so each command here loads it itself.

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The spool_dir of an EpisodeWriter.")]


@app.callback()
def _describe() -> None:
    """Shows a robot's spool, sends what waits in it, retries what was refused.

    \b
    Examples:
      touchline spool show /var/lib/robot/spool
      touchline spool retry /var/lib/robot/spool
      touchline spool send /var/lib/robot/spool replay-host:50051
    """


@app.command()
def show(folder: Folder) -> None:
    """Shows what waits, and what was refused and why.

    Changes nothing, and may be run while a writer uses the spool.

    \b
    Examples:
      touchline spool show /var/lib/robot/spool

    \b
    Exit status:
      0  the spool is shown
      1  it is not a spool, or cannot be read
    """
    from touchline._spool import maintenance

    with failing_well("interrupted"):
        _print_spool(maintenance.survey(folder))


@app.command()
def retry(folder: Folder) -> None:
    """Puts refused episodes back into the queue.

    Each goes back to its old place, for example after the server's schema or limits were corrected. The next writer on the spool sends
    them, or `touchline spool send`. No writer may be using the spool. Damaged episodes stay.

    \b
    Examples:
      touchline spool retry /var/lib/robot/spool

    \b
    Exit status:
      0  they wait again, or none was refused
      1  it is not a spool, is in use, or cannot be written
    """
    from touchline._spool import maintenance

    with failing_well("interrupted"):
        count = maintenance.retry(folder)
        if not count:
            say(f"{folder}: none was refused")
        else:
            say(f"{folder}: {amount(count, 'refused episode')} {'waits' if count == 1 else 'wait'} again")
            say(f"  the next writer on it sends them; or: touchline spool send {folder} HOST:PORT")


@app.command()
def send(
    folder: Folder,
    address: Annotated[
        str, typer.Argument(metavar="HOST:PORT|unix:/PATH", envvar="TOUCHLINE_ADDRESS", help="Server.", show_envvar=True)
    ] = "127.0.0.1:50051",
    timeout_s: Annotated[float, typer.Option(metavar="SECONDS", help="Longest time that the server may be away.", min=0.1)] = 60.0,
) -> None:
    """Sends what waits, each episode exactly once.

    Oldest first; meant for a robot whose program is gone. The episodes keep their keys, so what the server has stored already is not stored
    again, and an interrupted command can be run again. No writer may be using the spool (it would send what waits by itself). Refused
    episodes stay, with the reason.

    \b
    Examples:
      touchline spool send /var/lib/robot/spool replay-host:50051

    \b
    Exit status:
      0    nothing is left to send
      1    some were refused (stdout says why), some are left, or it failed
      2    the command line is wrong
      130  interrupted; what is not acknowledged waits as before
    """
    from touchline._spool import maintenance

    begun_s = time.monotonic()
    logging.getLogger("touchline").addHandler(_Traces())
    interrupted = "interrupted; what is not acknowledged waits as before, and the same command again goes on"
    with failing_well(interrupted) as check, Meter(Console(stderr=True)) as meter:
        maintenance.check_free(folder)
        probe(address)
        told = False

        def watch(report: SendReport) -> None:
            nonlocal told
            check()
            if (report.trouble is not None) != told:
                told = not told
                meter.rest()
                complain(f"tried again: {escape(str(report.trouble))}" if told else "it goes on")
            done = report.sent + report.refused
            meter.show(f"send {folder}", done, report.total, unit="episodes", size_bytes=report.size_bytes)

        report = maintenance.send(folder, address, timeout_s=timeout_s, watch=watch)
        meter.rest()
        _tell_sent(folder, address, report, time.monotonic() - begun_s)
    if report.trouble is not None:
        fail(f"given up: {escape(str(report.trouble))}\nThe same command may be run again.", EXIT_FAILED)
    if report.refused or report.left:
        raise typer.Exit(EXIT_FAILED)


class _Traces(logging.Handler):
    """Of what the client logs, only what nobody expected is not said by the command itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None:
            complain(self.format(record))


def _print_spool(report: SpoolReport) -> None:
    user = "nobody uses it" if report.user is None else f"in use by process {report.user}" if report.user else "in use"
    table = f", for the table {report.table!r}" if report.table else ""
    say(f"{report.folder}: {user}; {_size(report.disk_bytes)} on the disk{table}")
    _tell_some("waiting", report.waiting)
    _tell_some("refused", report.refused, style="bold red")
    if report.refused:
        say_reasons(_reasons(report.refused))
        say(f"    touchline spool retry {report.folder}: puts them back into the queue")
    if report.damaged:
        _tell_some("damaged", report.damaged, style="bold red")
        say_reasons(_reasons(report.damaged))
    if report.missing:
        told = "the newest that were taken over: the log was damaged or cut; perhaps they were acknowledged before"
        say(f"  missing     {report.missing:>10,}  {told}", style="bold red")


def _tell_some(what: str, episodes: list[SpooledEpisode], style: str = "") -> None:
    line = f"  {what:<10}  {len(episodes):>10,}"
    if episodes:
        steps, size_bytes = sum(episode.length for episode in episodes), sum(episode.size_bytes for episode in episodes)
        oldest_s = min(episode.time_s for episode in episodes)
        line += f"  {amount(steps, 'step')}, {_size(size_bytes)}, the oldest of {_moment(oldest_s)}"
    say(line, style if episodes else "")


def _tell_sent(folder: Path, address: str, report: SendReport, seconds: float) -> None:
    if not report.total:
        say(f"{folder}: nothing waits")
        return
    rate = speed(report.sent + report.refused, report.size_bytes, seconds)
    say(f"{folder} to {address}: {amount(report.sent, 'episode')}, {amount(report.steps, 'step')}{rate}")
    say(f"  acknowledged  {report.sent:>8,}")
    if report.refused:
        say(f"  refused     {report.refused:>10,}  kept in the spool; touchline spool retry {folder} puts them back", style="bold red")
        say_reasons(report.reasons)
        from touchline._spool.queue import MAX_REFUSED

        if report.refused > MAX_REFUSED:
            say(f"    a writer that uses this spool keeps the newest {MAX_REFUSED} alone: put them back before one does")
    if report.left:
        say(f"  left        {report.left:>10,}  wait as before", style="bold red")


def _reasons(episodes: list[SpooledEpisode]) -> dict[str, Refusals]:
    reasons: dict[str, Refusals] = {}
    for episode in episodes:
        add_refusal(reasons, episode.number, episode.reason)
    return reasons


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:,.1f} kB"


def _moment(time_s: float) -> str:
    """Returns when something was, and how long ago where this machine's clock makes sense of it."""
    ago_s = time.time() - time_s
    told = datetime.fromtimestamp(time_s).isoformat(sep=" ", timespec="seconds")
    for seconds, unit in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")):
        if ago_s >= 2 * seconds:
            return f"{told}, {ago_s / seconds:,.0f} {unit} ago"
    return told
