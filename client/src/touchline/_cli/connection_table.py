"""The table of a server's connections: its columns, how they are sorted, and which of them fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from touchline._cli.amounts import count_text, duration_text, share_text, size_text
from touchline._cli.status_view import Connection
from touchline_protos.log_lines import escape

WAITS_MUCH = 0.5
"""Share of a minute from which on a wait is marked."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table."""

    title: str
    text: Callable[[Connection], str]
    key: Callable[[Connection], Any]
    """What rows are sorted by."""
    least_width: int = 0
    """Width of the screen from which on it is shown."""
    right: bool = True
    falling: bool = True
    """Whether the largest comes first."""


def _column(title: str, name: str, text: Callable[[Any], str], *, least_width: int = 0) -> Column:
    def shown(row: Connection) -> str:
        value = getattr(row, name)
        return "-" if value is None else text(value)

    def key(row: Connection) -> float:
        value = getattr(row, name)
        return -1.0 if value is None else value

    return Column(title, shown, key, least_width)


def _words(title: str, name: str, *, least_width: int = 0) -> Column:
    return Column(
        title, lambda row: escape(getattr(row, name)) or "-", lambda row: getattr(row, name), least_width, right=False, falling=False
    )


COLUMNS = (
    _words("KIND", "kind"),
    _words("NAME", "name"),
    _column("PENDING", "pending_bytes", size_text),
    _column("WAITS", "waits_share", share_text),
    _column("PER S", "rate", count_text),
    _column("TOTAL", "total", count_text, least_width=70),
    _column("LAST", "latency_s", duration_text, least_width=80),
    _words("TABLE", "tables", least_width=100),
    _words("ADDRESS", "address", least_width=120),
    _words("CLIENT", "client", least_width=160),
    _words("DETAIL", "detail", least_width=90),
)
PENDING = 2
"""Position of the column that the table is sorted by at first."""


def sort(rows: Sequence[Connection], column: int, *, reverse: bool) -> list[Connection]:
    """Returns rows sorted by a column, in its own order or in reverse; equal ones by name."""
    by = COLUMNS[column]
    named = sorted(rows, key=lambda row: (row.kind, row.name))
    return sorted(named, key=by.key, reverse=by.falling != reverse)


def make_table(rows: Sequence[Connection], width: int, *, sorted_by: int | None = None) -> Table:
    """Returns a table of rows for a screen of a width.

    Args:
        rows: the rows, in their order.
        width: width of the screen.
        sorted_by: position of a column whose title is marked.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", expand=False)
    shown = [(number, column) for number, column in enumerate(COLUMNS) if column.least_width <= width]
    for number, column in shown:
        style = "reverse" if number == sorted_by else ""
        table.add_column(Text(column.title, style=style), justify="right" if column.right else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        style = "yellow" if row.waits_share >= WAITS_MUCH else ""
        table.add_row(*(Text(column.text(row), style=style) for _, column in shown))
    return table
