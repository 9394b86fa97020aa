"""The law ``fresh_first``: each start once, newest first, then the law ``episode``."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from support.store_cases import append_episode, chi_square, chi_square_limit, count_cells, make_config, traced
from touchline_server import ReplayBuffer
from touchline_server.selectors.entries import ID, LENGTH
from touchline_server.selectors.options import LawSettings
from touchline_server.store.index import EpisodeIndex

HORIZON = 3


def filled(lengths: list[int], *, capacity: int = 100, **sampling: object) -> ReplayBuffer:
    buffer = ReplayBuffer(make_config(capacity, horizon=HORIZON, batch_size=10, law="fresh_first", **sampling))
    for number, length in enumerate(lengths):
        buffer.add_episode(traced(number, length))
    return buffer


def slices_of(batch: object) -> list[tuple[int, int]]:
    return list(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True))  # type: ignore[attr-defined]


def test_each_start_comes_once_and_newest_first() -> None:
    buffer = filled([6, 3, 5, 9])

    batch = buffer.sample(batch_size=11)

    expected = [(number, start) for number, length in ((3, 9), (2, 5), (0, 6)) for start in reversed(range(length - HORIZON))]
    assert slices_of(batch) == expected
    assert batch.probability.tolist() == [1.0] * 11


def test_episode_that_is_added_comes_before_what_was_left() -> None:
    buffer = filled([6, 9])
    first = slices_of(buffer.sample(batch_size=2))
    buffer.add_episode(traced(2, 5))

    assert first == [(1, 5), (1, 4)]
    assert slices_of(buffer.sample(batch_size=9)) == [(2, 1), (2, 0), (1, 3), (1, 2), (1, 1), (1, 0), (0, 2), (0, 1), (0, 0)]


def test_rest_of_a_batch_and_all_later_ones_follow_the_law_episode() -> None:
    buffer = filled([4, 25, 9, 3, 6, 14], seed=3)
    lengths = {0: 4, 1: 25, 2: 9, 4: 6, 5: 14}
    cells = [(number, start) for number, length in lengths.items() for start in range(length - HORIZON)]

    batch = buffer.sample(batch_size=20_000)

    assert sorted(slices_of(batch)[: len(cells)]) == sorted(cells)
    chance = np.array([1 / len(lengths) / (lengths[number] - HORIZON) for number, _ in cells])
    for later in (slices_of(batch)[len(cells) :], slices_of(buffer.sample(batch_size=20_000))):
        assert chi_square(count_cells(later, cells), len(later) * chance) < chi_square_limit(len(cells) - 1)
    by_cell = dict(zip(cells, chance, strict=True))
    np.testing.assert_allclose(batch.probability[len(cells) :], [by_cell[cell] for cell in slices_of(batch)[len(cells) :]], rtol=1e-12)


def test_law_after_evictions_clears_and_wrapping_fits_what_is_left() -> None:
    buffer = filled([9, 4, 25, 3, 6, 14] * 4, capacity=60, seed=4)
    buffer.clear()
    lengths = {}
    for number, length in enumerate([9, 4, 25, 3, 6, 14, 20, 5, 11] * 2, start=24):
        buffer.add_episode(traced(number, length))
        lengths[number] = length
        while sum(lengths.values()) > 60:
            del lengths[min(lengths)]
    cells = [(number, start) for number, length in lengths.items() for start in range(max(length - HORIZON, 0))]

    fresh = slices_of(buffer.sample(batch_size=len(cells)))
    later = slices_of(buffer.sample(batch_size=20_000))

    assert fresh == cells_newest_first(cells)
    eligible = [length - HORIZON for length in lengths.values() if length > HORIZON]
    expected = np.concatenate([np.full(starts, 20_000 / len(eligible) / starts) for starts in eligible])
    assert chi_square(count_cells(later, cells), expected) < chi_square_limit(len(cells) - 1)


def test_fresh_starts_of_evicted_and_cleared_episodes_are_not_drawn() -> None:
    buffer = filled([9, 9], capacity=40)
    assert slices_of(buffer.sample(batch_size=1)) == [(1, 5)]
    for number in range(2, 12):
        buffer.add_episode(traced(number, 9))
    after_evictions = [(number, start) for number in range(8, 12) for start in range(6)]

    assert slices_of(buffer.sample(batch_size=24)) == cells_newest_first(after_evictions)
    assert {number for number, _ in slices_of(buffer.sample(batch_size=200))} == {8, 9, 10, 11}

    buffer.add_episode(traced(12, 9))
    buffer.clear()
    buffer.add_episode(traced(13, 5))
    assert slices_of(buffer.sample(batch_size=2)) == [(13, 1), (13, 0)]
    assert {number for number, _ in slices_of(buffer.sample(batch_size=50))} == {13}


def cells_newest_first(cells: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted(cells, reverse=True)


def test_learners_share_what_is_fresh_and_horizons_do_not() -> None:
    buffer = filled([8])

    one, other = buffer.sample(batch_size=2, seed=1), buffer.sample(batch_size=2, seed=2)
    shorter = buffer.sample(batch_size=1, horizon=2)

    assert slices_of(one) + slices_of(other) == [(0, 4), (0, 3), (0, 2), (0, 1)]
    assert slices_of(shorter) == [(0, 5)]


def test_same_seed_adds_and_draws_give_the_same_batches() -> None:
    def play() -> list[list[tuple[int, int]]]:
        buffer = filled([], capacity=50, seed=5)
        batches = []
        for number in range(30):
            buffer.add_episode(traced(number, 4 + number * 7 % 11))
            batches.append(slices_of(buffer.sample()))
        return batches

    assert play() == play()


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20), batches=st.integers(1, 6), size=st.integers(1, 9))
def test_batches_drawn_together_are_those_drawn_one_by_one(lengths: list[int], batches: int, size: int) -> None:
    def index() -> EpisodeIndex:
        made = EpisodeIndex(LawSettings(60))
        for number, length in enumerate([*lengths, 4]):
            append_episode(made, number, length)
        return made

    together = index().selectors.of("fresh_first").draw(size, HORIZON, np.random.default_rng(1), batches=batches)
    selector, rng = index().selectors.of("fresh_first"), np.random.default_rng(1)
    single = [selector.draw(size, HORIZON, rng) for _ in range(batches)]

    for field in ("episode_id", "start", "first_row", "probability"):
        assert getattr(together, field).tolist() == [value for draw in single for value in getattr(draw, field).tolist()]


class FreshAgainstModel(RuleBasedStateMachine):
    """The queue against a list of starts, under any sequence of adds, evictions, clears and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.index = EpisodeIndex(LawSettings(30))
        self.fresh: list[tuple[int, int]] = []
        self.used = False
        self.number = 0

    @rule(length=st.integers(1, 12))
    def add(self, length: int) -> None:
        append_episode(self.index, self.number, length)
        stored = set(self.index.entries[:, ID].tolist())
        self.fresh += [(self.number, start) for start in range(length - HORIZON)]
        self.fresh = [cell for cell in self.fresh if cell[0] in stored]
        self.number += 1

    @rule()
    def clear(self) -> None:
        self.index.evict_through(self.number)
        self.index.reset()
        self.fresh.clear()

    @precondition(lambda self: len(self.index.eligible(HORIZON)))
    @rule(slices=st.integers(1, 60))
    def draw(self, slices: int) -> None:
        drawn = self.index.selectors.of("fresh_first").draw(slices, HORIZON, np.random.default_rng(0))
        cells = list(zip(drawn.episode_id.tolist(), drawn.start.tolist(), strict=True))
        expected = [self.fresh.pop() for _ in range(min(slices, len(self.fresh)))]
        assert cells[: len(expected)] == expected
        assert (drawn.probability[: len(expected)] == 1).all()
        assert (drawn.probability[len(expected) :] <= 1).all()
        first_rows = dict(self.index.entries[:, [ID, 1]].tolist())
        assert drawn.first_row.tolist() == [first_rows[number] + start for number, start in cells]

    @invariant()
    def only_long_enough_episodes_are_eligible(self) -> None:
        assert len(self.index.eligible(HORIZON)) == (self.index.entries[:, LENGTH] > HORIZON).sum()


TestFreshAgainstModel = FreshAgainstModel.TestCase
TestFreshAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("pad", ["none", "end"])
def test_padded_slices_come_once_each_as_well(pad: str) -> None:
    buffer = filled([6, 2, 5], pad=pad)

    starts = {0: 3, 2: 2} if pad == "none" else {0: 5, 1: 1, 2: 4}
    cells = [(number, start) for number, count in starts.items() for start in range(count)]
    assert slices_of(buffer.sample(batch_size=len(cells))) == cells_newest_first(cells)
