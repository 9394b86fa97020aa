"""The whole buffer against a plain list, after any sequence of adds, refusals, failed copies and clears."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.store_cases import check_traced, make_config, read_episode, traced, traced_columns
from touchline_server import InvalidEpisodeError, NotReadyError, ReplayBuffer
from touchline_server.selectors.entries import ID, LENGTH, POLICY_VERSION
from touchline_server.store.columns import Columns


class BrokenCopyError(Exception):
    """Raised in the middle of a copy."""


class BufferAgainstList(RuleBasedStateMachine):
    """The model keeps (id, number, length), oldest first; an episode's number determines its contents."""

    @initialize(capacity=st.integers(4, 24), incoming=st.booleans())
    def begin(self, capacity: int, incoming: bool) -> None:
        self.capacity = capacity
        self.incoming = incoming
        self.buffer = ReplayBuffer(make_config(capacity, seed=0, row_convention="incoming" if incoming else "outgoing"))
        self.model: list[tuple[int, int, int]] = []
        self.tried = 0
        self.next_id = 0
        self.horizons: set[int] = set()
        self.expected = dict.fromkeys(
            ["steps_added", "episodes_added", "steps_evicted", "episodes_evicted", "episodes_refused", "episodes_too_short"], 0
        )

    def next_number(self) -> int:
        self.tried += 1
        return self.tried

    def evict_for(self, length: int) -> None:
        while sum(rows for *_, rows in self.model) + length > self.capacity:
            self.expected["steps_evicted"] += self.model.pop(0)[2]
            self.expected["episodes_evicted"] += 1

    @rule(share=st.floats(0, 1))
    def add(self, share: float) -> None:
        number, length = self.next_number(), max(1, round(share * self.capacity))

        stored = self.buffer.add_episode(traced(number, length))

        self.evict_for(length)
        self.model.append((self.next_id, number, length))
        self.next_id += 1
        self.expected["episodes_added"] += 1
        self.expected["steps_added"] += length
        self.expected["episodes_too_short"] += length <= 3
        assert stored.episode_id == self.model[-1][0]
        assert stored.counts == self.buffer.counts()

    @rule(excess=st.integers(1, 10))
    def add_too_long(self, excess: int) -> None:
        with pytest.raises(InvalidEpisodeError, match=f"{self.capacity + excess} rows, expected at most"):
            self.buffer.add_episode(traced(self.next_number(), self.capacity + excess))
        self.expected["episodes_refused"] += 1

    @rule(length=st.integers(1, 4))
    def add_malformed(self, length: int) -> None:
        columns = traced_columns(self.next_number(), length)
        columns["obs.state"][-1] = np.nan
        with pytest.raises(InvalidEpisodeError, match=r"obs\.state"):
            self.buffer.add(columns)
        self.expected["episodes_refused"] += 1

    @rule(share=st.floats(0, 1), copies=st.integers(0, 5))
    def add_with_a_copy_that_fails(self, share: float, copies: int) -> None:
        """Some rows are written, then the copy breaks: the evicted episodes are gone, and nothing else has changed."""
        length = max(1, round(share * self.capacity))
        write_rows, left = Columns._write_rows, copies

        def fail(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise BrokenCopyError
            write_rows(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Columns, "_write_rows", fail)
            try:
                self.buffer.add_episode(traced(self.next_number(), length))
            except BrokenCopyError:
                self.evict_for(length)
                self.expected["episodes_refused"] += 1
                self.next_id += 1  # ids of failed copies are not used again
            else:
                raise AssertionError("an episode has six columns at least")

    @rule()
    def clear(self) -> None:
        counts = self.buffer.clear()

        self.evict_for(self.capacity)
        assert counts.steps_stored == 0
        assert self.buffer.store.schema is None

    @rule(horizon=st.integers(1, 8))
    def use_horizon(self, horizon: int) -> None:
        self.horizons.add(horizon)

    @precondition(lambda self: self.horizons)
    @rule(data=st.data(), law=st.sampled_from(["episode", "step"]), batch_size=st.integers(1, 20))
    def sample(self, data: st.DataObject, law: str, batch_size: int) -> None:
        horizon = data.draw(st.sampled_from(sorted(self.horizons)))
        numbers = {identity: number for identity, number, length in self.model if length > horizon}
        if not numbers:
            with pytest.raises(NotReadyError, match=f"{sum(rows for *_, rows in self.model)} steps in {len(self.model)} episodes"):
                self.buffer.sample(batch_size=batch_size, horizon=horizon, law=law)
            return

        batch = self.buffer.sample(batch_size=batch_size, horizon=horizon, law=law)

        check_traced(batch, horizon=horizon, incoming=self.incoming)
        assert [numbers[identity] for identity in batch.episode_id.tolist()] == batch.policy_version.tolist()

    @invariant()
    def same_episodes_in_order_of_age(self) -> None:
        entries = self.buffer.store.entries()
        assert [tuple(entry) for entry in entries[:, [ID, POLICY_VERSION, LENGTH]].tolist()] == self.model
        for entry, (_, number, length) in zip(entries, self.model, strict=True):
            stored, expected = read_episode(self.buffer.store, entry), traced_columns(number, length)
            assert set(stored) == set(expected)
            assert all(stored[name].tobytes() == expected[name].tobytes() for name in expected)

    @invariant()
    def same_counts(self) -> None:
        counts = self.buffer.counts()
        assert {name: getattr(counts, name) for name in self.expected} == self.expected
        assert counts.steps_added == counts.steps_stored + counts.steps_evicted
        assert counts.episodes_added == counts.episodes_stored + counts.episodes_evicted
        assert counts.steps_stored == self.buffer.size == sum(rows for *_, rows in self.model)
        assert counts.episodes_stored == self.buffer.num_eps == len(self.model)

    @invariant()
    def same_eligible_episodes(self) -> None:
        assert self.buffer.ready() == any(length > 3 for *_, length in self.model)
        for horizon in self.horizons:
            eligible = self.buffer.store._ring.index.eligible(horizon)
            assert eligible.entries[:, ID].tolist() == [identity for identity, _, length in self.model if length > horizon]
            assert eligible.starts == sum(length - horizon for *_, length in self.model if length > horizon)


TestBufferAgainstList = BufferAgainstList.TestCase
TestBufferAgainstList.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
