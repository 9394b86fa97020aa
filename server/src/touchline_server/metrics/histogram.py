"""Durations, counted in buckets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from touchline_protos.types.status import LATENCY_BOUNDS_S, LatencyStatus
from touchline_server.metrics.windows import Window

RECENT_S = 60.0
"""Time whose durations the percentiles are of."""


class Histogram:
    """Counts durations. One thread observes; any thread may read, and may see a duration in the count that is not in the sum yet.

    Args:
        marks: precision of the last minute, see :class:`Window`.
    """

    __slots__ = ("_window", "buckets", "sum_s")

    def __init__(self, *, marks: int = 12) -> None:
        self.buckets = [0] * (len(LATENCY_BOUNDS_S) + 1)
        """Counts of the durations up to each bound and above the one before it."""
        self.sum_s = 0.0
        """Sum of the durations."""
        self._window = Window(RECENT_S, marks=marks)

    def observe(self, duration_s: float, times: int = 1) -> None:
        """Counts a duration."""
        self.buckets[bisect_left(LATENCY_BOUNDS_S, duration_s)] += times
        self.sum_s += duration_s * times

    def tick(self, now: float) -> None:
        """Marks the present, from which the last minute is counted. Call it every second."""
        if self._window.is_due(now):
            self._window.mark(now, self.buckets)

    def status(self, now: float) -> LatencyStatus:
        """Returns the counts, and the percentiles of the last minute."""
        return latency_status(self.buckets, self.sum_s, self._window.recent(now, self.buckets).counts)


def latency_status(buckets: Sequence[int], sum_s: float, recent: Iterable[float]) -> LatencyStatus:
    """Returns a status of these counts, with the percentiles of the recent ones."""
    lately = list(recent)
    return LatencyStatus(
        count=sum(buckets),
        sum_s=sum_s,
        p50_s=percentile(lately, 0.5),
        p99_s=percentile(lately, 0.99),
        bounds_s=LATENCY_BOUNDS_S,
        buckets=tuple(buckets),
    )


def percentile(buckets: Sequence[float], share: float) -> float:
    """Returns the duration that this share of the counted ones does not exceed, interpolated within its bucket; 0 if there is none."""
    wanted = share * sum(buckets)
    if not wanted:
        return 0.0
    for number, count in enumerate(buckets):
        if wanted <= count:
            if number == len(LATENCY_BOUNDS_S):
                break  # above the last bound: how far is not known
            lower = LATENCY_BOUNDS_S[number - 1] if number else 0.0
            return lower + (LATENCY_BOUNDS_S[number] - lower) * wanted / count
        wanted -= count
    return LATENCY_BOUNDS_S[-1]
