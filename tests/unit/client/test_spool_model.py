"""Both queues of pending episodes, compared with a plain list after any sequence of puts, answers, drops and, on the disk, crashes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.codec_cases import same_episode
from touchline import InvalidEpisodeError, TouchlineError
from touchline._actor.queue import EpisodeQueue, MemoryQueue, QueueTicket
from touchline._spool.file import REFUSED
from touchline._spool.queue import MAX_REFUSED, Spool
from touchline_protos.codec import Episode, EpisodeKey

LIMIT = 1 << 20


def numbered(number: int, size: int) -> Episode:
    """Returns an episode of about ``size`` bytes that follows from number and size."""
    rng = np.random.default_rng([number, size])
    return Episode({"obs": rng.integers(0, 256, (size, 1), np.uint8)}, EpisodeKey("robot", 1, number), "left", size)


class QueueAgainstList(RuleBasedStateMachine):
    """The model: (number, size) of each episode, oldest first, and the number of those being sent."""

    def __init__(self) -> None:
        super().__init__()
        self.model: list[tuple[int, int]] = []
        self.sending = 0
        self.tried = 0

    def room_is_certain(self, size: int) -> bool:
        raise NotImplementedError

    def queue(self) -> EpisodeQueue:
        raise NotImplementedError

    @rule(size=st.integers(1, 20_000) | st.integers(100_000, 250_000), drop_oldest=st.booleans())
    def put(self, size: int, drop_oldest: bool) -> None:
        number, certain = self.tried, self.room_is_certain(size)
        self.tried += 1

        admission = self.queue().put(self.queue().pack(numbered(number, size)), drop_oldest=drop_oldest)

        assert admission.error is None
        dropped = [(waiting.key.sequence, waiting.length) for waiting in admission.dropped]
        assert dropped == self.model[self.sending :][: len(dropped)]
        assert not dropped or (drop_oldest and not certain)
        assert admission.kept or not certain
        assert admission.kept or not drop_oldest or self.sending, "one always fits if all others may be dropped"
        del self.model[self.sending : self.sending + len(dropped)]
        if admission.kept:
            self.model.append((number, size))

    @precondition(lambda self: self.model)
    @rule()
    def peek(self) -> None:
        self.taken = [self.check_taken(self.queue().peek(), 0)]
        self.sending = 1

    @precondition(lambda self: 0 < self.sending < len(self.model))
    @rule()
    def take_another(self) -> None:
        self.taken.append(self.check_taken(self.queue().peek(self.taken[-1]), self.sending))
        self.sending += 1

    @precondition(lambda self: self.sending and self.sending == len(self.model))
    @rule()
    def take_another_where_there_is_none(self) -> None:
        assert self.queue().peek(self.taken[-1]) is None

    def check_taken(self, taken: tuple[QueueTicket, Episode | TouchlineError] | None, position: int) -> QueueTicket:
        assert taken is not None
        waiting, episode = taken
        number, size = self.model[position]
        assert (waiting.key, waiting.length) == (EpisodeKey("robot", 1, number), size)
        assert isinstance(episode, Episode) and same_episode(episode, numbered(number, size))
        return waiting

    @precondition(lambda self: self.sending)
    @rule()
    def acknowledge(self) -> None:
        self.queue().acknowledge(self.taken.pop(0))

        del self.model[0]
        self.sending -= 1

    @precondition(lambda self: self.sending)
    @rule()
    def refuse(self) -> None:
        self.queue().dead_letter(self.taken.pop(0), InvalidEpisodeError("as the test wants"))

        del self.model[0]
        self.sending -= 1

    @invariant()
    def same_keys(self) -> None:
        assert [key.sequence for key in self.queue().waiting_keys()] == [number for number, _ in self.model]


class MemoryAgainstList(QueueAgainstList):
    @initialize(max_pending=st.integers(2, 5), max_bytes=st.integers(1_000, 500_000))
    def begin(self, max_pending: int, max_bytes: int) -> None:
        self.max_pending, self.max_bytes = max_pending, max_bytes
        self.memory = MemoryQueue(max_pending=max_pending, max_bytes=max_bytes)

    def queue(self) -> EpisodeQueue:
        return self.memory

    def room_is_certain(self, size: int) -> bool:
        held = sum(size for _, size in self.model)
        return not self.model or (len(self.model) < self.max_pending and held + size <= self.max_bytes)

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.model) <= self.max_pending
        assert len(self.model) == 1 or sum(size for _, size in self.model) <= self.max_bytes


class SpoolAgainstList(QueueAgainstList):
    @initialize(max_pending=st.none() | st.integers(2, 5))
    def begin(self, max_pending: int | None) -> None:
        self.max_pending = max_pending
        self.parent = tempfile.TemporaryDirectory()
        self.lives = 0
        self.open()

    def teardown(self) -> None:
        if hasattr(self, "parent"):
            self.spool.close()
            self.parent.cleanup()

    def queue(self) -> EpisodeQueue:
        return self.spool

    def room_is_certain(self, size: int) -> bool:
        crowded = self.max_pending is not None and len(self.model) >= self.max_pending
        return (
            not crowded and sum(held for _, held in self.model) + 2 * size + 24 * 4096 * (len(self.model) + 2) < LIMIT - LIMIT // 8 - 65_536
        )

    @property
    def folder(self) -> Path:
        return Path(self.parent.name, f"life-{self.lives}")

    def open(self) -> None:
        self.spool = Spool(self.folder, limit_bytes=LIMIT, max_pending=self.max_pending)
        self.sending = 0
        assert self.spool.resumed == len(self.model)

    @rule()
    def restart(self) -> None:
        self.spool.close()
        self.open()

    @rule()
    def crash(self) -> None:
        before = self.folder
        self.lives += 1
        shutil.copytree(before, self.folder)  # as a kill leaves it: all files unchanged, including the log
        self.spool.close()
        self.open()

    @invariant()
    def bounds_hold(self) -> None:
        assert sum(file.stat().st_size for file in self.folder.iterdir()) <= LIMIT
        assert self.max_pending is None or len(self.model) <= self.max_pending
        assert self.spool._connection is not None
        (refused,) = self.spool._connection.execute("SELECT count(*) FROM episodes WHERE state = ?", (REFUSED,)).fetchone()
        assert refused <= MAX_REFUSED


TestMemoryAgainstList = MemoryAgainstList.TestCase
TestMemoryAgainstList.settings = settings(max_examples=60, stateful_step_count=40)
TestSpoolAgainstList = SpoolAgainstList.TestCase
TestSpoolAgainstList.settings = settings(max_examples=25, stateful_step_count=40)
