"""One slice of a round: so many tenths of a second of one subject, timed, noted and checked.

Needs numpy only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from benchmarks.checks import BatchLog, check_batch
from benchmarks.protocol import cpu_seconds
from benchmarks.workloads import Content

WARM_UP_S = 0.1
"""Before each slice: what a subject had ready from the pause before is used up, and caches are its own again."""

MAX_LATENCIES = 1 << 16


class BatchSubject(Protocol):
    """Something that gives batches."""

    content: Content

    def take(self) -> Any:
        """Returns the next batch, in whatever form a user of the subject gets it."""

    def noted(self, batch: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns the batch's obs and reward as arrays, without a copy."""

    def arrays(self, batch: Any) -> Mapping[str, np.ndarray]:
        """Returns all of the batch as arrays, for :func:`~benchmarks.checks.check_batch`."""


class SliceTimer:
    """Runs slices of one subject."""

    def __init__(self, subject: BatchSubject, *, log_bytes: int = 32 << 20) -> None:
        self._subject = subject
        workload = subject.content.workload
        noted_bytes = workload.batch_size * (8 + 4 * workload.horizon)
        self._log = BatchLog(subject.content, capacity=max(log_bytes // noted_bytes, 1))

    def run(self, seconds: float, *, server_pid: int | None = None) -> dict[str, float]:
        """Takes batches for so long.

        Args:
            seconds: of the timed part; at least one batch is taken.
            server_pid: whose processor time is noted besides this process's own.

        Returns:
            ``batches_per_s``, ``p50_s`` and ``p99_s`` of the time that a batch took to arrive, ``cpu_s`` a batch here, ``server_cpu_s`` a
            batch there, and how many batches were ``checked``.

        Raises:
            WrongDataError: a batch was wrong.
        """
        subject, log = self._subject, self._log
        self._take_for(WARM_UP_S)
        latencies: list[float] = []
        clock = time.perf_counter
        server_before = cpu_seconds(server_pid) if server_pid else 0.0
        own_before = time.process_time()
        begin = asked = clock()
        count = 0
        while True:
            batch = subject.take()
            now = clock()
            latencies.append(now - asked)
            log.note(*subject.noted(batch))
            count += 1
            asked = clock()
            if asked - begin >= seconds:
                break
        elapsed = asked - begin
        own = time.process_time() - own_before
        server = cpu_seconds(server_pid) - server_before if server_pid else 0.0
        check_batch(subject.content, subject.arrays(batch))
        del batch
        p50, p99 = np.percentile(latencies[-MAX_LATENCIES:], [50, 99])
        return {
            "batches_per_s": count / elapsed,
            "p50_s": float(p50),
            "p99_s": float(p99),
            "cpu_s": own / count,
            "server_cpu_s": server / count,
            "checked": log.verify(),
        }

    def _take_for(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        take: Callable[[], Any] = self._subject.take
        batch = take()
        while time.perf_counter() < end:
            del batch
            batch = take()
        check_batch(self._subject.content, self._subject.arrays(batch))


def seconds_per_call(work: Callable[[], Any], seconds: float) -> float:
    """Returns how long a call takes, on average over so many seconds after a short warm-up."""
    for _ in range(20):
        work()
    begin = time.perf_counter()
    count = 0
    while True:
        for _ in range(10):
            work()
        count += 10
        elapsed = time.perf_counter() - begin
        if elapsed >= seconds:
            return elapsed / count
