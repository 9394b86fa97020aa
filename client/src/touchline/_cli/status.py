"""``touchline status``: what a server does, on one screen."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from touchline._cli import connection_table
from touchline._cli.options import SERVER, Address, AsJson, TableNames
from touchline._cli.status_view import (
    VERDICT_STYLES,
    connections_of,
    refusal_line,
    server_lines,
    table_lines,
    table_name,
)
from touchline._cli.terminal import print_grid, print_json, print_line, report_errors
from touchline.client import ReplayClient
from touchline.types import ServerStatus, TableStatus
from touchline_protos.log_lines import escape

MAX_CONNECTIONS = 12
MAX_REFUSALS = 5
LABELS = 9
"""Width of the labels before the lines of a table."""


def status(
    address: Address = "127.0.0.1:50051",
    table: TableNames = None,
    timeout_s: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for the answer.", min=0.1, rich_help_panel=SERVER)
    ] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Show what a server does: who waits for whom, what comes in and goes out, who is connected, what is refused.

    Rates are of the last minute. PENDING is what waits at a connection: bytes in an actor's spool, or made for a learner and not taken yet.
    WAITS is the share of the last minute that it waited. LAST is the age of an actor's last episode, or the 99th percentile of a learner's
    wait for a batch. Answers while the server restores its store, too. If the server requires tokens, the token must have the
    role learner or admin.

    \b
    Examples:
      touchline status --address replay-host:50051
      touchline status --table demos
      touchline status --json | jq -r '.tables[] | "\\(.table) \\(.verdict)"'

    \b
    Exit status:
      0    the status is shown, whatever it is
      1    the server is unreachable or older than 0.2, or the token does not allow it
      2    the command line is wrong
      130  interrupted
    """
    with report_errors("interrupted"), ReplayClient(address, timeout_s=timeout_s) as client:
        found = client.status(tables=table or None)
    if as_json:
        print_json({"address": address, **found.to_dict()})
    else:
        print_status(found, address)


def print_status(found: ServerStatus, address: str) -> None:
    """Prints a snapshot."""
    first, second = server_lines(found.server, address)
    print_grid((), [(first, "bold")])
    print_grid((), [(second, "")])
    for table in found.tables:
        print_line("")
        _print_table(table)
    rows = connection_table.sort(connections_of(found), connection_table.PENDING, reverse=False)
    if rows:
        console = Console()
        console = console if console.is_terminal else Console(width=1000)
        print_line("")
        console.print(connection_table.make_table(rows[:MAX_CONNECTIONS], console.width))
        if len(rows) > MAX_CONNECTIONS:
            print_line(f"and {len(rows) - MAX_CONNECTIONS:,} more: touchline top, or --json")
    if found.refusals:
        print_line("")
        print_line("refused", "bold")
        for refusal in found.refusals[:MAX_REFUSALS]:
            print_grid((), [(f"  {refusal_line(refusal, found.time_unix_s)}", "")])


def _print_table(table: TableStatus) -> None:
    verdict = str(table.verdict).replace("_", " ") or "state not known"
    text = f": {escape(table.verdict_text)}" if table.verdict_text else ""
    print_grid((LABELS,), [(table_name(table.table), "bold"), (verdict + text, VERDICT_STYLES[table.verdict])])
    for label, line in table_lines(table):
        print_grid((LABELS,), [(f"  {label}", ""), (line, "")])
