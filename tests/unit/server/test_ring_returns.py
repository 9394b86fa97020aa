"""The server's end of the way back through a ring, against learners that write anything into it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.store_cases import make_config, traced
from touchline_protos.shm import ring_control
from touchline_protos.shm.ring import RingError, RingWriter, shared_memory_id
from touchline_protos.shm.ring_returns import ReturnEntries, ReturnGeometry, are_priorities
from touchline_protos.shm.ring_slots import RingGeometry
from touchline_server import ReplayBuffer
from touchline_server.service.ring_returns import RingReturns
from touchline_server.tables.sampler import Reserved, TableSampler

pytestmark = pytest.mark.skipif(not shared_memory_id(), reason="rings need Linux on x86-64")

H, B, SLOTS = 2, 4, 3


class Stage:
    """A ring whose batches were drawn from a table, and the learner's end of its memory as raw words and arrays."""

    def __init__(self, batches: int = 2) -> None:
        self.buffer = ReplayBuffer(make_config(500, horizon=H, batch_size=B, law="prioritized", priority_alpha=1.0, seed=3))
        for number in range(5):
            self.buffer.add_episode(traced(number, 12))
        geometry = ReturnGeometry.behind(100, transitions=H, batch_size=B)
        self.ring = RingWriter(RingGeometry.of(SLOTS, geometry.end), geometry)
        self.returns = RingReturns(self.ring, geometry)
        self.entries = ReturnEntries(self.ring.slots, self.ring.geometry, geometry)
        self.words = self.ring.control._words
        table = self.buffer.table
        self.sampler = TableSampler(table, table.spec(), np.random.default_rng(3))
        self.draws: list[Any] = []
        self.publish(batches)

    def publish(self, batches: int) -> None:
        with self.sampler.draw(Reserved(batches, (B,))) as drawn:
            self.draws.append(drawn.parts[0].draw)
            self.returns.remember(drawn, batches)
        for _ in range(batches):
            self.ring.control.publish(0, 0)

    def send(self, *entries: tuple[int, np.ndarray]) -> None:
        """Writes entries and hands them over, whatever is in them."""
        sent = self.words[ring_control._RETURNS_SENT]
        for number, (publication, priorities) in enumerate(entries):
            at = (sent + number) % len(self.entries)
            self.entries.publications[at][0] = publication
            self.entries.priorities[at][...] = priorities
        self.words[ring_control._RETURNS_SENT] = sent + len(entries)

    def counts(self) -> tuple[int, ...]:
        """Returns what the server has reported: entries taken; slices updated, evicted and refused."""
        first = ring_control._RETURNS_TAKEN
        return tuple(self.words[first : first + 4])

    def shares(self) -> dict[tuple[int, int], float]:
        batch = self.buffer.sample(batch_size=2_000, seed=0)
        return dict(zip(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True), batch.probability.tolist(), strict=True))


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.ring.close()


def full(value: float) -> np.ndarray:
    return np.full((H, B), value, np.float32)


def test_entries_of_batches_that_were_drawn_together_are_set_in_their_order(stage: Stage) -> None:
    expected = Stage()
    priorities = [np.random.default_rng(n).random((H, B), np.float32) * 9 for n in range(3)]
    order = [1, 0, 1]
    stage.send(*zip(order, priorities, strict=True))

    stage.returns.apply()

    assert stage.counts() == (3, 3 * B, 0, 0)
    draw = stage.draws[0]
    for publication, values in zip(order, priorities, strict=True):
        part = slice(publication * B, (publication + 1) * B)
        expected.buffer.update_priorities((draw.episode_id[part], draw.start[part]), values)
    assert stage.shares() == expected.shares()


@pytest.mark.parametrize("publication", [-1, 2, 2**62, -(2**63)])
@pytest.mark.parametrize("value", [1.0, 50.0])
def test_entry_of_a_batch_that_is_not_known_is_refused(publication: int, value: float, stage: Stage) -> None:
    before = stage.shares()
    stage.send((publication, full(value)), (0, full(1.0)))

    stage.returns.apply()

    assert stage.counts() == (2, B, 0, B)
    assert stage.shares() == before


@pytest.mark.parametrize("value", [np.nan, -np.nan, -1.0, np.inf, -np.inf, -1e-45], ids=str)
def test_entry_with_a_bad_value_is_refused_and_those_beside_it_are_set(value: float, stage: Stage) -> None:
    bad = full(1.0)
    bad[-1, -1] = value
    stage.send((0, full(50.0)), (1, bad), (0, full(-0.0)))

    stage.returns.apply()

    assert stage.counts() == (3, 2 * B, 0, B)
    assert all(np.isfinite(share) and share > 0 for share in stage.shares().values())


@pytest.mark.parametrize("sent", [-1, 2 * SLOTS + 1, 2**63 - 1, -(2**63)])
def test_learner_that_lies_about_its_count_is_no_longer_listened_to(sent: int, stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    before = stage.shares()
    stage.words[ring_control._RETURNS_SENT] = sent

    stage.returns.apply()
    stage.words[ring_control._RETURNS_SENT] = 0
    stage.send((0, full(50.0)))
    stage.returns.apply()
    stage.returns.end()

    assert stage.counts()[0] == 0
    assert stage.shares() == before
    assert f"a learner sent {sent} entries of priorities back together, expected up to 6" in caplog.text


def test_entry_that_changes_after_it_was_taken_changes_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server checks a copy."""
    stage.send((0, full(50.0)))
    runs = stage.returns._runs

    def change_then_check(publications: list[int], priorities: np.ndarray) -> Any:
        stage.entries.priorities[0][...] = np.nan
        stage.entries.publications[0][0] = 2**40
        return runs(publications, priorities)

    monkeypatch.setattr(stage.returns, "_runs", change_then_check)
    stage.returns.apply()

    assert stage.counts() == (1, B, 0, 0)
    assert all(np.isfinite(share) for share in stage.shares().values())


def test_batches_are_remembered_for_three_rings(stage: Stage) -> None:
    for _ in range(4):
        stage.publish(2)  # ten were published, nine are remembered

    stage.send((0, full(1.0)), (1, full(1.0)), (9, full(1.0)))
    stage.returns.apply()

    assert stage.counts() == (3, 2 * B, 0, B)
    assert len(stage.returns._drawn) == 3 * SLOTS


def test_evicted_episodes_are_counted_after_the_rows_went_to_others(stage: Stage) -> None:
    stage.buffer.add_episode(traced(99, 500))  # all of the ring
    before = stage.shares()

    stage.send((0, full(50.0)), (1, full(60.0)))
    stage.returns.apply()

    assert stage.counts() == (2, 0, 2 * B, 0)
    assert stage.shares() == before


def test_end_applies_what_is_left_and_says_so(stage: Stage) -> None:
    stage.send((0, full(50.0)))

    stage.returns.end()

    assert stage.counts() == (1, B, 0, 0)
    assert stage.words[ring_control._RETURNS_ENDED] == 1


@given(st.binary(min_size=400, max_size=400), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=8, max_size=8))
@settings(max_examples=40, deadline=None)
def test_arbitrary_bytes_never_reach_the_weights(data: bytes, words: list[int]) -> None:
    stage = Stage()
    try:
        stage.words[16:24] = words  # the learner's line of control words
        for slot in range(SLOTS):
            memory = np.frombuffer(stage.ring.slots.array(slot), np.uint8)
            memory[:400] = np.frombuffer(data, np.uint8)
        stage.returns.apply()
        stage.words[ring_control._RETURNS_SENT] = stage.returns._taken + 1
        stage.returns.apply()
        stage.returns.end()

        assert all(np.isfinite(share) and share > 0 for share in stage.shares().values())
    finally:
        stage.ring.close()


@given(st.lists(st.floats(width=32), max_size=20))
@settings(max_examples=200)
def test_are_priorities_agrees_with_comparisons(values: list[float]) -> None:
    array = np.array(values, np.float32)
    bad = ~((array >= 0) & (array <= np.finfo(np.float32).max))

    if not np.signbit(array[array == 0]).any():
        assert are_priorities(array) == (not bad.any())
    elif bad.any():
        assert not are_priorities(array)


@pytest.mark.parametrize("offset", [0, 64, 100, 129, 4096 - 128, 2**40, -64])
def test_geometry_that_does_not_fit_its_slots_is_refused(offset: int) -> None:
    good = ReturnGeometry.behind(100, transitions=H, batch_size=B)
    ring = RingGeometry.of(SLOTS, good.end)
    good.check(100, ring)
    assert (good.offset, good.entry_size_bytes, ring.slot_size_bytes) == (128, 64, 4096)

    if offset == 4096 - 128:
        ReturnGeometry(offset, H, B).check(100, ring)  # the last place
        offset += 64
    with pytest.raises(RingError, match=f"entries of 64 bytes at byte {offset} of slots, expected them behind 100 and within 4096"):
        ReturnGeometry(offset, H, B).check(100, ring)
