"""Threads that copy the rows of one big batch together.

``numpy.take`` copies without the interpreter lock, so a few threads gather a batch of images as fast as memory allows. Torch's
``index_select`` does the same with threads of its own and goes on scaling where ``take`` stops, at about eight threads, but a server
without CUDA does not import torch.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import numpy as np

from touchline_server.store.columns import Take

Job = Callable[[], object]

MAX_THREADS = 64
"""Most threads that may be configured."""

MAX_DEFAULT_THREADS = 8
"""Most threads by default: ``numpy.take`` in more of them is no faster."""

MIN_SHARED_BYTES = 1 << 22
"""Least size of a batch, or of one tensor of it, that several threads gather: waking a thread costs as much as copying some 100 KiB. Larger
than what an event loop gathers by itself."""

PIECE_BYTES = 1 << 20
"""Size of the pieces that threads take turns at, so that one that starts late or is interrupted leaves more to the others."""


class GatherThreads:
    """Runs the jobs of one gather in the calling thread and in up to ``threads`` - 1 others. Thread-safe.

    Callers share the other threads. One that finds them busy does its jobs by itself, so it never waits for another caller's jobs, only
    for the last ones of its own.

    Args:
        threads: number of threads for one gather; 1 uses only the caller's, 0 as many as there are cores, up to MAX_DEFAULT_THREADS.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads or min(available_cores(), MAX_DEFAULT_THREADS)
        """Threads for one gather."""
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def pays(self, size_bytes: int) -> bool:
        """Returns whether several threads gather this many bytes faster than one."""
        return self.threads > 1 and size_bytes >= MIN_SHARED_BYTES

    def run(self, jobs: Iterable[Job]) -> None:
        """Runs every job once. When it returns or raises, no job is running any more.

        Raises:
            Exception: that of a job; those that had not begun are not run.
        """
        waiting = deque(jobs)

        def work() -> None:
            try:
                while True:
                    try:
                        job = waiting.popleft()  # atomic: each job is taken once
                    except IndexError:
                        return
                    job()
            except BaseException:
                waiting.clear()
                raise

        helpers = [self._executor().submit(work) for _ in range(min(self.threads, len(waiting)) - 1)]
        try:
            work()
        finally:
            # A helper that has not begun finds nothing to do, and is not waited for.
            running = [helper for helper in helpers if not helper.cancel()]
            wait(running)
        for helper in running:
            helper.result()

    def gather(self, take: Take, rows: np.ndarray, out: np.ndarray) -> None:
        """Copies rows of one column, as :meth:`Columns.gather` does."""
        self.run(pieces_of(take, rows, out))

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                # Its threads start with the first jobs, and end with the table.
                self._pool = ThreadPoolExecutor(self.threads - 1, thread_name_prefix="touchline-gather")
            return self._pool


def pieces_of(take: Take, rows: np.ndarray, out: np.ndarray) -> Iterator[Job]:
    """Yields jobs that together copy rows of one column.

    Args:
        take: the column's take.
        rows: [T, slices] int64.
        out: [T, slices, *inner]; each of its steps is contiguous.
    """
    size = max(PIECE_BYTES // max(out[0, 0].nbytes, 1), 1) if out.size else 1
    for step_rows, step_out in zip(rows, out, strict=True):
        for begin in range(0, len(step_rows), size):
            yield partial(take, step_rows[begin : begin + size], 0, step_out[begin : begin + size], "clip")


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
