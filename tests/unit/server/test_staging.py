"""Episodes on their way to a device through two blocks of pinned memory, on a device that copies as late as it may."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from touchline_protos.types.dtypes import DType, to_numpy
from touchline_server.store import gather_threads, staging
from touchline_server.store.gather_threads import GatherThreads
from touchline_server.store.schema import ColumnSpec
from touchline_server.store.staging import StagedWriter


class LateQueue:
    """Copies to columns that are done only when an event behind them is waited for."""

    def __init__(self, columns: list[ColumnSpec], capacity: int) -> None:
        self.columns = {spec.name: np.full(capacity * spec.row_bytes, 7, np.uint8) for spec in columns}
        self.row_bytes = {spec.name: spec.row_bytes for spec in columns}
        self.allocated: list[int] = []
        self.fail_at: int | None = None
        self._waiting: deque[Callable[[], None]] = deque()
        self._queued = 0
        self._done = 0

    def allocate(self, size_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        self.allocated.append(size_bytes)
        memory = np.full(size_bytes, 9, np.uint8)
        return memory, memory

    def copy(self, name: str, first_row: int, memory: Any, begin: int, end: int) -> None:
        if self.fail_at == self._queued:
            raise RuntimeError("the device refuses")
        at = first_row * self.row_bytes[name]
        assert 0 <= begin < end <= len(memory) and at + end - begin <= len(self.columns[name])

        def run() -> None:
            self.columns[name][at : at + end - begin] = memory[begin:end]

        self._waiting.append(run)
        self._queued += 1

    def record(self) -> int:
        return self._queued

    def synchronize(self, event: int) -> None:
        while self._done < event:
            self._waiting.popleft()()
            self._done += 1

    def finish(self) -> None:
        self.synchronize(self._queued)


SPECS = st.lists(
    st.tuples(st.sampled_from(DType).map(to_numpy), st.lists(st.integers(0, 3), max_size=2).map(tuple)), min_size=1, max_size=4
).map(lambda columns: [ColumnSpec(f"column{number}", dtype, shape) for number, (dtype, shape) in enumerate(columns)])


def episode_of(specs: list[ColumnSpec], length: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    columns = {}
    for spec in specs:
        raw = np.frombuffer(random.bytes(length * spec.row_bytes), np.uint8)
        columns[spec.name] = (raw & 1 if spec.dtype == np.bool_ else raw).tobytes()
        columns[spec.name] = np.frombuffer(bytearray(columns[spec.name]), spec.dtype).reshape(length, *spec.shape)
    return columns


@settings(max_examples=60, deadline=None)
@given(
    specs=SPECS,
    capacity=st.integers(1, 30),
    lengths=st.lists(st.integers(1, 30), max_size=8),
    block_bytes=st.sampled_from([1, 200, 1 << 20]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_staged_episodes_arrive_whole_however_late_the_device_copies(
    specs: list[ColumnSpec], capacity: int, lengths: list[int], block_bytes: int, threads: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    queue = LateQueue(specs, capacity)
    expected = {name: column.copy() for name, column in queue.columns.items()}
    row = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "MAX_BLOCK_BYTES", block_bytes)
        patch.setattr(staging, "MIN_BLOCK_BYTES", 1)
        patch.setattr(staging, "PIECE_BYTES", 20)
        patch.setattr(gather_threads, "MIN_SHARED_BYTES", 0)
        writer = StagedWriter(queue, specs, capacity, threads=GatherThreads(threads))
        for length in lengths:
            length = min(length, capacity)
            episode = episode_of(specs, length, random)
            writer.write(row, episode)
            for spec in specs:
                rows = (row + np.arange(length)) % capacity
                expected[spec.name].reshape(capacity, -1)[rows] = np.frombuffer(episode[spec.name].tobytes(), np.uint8).reshape(length, -1)
                episode[spec.name].reshape(-1).view(np.uint8)[:] = 3  # the caller's again
            row = (row + length) % capacity
    queue.finish()

    for name, column in expected.items():
        assert queue.columns[name].tobytes() == column.tobytes(), name


SPEC = [ColumnSpec("obs", np.dtype("u1"), (1000,))]


def test_staging_blocks_grow_and_are_used_again() -> None:
    queue = LateQueue(SPEC, 1000)
    writer = StagedWriter(queue, SPEC, 1000)

    for _ in range(10):
        writer.write(0, {"obs": np.zeros((100, 1000), np.uint8)})
    few = list(queue.allocated)
    for _ in range(10):
        writer.write(0, {"obs": np.zeros((500, 1000), np.uint8)})

    assert len(few) == staging.BLOCKS and len(queue.allocated) == 2 * staging.BLOCKS
    assert min(queue.allocated[2:]) >= 500_000


def test_staging_of_a_large_episode_stays_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MAX_BLOCK_BYTES", 50_000)
    queue = LateQueue(SPEC, 1000)
    writer = StagedWriter(queue, SPEC, 1000)
    episode = np.random.default_rng(0).integers(0, 256, (1000, 1000), np.uint8)

    writer.write(700, {"obs": episode})
    queue.finish()

    assert max(queue.allocated) <= max(50_000 + staging.ALIGNMENT, staging.MIN_BLOCK_BYTES)
    assert np.array_equal(queue.columns["obs"].reshape(1000, 1000), np.roll(episode, 700, axis=0))


def test_staging_after_a_failed_copy_waits_for_those_before_it() -> None:
    columns = [ColumnSpec("a", np.dtype("u1"), (8,)), ColumnSpec("b", np.dtype("u1"), (8,))]
    queue = LateQueue(columns, 10)
    writer = StagedWriter(queue, columns, 10)
    queue.fail_at = 1

    with pytest.raises(RuntimeError, match="refuses"):
        writer.write(0, {name: np.full((4, 8), 1, np.uint8) for name in ("a", "b")})
    queue.fail_at = None
    for value in (2, 3, 4):
        writer.write(0, {name: np.full((4, 8), value, np.uint8) for name in ("a", "b")})

    # Two blocks: the second one's copies and the one of the failed write were waited for before the first one was filled again.
    assert queue.columns["a"][0] == 2
    queue.finish()
    assert queue.columns["a"][0] == queue.columns["b"][0] == 4
