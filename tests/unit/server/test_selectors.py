"""Selectors by themselves: what they are fed with, what they draw, and how they are found by name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.store_cases import append_episode, filled_index, make_config, traced
from touchline_server import ConfigError, InvalidArgumentError, ReplayBuffer
from touchline_server.selectors import registry
from touchline_server.selectors.draw import Draw
from touchline_server.selectors.eligible import MAX_HORIZONS, EligibleEpisodes
from touchline_server.selectors.entries import ENTRY_WIDTH, ID, LENGTH, Entry, EntryQueue
from touchline_server.selectors.options import NO_OPTIONS, LawOptions, LawSettings
from touchline_server.selectors.registry import LAWS, Selectors
from touchline_server.selectors.selector import Selector
from touchline_server.store.index import EpisodeIndex
from touchline_server.store.pinned_draw import physical_rows


def test_entry_queue_many_appends_and_drops_keeps_order_in_bounded_memory() -> None:
    queue = EntryQueue()
    for number in range(100):
        queue.append((number,) * ENTRY_WIDTH)

    for number in range(100, 20_000):
        queue.append((number,) * ENTRY_WIDTH)
        queue.drop_oldest()

    assert np.array_equal(queue.live[:, ID], np.arange(19_900, 20_000))
    assert len(queue._entries) <= 400


def test_entry_queue_of_entries_copies_them() -> None:
    entries = np.arange(12, dtype=np.int64).reshape(2, 6)

    queue = EntryQueue(entries)
    entries[:] = 0
    queue.append((9, 9, 9, 9, 9, 9))

    assert queue.live.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [9, 9, 9, 9, 9, 9]]


def test_draw_slice_over_the_seam_is_wrapped_row_by_row() -> None:
    index = filled_index(10, [6, 3, 4])  # the last lies in rows 9, 0, 1, 2

    draw = index.selectors.of("step").draw(5, 3, np.random.default_rng(0))

    assert physical_rows(draw.first_row[None], 4, 10)[0].tolist() == [[9] * 5, [0] * 5, [1] * 5, [2] * 5]


def test_draw_result_does_not_change_with_the_index() -> None:
    index = filled_index(20, [5, 5, 5])
    draw = index.selectors.of("episode").draw(64, 3, np.random.default_rng(0))
    before = draw.episode_id.copy(), draw.first_row.copy()

    for number in range(3, 200):
        append_episode(index, number, 5)

    assert np.array_equal(draw.episode_id, before[0])
    assert np.array_equal(draw.first_row, before[1])


def test_eligible_episodes_built_late_equal_those_kept_up_to_date() -> None:
    index = EpisodeIndex(LawSettings(1000))
    kept = index.eligible(4)
    for number, length in enumerate([3, 9, 4, 5, 60, 1, 5, 7] * 30):
        append_episode(index, number, length)

    late = EligibleEpisodes(4, index.entries)

    assert np.array_equal(late.entries, kept.entries)
    assert late.starts == kept.starts
    # The sums count from different episodes: only their differences mean anything.
    assert np.array_equal(late.starts_before - late.starts_before[0], kept.starts_before - kept.starts_before[0])


def test_eligible_episodes_of_more_horizons_than_are_kept_stay_right() -> None:
    index = filled_index(500, [3, 9, 30, 5, 12])

    for horizon in [*range(1, 2 * MAX_HORIZONS), 1, 2]:
        append_episode(index, 100 + len(index), 7)
        lengths = index.entries[:, LENGTH]
        assert len(index.eligible(horizon)) == (lengths > horizon).sum()

    assert len(index.selectors.eligible) == MAX_HORIZONS


GOLDEN = {
    ("episode", 11): [(36, 0), (45, 1), (48, 12), (32, 1), (36, 5), (58, 7)],
    ("episode", None): [(49, 0), (57, 6), (54, 3), (38, 5), (40, 2), (56, 0)],
    ("step", 11): [(36, 7), (46, 5), (48, 5), (33, 3), (36, 11), (58, 4)],
    ("step", None): [(40, 4), (45, 3), (46, 6), (47, 1), (59, 4), (53, 13)],
}
"""Episode and start of each slice by law and seed of the request, in this order, as they were drawn before laws were selectors."""


def test_draw_of_a_seed_gives_the_numbers_that_it_always_gave() -> None:
    buffer = ReplayBuffer(make_config(300, batch_size=6, seed=7))
    for number in range(60):
        buffer.add_episode(traced(number, 3 + number * 7 % 17))

    drawn = {}
    for law, seed in GOLDEN:
        batch = buffer.sample(law=law, seed=seed)
        drawn[law, seed] = list(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True))

    assert drawn == GOLDEN
    assert buffer.seeds.stream().random() == 0.7701409510034741


class Recorder(Selector):
    """A law with state: the newest episode, and every call that it received."""

    law = "recorder"
    stateful = True
    made = 0

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        Recorder.made += 1
        self.stored: list[Entry] = []

    def append(self, entry: Entry) -> None:
        assert type(entry) is tuple
        self.stored.append(entry)

    def evict(self, entry: Entry) -> None:
        assert self.stored.pop(0) == entry

    def clear(self) -> None:
        self.stored.clear()

    def draw(self, batch_size: int, horizon: int, rng: np.random.Generator, *, batches: int = 1, options: LawOptions = NO_OPTIONS) -> Draw:
        columns = np.repeat(np.array([self.stored[-1]]), batch_size * batches, axis=0).T
        number, first_row, _, actor, version, _ = columns
        return Draw(first_row, number, np.zeros_like(number), actor, version, np.ones(len(number)))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(registry, "LAWS", {**LAWS, Recorder.law: Recorder})
    return Recorder


@given(lengths=st.lists(st.integers(1, 12), max_size=40), used_after=st.integers(0, 40))
def test_selector_with_state_knows_what_is_stored_from_its_first_use_on(lengths: list[int], used_after: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "LAWS", {**LAWS, Recorder.law: Recorder})
        index = EpisodeIndex(LawSettings(20))
        for number, length in enumerate(lengths):
            if number >= used_after:
                index.selectors.of("recorder")
            append_episode(index, number, length)
        selector = index.selectors.of("recorder")

        assert selector.stored == [tuple(entry) for entry in index.entries.tolist()]


def test_law_of_its_own_is_drawn_by_name_through_the_whole_buffer(recorder: type[Recorder]) -> None:
    buffer = ReplayBuffer(make_config(30, batch_size=4))
    made = recorder.made

    for number in range(20):
        buffer.add_episode(traced(number, 6))
        assert buffer.sample(law="recorder").episode_id.tolist() == [number] * 4
    buffer.clear()
    buffer.add_episode(traced(20, 6))

    assert buffer.sample(law="recorder").episode_id.tolist() == [20] * 4
    assert recorder.made <= made + 2


def test_law_that_there_is_not_is_refused_by_requests_and_the_configuration() -> None:
    with pytest.raises(InvalidArgumentError, match="law: 'uniform', expected one of episode, step"):
        ReplayBuffer(make_config()).spec(law="uniform")
    with pytest.raises(ConfigError, match=r"sampling\.law: 'uniform', expected 'episode' or 'step'"):
        make_config(law="uniform")


@pytest.mark.parametrize("law", [law for law in LAWS if law != "prioritized"])
def test_update_of_a_law_without_priorities_is_refused(law: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"law: '{law}' has no priorities"):
        Selectors(EntryQueue(), LawSettings(20)).of(law).update(np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones((3, 1)))
