"""Draws on a card, and batches at fixed addresses: by themselves, in a CUDA graph, and for a compiled learner, while episodes are added."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats

from support.device_draws import DRAWN_BY_KEY_7, check_drawn, fill, on_host
from support.store_cases import check_traced, make_config, traced
from touchline_server import Batch, InvalidArgumentError, ReplayBuffer
from touchline_server.selectors.entries import ID, LENGTH

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make_buffer(capacity: int = 150, **sampling: object) -> ReplayBuffer:
    return ReplayBuffer(make_config(capacity, storage={"device": "cuda"}, seed=1, **sampling))


def host_batch(batch: Batch) -> Batch:
    """The batch on the host, for :func:`check_traced`."""
    values = {name: getattr(batch, name).cpu() for name in ("action", "reward", "done", "episode_id", "start", "actor", "policy_version")}
    obs = {name: value.cpu() for name, value in batch.obs.items()}
    extra = {name: value.cpu() for name, value in batch.extra.items()}
    return Batch(obs=obs, extra=extra, task=None, probability=batch.probability.cpu(), **values)


@pytest.mark.parametrize("law", ["episode", "step"])
@pytest.mark.parametrize("pad", ["none", "end"])
def test_cuda_draws_follow_their_law_and_hold_the_rows_that_they_name(law: str, pad: str) -> None:
    buffer = make_buffer(120)
    fill(buffer, 7)
    sampler = buffer.device_sampler(batch_size=4096, horizon=3, law=law, pad=pad, seed=1)
    sampler.sample()
    fill(buffer, 40, begin=7)

    counts: dict[tuple[int, int], int] = {}
    for _ in range(5):
        batch = sampler.sample()
        check_drawn(buffer, batch, 3)
        for one in zip(on_host(batch.episode_id).tolist(), on_host(batch.start).tolist(), strict=True):
            counts[one] = counts.get(one, 0) + 1

    reach = 1 if pad == "end" else 3
    entries = [entry for entry in buffer.store.entries() if entry[LENGTH] > reach]
    starts = sum(entry[LENGTH] - reach for entry in entries)
    chances = {
        (int(entry[ID]), start): 1 / starts if law == "step" else 1 / len(entries) / (entry[LENGTH] - reach)
        for entry in entries
        for start in range(entry[LENGTH] - reach)
    }
    assert counts.keys() <= chances.keys()
    found = [counts.get(one, 0) for one in chances]
    assert stats.chisquare(found, [5 * 4096 * chance for chance in chances.values()]).pvalue > 1e-3


def test_cuda_draws_of_one_seed_are_those_of_the_interpreter() -> None:
    buffer = make_buffer()
    fill(buffer, 30)

    found = buffer.sample(draw="device", seed=7, batch_size=4)

    assert (on_host(found.episode_id).tolist(), on_host(found.start).tolist()) == DRAWN_BY_KEY_7


def test_cuda_graph_replays_draw_new_batches_of_the_episodes_that_are_stored_by_then() -> None:
    buffer = make_buffer()
    fill(buffer, 20)
    sampler = buffer.device_sampler(batch_size=64, seed=3)
    sampler.sample()
    graph = torch.cuda.CUDAGraph()
    with sampler.hold(), torch.cuda.graph(graph):
        sampler.launch()
        total = sampler.batch.reward.sum()

    seen = set()
    for number in range(20, 80):
        with sampler.hold():
            graph.replay()
        check_drawn(buffer, sampler.batch, 3)
        assert float(total) == float(sampler.batch.reward.sum())
        seen |= set(on_host(sampler.batch.episode_id).tolist())
        buffer.add_episode(traced(number, 2 + number * 7 % 29))

    assert max(seen) > 70


def test_cuda_graph_replays_beside_adds_give_no_torn_batch() -> None:
    buffer = make_buffer(120)
    fill(buffer, 20)
    sampler = buffer.device_sampler(batch_size=64, seed=3)
    sampler.sample()
    graph = torch.cuda.CUDAGraph()
    with sampler.hold(), torch.cuda.graph(graph):
        sampler.launch()
    done = threading.Event()

    def add() -> None:
        number = 20
        while not done.is_set():
            buffer.add_episode(traced(number, 4 + number % 40))
            number += 1

    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(add)
        try:
            for _ in range(300):
                with sampler.hold():
                    graph.replay()
                check_traced(host_batch(sampler.batch), horizon=3)
        finally:
            done.set()
        adding.result()


def test_cuda_sampler_used_on_another_stream_follows_itself() -> None:
    buffer = make_buffer()
    fill(buffer, 20)
    sampler = buffer.device_sampler(batch_size=64, seed=3)

    for number in range(20, 40):
        with torch.cuda.stream(torch.cuda.Stream()):
            batch = sampler.sample()
            check_drawn(buffer, batch, 3)
        buffer.add_episode(traced(number, 20))


def test_cuda_batches_into_an_earlier_one_feed_a_compiled_learner() -> None:
    buffer, expected = make_buffer(), make_buffer()
    for one in (buffer, expected):
        fill(one, 20)
    batch, _ = buffer.sample(), expected.sample()
    torch._dynamo.mark_static_address(batch.obs["state"])

    @torch.compile(mode="reduce-overhead")
    def learn(state: torch.Tensor) -> torch.Tensor:
        return (state * 2).sum((0, 2))

    for _ in range(10):
        again = buffer.sample(out=batch)
        found = learn(batch.obs["state"]).clone()
        assert again.obs["state"].data_ptr() == batch.obs["state"].data_ptr()
        torch.testing.assert_close(found, (expected.sample().obs["state"] * 2).sum((0, 2)))


def test_cuda_table_in_host_memory_refuses_draws_on_the_device() -> None:
    buffer = ReplayBuffer(make_config(150))
    fill(buffer, 5)

    with pytest.raises(InvalidArgumentError, match="columns are in host memory"):
        buffer.sample(draw="device")


def test_cuda_sample_is_one_launch_and_one_copy() -> None:
    buffer = make_buffer()
    fill(buffer, 20)
    buffer.sample()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        buffer.sample()
        torch.cuda.synchronize()

    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("gather_rows" in name for name in names) == 1
    assert len(names) == 2, names
    assert np.count_nonzero(["Memcpy" in name for name in names]) == 1
