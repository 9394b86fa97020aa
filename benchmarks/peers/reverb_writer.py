"""The process of one of Reverb's writers: inserts episodes, flat out or at a pace, until it is asked to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import reverb  # type: ignore[import-not-found]
from reverb import structured_writer

from benchmarks.pacing import ready_tags
from benchmarks.peers.reverb_tables import pack, step_signature
from benchmarks.protocol import serve
from benchmarks.workloads import WORKLOADS, Content

PENDING_ITEMS = 100
"""Items that may wait for the server; many more and Reverb warns of its memory."""

FLUSH_STEPS = 100


class Writer:
    """Inserts the slices of episodes that it made in advance, over and over."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._steps = 0

    def prepare(
        self, *, address: str, workload: str, rows: int, number: int, table: str, packed: bool, structured: bool, chunk_length: int = 0
    ) -> None:
        """Connects, and makes episodes.

        Args:
            address: the server's address.
            workload: name of the workload.
            rows: rows of the server's store.
            number: number of this writer; no two writers have the same episodes.
            table: table to write to.
            packed: whether all columns are packed into one.
            structured: whether to use a ``StructuredWriter`` instead of a ``TrajectoryWriter``.
            chunk_length: steps in a chunk of a ``TrajectoryWriter``; 0 leaves it to Reverb.
        """
        self._content = Content(WORKLOADS[workload].resized(rows))
        self._client = reverb.Client(address)
        self._table, self._packed, self._chunk_length = table, packed, chunk_length
        self._writer: Any = self._structured() if structured else self._trajectory()
        self._is_structured = structured
        size = self._content.workload.row_bytes * self._content.workload.max_length
        self._episodes = [self._columns(tag) for tag in ready_tags(number, episode_bytes=size)]

    def fill(self, *, first: int, every: int, rows: int) -> int:
        """Inserts every ``every``-th of the first episodes of the workload; returns how many steps."""
        steps = 0
        for tag in self._content.tags_to_fill(rows)[first::every]:
            steps += self._insert(self._columns(tag), 0.0)
        return steps

    def start(self, *, steps_per_s: float) -> None:
        """Begins to insert, at this pace or, for 0, flat out."""
        self._stopping.clear()
        self._steps = 0
        self._begin = time.perf_counter()
        self._thread = threading.Thread(target=self._work, args=(steps_per_s,), daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Ends it; returns the confirmed ``steps_per_s``.

        Raises:
            BaseException: whatever ended it before.
        """
        assert self._thread is not None
        self._stopping.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return {"steps_per_s": self._steps / (time.perf_counter() - self._begin)}

    def insert(self, *, seconds: float) -> dict[str, float]:
        """Inserts flat out for ``seconds``; returns the confirmed ``steps_per_s`` and this process's ``cpu_s`` a step."""
        before = time.process_time()
        self.start(steps_per_s=0.0)
        self._stopping.wait(seconds)
        result = self.stop()
        return {**result, "cpu_s": (time.process_time() - before) / max(self._steps, 1)}

    def methods(self) -> dict[str, Any]:
        """Returns what the driver may call."""
        return {name: getattr(self, name) for name in ("prepare", "fill", "start", "stop", "insert")}

    def _columns(self, tag: int) -> dict[str, np.ndarray]:
        return pack(self._content.workload, self._content.episode(tag), packed=self._packed)

    def _trajectory(self) -> Any:
        steps = self._content.workload.horizon + 1
        writer = self._client.trajectory_writer(num_keep_alive_refs=max(steps, self._chunk_length), validate_items=False)
        if self._chunk_length:
            for name in step_signature(self._content.workload, packed=self._packed):
                writer.configure((name,), num_keep_alive_refs=max(steps, self._chunk_length), max_chunk_length=self._chunk_length)
        return writer

    def _structured(self) -> Any:
        steps = self._content.workload.horizon + 1
        signature = step_signature(self._content.workload, packed=self._packed)
        pattern = structured_writer.pattern_from_transform(signature, lambda step: {name: step[name][-steps:] for name in signature})
        return self._client.structured_writer([structured_writer.create_config(pattern=pattern, table=self._table)])

    def _work(self, steps_per_s: float) -> None:
        try:
            number = 0
            while not self._stopping.is_set():
                self._insert(self._episodes[number % len(self._episodes)], steps_per_s)
                number += 1
        except BaseException as error:
            self._failure = error

    def _insert(self, columns: Mapping[str, np.ndarray], steps_per_s: float) -> int:
        """Inserts an episode and waits until the server has confirmed it; a stop cuts it short."""
        writer = self._writer
        horizon, length = self._content.workload.horizon, len(next(iter(columns.values())))
        begin, done = time.perf_counter(), 0
        for step in range(length):
            writer.append({name: column[step] for name, column in columns.items()})
            if not self._is_structured and step >= horizon:
                trajectory = {name: writer.history[name][-horizon - 1 :] for name in columns}
                writer.create_item(self._table, 1.0, trajectory)
            done += 1
            if done % FLUSH_STEPS == 0:
                writer.flush(PENDING_ITEMS)
                early = begin + done / steps_per_s - time.perf_counter() if steps_per_s else 0.0
                if self._stopping.wait(max(early, 0.0)):
                    break
        writer.end_episode()
        self._steps += done
        return done


if __name__ == "__main__":
    serve(Writer().methods())
