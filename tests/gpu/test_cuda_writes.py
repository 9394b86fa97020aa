"""Adds to columns in CUDA memory: the host does not wait for the device, and no gather sees rows that are being written."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from support.store_cases import as_bits, make_config, read_episode, traced, traced_columns
from touchline_server import Batch, ReplayBuffer
from touchline_server.store import staging

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SECONDS = 2_000_000_000
"""Cycles for which a stream is kept busy: about a second."""


def cuda_buffer(capacity: int = 40) -> ReplayBuffer:
    """A buffer that is full and has its pinned blocks: allocating one waits for the device."""
    buffer = ReplayBuffer(make_config(capacity, storage={"device": "cuda"}, seed=1))
    for _ in range(staging.BLOCKS):
        buffer.add_episode(traced(0, 40))
    return buffer


def stamps(batch: Batch) -> torch.Tensor:
    return batch.extra["stamp"].cpu()


def busy_reader(buffer: ReplayBuffer) -> tuple[torch.cuda.Stream, Batch]:
    """A stream that is busy for a while before it gathers a batch."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        buffer.sample()
        torch.cuda._sleep(SECONDS)
        return stream, buffer.sample()


def test_cuda_add_does_not_wait_for_the_gathers_that_it_follows() -> None:
    cuda = cuda_buffer()
    old = traced_columns(0, 40)["stamp"]
    stream, batch = busy_reader(cuda)

    cuda.add_episode(traced(1, 40))  # takes all the rows that are still to be gathered
    busy = not stream.query()
    stream.synchronize()

    assert busy
    assert np.isin(stamps(batch).numpy(), old).all()


def test_cuda_gather_on_another_stream_sees_an_add_that_is_still_queued() -> None:
    cuda = cuda_buffer()
    stream, _ = busy_reader(cuda)
    cuda.add_episode(traced(1, 40))

    with torch.cuda.stream(torch.cuda.Stream()):
        batch = cuda.sample()
        queued = not stream.query()
        found = stamps(batch).numpy()
    copied = next(iter(cuda.episodes())).columns["stamp"]

    assert queued
    assert np.isin(found, traced_columns(1, 40)["stamp"]).all()
    assert as_bits(copied) == as_bits(traced_columns(1, 40)["stamp"])


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 26])
def test_cuda_episodes_in_pieces_of_any_size_are_stored_whole(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MAX_BLOCK_BYTES", block_bytes)
    cuda = cuda_buffer(60)

    for number in range(12):
        columns = traced_columns(number, 5 + number * 7 % 50) | {"nothing": np.empty((5 + number * 7 % 50, 0), np.float64)}
        cuda.add(columns)
        stored = read_episode(cuda.store, cuda.store.entries()[-1])
        assert {name: as_bits(column) for name, column in stored.items()} == {name: as_bits(column) for name, column in columns.items()}


def test_cuda_memory_of_a_buffer_that_goes_is_not_used_again_while_a_write_is_queued() -> None:
    cuda = ReplayBuffer(make_config(1_000_000, storage={"device": "cuda"}))
    columns = {"obs": np.ones((1000, 4), np.float32), "action": np.ones((1000, 2), np.float32), "reward": np.ones(1000, np.float32)}
    for _ in range(staging.BLOCKS):
        cuda.add(columns)
    stream, batch = busy_reader(cuda)
    cuda.add(columns)
    del cuda, batch
    gc.collect()

    others = [torch.zeros(size, device="cuda") for size in (4_000_000, 2_000_000, 1_000_000)]
    stream.synchronize()
    torch.cuda.synchronize()

    assert all(not tensor.any() for tensor in others)
