"""The episode index on its own: against a plain list, after any sequence of adds and evictions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from support.store_cases import append_episode, evict_for, filled_index
from touchline_server.selectors.entries import FIRST_ROW, ID, LENGTH
from touchline_server.selectors.options import LawOptions, LawSettings
from touchline_server.selectors.registry import LAWS
from touchline_server.store.index import EpisodeIndex
from touchline_server.store.pinned_draw import physical_rows


def test_index_episode_at_the_seam_wraps_and_the_next_follows_it() -> None:
    index = filled_index(10, [6, 3])

    evicted = append_episode(index, 2, 4)

    assert evicted == (1, 6)
    assert index.entries[:, [ID, FIRST_ROW, LENGTH]].tolist() == [[1, 6, 3], [2, 9, 4]]
    assert index.cursor == 3


def test_index_episode_of_the_whole_capacity_evicts_all_others() -> None:
    index = filled_index(10, [2, 3, 4])

    evicted = evict_for(index, 10)

    assert evicted == (3, 9)
    assert len(index) == index.steps == 0


@given(data=st.data(), capacity=st.integers(2, 40))
def test_fill_whole_episodes_of_any_lengths_have_any_min_steps_in_the_end(data: st.DataObject, capacity: int) -> None:
    lengths = data.draw(st.lists(st.integers(2, capacity), min_size=1, max_size=12), "lengths, played again and again")
    steps = data.draw(st.integers(1, capacity), "min_steps")
    before = data.draw(st.integers(0, 60), "episodes before the wait begins")
    index = EpisodeIndex(LawSettings(capacity))

    enough_after = None
    for number in range(before + capacity**2 + capacity):
        length = lengths[number % len(lengths)]
        append_episode(index, number, length)
        if number >= before and index.fill(1).has(steps):
            enough_after = number
            break

    assert enough_after is not None
    fill = index.fill(1)
    assert fill.steps >= steps or fill.steps + fill.longest > capacity


def test_fill_one_short_episode_in_a_large_ring_is_not_enough_although_a_long_one_was_just_evicted() -> None:
    index = filled_index(1_000, [1_000, 2])

    assert not index.fill(1).has(950)


@settings(max_examples=60, stateful_step_count=40, deadline=None)
class IndexAgainstList(RuleBasedStateMachine):
    """The model keeps (id, length) oldest first, and which episode and step each row of the ring holds."""

    @initialize(capacity=st.integers(1, 30))
    def begin(self, capacity: int) -> None:
        self.capacity = capacity
        self.index = EpisodeIndex(LawSettings(capacity))
        self.model: list[tuple[int, int]] = []
        self.rows: list[tuple[int, int] | None] = [None] * capacity
        self.next_row = 0
        self.next_id = 0
        self.horizons: set[int] = set()

    @rule(share=st.floats(0, 1))
    def add(self, share: float) -> None:
        length = max(1, round(share * self.capacity))
        free = self.capacity - sum(rows for _, rows in self.model)
        gone = []
        while free < length:
            gone.append(self.model.pop(0))
            free += gone[-1][1]

        evicted = append_episode(self.index, self.next_id, length)

        assert evicted == (len(gone), sum(rows for _, rows in gone))
        self.model.append((self.next_id, length))
        for step in range(length):
            self.rows[self.next_row] = (self.next_id, step)
            self.next_row = (self.next_row + 1) % self.capacity
        self.next_id += 1

    @rule(horizon=st.integers(1, 12))
    def use_horizon(self, horizon: int) -> None:
        self.horizons.add(horizon)

    @rule(law=st.sampled_from(list(LAWS)), seed=st.integers(0, 1000))
    def draw(self, law: str, seed: int) -> None:
        for horizon in self.horizons:
            eligible = self.index.eligible(horizon)
            if not len(eligible):
                continue
            options = LawOptions(recent_half_life=5.0)
            draw = self.index.selectors.of(law).draw(20, horizon, np.random.default_rng(seed), options=options)
            rows = physical_rows(draw.first_row[None], horizon + 1, self.capacity)[0]
            lengths = dict(self.model)
            starts = {number: length - horizon for number, length in self.model if length > horizon}
            for column in range(20):
                number, start = int(draw.episode_id[column]), int(draw.start[column])
                assert start + horizon < lengths[number]
                assert [self.rows[row] for row in rows[:, column]] == [(number, start + step) for step in range(horizon + 1)]
                if law in ("episode", "task"):  # of one task
                    assert draw.probability[column] == pytest.approx(1 / (len(starts) * starts[number]), rel=1e-12)
                elif law in ("step", "prioritized"):  # of steps of one priority
                    assert draw.probability[column] == 1 / sum(starts.values())

    @invariant()
    def agrees(self) -> None:
        assert [tuple(entry) for entry in self.index.entries[:, [ID, LENGTH]]] == self.model
        assert self.index.steps == sum(length for _, length in self.model)
        lengths = [length for _, length in self.model]
        for horizon in {3, *self.horizons}:
            fill = self.index.fill(horizon)
            assert (fill.episodes, fill.steps, fill.longest) == (len(lengths), sum(lengths), max(lengths, default=0))
            assert fill.eligible == sum(length > horizon for length in lengths)
            assert fill.full == (bool(lengths) and sum(lengths) + max(lengths) > self.capacity)
        for number, first_row, length in self.index.entries[:, [ID, FIRST_ROW, LENGTH]].tolist():
            assert [self.rows[(first_row + step) % self.capacity] for step in range(length)] == [(number, step) for step in range(length)]
        for horizon in self.horizons:
            eligible = self.index.eligible(horizon)
            long_enough = [(number, length) for number, length in self.model if length > horizon]
            assert [tuple(entry) for entry in eligible.entries[:, [ID, LENGTH]]] == long_enough
            assert eligible.starts == sum(length - horizon for _, length in long_enough)


TestIndexAgainstList = IndexAgainstList.TestCase
