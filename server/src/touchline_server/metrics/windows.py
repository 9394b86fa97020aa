"""What happened within the last minute, ten minutes or hour, from totals that only grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from operator import sub
from typing import NamedTuple, TypeVar

N = TypeVar("N", int, float)


class Recent(NamedTuple):
    """What happened within a window."""

    span_s: float
    """Seconds that it covers: about the window's length, or less while it is young."""
    counts: tuple[float, ...]
    """Growth of each total in that time."""


class Window:
    """Keeps totals of the recent past, at most one of each interval, and says by how much they have grown since.

    The owner of the totals marks them, either again and again, or just before each change: a total that did not change needs no mark. Not
    thread-safe.

    Args:
        span_s: length of the recent past.
        marks: number of marks kept, and so the precision of the length.
    """

    __slots__ = ("_interval_s", "_marks", "_span_s")

    def __init__(self, span_s: float, *, marks: int = 60) -> None:
        self._span_s = span_s
        self._interval_s = span_s / marks
        self._marks: deque[tuple[float, tuple[float, ...]]] = deque()

    def is_due(self, now: float) -> bool:
        """Returns whether :meth:`mark` would keep a mark."""
        return not self._marks or now - self._marks[-1][0] >= self._interval_s

    def mark(self, now: float, totals: Sequence[float]) -> None:
        """Keeps the present totals, if the last mark is an interval ago."""
        if self.is_due(now):
            self._marks.append((now, tuple(totals)))
            while self._marks[0][0] <= now - self._span_s:
                self._marks.popleft()

    def recent(self, now: float, totals: Sequence[float]) -> Recent:
        """Returns by how much the totals have grown within the window; nothing if no mark lies in it."""
        for at, before in self._marks:
            if at > now - self._span_s:
                return Recent(now - at, tuple(map(sub, totals, before)))
        return Recent(0.0, (0,) * len(totals))
