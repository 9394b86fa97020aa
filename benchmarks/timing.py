"""One slice of a round: some tenths of a second of one subject, timed, recorded and checked.

Needs numpy only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from benchmarks.checks import BatchLog, check_batch
from benchmarks.protocol import cpu_seconds
from benchmarks.workloads import Content

WARM_UP_S = 0.1
"""Warm-up before each slice, which uses up what a subject prepared during the pause and refills the caches."""

MAX_LATENCIES = 1 << 16

Taken = TypeVar("Taken")


class BatchSubject(Protocol):
    """A source of batches."""

    content: Content

    def take(self) -> Any:
        """Returns the next batch, in the form in which a user of the subject gets it."""

    def noted(self, batch: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns the batch's obs and reward as arrays, without a copy."""

    def arrays(self, batch: Any) -> Mapping[str, np.ndarray]:
        """Returns all of the batch as arrays, for :func:`~benchmarks.checks.check_batch`."""


class Usage:
    """CPU time of this process and of a server, measured from construction.

    Args:
        server_pid: the server's process; None for none.
    """

    def __init__(self, server_pid: int | None) -> None:
        self._server_pid = server_pid
        self._server_before = self._server()
        self._own_before = time.process_time()

    def figures(self, latencies: Sequence[float], elapsed_s: float) -> dict[str, float]:
        """Returns what a slice measured, without its checks; called as its clock stops.

        Args:
            latencies: seconds that each batch took to arrive.
            elapsed_s: length of the slice in seconds.
        """
        own = time.process_time() - self._own_before
        server = self._server() - self._server_before
        count = len(latencies)
        p50, p99 = np.percentile(latencies[-MAX_LATENCIES:], [50, 99])
        return {
            "batches_per_s": count / elapsed_s,
            "p50_s": float(p50),
            "p99_s": float(p99),
            "cpu_s": own / count,
            "server_cpu_s": server / count,
        }

    def _server(self) -> float:
        return cpu_seconds(self._server_pid) if self._server_pid else 0.0


class SliceTimer:
    """Runs slices of one subject."""

    def __init__(self, subject: BatchSubject, *, log_bytes: int = 32 << 20) -> None:
        self._subject = subject
        workload = subject.content.workload
        noted_bytes = workload.batch_size * (8 + 4 * workload.horizon)
        self._log = BatchLog(subject.content, capacity=max(log_bytes // noted_bytes, 1))

    def run(self, seconds: float, *, server_pid: int | None = None) -> dict[str, float]:
        """Takes batches for ``seconds``.

        Args:
            seconds: length of the timed part; at least one batch is taken.
            server_pid: process whose CPU time is recorded besides this process's own.

        Returns:
            ``batches_per_s``, ``p50_s`` and ``p99_s`` of the time that a batch took to arrive, ``cpu_s`` a batch here, ``server_cpu_s`` a
            batch there, and how many batches were ``checked``.

        Raises:
            WrongDataError: a batch was wrong.
        """
        subject, log = self._subject, self._log
        batch = take_for(subject.take, WARM_UP_S)
        check_batch(subject.content, subject.arrays(batch))
        del batch
        latencies: list[float] = []
        clock = time.perf_counter
        usage = Usage(server_pid)
        begin = asked = clock()
        while True:
            batch = subject.take()
            now = clock()
            latencies.append(now - asked)
            log.note(*subject.noted(batch))
            asked = clock()
            if asked - begin >= seconds:
                break
        figures = usage.figures(latencies, asked - begin)
        check_batch(subject.content, subject.arrays(batch))
        del batch
        return {**figures, "checked": log.verify()}


def take_for(take: Callable[[], Taken], seconds: float) -> Taken:
    """Takes batches for ``seconds``, at least one, releasing each before the next; returns the last."""
    end = time.perf_counter() + seconds
    batch = take()
    while time.perf_counter() < end:
        del batch
        batch = take()
    return batch


def rate_and_cpu(take: Callable[[], Any], seconds: float, cpu_clock: Callable[[], float]) -> tuple[float, float]:
    """Takes batches for ``seconds`` after a short warm-up; returns batches a second, and seconds of CPU time a batch by ``cpu_clock``."""
    take_for(take, 0.1)
    cpu, count, begin = cpu_clock(), 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        take()
        count += 1
    return count / elapsed, (cpu_clock() - cpu) / count


def seconds_per_call(work: Callable[[], Any], seconds: float) -> float:
    """Returns how long a call takes, on average over ``seconds`` after a short warm-up."""
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
