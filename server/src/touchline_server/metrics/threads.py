"""CPU time of the process and of its threads, as Linux counts it."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from pathlib import Path

from touchline_server.metrics.windows import Window

RECENT_S = 60.0
"""Time over which CPU time is averaged."""

EVENT_LOOP = "event-loop"
"""Name of the event loop's group."""

_TASKS = Path("/proc/self/task")


class ThreadTimes:
    """CPU time of the threads, summed by groups of them. The thread that makes the object is the event loop's, a group of its own.

    Args:
        groups: name of the group by the beginning of the threads' names.
    """

    def __init__(self, groups: dict[str, str]) -> None:
        self._groups = groups
        self._loop = threading.current_thread()
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.0
        self._window = Window(RECENT_S, marks=12)
        self._last: dict[int, float] = {}
        self._totals = dict.fromkeys((EVENT_LOOP, *groups.values()), 0.0)
        self.threads: Counter[str] = Counter()
        """Number of threads of each group, at the last tick."""

    def tick(self, now: float) -> None:
        """Reads the times. Call it every second."""
        last, self._last, self.threads = self._last, {}, Counter()
        for thread in threading.enumerate():
            group = EVENT_LOOP if thread is self._loop else self._group_of(thread.name)
            if group is None or thread.native_id is None:
                continue
            self.threads[group] += 1
            used_s = self._cpu_s(thread.native_id)
            self._last[thread.native_id] = used_s
            self._totals[group] += max(used_s - last.get(thread.native_id, used_s), 0.0)
        self._window.mark(now, self._all())

    def shares(self, now: float) -> dict[str, float]:
        """Returns the CPU time of each group over the last minute, in cores; that of the process has an empty name."""
        recent = self._window.recent(now, self._all())
        names = ["", *self._totals]
        return {name: used_s / recent.span_s if recent.span_s else 0.0 for name, used_s in zip(names, recent.counts, strict=True)}

    def _group_of(self, name: str) -> str | None:
        return next((group for start, group in self._groups.items() if name.startswith(start)), None)

    def _all(self) -> list[float]:
        return [time.process_time(), *self._totals.values()]

    def _cpu_s(self, thread_id: int) -> float:
        try:
            # The name, in parentheses, may contain blanks.
            words = (_TASKS / str(thread_id) / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended, or this is not Linux
            return self._last.get(thread_id, 0.0)
        return (int(words[11]) + int(words[12])) * self._tick_s
