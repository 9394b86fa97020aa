"""The law ``task``: tasks alike, then the law ``episode`` within the task; and the queues by task that it draws from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tensordict import TensorDict

from support.store_cases import chi_square, chi_square_limit, count_cells, make_config, plain_columns
from touchline_protos.codec import Episode
from touchline_server import InvalidArgumentError, ReplayBuffer
from touchline_server.selectors.entries import TASK, Entry
from touchline_server.selectors.task import EpisodesByTask

HORIZON = 3
Stored = dict[int, tuple[int, int]]
"""Task and length of each episode."""


def played(task: int, length: int, *, dtype: type = np.int64, shape: tuple[int, ...] = ()) -> Episode:
    return Episode(plain_columns(length, task=np.full((length, *shape), task, dtype)))


def law_of(stored: Stored) -> dict[tuple[int, int], float]:
    """Returns the probability of each start."""
    eligible = {number: (task, length - HORIZON) for number, (task, length) in stored.items() if length > HORIZON}
    tasks = [task for task, _ in eligible.values()]
    return {
        (number, start): 1 / len(set(tasks)) / tasks.count(task) / starts
        for number, (task, starts) in eligible.items()
        for start in range(starts)
    }


def check_law(buffer: ReplayBuffer, stored: Stored, draws: int = 40_000) -> None:
    law = law_of(stored)
    cells = list(law)
    batch = buffer.sample(batch_size=draws, law="task")
    slices = list(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True))
    counts = count_cells(slices, cells)
    assert chi_square(counts, np.array([law[cell] * draws for cell in cells])) < chi_square_limit(len(cells) - 1)
    np.testing.assert_allclose(batch.probability, [law[cell] for cell in slices], rtol=1e-12)


def filled(episodes: list[tuple[int, int]], *, capacity: int = 200, **sampling: object) -> tuple[ReplayBuffer, Stored]:
    buffer = ReplayBuffer(make_config(capacity, horizon=HORIZON, seed=1, **sampling))
    stored: Stored = {}
    for number, (task, length) in enumerate(episodes):
        buffer.add_episode(played(task, length))
        stored[number] = task, length
        while sum(length for _, length in stored.values()) > capacity:
            del stored[min(stored)]
    return buffer, stored


def test_tasks_of_unequal_size_are_alike() -> None:
    check_law(*filled([(7, 9), (7, 20), (7, 4), (7, 30), (-2, 6), (0, 8), (0, 3)]))


def test_law_after_evictions_and_wrapping_fits_what_is_left() -> None:
    check_law(*filled([(number * number % 7, 4 + number * 5 % 13) for number in range(60)], capacity=90))


def test_law_that_was_used_before_evictions_and_a_clear_fits_what_is_left() -> None:
    buffer, _ = filled([(number % 3, 8) for number in range(10)], capacity=60)
    buffer.sample(law="task")
    buffer.clear()
    stored: Stored = {}
    for number in range(10, 50):
        task, length = number * 3 % 5, 4 + number * 7 % 9
        buffer.add_episode(played(task, length))
        buffer.sample(batch_size=2, law="task")
        stored[number] = task, length
        while sum(length for _, length in stored.values()) > 60:
            del stored[min(stored)]

    check_law(buffer, stored)


def test_task_without_an_episode_that_is_long_enough_does_not_count() -> None:
    check_law(*filled([(1, 9), (2, 3), (3, 8)]))


def test_batch_carries_the_tasks_alike() -> None:
    buffer, _ = filled([(5, 10)] * 15 + [(9, 10)])

    tasks = buffer.sample(batch_size=10_000, law="task").task

    assert sorted(set(tasks.tolist())) == [5, 9]
    assert abs(int((tasks == 9).sum()) - 5_000) < 250


@pytest.mark.parametrize(("dtype", "shape"), [(np.int32, (1,)), (np.uint8, ()), (np.bool_, ())])
def test_task_may_be_any_integer_with_or_without_an_axis(dtype: type, shape: tuple[int, ...]) -> None:
    buffer = ReplayBuffer(make_config(100, horizon=HORIZON, seed=1))
    for task in (0, 0, 0, 1):
        buffer.add_episode(played(task, 8, dtype=dtype, shape=shape))

    newest = (buffer.sample(batch_size=4_000, law="task").episode_id == 3).sum()

    assert abs(int(newest) - 2_000) < 150


def test_episodes_task_is_that_of_its_first_row() -> None:
    buffer = ReplayBuffer(make_config(100, horizon=HORIZON))
    buffer.add_episode(Episode(plain_columns(8, task=np.array([4, 5, 6, 7, 8, 9, 10, 11]))))

    assert buffer.store.entries()[:, TASK].tolist() == [4]


def test_restored_and_torchrls_episodes_have_their_tasks(tmp_path: Path) -> None:
    config = make_config(200, horizon=HORIZON, storage={"data_dir": str(tmp_path)}, seed=2)
    buffer = ReplayBuffer(config)
    for task in (3, 3, 3, 8):
        buffer.add_episode(played(task, 9))
    buffer.close()

    restored = ReplayBuffer(config)
    rows = {name: torch.as_tensor(array) for name, array in plain_columns(12, task=np.full(12, 11)).items()}
    restored.as_torchrl().extend(TensorDict(rows, [12]))

    check_law(restored, {0: (3, 9), 1: (3, 9), 2: (3, 9), 3: (8, 9), 4: (11, 12)})
    restored.close()


@pytest.mark.parametrize("columns", [{}, {"task": np.zeros(8, np.float32)}])
def test_table_without_task_numbers_is_refused_by_name(columns: dict[str, np.ndarray]) -> None:
    buffer = ReplayBuffer(make_config(100, horizon=HORIZON))
    buffer.add_episode(Episode(plain_columns(8, **columns)))

    with pytest.raises(InvalidArgumentError, match="law: 'task', expected a table with a column task of integers"):
        buffer.sample(law="task")


def test_batches_drawn_together_are_those_drawn_one_by_one() -> None:
    buffer, _ = filled([(number % 3, 6 + number) for number in range(9)])
    selector = buffer.store._ring.index.selectors.of("task")
    together = selector.draw(8, HORIZON, np.random.default_rng(7), batches=5)
    rng = np.random.default_rng(7)

    assert together.start.tolist() == [start for _ in range(5) for start in selector.draw(8, HORIZON, rng).start.tolist()]


class QueuesAgainstModel(RuleBasedStateMachine):
    """The queues of all tasks against a list of entries, under any sequence of appends and evictions."""

    def __init__(self) -> None:
        super().__init__()
        self.queues = EpisodesByTask(HORIZON, np.empty((0, 6), np.int64))
        self.stored: list[Entry] = []
        self.number = 0

    @rule(task=st.integers(-3, 3), length=st.integers(3, 6), repeats=st.integers(1, 40))
    def append(self, task: int, length: int, repeats: int) -> None:
        for _ in range(repeats):
            entry = (self.number, 0, length, 0, 0, task)
            self.queues.append(entry)
            self.stored.append(entry)
            self.number += 1

    @precondition(lambda self: self.stored)
    @rule(count=st.integers(1, 60))
    def evict(self, count: int) -> None:
        for entry in self.stored[:count]:
            self.queues.evict(entry)
        del self.stored[:count]

    @invariant()
    def queues_are_those_of_the_list(self) -> None:
        eligible = [entry for entry in self.stored if entry[2] > HORIZON]
        tasks = sorted({entry[TASK] for entry in eligible})
        assert self.queues._tasks == tasks
        for at, task in enumerate(tasks):
            begin, count = self.queues._begin[at], self.queues._count[at]
            assert self.queues._array[begin : begin + count].tolist() == [list(entry) for entry in eligible if entry[TASK] == task]

    @invariant()
    def memory_is_bounded_by_what_is_live(self) -> None:
        peak = max(self.number, 1)
        assert len(self.queues._array) <= max(64, 16 * (peak + 7 * 4))


TestQueuesAgainstModel = QueuesAgainstModel.TestCase
TestQueuesAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(rounds=st.integers(500, 1_500), tasks=st.integers(1, 6))
@settings(max_examples=10, deadline=None)
def test_memory_stays_bounded_while_episodes_come_and_go(rounds: int, tasks: int) -> None:
    queues = EpisodesByTask(HORIZON, np.empty((0, 6), np.int64))
    for number in range(rounds):
        queues.append((number, 0, 9, 0, 0, number % tasks))
        if number >= 20:
            queues.evict((number - 20, 0, 9, 0, 0, (number - 20) % tasks))

    assert len(queues._array) <= 16 * (20 + 4 * tasks)
