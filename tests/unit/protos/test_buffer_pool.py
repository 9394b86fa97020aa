"""Receive buffers: never used again while anything sees them, used again after that."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from support.codec_cases import batch_arrays, fill, layout
from touchline_protos.codec import BatchDecoder
from touchline_protos.codec.buffer_pool import BufferPool
from touchline_protos.types.batch import Batch

MADE = layout(3, 8, obs=(40,))


def message(seed: int, n: int = 1) -> bytes:
    made, views = MADE.group(n)
    for index, batch in enumerate(views):
        fill(batch, seed + index)
    return made


def decode(decoder: BatchDecoder, seed: int) -> Batch:
    return decoder.feed(message(seed))[0]


@pytest.mark.parametrize(
    "hold",
    [
        lambda batch: batch.obs["state"],
        lambda batch: batch.obs["state"][0],
        lambda batch: batch.obs["state"][1:, ::2].T,
        lambda batch: batch.reward.reshape(-1).view(np.uint8),
        lambda batch: batch.episode_id[:1],
        lambda batch: memoryview(batch.obs["state"][0]),
        lambda batch: np.asarray(memoryview(batch.obs["image"]["left"])),
    ],
)
def test_held_view_is_unchanged_while_hundreds_more_are_decoded(hold) -> None:
    decoder = BatchDecoder()
    held = hold(decode(decoder, 1))
    before = bytes(held)

    for seed in range(2, 302):
        decode(decoder, seed)

    assert bytes(held) == before


def test_held_torch_tensor_is_unchanged_while_hundreds_more_are_decoded() -> None:
    torch = pytest.importorskip("torch")
    decoder = BatchDecoder()
    held = torch.from_numpy(decode(decoder, 1).obs["state"])[2:]
    before = held.clone()

    for seed in range(2, 302):
        decode(decoder, seed)

    assert torch.equal(held.view(torch.int32), before.view(torch.int32))


def test_view_in_a_garbage_cycle_is_unchanged_when_its_finalizer_saves_it() -> None:
    saved = []

    class Keeper:
        def __init__(self, view: np.ndarray) -> None:
            self.view, self.me = view, self

        def __del__(self) -> None:
            saved.append(self.view)

    decoder = BatchDecoder()
    keeper = Keeper(decode(decoder, 1).obs["state"][0])
    before = keeper.view.copy()
    del keeper
    gc.collect()

    for seed in range(2, 20):
        decode(decoder, seed)

    assert len(saved) == 1 and saved[0].tobytes() == before.tobytes()


def test_batches_of_one_group_do_not_hold_each_others_memory() -> None:
    decoder = BatchDecoder()
    first, second, third = decoder.feed(message(1, n=3))
    held = second.obs["state"][0]
    before = held.tobytes()
    freed = {batch.obs["state"].ctypes.data for batch in (first, third)}
    del first, second, third

    again = [decode(decoder, seed) for seed in (50, 51)]

    assert {batch.obs["state"].ctypes.data for batch in again} == freed
    assert held.tobytes() == before


def test_buffer_is_used_again_after_its_last_view_died() -> None:
    decoder = BatchDecoder()
    batch = decode(decoder, 1)
    address = batch.obs["state"].ctypes.data
    view = batch.reward[0]
    del batch

    assert decode(decoder, 2).obs["state"].ctypes.data != address
    del view
    addresses = {decode(decoder, seed).obs["state"].ctypes.data for seed in range(3, 6)}
    assert len(addresses) == 1
    first, second = decode(decoder, 6), decode(decoder, 7)
    assert address in {b.obs["state"].ctypes.data for b in (first, second)}


def test_received_arrays_are_writable_and_share_no_memory() -> None:
    received = message(3, n=2)
    copy = bytes(bytearray(received))
    first, second = BatchDecoder().feed(received)
    untouched = {name: array.copy() for name, array in batch_arrays(second).items()}

    for array in batch_arrays(first).values():
        array.reshape(-1).view(np.uint8)[...] = 0xAA

    assert received == copy
    assert all(array.tobytes() == untouched[name].tobytes() for name, array in batch_arrays(second).items())


def test_chunked_batch_in_progress_keeps_its_buffer() -> None:
    decoder = BatchDecoder()
    plan = MADE.chunk_plan(500)
    parts = [MADE.chunk(piece) for piece in plan]
    for index, (_, views) in enumerate(parts):
        for view in views:
            view[...] = np.frombuffer(bytes([index % 250]) * view.nbytes, view.dtype).reshape(view.shape)
    messages = [part for part, _ in parts]
    sample, views = MADE.sample_response()
    fill(views, 0)
    for part in messages[:-1]:
        decoder.feed(part)

    for _ in range(50):
        decoder.sample_response(sample)
    done = decoder.feed(messages[-1])

    assert len(done) == 1
    first_row_bytes = done[0].obs["state"][0, 0].tobytes()
    assert first_row_bytes == b"\0" * len(first_row_bytes)


def test_idle_buffers_are_bounded() -> None:
    pool = BufferPool(max_idle_bytes=5 * 4096)
    leases = [pool.lease(4000) for _ in range(20)]

    leases.clear()

    assert pool.idle_bytes == 5 * 4096


def test_buffers_of_sizes_no_longer_wanted_are_freed() -> None:
    pool = BufferPool(max_idle_bytes=10 * 4096)
    leases = [pool.lease(4096) for _ in range(8)]
    leases.clear()
    leases = [pool.lease(3 * 4096) for _ in range(3)]
    leases.clear()

    lease = pool.lease(3 * 4096)

    assert pool.idle_bytes == 2 * 3 * 4096
    assert len(lease) == 3 * 4096


def test_lease_outlives_its_pool() -> None:
    pool = BufferPool(max_idle_bytes=1 << 20)
    array = np.ndarray((10,), np.int64, pool.lease(80))
    array[...] = range(10)

    del pool
    gc.collect()

    assert array.tolist() == list(range(10))


@pytest.mark.parametrize("size", [1, 80, 4096, 4097, 300_000, 38_000_000])
def test_lease_is_large_enough_aligned_and_not_much_larger(size: int) -> None:
    lease = BufferPool(1 << 20).lease(size)

    assert size <= len(lease) <= max(4096, size * 9 // 8 + 4096)
    assert np.frombuffer(lease, np.uint8).ctypes.data % 64 == 0


def test_leases_that_die_in_other_threads_come_back_whole() -> None:
    decoder = BatchDecoder()
    batches = [decode(decoder, seed) for seed in range(64)]
    expected = [batch.obs["state"].tobytes() for batch in batches]
    wrong: list[int] = []

    def check_and_drop(mine: list[tuple[Batch, bytes]]) -> None:
        while mine:
            batch, content = mine.pop()
            if batch.obs["state"].tobytes() != content:
                wrong.append(1)

    pairs = list(zip(batches, expected, strict=True))
    batches.clear()
    threads = [threading.Thread(target=check_and_drop, args=(pairs[i::4],)) for i in range(4)]
    pairs.clear()
    for thread in threads:
        thread.start()
    for seed in range(100, 300):
        batch = decode(decoder, seed)
        assert batch.obs["state"].tobytes() == decode(BatchDecoder(), seed).obs["state"].tobytes()
    for thread in threads:
        thread.join()

    assert not wrong
