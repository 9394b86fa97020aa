"""``touchline table``: list, create, change and drop tables of a server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from touchline._cli.grouped_help import GroupedCommand
from touchline._cli.options import Address, AsJson, Timeout
from touchline._cli.terminal import EXIT_USAGE, confirm, exit_with, pluralize, print_json, print_line, report_errors
from touchline.client import ReplayClient
from touchline.types import RateInfo, TableInfo

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the table.", show_default=False)]


@app.callback()
def _root() -> None:
    """List, create, change and drop tables of a server.

    \b
    Examples:
      touchline table list --address replay-host:50051
      touchline table create demos buffer_size=100_000 law=step
      touchline table set demos.rate.samples_per_insert=4
      touchline table drop demos
    """


@app.command("list", cls=GroupedCommand)
def list_tables(address: Address = "127.0.0.1:50051", timeout_s: Timeout = 60.0, as_json: AsJson = False) -> None:
    """List the tables of a server that the token may use.

    \b
    Examples:
      touchline table list --address replay-host:50051

    \b
    Exit status:
      0  the tables are listed
      1  the server is unreachable
    """
    with report_errors("interrupted"), ReplayClient(address, timeout_s=timeout_s) as client:
        tables = list(client.tables().values())
    if as_json:
        print_json({"address": address, "tables": tables})
        return
    for table in tables:
        _print_table(table)


@app.command(cls=GroupedCommand)
def create(
    name: Name,
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys as in [tables.NAME] of the server's configuration; the default table has the others.",
            show_default=False,
        ),
    ] = None,
    address: Address = "127.0.0.1:50051",
    timeout_s: Timeout = 60.0,
    as_json: AsJson = False,
) -> None:
    """Create a table.

    With a data_dir, the server remembers it over a restart. If the server requires tokens, the token must have the role admin. A table that
    exists with the same keys is left as it is.

    \b
    Examples:
      touchline table create demos --address replay-host:50051
      touchline table create demos buffer_size=100_000 law=step durability=none

    \b
    Exit status:
      0    the table exists
      1    the server is unreachable or refused the table: its name is taken, a key or a value is wrong, or the token does not allow it
      2    the command line is wrong
      130  interrupted
    """
    given: dict[str, Any] = {}
    for text in keys or ():
        key, value = _parse(text)
        section, dot, inner = key.partition(".")
        if dot:
            given.setdefault(section, {})[inner] = value
        else:
            given[key] = value
    with report_errors("interrupted; the table may have been created"), ReplayClient(address, timeout_s=timeout_s) as client:
        client.create_table(name, **given)
        table = client.tables()[name]
    if as_json:
        print_json({"address": address, "created": table})
        return
    print_line(f"{address}: created")
    _print_table(table)


@app.command("set", cls=GroupedCommand)
def set_keys(
    keys: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME.]rate.KEY=VALUE...",
            help="Keys of the rate limit of table NAME, or of the default table.",
            show_default=False,
        ),
    ],
    address: Address = "127.0.0.1:50051",
    timeout_s: Timeout = 60.0,
    as_json: AsJson = False,
) -> None:
    """Change the rate limit of a table while the server runs.

    Learners and actors that wait notice it. A table that was created at run time has it after a restart of the server as well, any other
    table its configured one. If the server requires tokens, the token must have the role admin.

    \b
    Examples:
      touchline table set demos.rate.samples_per_insert=4 --address replay-host:50051
      touchline table set rate.samples_per_insert=8 rate.tolerance=4096

    \b
    Exit status:
      0    the limit is changed
      1    the server is unreachable or refused: no such table, a key or a value is wrong, or the token does not allow it
      2    the command line is wrong
      130  interrupted
    """
    changes: dict[str, dict[str, Any]] = {}
    for text in keys:
        place, value = _parse(text)
        *table, section, key = [*[""] * 2, *place.split(".")][-3:]
        if section != "rate" or place.count(".") > 2:
            exit_with(f"{text!r}: expected rate.KEY=VALUE or NAME.rate.KEY=VALUE", EXIT_USAGE)
        changes.setdefault(table[0], {})[key] = value
    with report_errors("interrupted; the limit may have been changed"), ReplayClient(address, timeout_s=timeout_s) as client:
        for name, rate in changes.items():
            client.set_rate(name, **rate)
            if not as_json:
                print_line(f"{address}: changed {name or '(default)'}")
        if as_json:
            print_json({"address": address, "changed": [{"table": name, "rate": client.info(table=name).rate} for name in changes]})


@app.command(cls=GroupedCommand)
def drop(
    name: Name,
    address: Address = "127.0.0.1:50051",
    timeout_s: Timeout = 60.0,
    yes: Annotated[bool, typer.Option("--yes", help="Drop without asking for confirmation.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a table with all its episodes, in memory and on disk.

    Prints what would be removed and asks first. Streams of the table end with an error; other tables are not touched. A table that is in
    the server's configuration comes back, empty, at the next start. If the server requires tokens, the token must have the role admin.

    \b
    Examples:
      touchline table drop demos --address replay-host:50051
      touchline table drop demos --yes

    \b
    Exit status:
      0    the table is gone
      1    nothing was removed: the answer was no, there is no such table, the server is unreachable, or the token does not allow it
      2    the command line is wrong, or there is no terminal to ask on and --yes is missing
      130  interrupted
    """
    interrupted = "interrupted; if you had already confirmed, the table may have been dropped"
    with report_errors(interrupted), ReplayClient(address, timeout_s=timeout_s) as client:
        table = client.tables().get(name)
        if table is not None and not yes:
            if not as_json:
                _print_table(table)
            confirm("Remove all of it? This cannot be undone.", failed="nothing was removed", hint="--yes drops without asking")
        counts = client.drop_table(name)
    if as_json:
        print_json({"address": address, "dropped": name, "counts": counts})
        return
    print_line(f"{address}: dropped {name}, {pluralize(counts.episodes_stored, 'episode')} removed")


def _print_table(table: TableInfo) -> None:
    counts = table.counts
    details = [
        f"{counts.steps_stored:,} of {pluralize(table.capacity, 'step')}",
        pluralize(counts.episodes_stored, "episode"),
        f"law {table.law}",
        *([table.device] if table.device else []),
        {"": "in memory", "ok": "durable"}.get(table.storage_state, f"durable store {table.storage_state}: {table.storage_reason}"),
        *(["created at run time"] if table.created else []),
    ]
    print_line(f"{table.name or '(default)'}: {', '.join(details)}")
    for line in _describe_rate(table.rate):
        print_line(f"  {line}")


def _describe_rate(rate: RateInfo | None) -> Iterator[str]:
    """Yields how a rate limit stands, and which callers it holds back."""
    if rate is None:
        return
    target = f"{rate.samples_per_insert:g} slices per step within {rate.tolerance:,.0f} slices" if rate.samples_per_insert else "no ratio"
    after = f", after {pluralize(rate.min_steps, 'step')}" if rate.min_steps else ""
    now = "none yet" if rate.ratio is None else f"{rate.ratio:.2f} since the start"
    recent = "" if rate.recent_ratio is None else f", {rate.recent_ratio:.2f} in the last minute"
    yield f"rate limit: {target}{after}; {now}{recent}"
    for who, held, callers, reason in (
        ("actor", rate.adds_held, rate.adds, rate.adds_wait_for),
        ("learner", rate.batches_held, rate.batches, rate.batches_wait_for),
    ):
        if held:
            longest = f"{callers[0].who or '(no name)'} for {callers[0].waiting_s:.0f} s" if callers else ""
            yield f"{pluralize(held, who)} held back, {longest}: {reason}"


def _parse(text: str) -> tuple[str, Any]:
    """Returns the key and the value of ``KEY=VALUE``: a bool, a number, or else a text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        exit_with(f"{text!r}: expected KEY=VALUE", EXIT_USAGE)
    if value in ("true", "false"):
        return key, value == "true"
    if re.fullmatch(r"[+-]?[0-9][0-9_]*", value):
        return key, int(value)
    try:
        return key, float(value)
    except ValueError:
        return key, value
