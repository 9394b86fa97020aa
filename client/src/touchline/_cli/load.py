"""``touchline load``, ``export`` and ``clear``, with ``spool`` beside them. :mod:`touchline._cli.main` sees to typer and rich."""

from __future__ import annotations

import enum
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

from touchline import datasets
from touchline._cli import spool
from touchline._cli.progress import Meter
from touchline._cli.terminal import EXIT_FAILED, EXIT_USAGE, amount, complain, fail, failing_well, probe, say, say_reasons, speed
from touchline.client import ReplayClient
from touchline.datasets import DatasetError, ExportReport, LoadReport
from touchline.types import ColumnInfo, ServerInfo
from touchline_protos.log_lines import escape

LOAD_INTERRUPTED = "interrupted; the same command again goes on, and stores nothing twice"

app = typer.Typer(
    name="touchline",
    no_args_is_help=True,
    add_completion=False,
    # Plain text: it keeps the examples' lines, and reads the same in a log.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(spool.app, name="spool")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"touchline {version('touchline')}")
        raise typer.Exit


@app.callback()
def _describe(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Touchline's client: loads and exports data sets, empties a server, and manages robots' spools.

    TLS and tokens come from the environment: TOUCHLINE_TLS_CA, TOUCHLINE_TOKEN.

    \b
    Examples:
      touchline load mt30/*.pt --address replay-host:50051
      touchline load minari:D4RL/door/human-v2
      touchline export everything.h5 --address replay-host:50051
      touchline clear --address replay-host:50051
      touchline spool show /var/lib/robot/spool
    """


class FormatName(str, enum.Enum):
    """The formats; :data:`touchline.datasets.FORMATS`."""

    TDMPC2 = "tdmpc2"
    MINARI = "minari"
    HDF5 = "hdf5"
    NPZ = "npz"


Address = Annotated[
    str, typer.Option(metavar="HOST:PORT|unix:/PATH", envvar="TOUCHLINE_ADDRESS", help="Server.", show_default=True, show_envvar=True)
]
Format = Annotated[FormatName | None, typer.Option(help="Format of the data set. Default: by its name.", show_choices=True)]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", help="Longest time that the server may be away in one call.", min=0.1)]


@app.command()
def load(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="Files (.pt, .h5, .hdf5, .npz), folders of .pt files, or Minari data sets (minari:ID)."),
    ],
    address: Address = "127.0.0.1:50051",
    format: Format = None,
    actor: Annotated[str | None, typer.Option(metavar="NAME", help="Actor to store them under. Default: as in the source.")] = None,
    task: Annotated[int | None, typer.Option(metavar="NUMBER", help="Add a column `task` (int64) that holds this number.")] = None,
    drop: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Leave out a column and everything below it (obs.rgb, info). Repeatable.")
    ] = None,
    float32: Annotated[bool, typer.Option("--float32", help="Store float64 columns as float32.")] = False,
    infos: Annotated[bool, typer.Option("--infos", help="Minari: also store infos that are arrays, as columns info.<name>.")] = False,
    first: Annotated[int, typer.Option(metavar="N", help="Skip this many episodes of each source.", min=0)] = 0,
    limit: Annotated[int | None, typer.Option(metavar="N", help="At most this many episodes of each source.", min=0)] = None,
    again: Annotated[str, typer.Option(metavar="LABEL", help="Store episodes again that were stored before, once for each label.")] = "",
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Unpickle whatever a .pt file contains. RUNS ANY CODE IN IT.")
    ] = False,
    max_episode_bytes: Annotated[
        int | None, typer.Option(metavar="BYTES", help="Refuse larger episodes without reading them. Default: the server's limit.", min=1)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read everything and report what would be stored; needs no server.")] = False,
    allow_refused: Annotated[bool, typer.Option("--allow-refused", help="Exit with 0 even if episodes were refused.")] = False,
    timeout_s: Timeout = 60.0,
) -> None:
    """Stores data sets on a server, each episode exactly once.

    To go on with an interrupted load, run the same command again: episodes that are stored already are recognised as duplicates, by the
    source's content and not by its name. An episode that was stored and has been evicted counts as stored; --again stores it once more.

    \b
    Examples:
      touchline load mt30/*.pt --address replay-host:50051
      touchline load minari:D4RL/door/human-v2 --float32 --task 3
      touchline load demos.h5 --actor teleoperation --limit 100
      touchline load demos.npz --dry-run

    \b
    Exit status:
      0    every episode is stored
      1    some were refused (stdout says which and why), or it failed
      2    the command line is wrong
      130  interrupted
    """
    changes = datasets.Changes(task=task, drop=tuple(drop or ()), float32=float32)
    options = {"format": format, "changes": changes, "first": first, "limit": limit, "infos": infos, "trust_pickle": trust_pickle}
    options["max_episode_bytes"] = max_episode_bytes
    failed = False
    with (
        failing_well(LOAD_INTERRUPTED) as check,
        Meter(Console(stderr=True)) as meter,
        ExitStack() as stack,
    ):
        client = None
        if not dry_run:
            probe(address)
            client = stack.enter_context(ReplayClient(address, timeout_s=timeout_s))
        for source in sources:
            begun_s = time.monotonic()
            try:
                if client is None:
                    report, columns = datasets.survey(source, watch=_watch(meter, source, check), **options)  # type: ignore[arg-type]
                    meter.rest()
                    _tell_survey(source, report, columns)
                else:
                    report = datasets.load(client, source, actor=actor, again=again, watch=_watch(meter, source, check), **options)  # type: ignore[arg-type]
                    meter.rest()
                    _tell_load(source, report, time.monotonic() - begun_s)
            except DatasetError as error:
                failed = True
                meter.rest()
                complain(escape(str(error)))
            else:
                failed |= bool(report.refused) and not allow_refused
        if client is not None:
            counts = client.counts()
            say(f"{address} has {amount(counts.episodes_stored, 'episode')}, {amount(counts.steps_stored, 'step')}")
    if failed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def export(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="File (.h5, .hdf5, .npz, .pt), or Minari data set (minari:ID).")],
    address: Address = "127.0.0.1:50051",
    format: Format = None,
    first: Annotated[int | None, typer.Option(metavar="ID", help="Only episodes with this id or a higher one.", min=0)] = None,
    last: Annotated[int | None, typer.Option(metavar="ID", help="Only episodes with this id or a lower one.", min=0)] = None,
    newest: Annotated[int | None, typer.Option(metavar="N", help="Only the newest N of the episodes that match.", min=1)] = None,
    actor: Annotated[str | None, typer.Option(metavar="NAME", help="Only episodes of this actor.")] = None,
    column: Annotated[list[str] | None, typer.Option(metavar="COLUMN", help="Only this column (obs includes obs.*). Repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing data set.")] = False,
    compress: Annotated[bool, typer.Option("--compress", help="HDF5 and NPZ: compress; smaller and slower.")] = False,
    allow_refused: Annotated[bool, typer.Option("--allow-refused", help="Exit with 0 even if episodes were left out.")] = False,
    timeout_s: Timeout = 60.0,
) -> None:
    """Writes a server's episodes to a data set.

    `touchline load` brings them back to the bit. The data set is written under a hidden name and renamed once it is complete. Episodes that
    are evicted before their turn are not in it. A .pt file holds episodes of equal length; --format tdmpc2 writes a folder with a file for
    each length.

    \b
    Examples:
      touchline export everything.h5 --address replay-host:50051
      touchline export newest.npz --newest 100 --compress
      touchline export minari:soccer/left-foot-v0 --actor left-foot
      touchline export chunks --format tdmpc2

    \b
    Exit status:
      0    the data set is written
      1    the format cannot hold some of the episodes (stdout says why), or it failed
      2    the command line is wrong
      130  interrupted; nothing was written
    """
    begun_s = time.monotonic()
    with failing_well("interrupted; nothing was written") as check, Meter(Console(stderr=True)) as meter:
        probe(address)

        def watch(done: int, total: int, report: ExportReport) -> None:
            check()
            meter.show(f"export {target}", done, total, unit="episodes", size_bytes=report.size_bytes)

        with ReplayClient(address, timeout_s=timeout_s) as client:
            report = datasets.export(
                client,
                target,
                format=format,
                force=force,
                compress=compress,
                watch=watch,
                first=first,
                last=last,
                newest=newest,
                actor=actor,
                columns=column or None,
            )
        meter.rest()
        _tell_export(target, report, time.monotonic() - begun_s)
    if report.left_out and not allow_refused:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def clear(
    address: Address = "127.0.0.1:50051",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    timeout_s: Timeout = 60.0,
) -> None:
    """Empties a server: every episode and the columns, which the next episode fixes anew.

    It says what would go and asks first. With a data_dir the episodes are gone from the disk as well; a snapshot taken before keeps
    them. Keys stay known: an episode that was stored before is not stored again. If the server has tokens, an admin's is needed.

    \b
    Examples:
      touchline clear --address replay-host:50051
      touchline clear --yes

    \b
    Exit status:
      0    it is empty, or was
      1    it was not cleared: the answer was no, there is no server, or the token does not allow it
      2    the command line cannot be used, or there is no terminal to ask on and --yes is missing
      130  interrupted
    """
    with failing_well("interrupted; if it was confirmed already, the server may have been cleared"):
        probe(address)
        with ReplayClient(address, timeout_s=timeout_s) as client:
            found = client.info()
            _tell_stored(address, found)
            if not found.counts.episodes_stored and not found.columns:
                return
            if not yes:
                _ask("Forget all of it, for good?")
            counts = client.clear()
    gone = counts.episodes_evicted - found.counts.episodes_evicted
    say(f"{address}: cleared, {amount(gone, 'episode')} gone; the next episode fixes the columns anew")


def _tell_stored(address: str, found: ServerInfo) -> None:
    say(f"{address}: {amount(found.counts.episodes_stored, 'episode')}, {amount(found.counts.steps_stored, 'step')}")
    _tell_columns(found.columns)


def _ask(question: str) -> None:
    """Ends the command unless the answer is yes."""
    if not sys.stdin.isatty():
        fail("nothing was cleared: there is no terminal to ask on; --yes clears without asking", EXIT_USAGE)
    if not typer.confirm(question, err=True):
        fail("nothing was cleared", EXIT_FAILED)


def _watch(meter: Meter, source: str, check: Callable[[], None]) -> Callable[[str, int, int, LoadReport], None]:
    def watch(stage: str, done: int, total: int, report: LoadReport) -> None:
        check()
        if stage == "fingerprint":
            meter.show(f"fingerprint {source}", done, total, unit="bytes", size_bytes=done)
        else:
            meter.show(f"{stage} {source}", done, total, unit="episodes", size_bytes=report.size_bytes)

    return watch


def _tell_load(source: str, report: LoadReport, seconds: float) -> None:
    say(f"{source}: {amount(report.read, 'episode')}, {amount(report.steps, 'step')}{speed(report.read, report.size_bytes, seconds)}")
    say(f"  stored      {report.stored:>10,}")
    if report.duplicates:
        say(f"  duplicates  {report.duplicates:>10,}  stored before, even if evicted since; --again LABEL stores them once more")
    _tell_refused(report)


def _tell_survey(source: str, report: LoadReport, columns: dict[str, ColumnInfo]) -> None:
    say(f"{source}: {amount(report.read, 'episode')}, {amount(report.steps, 'step')}, {report.size_bytes / 1e6:,.1f} MB; nothing was sent")
    _tell_columns(columns)
    _tell_refused(report)


def _tell_columns(columns: dict[str, ColumnInfo]) -> None:
    width = max((len(name) for name in columns), default=0)
    for name, column in columns.items():
        say(f"  {name:<{width}}  {column.dtype} {list(column.shape)}")


def _tell_refused(report: LoadReport) -> None:
    if not report.refused:
        return
    say(f"  refused     {report.refused:>10,}", style="bold red")
    say_reasons(report.reasons)


def _tell_export(target: str, report: ExportReport, seconds: float) -> None:
    say(f"{target}: {amount(report.written, 'episode')}, {amount(report.steps, 'step')}{speed(report.written, report.size_bytes, seconds)}")
    if report.evicted:
        say(f"  evicted     {report.evicted:>10,}  before their turn came")
    if report.left_out:
        say(f"  left out    {report.left_out:>10,}", style="bold red")
    for reason, ids in report.reasons.items():
        more = f" and {len(ids) - 5:,} more" if len(ids) > 5 else ""
        say(f"    {len(ids):,} × {reason}: episodes {', '.join(map(str, ids[:5]))}{more}")
