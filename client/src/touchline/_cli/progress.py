"""Progress of a command on stderr: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from touchline_protos.log_lines import escape

LINE_INTERVAL_S = 5.0
"""Time between two lines if stderr is not a terminal."""


class ProgressDisplay:
    """Shows the progress of one piece of work after another. A context manager that hides it at the end. Not thread-safe.

    Args:
        console: the console to draw on.
        clock: a function that returns monotonic time in seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._label = ""
        self._started_s = self._printed_s = clock()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.hide()

    def hide(self) -> None:
        """Removes the bar, so that something else can be printed."""
        self._label = ""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def show(self, label: str, done: int, total: int | None, *, unit: str, size_bytes: int) -> None:
        """Shows how far a piece of work is.

        Args:
            label: name of the piece of work; another name than in the last call starts another piece.
            done: amount done.
            total: amount to do; None if unknown.
            unit: unit of both, ``"episodes"`` or ``"bytes"``.
            size_bytes: number of bytes processed, for the throughput.
        """
        now_s, label = self._clock(), escape(label)
        if label != self._label:
            self.hide()
            self._label, self._started_s, self._printed_s = label, now_s, now_s
            if self._console.is_terminal:
                self._bar = self._start_bar()
                self._task = self._bar.add_task(label, total=total, amounts="")
        amounts = format_progress(done, total, unit=unit, size_bytes=size_bytes, seconds=now_s - self._started_s)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, amounts=amounts)
        elif now_s - self._printed_s >= LINE_INTERVAL_S:
            self._printed_s = now_s
            self._console.print(Text(f"{label}: {amounts}"), soft_wrap=True)

    def _start_bar(self) -> Progress:
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amounts]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        bar.start()
        return bar


def format_progress(done: int, total: int | None, *, unit: str, size_bytes: int, seconds: float) -> str:
    """Returns the amount done and the throughput as text; see :meth:`ProgressDisplay.show`."""
    if unit == "bytes":
        return f"{done / 1e6:,.0f} of {(total or 0) / 1e6:,.0f} MB{_throughput(None, size_bytes, seconds)}"
    return f"{done:,}{'' if total is None else f' of {total:,}'} {unit}{_throughput(done, size_bytes, seconds)}"


def _throughput(done: int | None, size_bytes: int, seconds: float) -> str:
    if seconds <= 0 or not size_bytes:
        return ""
    return ("" if done is None else f", {done / seconds:,.0f} episodes/s") + f", {size_bytes / seconds / 1e6:,.1f} MB/s"
