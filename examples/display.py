"""Shows the demo's progress: a live panel on a terminal, otherwise a plain line now and then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from touchline import Counts

PLAIN_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The demo's state at one moment."""

    phase: str
    """Current activity in a few words."""
    elapsed_s: float
    """Time since play began."""
    total_s: float
    """Planned time of play."""
    counts: Counts
    """Counts of the server's table."""
    steps_per_s: float
    """Recent rate of incoming rows."""
    updates: int | None = None
    """Updates of the learner; this and the next fields are None before its first report."""
    batches_per_s: float | None = None
    loss: float | None = None
    held_out: float | None = None
    """Error of the predicted reward on held-out slices, as a share of the error of predicting its mean."""

    @property
    def left_s(self) -> float:
        """Remaining seconds of play."""
        return max(0.0, self.total_s - self.elapsed_s)


class Display(Protocol):
    """Shows snapshots."""

    def show(self, snapshot: Snapshot) -> None:
        """Shows the newest snapshot; may skip some."""


@contextmanager
def open_display(console: Console) -> Iterator[Display]:
    """Yields the display that fits the console."""
    if not console.is_terminal:
        yield _PlainDisplay(console)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield _LiveDisplay(live)


class _PlainDisplay:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: Snapshot | None = None

    def show(self, snapshot: Snapshot) -> None:
        last = self._last
        if last is not None and last.phase == snapshot.phase and snapshot.elapsed_s - last.elapsed_s < PLAIN_EVERY_S:
            return
        self._last = snapshot
        counts = snapshot.counts
        self._console.print(
            f"{snapshot.elapsed_s:5.0f} s  {snapshot.phase}: {counts.episodes_added} episodes, {counts.steps_added:,} steps "
            f"({snapshot.steps_per_s:,.0f}/s); {_learning(snapshot)}",
            highlight=False,
            soft_wrap=True,
        )


class _LiveDisplay:
    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, snapshot: Snapshot) -> None:
        counts = snapshot.counts
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(justify="right", style="bold cyan")
        table.add_column(style="dim")
        table.add_row("episodes", f"{counts.episodes_added:,}", f"{counts.episodes_stored:,} stored, {counts.episodes_evicted:,} evicted")
        table.add_row("steps", f"{counts.steps_added:,}", f"{snapshot.steps_per_s:,.0f} a second")
        table.add_row("batches", _or_dash(snapshot.batches_per_s, ".0f"), "a second")
        table.add_row("updates", _or_dash(snapshot.updates, ","), "of the world model")
        table.add_row("loss", _or_dash(snapshot.loss, ".4f"), "latent consistency and reward")
        table.add_row("reward error", _or_dash(snapshot.held_out, ".0%"), "of predicting the mean, on held-out matches")
        time = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=snapshot.total_s, completed=min(snapshot.elapsed_s, snapshot.total_s), width=32)
        time.add_row(bar, Text(f"{snapshot.left_s:.0f} s left, {snapshot.phase}", style="dim"))
        self._live.update(Panel(Group(table, Text(), time), title="Touchline: robot soccer into a replay server", expand=False))


def _learning(snapshot: Snapshot) -> str:
    if snapshot.updates is None:
        return "the learner waits for history"
    return (
        f"{snapshot.updates:,} updates, {_or_dash(snapshot.batches_per_s, '.0f')} batches/s, loss {_or_dash(snapshot.loss, '.4f')}, "
        f"held-out reward error {_or_dash(snapshot.held_out, '.0%')} of predicting the mean; {snapshot.left_s:.0f} s left"
    )


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
