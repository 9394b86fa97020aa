"""The in-process buffer as its users see it."""

from __future__ import annotations

import gc
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from support.store_cases import STRIDE, check_traced, make_config, plain_columns, read_episode, sample_with, traced, traced_columns
from touchline_protos.codec import Episode, EpisodeKey
from touchline_server import Config, InvalidArgumentError, NotReadyError, ReplayBuffer


def test_buffer_takes_its_numbers_from_the_configuration() -> None:
    buffer = ReplayBuffer(Config(config={"buffer_size": 500, "batch_size": 7, "min_history": 50, "horizon": 2}))

    buffer.add(plain_columns(10))

    assert (buffer.capacity, buffer.min_history) == (500, 50)
    assert buffer.sample().action.shape == (2, 7, 1)
    assert buffer.ready()  # though fewer than min_history rows are stored


def test_add_takes_a_tensordict_a_dict_of_tensors_or_of_arrays_alike() -> None:
    arrays = plain_columns(6, done=np.arange(6) == 5)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    buffer = ReplayBuffer(make_config())

    counts = [buffer.add(episode) for episode in (arrays, tensors, TensorDict(tensors, [6]))]

    assert counts == [1, 2, 3]
    stored = [read_episode(buffer.store, entry) for entry in buffer.store.entries()]
    assert all(episode[name].tobytes() == arrays[name].tobytes() for episode in stored for name in arrays)


def test_add_copies_what_it_is_given() -> None:
    buffer = ReplayBuffer(make_config())
    columns = plain_columns(6)

    buffer.add(columns)
    columns["obs"][:] = -1

    assert (buffer.sample().obs >= 0).all()


def test_add_views_of_other_layouts_are_stored_right() -> None:
    buffer = ReplayBuffer(make_config())
    obs = np.arange(24.0).reshape(4, 6).T  # column-major
    reward = np.arange(12, dtype=">f4")[::2]
    action = torch.arange(12.0).reshape(2, 6).T

    buffer.add({"obs": obs, "action": action, "reward": reward})

    stored = read_episode(buffer.store, buffer.store.entries()[0])
    assert stored["obs"].tolist() == obs.tolist()
    assert stored["action"].tolist() == action.tolist()
    assert stored["reward"].tolist() == [0, 2, 4, 6, 8, 10]


def test_add_tensor_that_requires_grad_is_stored_detached() -> None:
    buffer = ReplayBuffer(make_config())

    buffer.add(plain_columns(6, obs=torch.ones(6, 2, requires_grad=True)))

    assert not buffer.sample().obs.requires_grad


def test_load_stores_each_episode_of_a_stack() -> None:
    buffer = ReplayBuffer(make_config())
    episodes = [traced_columns(number, 6) for number in range(4)]
    stack = TensorDict({name: torch.from_numpy(np.stack([episode[name] for episode in episodes])) for name in episodes[0]}, [4, 6])
    before = stack.clone()

    count = buffer.load(stack, actor="archive", policy_version=3)

    assert count == buffer.num_eps == 4
    assert (stack == before).all()
    for number, entry in enumerate(buffer.store.entries()):
        stored = read_episode(buffer.store, entry)
        assert all(stored[name].tobytes() == array.tobytes() for name, array in episodes[number].items())
    batch = buffer.sample()
    assert set(batch.policy_version.tolist()) == {3}
    assert batch.actor_names == {0: "archive"}


def test_load_more_than_fits_keeps_the_newest() -> None:
    buffer = ReplayBuffer(make_config(20))
    rows = np.arange(5 * 6, dtype=np.float32).reshape(5, 6)

    count = buffer.load({"obs": rows, "action": rows[..., None], "reward": rows})

    assert count == 3
    assert buffer.counts().episodes_evicted == 2


def test_ready_follows_the_configured_horizon() -> None:
    buffer = ReplayBuffer(make_config(horizon=5))
    seen = [buffer.ready()]

    for length in (5, 6):
        buffer.add(plain_columns(length))
        seen.append(buffer.ready())
    buffer.clear()
    seen.append(buffer.ready())

    assert seen == [False, False, True, False]


@pytest.mark.parametrize("law", ["episode", "step"])
@pytest.mark.parametrize("stored", [(), (3, 2)], ids=["nothing", "too short"])
def test_sample_before_anything_is_long_enough_raises_with_the_counts(law: str, stored: tuple[int, ...]) -> None:
    buffer = ReplayBuffer(make_config())
    for length in stored:
        buffer.add(plain_columns(length))

    with pytest.raises(NotReadyError, match=f"{sum(stored)} steps in {len(stored)} episodes are stored.* 4 steps that horizon 3 needs"):
        buffer.sample(law=law)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0, expected 1 to 65536 (limits.max_batch_size)"),
        ({"batch_size": -1}, "batch_size: -1"),
        ({"batch_size": 65_537}, "batch_size: 65537"),
        ({"horizon": 0}, "horizon: 0, expected 1 to 1024 (limits.max_horizon)"),
        ({"horizon": 1_025}, "horizon: 1025"),
        ({"law": "rank"}, "law: 'rank', expected one of episode, step"),
        ({"seed": -2}, "seed: -2, expected 0 or more"),
    ],
)
def test_sample_argument_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    buffer = ReplayBuffer(make_config())
    buffer.add(plain_columns(10))

    with pytest.raises(InvalidArgumentError, match=re.escape(message)):
        buffer.sample(**arguments)


def test_sample_overrides_hold_for_that_batch_only() -> None:
    buffer = ReplayBuffer(make_config())
    buffer.add(plain_columns(10))

    batch = buffer.sample(batch_size=5, horizon=7)

    assert batch.obs.shape == (8, 5, 2)
    assert batch.reward.shape == batch.done.shape == (7, 5, 1)
    assert buffer.sample().obs.shape == (4, 8, 2)


@pytest.mark.parametrize("convention", ["incoming", "outgoing"])
def test_sample_gives_the_rows_of_the_convention(convention: str) -> None:
    buffer = ReplayBuffer(make_config(row_convention=convention))
    for number in range(5):
        buffer.add_episode(traced(number, 6 + number))

    for law in ("episode", "step"):
        check_traced(buffer.sample(batch_size=64, law=law), horizon=3, incoming=convention == "incoming")


def test_sample_task_is_that_of_each_slices_first_row() -> None:
    buffer = ReplayBuffer(make_config())
    buffer.add(plain_columns(10, task=np.arange(10, dtype=np.int32)))

    batch = buffer.sample(batch_size=40)

    assert batch.task.dtype == torch.int32
    assert batch.task.tolist() == batch.start.tolist()


def test_sample_without_a_done_column_gives_float32_zeros() -> None:
    buffer = ReplayBuffer(make_config())
    buffer.add(plain_columns(10))

    done = buffer.sample().done

    assert done.dtype == torch.float32
    assert done.shape == (3, 8, 1)
    assert not done.any()


def test_sample_names_the_actors_of_its_slices() -> None:
    buffer = ReplayBuffer(make_config(20))
    for number, actor in enumerate(["left", "right", "left", "keeper"]):
        buffer.add_episode(traced(number, 10, actor=actor))

    batch = buffer.sample(batch_size=100)  # the last two are stored

    named = {batch.actor_names[actor] for actor in batch.actor.tolist()}
    assert named == {"left", "keeper"}
    with pytest.raises(TypeError):
        batch.actor_names[0] = "a name of the caller's"  # type: ignore[index]


def test_batches_that_are_held_are_never_overwritten() -> None:
    buffer = ReplayBuffer(make_config(100, batch_size=16))
    for number in range(20):
        buffer.add_episode(traced(number, 12))
    held = [buffer.sample() for _ in range(20)]
    first_rows = [buffer.sample().extra["stamp"][0] for _ in range(20)]
    arrays = [buffer.sample().reward.numpy()[1:] for _ in range(20)]
    copies = [tensor.clone() for tensor in first_rows], [array.copy() for array in arrays]
    gc.collect()

    for number in range(3_000):
        buffer.sample()
        if number % 10 == 0:
            buffer.add_episode(traced(20 + number, 12))

    for batch in held:
        check_traced(batch, horizon=3)
    assert all(torch.equal(row, copy) for row, copy in zip(first_rows, copies[0], strict=True))
    assert all(np.array_equal(array, copy) for array, copy in zip(arrays, copies[1], strict=True))


def test_batches_are_the_callers_to_write() -> None:
    buffer = ReplayBuffer(make_config())
    buffer.add_episode(traced(1, 12))

    batch = buffer.sample()
    for tensor in (batch.action, batch.reward, batch.extra["stamp"], batch.start, batch.obs["image"]):
        tensor.zero_()

    check_traced(buffer.sample(), horizon=3)


def test_batches_that_died_give_their_memory_to_the_next() -> None:
    buffer = ReplayBuffer(make_config())
    buffer.add_episode(traced(1, 12))

    addresses = {buffer.sample().obs["image"].data_ptr() for _ in range(50)}

    assert len(addresses) <= 2


def test_clear_then_another_schema_goes_on_with_ids_and_counts() -> None:
    buffer = ReplayBuffer(make_config(30))
    for number in range(5):
        buffer.add_episode(traced(number, 10))
    held = buffer.sample()

    cleared = buffer.clear()
    buffer.add(plain_columns(8, obs=np.ones((8, 5), np.uint8)))

    assert (cleared.steps_stored, cleared.episodes_stored, cleared.episodes_evicted, cleared.steps_evicted) == (0, 0, 5, 50)
    counts = buffer.counts()
    assert (counts.episodes_added, counts.steps_added, counts.episodes_stored, counts.steps_stored) == (6, 58, 1, 8)
    batch = buffer.sample()
    assert set(batch.episode_id.tolist()) == {5}
    assert batch.obs.dtype == torch.uint8
    assert batch.obs.shape == (4, 8, 5)
    check_traced(held, horizon=3)


def test_clear_of_an_empty_buffer_changes_nothing() -> None:
    buffer = ReplayBuffer(make_config())

    assert buffer.clear() == buffer.counts()
    assert buffer.add(plain_columns(5)) == 1


def test_add_with_a_key_is_idempotent() -> None:
    buffer = ReplayBuffer(make_config())
    key = EpisodeKey("robot", 1, 0)

    assert [buffer.add(plain_columns(5), key=key) for _ in range(3)] == [1, 1, 1]
    assert buffer.counts().episodes_duplicate == 2


def test_plans_of_many_shapes_and_threads_stay_bounded_and_right() -> None:
    buffer = ReplayBuffer(make_config())
    for number in range(3):
        buffer.add_episode(traced(number, 20))
    together = threading.Barrier(4)

    def sample() -> None:
        together.wait()
        for batch_size in range(1, 60):
            horizon = 1 + batch_size % 7
            check_traced(buffer.sample(batch_size=batch_size, horizon=horizon), horizon=horizon)

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(sample) for _ in range(4)]:
            job.result()

    assert len(buffer.table._plans) <= 64


def test_sample_with_a_generator_goes_on_where_it_was() -> None:
    buffer = ReplayBuffer(make_config())
    buffer.add_episode(traced(0, 40))

    one, other = (np.random.default_rng(3) for _ in range(2))
    streams = [[sample_with(buffer, random).start.tolist() for _ in range(3)] for random in (one, other)]

    assert streams[0] == streams[1]
    assert streams[0][0] != streams[0][1]


def test_add_episode_of_numpy_columns_answers_where_it_went() -> None:
    buffer = ReplayBuffer(make_config(20))

    answers = [buffer.add_episode(Episode(traced_columns(number, 8))) for number in range(3)]

    assert [(answer.episode_id, answer.first_row, answer.duplicate) for answer in answers] == [(0, 0, False), (1, 8, False), (2, 16, False)]
    assert buffer.sample().extra["stamp"].min() >= STRIDE
