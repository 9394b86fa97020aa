"""One slice of a round, of a subject whose batches are on a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.checks import BatchLog, check_batch
from benchmarks.gpu.place import Place
from benchmarks.timing import Usage, take_for
from benchmarks.workloads import ROW_ID_BYTES, Content

WARM_UP_S = 0.05
"""Warm-up before each slice, which uses up what a subject prepared during the pause."""

NOTED = 512
"""Maximum number of batches that a slice records before their places are reused."""

NOTE_EVERY = 8
"""One batch in this many is recorded: recording is two small copies on the device, whose launches cost the host some 25 µs."""


class DeviceSubject(Protocol):
    """Something that gives batches on a device."""

    content: Content
    place: Place

    def take(self) -> Any:
        """Returns the next batch; its tensors may still be in flight, in the order of the current stream."""

    def columns(self, batch: Any) -> Mapping[str, torch.Tensor]:
        """Returns the batch's tensors by the names of :func:`~benchmarks.checks.check_batch`."""


class DeviceLog:
    """Records row ids and rewards of batches in memory of the device, and checks them on the host after the clock has stopped."""

    def __init__(self, content: Content, place: Place) -> None:
        workload = content.workload
        dtype = np.dtype(workload.obs_dtype)
        self._content = content
        self._values = ROW_ID_BYTES // dtype.itemsize
        torch_dtype = torch.uint8 if dtype == np.uint8 else torch.float32
        self._ids = torch.empty((NOTED, workload.batch_size, self._values), dtype=torch_dtype, device=place.device)
        self._rewards = torch.empty((NOTED, workload.horizon, workload.batch_size), device=place.device)
        self._count = 0

    def note(self, columns: Mapping[str, torch.Tensor]) -> None:
        """Records a batch."""
        place = self._count % NOTED
        first_rows = columns["obs"][0]
        self._ids[place].copy_(first_rows.view(len(first_rows), -1)[:, : self._values])
        self._rewards[place].copy_(columns["reward"].view(self._rewards.shape[1:]))
        self._count += 1

    def verify(self) -> int:
        """Checks the recorded batches and starts afresh; returns how many. Raises WrongDataError as :class:`BatchLog` does."""
        count = min(self._count, NOTED)
        self._count = 0
        log = BatchLog(self._content, capacity=max(count, 1))
        ids, rewards = self._ids[:count].cpu().numpy(), self._rewards[:count].cpu().numpy()
        for row_ids, reward in zip(ids, rewards, strict=True):
            log.note(row_ids[None], reward)
        return log.verify()


class DeviceSliceTimer:
    """Runs slices of one subject."""

    def __init__(self, subject: DeviceSubject) -> None:
        self._subject = subject
        self._log = DeviceLog(subject.content, subject.place)

    def run(self, seconds: float, *, server_pid: int | None = None) -> dict[str, float]:
        """Takes batches for ``seconds``, then waits until the device has finished all of them; the time includes that wait.

        Args:
            seconds: length of the timed part.
            server_pid: process whose CPU time is recorded besides this process's own.

        Returns:
            As :meth:`benchmarks.timing.SliceTimer.run`, and ``gb_per_s``, bytes of batches; ``p50_s`` and ``p99_s`` are the host's time
            for a batch.

        Raises:
            WrongDataError: a batch was wrong.
        """
        subject, log = self._subject, self._log
        self._check(take_for(subject.take, WARM_UP_S))
        subject.place.synchronize()
        latencies: list[float] = []
        clock = time.perf_counter
        usage = Usage(server_pid)
        begin = clock()
        count = 0
        while True:
            asked = clock()
            batch = subject.take()
            now = clock()
            latencies.append(now - asked)
            if not count % NOTE_EVERY:
                log.note(subject.columns(batch))
            count += 1
            if now - begin >= seconds:
                break
        subject.place.synchronize()
        figures = usage.figures(latencies, clock() - begin)
        self._check(batch)
        del batch
        gb_per_s = figures["batches_per_s"] * subject.content.workload.batch_bytes / 1e9
        return {**figures, "gb_per_s": gb_per_s, "checked": log.verify()}

    def _check(self, batch: Any) -> None:
        arrays = {name: tensor.cpu().numpy() for name, tensor in self._subject.columns(batch).items()}
        check_batch(self._subject.content, arrays)
