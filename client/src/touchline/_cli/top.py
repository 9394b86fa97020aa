"""``touchline top``: what a server does, live."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from touchline._cli.options import OUTPUT, SERVER, Address, AsJson, TableNames
from touchline._cli.status import print_status
from touchline._cli.status_feed import FINAL_ERRORS, StatusFeed
from touchline._cli.terminal import print_json, print_line, report_errors
from touchline._cli.top_screen import TopScreen
from touchline.client import ReplayClient

IDLE_S = 1.0
"""Longest time between two drawings: the terminal may have another size, and the age of a snapshot is on the screen."""


def top(
    address: Address = "127.0.0.1:50051",
    table: TableNames = None,
    interval_s: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time between snapshots.", min=0.5, max=3600, rich_help_panel=SERVER)
    ] = 1.0,
    timeout_s: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for the first answer.", min=0.1, rich_help_panel=SERVER)
    ] = 5.0,
    count: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Print N snapshots, one after another, and end. Default: live on a terminal; otherwise 1, with --json without end.",
            min=1,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Watch a server live: its tables, and every actor and learner, by what waits at its connection.

    What the columns mean is in the help of `touchline status`. If the server goes away, the last state stays on the screen until it is
    back. With --json, or if stdout is not a terminal, prints snapshots instead: with --json one document a line.

    \b
    Keys:
      q          quit
      space, p   pause, and go on
      < >        sort by the column to the left or right; also the arrow keys
      1 to 9     sort by this column
      r          reverse the order
      + -        longer, shorter interval
      a, l       only actors, only learners; the same key again: both
      n, N       next page of connections, previous page; also the arrow keys
      h, ?       show the keys

    \b
    Examples:
      touchline top --address replay-host:50051
      touchline top --table demos --interval-s 5
      touchline top --json --count 60 > minute.jsonl

    \b
    Exit status:
      0    ended by q, or all snapshots are printed
      1    the server is unreachable or older than 0.2, or the token does not allow it
      2    the command line is wrong
      130  interrupted
    """
    with report_errors("interrupted"), ReplayClient(address, timeout_s=timeout_s) as client:
        live = count is None and not as_json and sys.stdout.isatty() and sys.stdin.isatty() and os.environ.get("TERM") != "dumb"
        if live:
            _watch(client, address, table or [], interval_s)
        else:
            _print_snapshots(client, address, table or [], interval_s, count=count or (None if as_json else 1), as_json=as_json)


def _watch(client: ReplayClient, address: str, tables: list[str], interval_s: float) -> None:
    from touchline._cli.keyboard import Keyboard  # not on Windows

    client.status(tables=tables or None)  # a wrong address or token is an error, not a screen that waits
    screen = TopScreen(address)
    console = Console()
    with Keyboard() as keyboard, StatusFeed(client, tables, interval_s, keyboard.wake) as feed:
        with Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
            while not screen.ended:
                for key in keyboard.read(IDLE_S):
                    screen.press(key, feed)
                if isinstance(feed.error, FINAL_ERRORS):
                    break
                live.update(screen.draw(feed, console), refresh=True)
        if isinstance(feed.error, FINAL_ERRORS):
            raise feed.error


def _print_snapshots(client: ReplayClient, address: str, tables: list[str], interval_s: float, *, count: int | None, as_json: bool) -> None:
    with client.watch_status(interval_s, tables=tables or None) as watch:
        for number, status in enumerate(watch, 1):
            if as_json:
                print_json({"address": address, **status.to_dict()}, indent=None)
                sys.stdout.flush()
            else:
                if number > 1:
                    print_line("")
                print_status(status, address)
            if number == count:
                return
