"""The write path with each journal: equal requests give equal rings, counts, keys and ids, and failures leave nothing behind."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.durable_cases import MODES, durable_config
from support.store_cases import make_config, read_episode, traced
from touchline_protos import Counts
from touchline_protos.codec import Episode, EpisodeKey
from touchline_server import ReplayBuffer, StorageFullError, TooLargeError
from touchline_server.durability import write_behind
from touchline_server.durability.journal import SqliteJournal
from touchline_server.store.columns import Columns
from touchline_server.store.dedup import payload_digest
from touchline_server.store.episode_ring import EpisodeRing
from touchline_server.store.inserts import AddRequest, PlannedInsert, Stored
from touchline_server.store.journal import NullJournal
from touchline_server.store.scratch import LOCK_NAME

COLUMNS = 6
"""Columns of a traced episode."""


class PlannedFailureError(Exception):
    """Raised on purpose."""


@dataclass(frozen=True)
class State:
    """Everything that a table holds and knows."""

    entries: list[list[int]]
    rows: dict[str, bytes]
    """All rows of the ring by column, those that are free as well."""
    counts: Counts
    senders: list[Any]
    """Known numbers by sender. Their order, by who stored last, is left out: an add that failed to apply may have moved its sender."""
    recent: list[Any]
    next_id: int


def state_of(buffer: ReplayBuffer) -> State:
    store = buffer.store
    columns, rows = store.columns, {}
    if columns is not None:
        for spec in columns.schema.columns:
            out = np.empty((store.capacity, *spec.shape), spec.dtype)
            columns.gather(spec.name, np.arange(store.capacity), out)
            rows[spec.name] = out.tobytes()
    ledger = store._ring.ledger
    return State(store.entries().tolist(), rows, buffer.counts(), sorted(ledger.senders()), list(ledger.recent()), store.writes.next_id)


def stored_rows(buffer: ReplayBuffer) -> dict[int, dict[str, bytes]]:
    """The rows of each stored episode by id and column."""
    return {
        int(entry[0]): {name: array.tobytes() for name, array in read_episode(buffer.store, entry).items()}
        for entry in buffer.store.entries()
    }


def comparable(outcome: Stored | Exception) -> object:
    """An outcome without the text of an error, which may say that the schema was restored."""
    return outcome if isinstance(outcome, Stored) else type(outcome)


def commit(buffer: ReplayBuffer, episodes: Sequence[Episode]) -> list[object]:
    """Returns the outcomes of a group that the committer hands to the write path."""
    requests = [AddRequest(episode, payload_digest(episode.columns)) for episode in episodes]
    return [comparable(outcome) for outcome in buffer.store.writes.commit(requests)]


def add(buffer: ReplayBuffer, episode: Episode) -> object:
    """Returns the outcome of one episode that a caller adds."""
    try:
        return buffer.add_episode(episode)
    except Exception as error:
        return comparable(error)


@contextmanager
def failing_plan(buffer: ReplayBuffer, after: int) -> Iterator[None]:
    """The plan step fails: at the check of each episode, or in allocating the columns."""

    def fail(*arguments: object) -> Any:
        raise TooLargeError("planned failure")

    name = "check" if after % 2 or buffer.store.columns is not None else "allocate"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffer.store._ring, name, fail)
        yield


@contextmanager
def failing_journal(buffer: ReplayBuffer, after: int) -> Iterator[None]:
    """The journal step fails; if the journal writes immediately, in the middle of its transaction."""
    journal = buffer.store.writes.journal

    def fail(*arguments: object, **options: object) -> Any:
        raise StorageFullError("planned failure")

    with pytest.MonkeyPatch.context() as patch:
        if isinstance(journal, NullJournal):
            patch.setattr(journal, "write", fail)
        elif isinstance(journal, SqliteJournal):
            database, left = journal._database, after
            apply = database._apply

            def fail_in_transaction(change: Any) -> None:
                nonlocal left
                apply(change)
                left -= 1
                if left < 0:
                    full = sqlite3.OperationalError("planned failure")
                    full.sqlite_errorcode = sqlite3.SQLITE_FULL
                    raise full

            patch.setattr(database, "_apply", fail_in_transaction)
        else:
            patch.setattr(write_behind, "make_change", fail)
        yield


@contextmanager
def failing_apply(buffer: ReplayBuffer, after: int) -> Iterator[None]:
    """The apply step fails: at a copy of rows, so in the middle of an episode."""
    write_rows, left = Columns._write_rows, after

    def fail(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise PlannedFailureError
        write_rows(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Columns, "_write_rows", fail)
        yield


Failing = Callable[[ReplayBuffer, int], Any]
LATE_FAILURES: list[Failing] = [failing_journal, failing_apply]


@pytest.mark.parametrize("step", [failing_journal, failing_apply])
def test_first_episode_that_fails_leaves_no_columns_and_no_files(step: Failing, tmp_path: Path) -> None:
    buffer = ReplayBuffer(make_config(20, storage={"device": "disk", "scratch_dir": str(tmp_path)}))

    with step(buffer, 0):
        assert not isinstance(add(buffer, traced(0, 5)), Stored)

    assert buffer.store.columns is None and buffer.store.schema is None
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    assert isinstance(add(buffer, traced(1, 5)), Stored)
    buffer.close()


class WritePathInEveryMode(RuleBasedStateMachine):
    """Four tables, one in memory and one for each durability, get the same requests and failures."""

    @initialize(capacity=st.integers(4, 24))
    def begin(self, capacity: int) -> None:
        self.folders = ExitStack()
        self.capacity = capacity
        self.paths = {mode: Path(self.folders.enter_context(tempfile.TemporaryDirectory())) for mode in MODES}
        self.buffers = [ReplayBuffer(make_config(capacity)), *(self.opened(mode) for mode in MODES)]
        self.tried = 0

    def opened(self, mode: str) -> ReplayBuffer:
        return ReplayBuffer(durable_config(self.paths[mode] / "data", capacity=self.capacity, durability=mode))

    def teardown(self) -> None:
        if not hasattr(self, "buffers"):
            return
        try:
            self.restart()
            for buffer in self.buffers:
                buffer.close()
        finally:
            self.folders.close()

    def episode(self, length: int, *, number: int | None = None) -> Episode:
        if number is None:
            self.tried += 1
            number = self.tried
        return traced(number, length, key=EpisodeKey(f"robot-{number % 3}", 1, number), actor=f"actor-{number % 4}")

    def everywhere(self, act: Callable[[ReplayBuffer], object]) -> object:
        """Does the same to every table, asserts that it has the same result, and returns that."""
        results = [act(buffer) for buffer in self.buffers]
        assert all(result == results[0] for result in results), results
        return results[0]

    @staticmethod
    def assert_written_counts(buffer: ReplayBuffer) -> None:
        """The counts in the file, which a killed server restores, are those of the ring, except for what changes without a commit."""
        journal = buffer.store.writes.journal
        assert isinstance(journal, SqliteJournal)
        with buffer.store.writes.lock:
            written, counts = journal.counts, buffer.counts()
        since = {"episodes_refused": written.episodes_refused, "episodes_duplicate": written.episodes_duplicate}
        assert written == replace(counts, **since)

    @rule(share=st.floats(0, 1), keyed=st.booleans())
    def add(self, share: float, keyed: bool) -> None:
        episode = self.episode(max(1, round(share * self.capacity)))
        stored = self.everywhere(lambda buffer: add(buffer, episode if keyed else replace(episode, key=None)))
        assert isinstance(stored, Stored) and not stored.duplicate

    @rule(kind=st.sampled_from(["too long", "not a number", "no column"]))
    def refuse(self, kind: str) -> None:
        episode = self.episode(self.capacity + 1 if kind == "too long" else 2)
        if kind == "not a number":
            episode.columns["obs.state"][:] = np.nan
        elif kind == "no column":
            del episode.columns["action"]
        assert not isinstance(self.everywhere(lambda buffer: add(buffer, episode)), Stored)

    @precondition(lambda self: self.tried)
    @rule(data=st.data(), same=st.booleans())
    def send_again(self, data: st.DataObject, same: bool) -> None:
        """An earlier key with the same length is a duplicate if that episode was stored; with another length it is a conflict."""
        number = data.draw(st.integers(1, self.tried), "number")
        lengths = {version: length for _, _, length, _, version, _ in self.buffers[0].store.entries().tolist()}
        length = lengths.get(number, 1)
        self.everywhere(lambda buffer: add(buffer, self.episode(length if same else length % self.capacity + 1, number=number)))

    @rule(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), repeat=st.integers(0, 7))
    def add_group(self, lengths: list[int], repeat: int) -> None:
        group = self.group(lengths, repeat)
        self.everywhere(lambda buffer: commit(buffer, group))

    def group(self, lengths: list[int], repeat: int) -> list[Episode]:
        """Episodes of these lengths, some too long for the ring, one of them twice, and once its key with another payload."""
        group = [self.episode(length) for length in lengths]
        twin = group[repeat % len(group)]
        return [*group, twin, self.episode(twin.length + 1, number=twin.policy_version)]

    @rule()
    def clear(self) -> None:
        self.everywhere(lambda buffer: buffer.clear())

    @rule()
    def restart(self) -> None:
        """The durable tables are closed and opened again; what the one in memory has kept, they have kept."""
        for at, mode in enumerate(MODES, 1):
            before = state_of(self.buffers[at])
            self.buffers[at].close()
            self.buffers[at] = self.opened(mode)
            after = state_of(self.buffers[at])
            # Restored episodes begin at row 0, and actors are numbered from 0.
            assert replace(after, entries=[], rows={}) == replace(before, entries=[], rows={})
        assert all(stored_rows(buffer) == stored_rows(self.buffers[0]) for buffer in self.buffers)
        # So that the ring in memory can be compared with theirs again:
        self.buffers[0] = self.moved(self.buffers[0])

    def moved(self, buffer: ReplayBuffer) -> ReplayBuffer:
        """A table in memory with what this one holds, as a start would restore it."""
        fresh = ReplayBuffer(make_config(self.capacity))
        ring: EpisodeRing = buffer.store._ring
        entries = ring.index.find(buffer.store.entries()[:, 0].tolist())
        restored = []
        for entry, row in zip(entries, buffer.store.entries(), strict=True):
            episode = replace(entry.origin, columns=read_episode(buffer.store, row))
            restored.append(PlannedInsert(AddRequest(episode, 0), entry.episode_id, entry.length, (), None))
        schema = buffer.store.schema if restored else None
        fresh.store.writes.restore(restored, schema, counts=buffer.counts(), ledger=ring.ledger, next_id=ring.next_id)
        return fresh

    @rule(share=st.floats(0, 1), step=st.sampled_from([failing_plan, failing_journal]), after=st.integers(0, 1))
    def fail_before_apply(self, share: float, step: Failing, after: int) -> None:
        """Nothing has changed but the count of refused episodes."""
        episode = self.episode(max(1, round(share * self.capacity)))
        for buffer in self.buffers:
            before = state_of(buffer)
            with step(buffer, 0 if step is failing_journal else after):
                assert not isinstance(add(buffer, episode), Stored)
            refused = replace(before.counts, episodes_refused=before.counts.episodes_refused + 1)
            assert state_of(buffer) == replace(before, counts=refused)

    @rule(share=st.floats(0, 1), copies=st.integers(0, COLUMNS - 1))
    def fail_to_apply(self, share: float, copies: int) -> None:
        """Evicted episodes are gone and the id is used up; otherwise nothing has changed, especially not the known keys."""
        length = max(1, round(share * self.capacity))
        episode = self.episode(length)
        for buffer in self.buffers:
            before, rows = state_of(buffer), stored_rows(buffer)
            with failing_apply(buffer, copies):
                assert not isinstance(add(buffer, episode), Stored)
            after = state_of(buffer)
            evicted = len(before.entries) - len(after.entries)
            assert after.entries == before.entries[evicted:]
            assert stored_rows(buffer) == {number: rows[number] for number in list(rows)[evicted:]}
            assert (after.senders, after.recent, after.next_id) == (before.senders, before.recent, before.next_id + 1)
            steps = sum(entry[2] for entry in before.entries[:evicted])
            assert after.counts == replace(
                before.counts,
                episodes_refused=before.counts.episodes_refused + 1,
                episodes_stored=before.counts.episodes_stored - evicted,
                episodes_evicted=before.counts.episodes_evicted + evicted,
                steps_stored=before.counts.steps_stored - steps,
                steps_evicted=before.counts.steps_evicted + steps,
            )

    @rule(
        lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), step=st.sampled_from([failing_journal, failing_apply]), data=st.data()
    )
    def fail_in_a_group(self, lengths: list[int], step: Failing, data: st.DataObject) -> None:
        """An episode of a group fails: in the journal all of them do, in the ring those behind it."""
        group = self.group(lengths, 0)
        after = data.draw(st.integers(0, COLUMNS * len(lengths)) if step is failing_apply else st.just(0), "after")

        def act(buffer: ReplayBuffer) -> object:
            with step(buffer, after):
                return commit(buffer, group)

        if step is failing_apply:
            outcomes = self.everywhere(act)
            assert isinstance(outcomes, list)
            original, twin = outcomes[0], outcomes[-2]
            assert isinstance(twin, Stored) == isinstance(original, Stored)
            return
        for buffer in self.buffers:
            before = state_of(buffer)
            act(buffer)
            after_it = state_of(buffer)
            assert replace(after_it, counts=before.counts) == before
            assert after_it.counts.episodes_refused == before.counts.episodes_refused + len(group) - 1  # the repeated one counts once

    @invariant()
    def same_everywhere(self) -> None:
        states = [state_of(buffer) for buffer in self.buffers]
        for state, mode in zip(states[1:], MODES, strict=True):
            assert state.entries == states[0].entries, mode
            assert state.counts == states[0].counts, mode
            assert (state.senders, state.recent, state.next_id) == (states[0].senders, states[0].recent, states[0].next_id), mode
            assert state.rows == states[0].rows, mode
        for buffer, mode in zip(self.buffers[1:], MODES, strict=True):
            if mode != "memory":  # where the file follows a moment later
                self.assert_written_counts(buffer)
        counts = states[0].counts
        assert counts.episodes_stored == len(states[0].entries) == counts.episodes_added - counts.episodes_evicted
        assert counts.steps_stored == sum(entry[2] for entry in states[0].entries) == counts.steps_added - counts.steps_evicted


TestWritePathInEveryMode = WritePathInEveryMode.TestCase
TestWritePathInEveryMode.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
