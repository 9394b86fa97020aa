"""The law ``prioritized`` against a plain list of steps, and what it is made of: the sum tree, windows, and the places of rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from support.store_cases import append_episode
from touchline_server.selectors.options import LawOptions, LawSettings
from touchline_server.selectors.prioritized import MIN_PRIORITY, window_max_and_sum
from touchline_server.selectors.sum_tree import BLOCK, FAN_OUT, MAX_TOP, SumTree
from touchline_server.store.index import EpisodeIndex

SIZES = [1, FAN_OUT, FAN_OUT + 1, MAX_TOP + 1, 20 * BLOCK * FAN_OUT]
"""Sizes of trees of one to three levels."""

RTOL = 2e-6
"""Weights are float32, and a slice's priority is a sum in float32."""


@pytest.mark.parametrize("size", SIZES)
def test_sum_tree_after_any_changes_finds_what_bisection_of_all_sums_finds(size: int) -> None:
    rng = np.random.default_rng(size)
    tree, weights = SumTree(size), np.zeros(size)
    for _ in range(20):
        index = rng.integers(0, size, 40)
        changed = (rng.random(40) * (rng.random(40) < 0.6)).astype(np.float32)
        tree.assign(index, changed)
        weights[index] = changed
        begin = int(rng.integers(0, size))
        end = min(begin + int(rng.integers(0, 300)), size)
        value = float(rng.integers(0, 2))
        tree.fill(begin, end, value)
        weights[begin:end] = value
        if not weights.any():
            continue

        fractions = rng.random(3 * BLOCK)
        found, found_weights = tree.find(fractions)

        assert tree.total == pytest.approx(weights.sum(), rel=1e-12)
        assert (weights[found] > 0).all()
        assert (weights[found] == found_weights).all()
        ends = np.cumsum(weights)
        position = fractions * ends[-1]
        assert (position < ends[found] * (1 + 1e-12)).all()
        assert (position >= (ends[found] - weights[found]) * (1 - 1e-12)).all()


@pytest.mark.parametrize("size", SIZES)
def test_sum_tree_at_the_ends_of_its_range_finds_weights_above_zero(size: int) -> None:
    tree = SumTree(size)
    place = size // 2
    tree.assign(np.array([place]), np.array([0.1]))

    found, weights = tree.find(np.array([0.0, 0.5, np.nextafter(1.0, 0.0)]))

    assert found.tolist() == [place] * 3
    assert weights.tolist() == [np.float32(0.1)] * 3


@pytest.mark.parametrize("size", SIZES[2:])
@pytest.mark.parametrize("run", [1, 5, FAN_OUT, FAN_OUT + 1, 3 * FAN_OUT])
def test_sum_tree_after_runs_were_assigned_has_the_sum_of_all_weights(size: int, run: int) -> None:
    rng = np.random.default_rng(run)
    tree, weights = SumTree(size), np.zeros(size)
    for runs in (1, 3, 40):
        # Some of them go on behind the last place at the first one.
        index = (rng.integers(0, size, runs) + np.arange(run)[:, None]) % size
        weights[index] = values = rng.random(size, dtype=np.float32)[index]
        tree.assign_runs(index, values)

        ends = np.cumsum(weights)
        found, _ = tree.find(rng.random(20))

        assert tree.total == pytest.approx(ends[-1], rel=1e-12)
        assert (weights[found] > 0).all()


@given(st.integers(1, 9), st.integers(0, 8), st.lists(st.floats(0, 1e6, width=32), min_size=17, max_size=17))
def test_window_max_and_sum_is_that_of_each_window(width: int, more: int, values: list[float]) -> None:
    array = np.array(values[: width + more], dtype=np.float32)

    highest, total = window_max_and_sum(array[:, None], width, factor=0.1)

    windows = [array[at : at + width] for at in range(more + 1)]
    assert highest.tolist() == [[window.max()] for window in windows]
    np.testing.assert_allclose(total, [[0.1 * window.astype(np.float64).sum()] for window in windows], rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("seam", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
def test_update_of_slices_that_share_transitions_takes_the_last_one(calls: int, seam: bool) -> None:
    settings_ = LawSettings(30, priority_alpha=1.0, priority_eta=0.0)
    index = EpisodeIndex(settings_)
    selector = index.selectors.of("prioritized")
    for number in range(2 if seam else 1):  # the second one lies across the seam
        append_episode(index, number, 20)
    starts = np.array([6, 5, 4, 9, 7])
    priorities = np.arange(1, 16, dtype=np.float32).reshape(5, 3).T
    expected = np.ones(20)
    for start, slice_ in zip(starts, priorities.T, strict=True):
        expected[start : start + 3] = slice_

    for part in np.array_split(np.arange(5), calls):
        selector.update(np.full(len(part), index.entries[-1, 0]), starts[part], np.ascontiguousarray(priorities[:, part]))
    draw = selector.draw(2000, 1, np.random.default_rng(0))

    here = draw.episode_id == index.entries[-1, 0]
    chance = dict(zip(draw.start[here].tolist(), draw.probability[here], strict=True))
    assert len(chance) == 19
    assert [chance[start] / chance[0] for start in range(19)] == pytest.approx(expected[:19], rel=RTOL)


class PriorityModel(RuleBasedStateMachine):
    """The selector behind an index against a dict of lists."""

    horizons = (1, 3, 4)

    @initialize(
        capacity=st.integers(6, 40),
        alpha=st.sampled_from([0.0, 0.6, 1.0]),
        eta=st.sampled_from([0.0, 0.9, 1.0]),
    )
    def start(self, capacity: int, alpha: float, eta: float) -> None:
        self.settings = LawSettings(capacity, priority_alpha=alpha, priority_eta=eta)
        self.index = EpisodeIndex(self.settings)
        self.selector = self.index.selectors.of("prioritized")
        self.number = 0
        self.highest = 1.0
        self.episodes: dict[int, list[float]] = {}

    @rule(length=st.integers(2, 12))
    def add(self, length: int) -> None:
        assume(length <= self.settings.capacity)
        evicted, _ = append_episode(self.index, self.number, length)
        for _ in range(evicted):
            del self.episodes[min(self.episodes)]
        self.episodes[self.number] = [self.highest] * length
        self.number += 1

    @rule()
    def clear(self) -> None:
        if len(self.index):
            self.index.evict_through(self.number)
        self.index.reset()
        self.episodes, self.highest = {}, 1.0

    @rule(data=st.data(), transitions=st.sampled_from([1, 2, 3, 5]))
    def update(self, data: st.DataObject, transitions: int) -> None:
        ids = data.draw(st.lists(st.integers(0, self.number), max_size=5))
        ids = [number for number in ids if number not in self.episodes or len(self.episodes[number]) > 1]
        assume(ids)
        starts = [data.draw(st.integers(0, len(self.episodes[number]) - 2)) if number in self.episodes else 7 for number in ids]
        size = (transitions, len(ids))
        values = data.draw(st.lists(st.floats(0, 1000, width=32), min_size=size[0] * size[1], max_size=size[0] * size[1]))
        priorities = np.array(values, dtype=np.float32).reshape(size)

        updated = self.selector.update(np.array(ids), np.array(starts), priorities)

        assert updated == sum(number in self.episodes for number in ids)
        for column, (number, start) in enumerate(zip(ids, starts, strict=True)):
            if number in self.episodes:
                for step in range(min(transitions, len(self.episodes[number]) - 1 - start)):  # the rest is padding
                    given = float(priorities[step, column])
                    self.episodes[number][start + step] = max(given, MIN_PRIORITY)
                    self.highest = max(self.highest, given)

    @rule(seed=st.integers(0, 9), horizon=st.sampled_from(horizons))
    def draw(self, seed: int, horizon: int) -> None:
        weights = self.weights(horizon)
        if not weights:
            assert not len(self.index.eligible(horizon))
            return

        draw = self.selector.draw(20, horizon, np.random.default_rng(seed), batches=2, options=LawOptions(beta=0.5))

        total = sum(weights.values())
        chances = [weights[cell] / total for cell in zip(draw.episode_id.tolist(), draw.start.tolist(), strict=True)]
        np.testing.assert_allclose(draw.probability, chances, rtol=RTOL)
        starts = len(weights)
        expected = (starts * np.array(chances).reshape(2, 20)) ** -0.5
        np.testing.assert_allclose(draw.weight, (expected / expected.max(axis=1, keepdims=True)).reshape(-1), rtol=RTOL)
        first = {int(entry[0]): int(entry[1]) for entry in self.index.entries}
        assert draw.first_row.tolist() == [first[number] + start for number, start in zip(draw.episode_id, draw.start, strict=True)]

    @rule()
    def check_that_every_start_has_exactly_its_share(self) -> None:
        for horizon in self.horizons:
            weights = self.weights(horizon)
            tree = self.selector._tree(horizon)  # type: ignore[attr-defined]
            expected = np.zeros(self.settings.capacity)
            first = {int(entry[0]): int(entry[1]) for entry in self.index.entries}
            for (number, start), weight in weights.items():
                expected[(first[number] + start) % self.settings.capacity] = weight
            np.testing.assert_allclose(tree.weights[: self.settings.capacity], expected, rtol=RTOL, atol=0)
            assert tree.total == pytest.approx(sum(weights.values()), rel=RTOL)

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.check_that_every_start_has_exactly_its_share()

    def weights(self, horizon: int) -> dict[tuple[int, int], float]:
        eta = self.settings.priority_eta
        found = {}
        for number, steps in self.episodes.items():
            for start in range(len(steps) - horizon):
                slice_ = steps[start : start + horizon]
                found[number, start] = (eta * max(slice_) + (1 - eta) * sum(slice_) / horizon) ** self.settings.priority_alpha
        return found


TestPriorityModel = PriorityModel.TestCase
TestPriorityModel.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
