"""The screen of ``touchline top``: what is drawn, and what keys change."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from touchline._cli import connection_table
from touchline._cli.amounts import count_text, duration_text, share_text, size_text
from touchline._cli.connection_table import COLUMNS, PENDING
from touchline._cli.status_feed import StatusFeed
from touchline._cli.status_view import (
    MINUTE_S,
    VERDICT_STYLES,
    Connection,
    connections_of,
    flow_of,
    is_restoring,
    per_s,
    refusal_line,
    server_lines,
    table_lines,
    table_name,
)
from touchline.types import ServerStatus, TableStatus, Verdict
from touchline_protos.log_lines import escape

INTERVALS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Intervals that the keys + and - choose among."""
KEYS = (
    "q quit   space pause   < > sort   r reverse   + - interval   a actors   l learners   n N page   h keys",
    "q quit  space pause  < > sort  h keys",
)
QUIET = (Verdict.IDLE, Verdict.BALANCED)
"""Verdicts that need no attention."""
HELP = """\
q          quit
space, p   pause, and go on
< >        sort by the column to the left or right; also the arrow keys
1 to 9     sort by this column
r          reverse the order
+ -        longer, shorter interval
a, l       only actors, only learners; the same key again: both
n, N       next page of connections, previous page; also the arrow keys
h, ?       hide this

PENDING    bytes in an actor's spool, or made for a learner and not taken yet
WAITS      share of the last minute that it waited
PER S      rows a second of an actor, batches a second of a learner
TOTAL      episodes of an actor, batches of a learner
LAST       age of an actor's last episode; 99th percentile of a learner's wait"""


class TopScreen:
    """State of the screen. Used by one thread.

    Args:
        address: address of the server, as shown.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._sorted_by = PENDING
        self._reverse = False
        self._kind = ""
        self._page = 0
        self._page_rows = 1
        self._helping = False
        self._paused: ServerStatus | None = None
        self._columns_shown = len(COLUMNS)
        self.ended = False
        """Whether the user has quit."""

    def press(self, key: str, feed: StatusFeed) -> None:
        """Does what a key stands for; ignores unknown ones."""
        if key == "q":
            self.ended = True
        elif key in (" ", "p"):
            self._paused = feed.status if self._paused is None else None
        elif key in ("<", ">"):
            self._move_sort(-1 if key == "<" else 1)
        elif key.isdecimal() and 0 < int(key) <= len(COLUMNS):
            self._sorted_by = int(key) - 1
        elif key == "r":
            self._reverse = not self._reverse
        elif key in ("+", "-"):
            feed.set_interval(_next_interval(feed.interval_s, longer=key == "+"))
        elif key in ("a", "l"):
            kind = "actor" if key == "a" else "learner"
            self._kind, self._page = "" if self._kind == kind else kind, 0
        elif key in ("n", "N"):
            self._page = max(self._page + (1 if key == "n" else -1), 0)
        elif key in ("h", "?"):
            self._helping = not self._helping

    def _move_sort(self, step: int) -> None:
        self._sorted_by = (self._sorted_by + step) % len(COLUMNS)

    def draw(self, feed: StatusFeed, console: Console) -> RenderableType:
        """Returns the screen for a terminal as large as it is now."""
        status = self._paused or feed.status
        if status is None:
            return Text("waiting for the first snapshot")
        foot = self._foot(console.width)
        if self._helping:
            return Group(Text(HELP, no_wrap=True, overflow="ellipsis"), foot)
        head = self._head(status, feed, console.width, max_tables=max(console.height // 4, 2))
        room = console.height - len(console.render_lines(Group(*head), pad=False)) - 1
        return Group(*head, *self._connections(status, console.width, room), foot)

    def _head(self, status: ServerStatus, feed: StatusFeed, width: int, *, max_tables: int) -> list[RenderableType]:
        first, second = server_lines(status.server, self._address)
        head: list[RenderableType] = [Text(escape(first), style="bold", no_wrap=True, overflow="ellipsis"), Text(second)]
        if self._paused is not None:
            head.append(Text("PAUSED: space goes on", style="reverse"))
        elif feed.error is not None:
            age = duration_text(time.monotonic() - feed.changed_s)
            head.append(Text(f"NO ANSWER, this is of {age} ago: {escape(str(feed.error))}", style="bold red"))
        tables = sorted(status.tables, key=lambda table: table.verdict in QUIET)[:max_tables]
        head += [Text(), _tables(tables, width)]
        if len(tables) < len(status.tables):
            head.append(Text(f"and {len(status.tables) - len(tables):,} more tables: --table NAME", style="dim"))
        head += [_sentence(table) for table in tables[: max_tables // 2] if table.verdict_text and table.verdict not in QUIET]
        if is_restoring(status):
            head += [
                Text(f"{table_name(table.table)}: {line}")
                for table in tables[: max_tables // 2]
                for label, line in table_lines(table)
                if label == "disk"
            ]
        if status.refusals:
            text = escape(refusal_line(status.refusals[0], status.time_unix_s))
            head.append(Text(f"refused: {text}", style="red", no_wrap=True, overflow="ellipsis"))
        return [*head, Text()]

    def _connections(self, status: ServerStatus, width: int, room: int) -> list[RenderableType]:
        """Returns the page of connections that fits in ``room`` lines."""
        rows = [row for row in connections_of(status) if self._kind in ("", row.kind)]
        rows = connection_table.sort(rows, self._sorted_by, reverse=self._reverse)
        if not rows:
            return [Text(f"no {self._kind or 'actor or learner'} is connected")]
        size = max(room - 2, 1)  # the titles, and the line about the page
        pages = (len(rows) + size - 1) // size
        self._page = min(self._page, pages - 1)
        begin = self._page * size
        shown: list[RenderableType] = [connection_table.make_table(rows[begin : begin + size], width, sorted_by=self._sorted_by)]
        if pages > 1:
            text = f"{begin + 1} to {min(begin + size, len(rows))} of {_describe(rows)}; n N pages"
            shown.append(Text(text, no_wrap=True, overflow="ellipsis"))
        return shown

    def _foot(self, width: int) -> Text:
        order = f"sorted by {COLUMNS[self._sorted_by].title}{', reversed' if self._reverse else ''}"
        keys = next((keys for keys in KEYS if len(keys) + len(order) + 3 <= width), KEYS[-1])
        return Text(f"{order}   {keys}", style="dim", no_wrap=True, overflow="ellipsis")


def _describe(rows: Sequence[Connection]) -> str:
    actors = sum(row.kind == "actor" for row in rows)
    return f"{actors:,} actors, {len(rows) - actors:,} learners"


def _next_interval(interval_s: float, *, longer: bool) -> float:
    if longer:
        return next((one for one in INTERVALS_S if one > interval_s), INTERVALS_S[-1])
    return next((one for one in reversed(INTERVALS_S) if one < interval_s), INTERVALS_S[0])


def _sentence(table: TableStatus) -> Text:
    text = f"{table_name(table.table)}: {escape(table.verdict_text)}"
    return Text(text, style=VERDICT_STYLES[table.verdict])


def _tables(tables: Sequence[TableStatus], width: int) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", expand=False)
    titles = ["TABLE", "VERDICT", "FULL", "ROWS/S IN", "BATCHES/S OUT", "REPLAY"]
    wide = width >= 100
    titles += ["BYTES/S IN", "BYTES/S OUT", "EPISODES", "SAMPLED AGE"] if wide else []
    for title in titles:
        shown.add_column(title, justify="left" if title in ("TABLE", "VERDICT") else "right", no_wrap=True, overflow="ellipsis")
    for table in tables:
        shown.add_row(*_table_row(table, wide=wide))
    return shown


def _table_row(table: TableStatus, *, wide: bool) -> list[Text]:
    minute = flow_of(table, MINUTE_S)
    share = table.counts.steps_stored / table.capacity if table.capacity else 0.0
    batches = per_s(sum(one.batches for one in minute.delivered), minute)
    ratio = "-" if minute.replay_ratio is None else count_text(minute.replay_ratio)
    verdict = str(table.verdict).replace("_", " ") or "-"
    cells = [
        escape(table_name(table.table)),
        verdict,
        share_text(share),
        count_text(per_s(minute.rows_in, minute)),
        count_text(batches),
        ratio,
    ]
    if wide:
        out_bytes = sum(one.bytes for one in minute.delivered)
        age = "-" if table.mean_sampled_s < 0 else duration_text(table.mean_sampled_s)
        sizes = [size_text(per_s(amount, minute)) for amount in (minute.bytes_in, out_bytes)]
        cells += [*sizes, f"{table.counts.episodes_stored:,}", age]
    return [Text(cell, style=VERDICT_STYLES[table.verdict] if number == 1 else "") for number, cell in enumerate(cells)]
