"""The last hour of every table, so that a page that is opened now has charts: 5 minutes by the second, an hour by 10 seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from touchline_protos.types.status import FlowStatus, ServerStatus, TableStatus, Transport
from touchline_server.http.parts import Tables

FINE_S, COARSE_S = 1, 10
"""Resolutions in seconds."""

FINE_POINTS, COARSE_POINTS = 300, 360
"""Points of each: 5 minutes, and an hour."""


def _total(table: TableStatus) -> FlowStatus:
    return next((flow for flow in table.flows if not flow.window_s), FlowStatus())


def _minute(table: TableStatus) -> FlowStatus:
    return next((flow for flow in table.flows if flow.window_s == 60), FlowStatus())


def _batches(transport: Transport) -> Callable[[TableStatus], float]:
    return lambda table: sum(one.batches for one in _total(table).delivered if one.transport is transport)


def _waited(*, learners: bool) -> Callable[[TableStatus], float]:
    return lambda table: sum(one.total_s for one in table.waits if one.learners is learners)


TOTALS: Mapping[str, Callable[[TableStatus], float]] = {
    "episodes_in": lambda table: _total(table).episodes_in,
    "rows_in": lambda table: _total(table).rows_in,
    "bytes_in": lambda table: _total(table).bytes_in,
    "batches_ring": _batches(Transport.RING),
    "batches_stream": _batches(Transport.STREAM),
    "batches_unary": _batches(Transport.UNARY),
    "batches_device": _batches(Transport.DEVICE),
    "rows_out": lambda table: sum(one.rows for one in _total(table).delivered),
    "bytes_out": lambda table: sum(one.bytes for one in _total(table).delivered),
    "rows_evicted": lambda table: _total(table).rows_evicted,
    "learners_waiting": _waited(learners=True),
    "actors_waiting": _waited(learners=False),
}
"""Series that are rates: what a total grew by a second. Seconds waited in a second are the callers that wait, on average."""

LEVELS: Mapping[str, Callable[[TableStatus], float | None]] = {
    "rows_stored": lambda table: table.counts.steps_stored,
    "replay_ratio": lambda table: _minute(table).replay_ratio,
    "slices_per_row": lambda table: _minute(table).slices_per_row,
    "stored_age_s": lambda table: table.median_stored_s if table.median_stored_s >= 0 else None,
    "sampled_age_s": lambda table: table.mean_sampled_s if table.mean_sampled_s >= 0 else None,
}
"""Series that are levels."""

Values = tuple[tuple[float, ...], tuple[float | None, ...]]


@dataclass(frozen=True, slots=True)
class _Mark:
    """Totals and levels of every table at one moment."""

    time_unix_s: float
    values: Mapping[str, Values]


class History:
    """Marks of the last hour. Not thread-safe."""

    def __init__(self) -> None:
        self._fine: deque[_Mark] = deque(maxlen=FINE_POINTS + 1)
        self._coarse: deque[_Mark] = deque(maxlen=COARSE_POINTS + 1)

    def add(self, status: ServerStatus) -> None:
        """Adds a snapshot, which must be newer than the ones before; one of the same moment is left out."""
        time_s = status.time_unix_s
        if self._fine and time_s <= self._fine[-1].time_unix_s:
            return
        values = {
            table.table: (tuple(of(table) for of in TOTALS.values()), tuple(of(table) for of in LEVELS.values())) for table in status.tables
        }
        mark = _Mark(time_s, values)
        self._fine.append(mark)
        # A little less than the interval, so that the jitter of the snapshots does not stretch it by one.
        if not self._coarse or time_s >= self._coarse[-1].time_unix_s + COARSE_S - FINE_S / 2:
            self._coarse.append(mark)

    def newest(self, tables: Tables) -> dict[str, dict[str, float | None]]:
        """Returns the newest point of every series, by table."""
        if not self._fine:
            return {}
        marks = list(self._fine)[-2:]
        return {name: _point(marks, name) for name in marks[-1].values if tables is None or name in tables}

    def to_dict(self, tables: Tables, *, coarse: bool) -> dict[str, Any]:
        """Returns the times and, by table and series, the values: a second or 10 seconds apart; null without a value."""
        marks = list(self._coarse if coarse else self._fine)
        names = [name for name in (marks[-1].values if marks else ()) if tables is None or name in tables]
        points = {name: [_point(marks[max(0, at - 1) : at + 1], name) for at in range(len(marks))] for name in names}
        return {
            "resolution_s": COARSE_S if coarse else FINE_S,
            "time_unix_s": [mark.time_unix_s for mark in marks],
            "tables": {name: {series: [point[series] for point in of] for series in (*TOTALS, *LEVELS)} for name, of in points.items()},
        }


def _point(marks: list[_Mark], table: str) -> dict[str, float | None]:
    """Returns a table's rates between two marks, and its levels at the second one."""
    before, now = marks[0].values.get(table), marks[-1].values.get(table)
    seconds = marks[-1].time_unix_s - marks[0].time_unix_s
    rates: tuple[float | None, ...] = (None,) * len(TOTALS)
    if before is not None and now is not None and seconds > 0:
        # A total that shrinks is that of a new table with the name of a dropped one.
        rates = tuple((new - old) / seconds if new >= old else None for old, new in zip(before[0], now[0], strict=True))
    levels = now[1] if now is not None else (None,) * len(LEVELS)
    return dict(zip((*TOTALS, *LEVELS), (*rates, *levels), strict=True))
