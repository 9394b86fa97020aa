"""Episodes on their way to a device: copied into pinned memory, from which the device takes them without the host waiting.

There are two blocks, so that one is filled while the device reads the other. A block holds all columns of an episode, or of as many of its
rows as fit. Each column goes from there to its rows in one copy, or in two at the end of the ring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from touchline_server.store.gather_threads import PIECE_BYTES, GatherThreads, Job
from touchline_server.store.schema import ColumnSpec

MAX_BLOCK_BYTES = 1 << 26
"""Largest block, unless a single row is larger: larger episodes go in pieces."""

MIN_BLOCK_BYTES = 1 << 16
"""Smallest block that is allocated."""

ALIGNMENT = 64
"""Multiple at which each column begins in a block."""

BLOCKS = 2


class CopyQueue(Protocol):
    """Copies to the columns on a device, queued and done in order."""

    def allocate(self, size_bytes: int) -> tuple[Any, np.ndarray]:
        """Returns pinned host memory, and the same as an array, [size_bytes] uint8."""
        ...

    def copy(self, name: str, first_row: int, memory: Any, begin: int, end: int) -> None:
        """Queues a copy of bytes ``begin`` to ``end`` - 1 of the memory to a column's rows from ``first_row`` on."""
        ...

    def record(self) -> Any:
        """Returns an event behind the copies so far."""
        ...

    def synchronize(self, event: Any) -> None:
        """Waits for an event."""
        ...


class StagedWriter:
    """Writes episodes to columns on a device through pinned memory. One thread at a time.

    Args:
        queue: the copies to the device.
        columns: the columns, in any order.
        capacity: rows of the columns, at which row numbers wrap.
        threads: threads that fill the blocks for large episodes.
    """

    def __init__(self, queue: CopyQueue, columns: Sequence[ColumnSpec], capacity: int, *, threads: GatherThreads | None = None) -> None:
        self._queue = queue
        self._columns = [spec for spec in columns if spec.row_bytes]
        self._row_bytes = max(sum(spec.row_bytes for spec in columns), 1)
        self._capacity = capacity
        self._threads = GatherThreads() if threads is None else threads
        self._blocks = [_Block() for _ in range(BLOCKS)]
        self._writes = 0

    def write(self, first_row: int, episode: Mapping[str, np.ndarray]) -> None:
        """Queues copies of an episode's columns into consecutive rows. The arrays are not needed any more when it returns.

        Args:
            first_row: physical row of the first step, in [0, capacity).
            episode: columns [length, ...] by dotted name, length at most the capacity.
        """
        length = len(next(iter(episode.values())))
        rows = max(MAX_BLOCK_BYTES // self._row_bytes, 1)
        for begin in range(0, length, rows):
            end = min(begin + rows, length)
            self._write_piece(
                (first_row + begin) % self._capacity, {name: array[begin:end] for name, array in episode.items()}, end - begin
            )

    def _write_piece(self, first_row: int, columns: Mapping[str, np.ndarray], length: int) -> None:
        sizes = [length * spec.row_bytes for spec in self._columns]
        offsets = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]).tolist()
        block = self._next_block(offsets[-1])
        jobs: list[Job] = []
        for spec, offset, size in zip(self._columns, offsets, sizes, strict=False):
            target = block.array[offset : offset + size].view(spec.dtype).reshape(length, *spec.shape)
            jobs.extend(_copies(columns[spec.name], target))
        if self._threads.pays(sum(sizes)):
            self._threads.run(jobs)
        else:
            for job in jobs:
                job()
        try:
            for spec, offset in zip(self._columns, offsets, strict=False):
                for row, at, count in runs_of(first_row, length, self._capacity):
                    begin = offset + at * spec.row_bytes
                    self._queue.copy(spec.name, row, block.memory, begin, begin + count * spec.row_bytes)
        finally:
            # Also after an error: the device may still read what was queued until then.
            block.event = self._queue.record()

    def _next_block(self, size_bytes: int) -> _Block:
        """Returns a block of at least this size that the device does not read any more."""
        block = self._blocks[self._writes % BLOCKS]
        self._writes += 1
        if block.event is not None:
            self._queue.synchronize(block.event)
            block.event = None
        if len(block.array) < size_bytes:
            # Larger than needed, so that episodes that grow little by little do not allocate each time.
            size = max(min(2 * size_bytes, MAX_BLOCK_BYTES), size_bytes, MIN_BLOCK_BYTES)
            block.memory, block.array = None, np.empty(0, np.uint8)  # freed before more is allocated
            block.memory, block.array = self._queue.allocate(size)
        return block


class _Block:
    """Pinned memory, and the event behind the copies out of it; None if there are none to wait for."""

    __slots__ = ("array", "event", "memory")

    def __init__(self) -> None:
        self.memory: Any = None
        self.array = np.empty(0, np.uint8)
        self.event: Any = None


def runs_of(first_row: int, length: int, capacity: int) -> Iterator[tuple[int, int, int]]:
    """Yields the runs of physical rows of an episode: first row, position in the episode, and number of rows."""
    before_seam = min(length, capacity - first_row)
    yield first_row, 0, before_seam
    if before_seam < length:
        yield 0, before_seam, length - before_seam


def _copies(source: np.ndarray, target: np.ndarray) -> Iterator[Job]:
    """Yields jobs that together copy an array of at least one row."""
    rows = max(PIECE_BYTES // max(target[0].nbytes, 1), 1)
    for begin in range(0, len(target), rows):
        yield partial(np.copyto, target[begin : begin + rows], source[begin : begin + rows])
