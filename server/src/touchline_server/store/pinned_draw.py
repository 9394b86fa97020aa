"""Drawn slices whose rows stay unchanged until they are gathered: phase one of a batch. Phase two is in :mod:`.gather`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import numpy as np

from touchline_server.selectors.draw import Draw
from touchline_server.store.columns import Columns
from touchline_server.store.epochs import HeldPin, ReaderEpochs


class PinnedDraw:
    """Slices of one table. Their rows are not overwritten until :meth:`release`, or the end of a ``with`` block.

    A writer waits for pins of rows that it is about to overwrite, so a draw is gathered soon, and released by the thread that gathered it.
    A draw whose rows another process gathers is held (:meth:`hold`): it keeps a writer waiting for a limited time only.

    Args:
        draw: the slices of all batches, in the order of drawing.
        columns: the columns that they are gathered from.
        lock: the store's, which :meth:`release` takes.
        epochs: the store's reader epochs.
        pin: the pin that ``epochs.pin`` returned.
    """

    __slots__ = ("_epochs", "_held", "_lock", "_pin", "columns", "draw")

    def __init__(self, draw: Draw, columns: Columns, lock: threading.Lock, epochs: ReaderEpochs, pin: int) -> None:
        self.draw = draw
        self.columns = columns
        self._lock = lock
        self._epochs = epochs
        self._pin = pin
        self._held: HeldPin | None = None

    def hold(self, on_revoke: Callable[[], None]) -> None:
        """Keeps the rows beyond the end of the ``with`` block, until :meth:`release` or until a writer has waited for ``ring.max_hold_s``.

        Call it once. Afterwards :meth:`release` may be called from any thread, more than once, and also after the rows were revoked.

        Args:
            on_revoke: called when the rows are revoked, by the thread that writes, before it overwrites any of them. It must make sure
                that what was gathered from then on is not used. It is called with the write lock held, and :meth:`release` waits for
                it, so it must be quick, must not call :meth:`release`, and must not wait for what adds or releases. It must not raise:
                then the rows stay pinned, and the add fails. It is not called after :meth:`release` has returned.
        """
        with self._lock:
            self._held = self._epochs.hold(self._pin, on_revoke)

    @property
    def lock(self) -> threading.Lock:
        """The store's lock, which guards its selectors too."""
        return self._lock

    def release(self) -> None:
        """Unpins the rows, which may be overwritten from now on. Must be called once, unless the draw is held."""
        with self._lock:
            if self._held is None:
                self._epochs.unpin(self._pin)
            else:
                self._epochs.release(self._held)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._held is None:
            self.release()


@dataclass(frozen=True, slots=True)
class DrawnSlices:
    """Slices of one table that are gathered together: a batch, or the part of one that this table provides."""

    draw: Draw
    rows: np.ndarray
    """[H+1, slices] int64: physical rows."""
    columns: Columns
    """Columns that the rows belong to."""

    def __len__(self) -> int:
        return self.rows.shape[1]


@dataclass(slots=True)
class DrawnPart:
    """What one table provides of batches that are drawn together: of each of them the slices ``begin`` to ``end`` - 1."""

    draw: Draw
    """[batches * slices]: batch by batch."""
    first: np.ndarray
    """[batches, slices] int64: row of each slice's first step, not wrapped: see :attr:`Draw.first_row`."""
    last: np.ndarray | None
    """[batches, slices] int64: step of each slice that all later ones repeat; None if no slice is padded."""
    steps: int
    """H + 1, rows of a slice."""
    columns: Columns
    """Columns that the rows belong to."""
    begin: int
    end: int
    _rows: np.ndarray | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.first)

    @property
    def rows(self) -> np.ndarray:
        """[batches, H+1, slices] int64: physical rows; made when they are asked for first."""
        if self._rows is None:
            self._rows = physical_rows(self.first, self.steps, self.columns.capacity, last=self.last)
        return self._rows

    def slices(self, batches: int) -> list[DrawnSlices]:
        """Returns the slices of each of the first batches."""
        size = self.end - self.begin
        return [
            DrawnSlices(self.draw.between(number * size, (number + 1) * size), rows, self.columns)
            for number, rows in enumerate(self.rows[:batches])
        ]

    def provenance(self) -> list[tuple[str, np.ndarray]]:
        """Returns the name in a body of each field of the provenance, and its values: [batches, slices], or [batches, H, slices, 1]."""
        batches, size = len(self), self.end - self.begin
        return [
            (
                f"provenance.{name}",
                values.reshape(batches, size) if values.ndim == 1 else values.reshape(-1, batches, size, 1).swapaxes(0, 1),
            )
            for name, values in self.draw.provenance()
        ]


def locate(draw: Draw, columns: Columns, *, batches: int, horizon: int, begin: int = 0) -> DrawnPart:
    """Returns one table's slices of batches. Rows of padding are the last one of the episode.

    Args:
        draw: the slices of all batches.
        columns: the columns that they are gathered from.
        batches: number of batches.
        horizon: H, transitions in a slice.
        begin: position of the first slice in each batch.
    """
    last = None if draw.valid is None else _rows_left(draw).reshape(batches, -1)
    first = draw.first_row.reshape(batches, -1)
    return DrawnPart(draw, first, last, horizon + 1, columns, begin, begin + first.shape[1])


def pad_draw(draw: Draw, horizon: int) -> Draw:
    """Returns a draw of slices that may run over their episode's end, with which of their transitions are real.

    Args:
        draw: slices of which at least the first transition is in the episode.
        horizon: transitions in a slice.
    """
    # Transition t of a slice leads from its row t to row t + 1, so the episode's last row is where the last real one leads.
    valid = np.arange(1, horizon + 1, dtype=np.int64)[:, None] <= _rows_left(draw)
    return replace(draw, valid=valid[:, :, None])


def _rows_left(draw: Draw) -> np.ndarray:
    """Returns how many rows of the episode follow each slice's first one, [slices] int64."""
    assert draw.length is not None  # a selector's draw
    return draw.length - 1 - draw.start


def physical_rows(first_row: np.ndarray, steps: int, capacity: int, *, last: np.ndarray | None = None) -> np.ndarray:
    """Returns the physical rows of slices: logical rows ``first_row`` + 0, 1, ... ``steps`` - 1, wrapped at the end of the ring.

    Args:
        first_row: [batches, B] int64, in [0, 2 x capacity).
        steps: H + 1, rows of a slice: at most ``capacity``.
        capacity: rows of the ring.
        last: [batches, B] int64: the largest number that is added to ``first_row``; None if it is ``steps`` - 1 everywhere.

    Returns:
        [batches, H+1, B] int64, in [0, capacity).
    """
    offsets = np.arange(steps, dtype=np.int64)[:, None]
    rows = first_row[:, None, :] + (offsets if last is None else np.minimum(offsets, last[:, None, :]))
    # An episode begins in [0, capacity) and is at most as long as the ring, so each row is less than 2 x capacity: one conditional
    # subtraction wraps it. A remainder takes three times as long.
    return np.subtract(rows, capacity, out=rows, where=rows >= capacity)
