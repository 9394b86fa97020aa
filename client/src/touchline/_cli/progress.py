"""How far a command is: a bar on a terminal, a line every few seconds where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from touchline_protos.log_lines import escape

PLAIN_EVERY_S = 5.0
"""Between two lines where there is no terminal."""


class Meter:
    """Shows one piece of work after the other, on stderr. Also a context manager that ends the showing.

    Args:
        console: of stderr.
        clock: seconds that only go forward.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._label = ""
        self._begun_s = self._told_s = clock()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.rest()

    def rest(self) -> None:
        """Takes the bar away, so that something else can be printed."""
        self._label = ""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def show(self, label: str, done: int, total: int | None, *, unit: str, size_bytes: int) -> None:
        """Tells how far a piece of work is.

        Args:
            label: names it; another label begins another piece.
            done: of ``total``.
            total: of ``unit``; None where it is not known.
            unit: ``"episodes"`` or ``"bytes"``.
            size_bytes: that went by so far.
        """
        now_s, label = self._clock(), escape(label)
        if label != self._label:
            self.rest()
            self._label, self._begun_s, self._told_s = label, now_s, now_s
            if self._console.is_terminal:
                self._bar = self._make_bar()
                self._task = self._bar.add_task(label, total=total, told="")
        told = progress_text(done, total, unit=unit, size_bytes=size_bytes, seconds=now_s - self._begun_s)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, told=told)
        elif now_s - self._told_s >= PLAIN_EVERY_S:
            self._told_s = now_s
            self._console.print(Text(f"{label}: {told}"), soft_wrap=True)

    def _make_bar(self) -> Progress:
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[told]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        bar.start()
        return bar


def progress_text(done: int, total: int | None, *, unit: str, size_bytes: int, seconds: float) -> str:
    """Returns how much is done, and how fast, in words."""
    if unit == "bytes":
        return f"{done / 1e6:,.0f} of {(total or 0) / 1e6:,.0f} MB{_rate(None, size_bytes, seconds)}"
    return f"{done:,}{'' if total is None else f' of {total:,}'} {unit}{_rate(done, size_bytes, seconds)}"


def _rate(done: int | None, size_bytes: int, seconds: float) -> str:
    if seconds <= 0 or not size_bytes:
        return ""
    return ("" if done is None else f", {done / seconds:,.0f} episodes/s") + f", {size_bytes / seconds / 1e6:,.1f} MB/s"
