"""Adds to columns in CUDA memory: the host does not wait for the device, and no gather sees rows that are being written."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from support.pinned import have_pinned_memory_ready
from support.store_cases import as_bits, make_config, read_episode, traced, traced_columns
from touchline_server import Batch, InvalidEpisodeError, ReplayBuffer
from touchline_server.store import staging

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SECONDS = 2_000_000_000
"""Cycles for which a stream is kept busy: about a second."""


@pytest.fixture(autouse=True)
def pinned_memory() -> None:
    have_pinned_memory_ready()


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


def cuda_batch(first: int, envs: int, rows: int) -> dict[str, torch.Tensor]:
    episodes = [traced_columns(first + number, rows) for number in range(envs)]
    return {name: torch.from_numpy(np.stack([episode[name] for episode in episodes])).cuda() for name in episodes[0]}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_cuda_batch_of_episodes_is_stored_whole(device: str) -> None:
    buffer = ReplayBuffer(make_config(60, storage={"device": device}))
    for number, (envs, rows, lengths) in enumerate([(3, 7, None), (5, 9, [9, 1, 3, 9, 2]), (9, 10, None), (2, 30, [30, 29])]):
        first = 10 * number
        count = buffer.add_batch(cuda_batch(first, envs, rows), lengths=lengths, policy_version=number)
        kept = list(buffer.episodes())

        assert len(kept) == count
        for episode in kept[-min(envs, count) :]:
            env = episode.columns["stamp"][0] // traced_columns(1, 1)["stamp"][0]
            expected = traced_columns(int(env), episode.length)
            assert {name: as_bits(column) for name, column in episode.columns.items()} == {
                name: as_bits(column) for name, column in expected.items()
            }


def test_cuda_batch_is_ordered_with_the_current_stream_on_both_sides() -> None:
    cuda = ReplayBuffer(make_config(60, storage={"device": "cuda"}))
    cuda.add_batch(cuda_batch(0, 2, 5))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        batch = {name: torch.zeros_like(tensor) for name, tensor in cuda_batch(1, 2, 5).items()}
        made = cuda_batch(1, 2, 5)
        torch.cuda._sleep(SECONDS // 10)
        for name, tensor in batch.items():
            tensor.copy_(made[name])  # queued behind the sleep, before the batch is added
        cuda.add_batch(batch)
        for tensor in batch.values():
            tensor.zero_()  # the simulator goes on

    stored = list(cuda.episodes())[-2:]

    for number, episode in enumerate(stored, 1):
        expected = traced_columns(number, 5)
        assert {name: as_bits(column) for name, column in episode.columns.items()} == {
            name: as_bits(column) for name, column in expected.items()
        }


def test_cuda_batch_with_a_value_that_is_not_finite_is_refused_by_name() -> None:
    cuda = ReplayBuffer(make_config(60, storage={"device": "cuda"}))
    batch = cuda_batch(0, 3, 5)
    batch["reward"][1, 3] = float("inf")

    with pytest.raises(InvalidEpisodeError, match="episode 1: reward: a value that is not finite in row 3"):
        cuda.add_batch(batch)
    assert cuda.num_eps == 0


def test_cuda_batch_of_many_episodes_is_not_copied_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = ReplayBuffer(make_config(2000, storage={"device": "cuda"}))
    copies: list[int] = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *given, **options: (copies.append(len(self)), copy(self, *given, **options))[1])

    batch = cuda_batch(0, 100, 10)
    copies.clear()
    cuda.add_batch(batch)

    assert len(copies) <= 2 * len(batch)
    assert cuda.num_eps == 100
