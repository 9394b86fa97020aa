"""Threads that gather a big batch together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from support.store_cases import as_bits, make_config
from touchline import ReplayClient
from touchline_server import ReplayBuffer
from touchline_server.service.app import ServerThread
from touchline_server.store.gather_threads import MAX_DEFAULT_THREADS, MIN_SHARED_BYTES, GatherThreads, available_cores, pieces_of

WAIT_S = 30.0


def test_gather_threads_run_jobs_at_the_same_time_and_each_once() -> None:
    threads = GatherThreads(3)
    together = threading.Barrier(3)
    seen: list[int] = []

    def job(number: int) -> None:
        if number < 3:
            together.wait(WAIT_S)
        seen.append(number)

    threads.run([lambda number=number: job(number) for number in range(50)])

    assert sorted(seen) == list(range(50))


@pytest.mark.parametrize("failing", range(3))
def test_gather_threads_raise_what_a_job_raises_when_no_job_runs_any_more(failing: int) -> None:
    threads = GatherThreads(3)
    together = threading.Barrier(3)
    ended: list[int] = []

    def job(number: int) -> None:
        together.wait(WAIT_S)
        if number == failing:
            raise ValueError(f"job {number}")
        ended.append(number)

    with pytest.raises(ValueError, match=f"job {failing}"):
        threads.run([lambda number=number: job(number) for number in range(3)])

    assert sorted(ended) == [number for number in range(3) if number != failing]


def test_gather_threads_that_are_busy_leave_the_jobs_to_the_caller() -> None:
    threads = GatherThreads(2)
    taken, go_on = threading.Barrier(3), threading.Event()

    def hold() -> None:
        taken.wait(WAIT_S)
        assert go_on.wait(WAIT_S)

    with ThreadPoolExecutor(1) as other:
        first = other.submit(threads.run, [hold, hold])
        taken.wait(WAIT_S)
        done: list[int] = []
        try:
            threads.run([lambda number=number: done.append(number) for number in range(5)])
        finally:
            go_on.set()
        first.result()

    assert done == list(range(5))


def test_gather_threads_by_default_are_the_cores_up_to_a_limit() -> None:
    assert GatherThreads(0).threads == min(available_cores(), MAX_DEFAULT_THREADS)
    assert not GatherThreads(1).pays(1 << 40)
    assert GatherThreads(2).pays(MIN_SHARED_BYTES) and not GatherThreads(2).pays(MIN_SHARED_BYTES - 1)


def test_pieces_of_a_tensor_without_bytes_or_slices_are_copied_too() -> None:
    for shape in ((2, 3, 0), (2, 0, 4)):
        out = np.empty(shape, np.uint8)
        for job in pieces_of(np.empty((5, *shape[2:]), np.uint8).take, np.zeros(shape[:2], np.int64), out):
            job()


@pytest.mark.parametrize("ring", [True, False], ids=["ring", "stream"])
def test_batches_gathered_by_several_threads_are_those_of_one(ring: bool) -> None:
    random = np.random.default_rng(0)
    episodes = [
        {
            "obs": random.integers(0, 256, (30, 40, 40), np.uint8),
            "action": random.random((30, 2), np.float32),
            "reward": random.random(30, np.float32),
        }
        for _ in range(5)
    ]
    shape: dict[str, Any] = {"batch_size": 900, "horizon": 3, "seed": 1}
    alone = ReplayBuffer(make_config(200, server={"gather_threads": 1}, **shape))
    shared = ReplayBuffer(make_config(200, server={"gather_threads": 2}, **shape))
    config = make_config(200, server={"gather_threads": 2, "port": 0}, **shape)
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        for episode in episodes:
            for buffer in (alone, shared, client):
                buffer.add(episode)
        with client.batches(ring=ring, seed=3) as batches:
            streamed = [next(batches) for _ in range(3)]
            assert batches.transport == ("ring" if ring else "stream")

    assert streamed[0].obs.nbytes >= MIN_SHARED_BYTES
    assert as_bits(alone.sample(seed=7).obs) == as_bits(shared.sample(seed=7).obs)
    assert any(thread.name.startswith("touchline-gather") for thread in threading.enumerate())
    rng = alone.seeds.stream(3)
    for batch in streamed:
        with alone.table.draw(alone.spec(), rng) as drawn:
            body = drawn.layout.body_views(bytearray(drawn.layout.body_bytes))
            drawn.gather_into((body,))
        assert as_bits(batch.obs) == as_bits(body["obs"])
        assert as_bits(batch.action) == as_bits(body["action"])
