"""A table with spare rows against one without, after any sequence of adds, failed copies, clears, and draws that learners hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from support.store_cases import as_bits, check_traced, make_config, read_episode, traced
from touchline_server import Config, NotReadyError, ReplayBuffer
from touchline_server.selectors.entries import FIRST_ROW, ID, LENGTH
from touchline_server.store import episode_ring
from touchline_server.store.columns import Columns
from touchline_server.store.pinned_draw import PinnedDraw, locate

HORIZON = 2

SHARES = st.sampled_from([0.05, 0.2, 0.35, 0.4, 0.5, 0.8, 1.0])
"""Length of an episode as a share of the capacity: most can be sampled."""


class BrokenCopyError(Exception):
    """Raised in the middle of a copy."""


@dataclass(eq=False)
class Held:
    """A draw that a learner holds, and what it may see."""

    drawn: PinnedDraw
    visible: frozenset[int]
    """Physical rows of every episode that was stored when it was drawn."""
    before: bytes
    actors: set[str]
    revoked: list[bool] = field(default_factory=list)


class SpareAgainstNone(RuleBasedStateMachine):
    """Held draws are revoked immediately, so the writer's choice whom to wait for shows in who is revoked."""

    @initialize(capacity=st.integers(8, 24), spare=st.integers(1, 40))
    def begin(self, capacity: int, spare: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(episode_ring, "spare_rows", lambda config: spare if config.storage.share_columns == "on" else 0)
        plain = make_config(capacity, horizon=HORIZON, seed=0, recent_steps=5)
        self.capacity, self.physical = capacity, capacity + spare
        self.plain = ReplayBuffer(plain)
        self.spare = ReplayBuffer(
            Config(
                config=plain.config,
                sampling=plain.sampling,
                storage={"device": "cpu", "share_columns": "on"},
                ring={"max_hold_s": 0},
            )
        )
        assert self.spare.store.physical_rows == self.physical
        self.held: list[Held] = []
        self.tried = 0
        self.cursor = 0

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()

    def visible_rows(self) -> frozenset[int]:
        return frozenset(
            (first + step) % self.physical
            for first, length in self.spare.store.entries()[:, [FIRST_ROW, LENGTH]].tolist()
            for step in range(length)
        )

    def gathered(self, drawn: PinnedDraw) -> bytes:
        rows = locate(drawn.draw, drawn.columns, batches=1, horizon=HORIZON).rows[0]
        out = np.empty(rows.shape, np.int64)
        drawn.columns.gather("stamp", rows, out)
        return out.tobytes()

    def expect_revoked(self, overwritten: set[int]) -> None:
        for held in list(self.held):
            # No draw is given up for rows in the spare: only if what is overwritten was visible to it.
            assert held.revoked == [True] * bool(held.visible & overwritten)
            if held.revoked:
                self.held.remove(held)

    @rule(share=SHARES, inline=st.booleans())
    def add(self, share: float, inline: bool) -> None:
        self.tried += 1
        length = max(1, round(share * self.capacity))
        episode = traced(self.tried, length, actor=f"actor {self.tried}")
        overwritten = {(self.cursor + step) % self.physical for step in range(length)}
        delayed = any(held.visible & overwritten for held in self.held)

        stored = self.spare.store.try_add(episode) if inline else None
        if inline and self.tried > 1 and self.spare.store.columns is not None and stored is None:
            assert delayed
        if stored is None:
            self.spare.add_episode(episode)
        else:
            assert not delayed
        self.plain.add_episode(episode)

        self.cursor = (self.cursor + length) % self.physical
        self.expect_revoked(overwritten)
        if not self.held:
            # Each episode has an actor of its own: no name is kept longer than a draw may look it up.
            assert len(self.spare.store.actors) == len(self.spare.store.entries())

    @rule(share=SHARES, copies=st.integers(0, 5))
    def add_with_a_copy_that_fails(self, share: float, copies: int) -> None:
        self.tried += 1
        length = max(1, round(share * self.capacity))
        overwritten = {(self.cursor + step) % self.physical for step in range(length)}
        write_rows = Columns._write_rows
        for buffer in (self.spare, self.plain):
            left = [copies]

            def fail(*arguments: Any, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise BrokenCopyError
                write_rows(*arguments)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Columns, "_write_rows", fail)
                with pytest.raises(BrokenCopyError):
                    buffer.add_episode(traced(self.tried, length))
        self.expect_revoked(overwritten)

    @rule(slices=st.integers(1, 6), law=st.sampled_from(["episode", "step", "recent"]))
    def draw_and_hold(self, slices: int, law: str) -> None:
        store = self.spare.store
        try:
            drawn = store.draw(slices, HORIZON, law, np.random.default_rng(self.tried))
        except NotReadyError:
            return
        actors = {store.actor_name(number) for number in drawn.draw.actor.tolist()}
        held = Held(drawn, self.visible_rows(), self.gathered(drawn), actors)
        with drawn:
            drawn.hold(lambda: held.revoked.append(self.gathered(drawn) == held.before))
        self.held.append(held)

    @rule(position=st.integers(0, 20))
    def release(self, position: int) -> None:
        if self.held:
            self.held.pop(position % len(self.held)).drawn.release()

    @rule()
    def clear(self) -> None:
        for buffer in (self.spare, self.plain):
            buffer.clear()
        for held in self.held:
            assert held.revoked == [True]
        self.held.clear()
        self.cursor = 0

    @rule(law=st.sampled_from(["episode", "step", "recent"]), seed=st.integers(0, 5))
    def sample(self, law: str, seed: int) -> None:
        try:
            one = self.plain.sample(law=law, seed=seed)
        except NotReadyError:
            with pytest.raises(NotReadyError):
                self.spare.sample(law=law, seed=seed)
            return
        other = self.spare.sample(law=law, seed=seed)

        check_traced(other, horizon=HORIZON)
        assert as_bits(one.extra["stamp"]) == as_bits(other.extra["stamp"])
        assert as_bits(one.probability) == as_bits(other.probability)

    @rule(priority=st.floats(0.1, 10))
    def sample_by_priority(self, priority: float) -> None:
        """The draws depend on where rows lie, their probabilities do not."""
        try:
            batches = [buffer.sample(law="prioritized", batch_size=64, seed=1) for buffer in (self.plain, self.spare)]
        except NotReadyError:
            return
        check_traced(batches[1], horizon=HORIZON)
        one, other = (
            dict(zip(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True), batch.probability.tolist(), strict=True))
            for batch in batches
        )
        for place in one.keys() & other.keys():
            assert one[place] == pytest.approx(other[place], rel=1e-4)
        chosen = [(int(identity), int(start)) for identity, start in zip(batches[0].episode_id, batches[0].start, strict=True)][:3]
        for buffer in (self.plain, self.spare):
            ids, starts = (np.array(values, np.int64) for values in zip(*chosen, strict=True))
            buffer.update_priorities((ids, starts), np.full((HORIZON, len(ids)), priority, np.float32))

    @invariant()
    def held_rows_have_not_changed(self) -> None:
        for held in getattr(self, "held", []):
            assert held.revoked == []
            assert self.gathered(held.drawn) == held.before
            assert {self.spare.store.actor_name(number) for number in held.drawn.draw.actor.tolist()} == held.actors

    @invariant()
    def same_contents_in_both(self) -> None:
        if not hasattr(self, "plain"):
            return
        assert self.plain.counts() == self.spare.counts()
        one, other = self.plain.store.entries(), self.spare.store.entries()
        assert one[:, [ID, LENGTH]].tolist() == other[:, [ID, LENGTH]].tolist()
        if len(other):
            assert self.spare.store.fill(HORIZON) == self.plain.store.fill(HORIZON)
            for at in (0, -1):
                left, right = (read_episode(store, entries[at]) for store, entries in ((self.plain.store, one), (self.spare.store, other)))
                assert {name: as_bits(array) for name, array in left.items()} == {name: as_bits(array) for name, array in right.items()}


TestSpareAgainstNone = SpareAgainstNone.TestCase
TestSpareAgainstNone.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
