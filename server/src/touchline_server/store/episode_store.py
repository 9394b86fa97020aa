"""The episode store: what a table holds, and the verbs that change and read it.

It is made of the table's state (:mod:`.episode_ring`, which has the concurrency protocol) and the one way to change that
(:mod:`.write_path`: plan → journal → apply).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from touchline_protos import Counts
from touchline_protos.codec import Episode
from touchline_protos.types.priorities import PriorityUpdate
from touchline_server.config.settings import Config
from touchline_server.errors import InvalidArgumentError, NotReadyError
from touchline_server.selectors.draw import Draw
from touchline_server.selectors.options import NO_OPTIONS, LawOptions, LawSettings
from touchline_server.selectors.prioritized import PRIORITIZED, PrioritizedSelector, SavedPriorities
from touchline_server.selectors.selector import Selector
from touchline_server.store.actors import NameTable
from touchline_server.store.columns import Columns
from touchline_server.store.device_episodes import EpisodeChanges, EpisodeTracker
from touchline_server.store.episode_ring import EpisodeRing
from touchline_server.store.index import Fill, IndexEntry
from touchline_server.store.inserts import CommitFuture, Stored
from touchline_server.store.journal import Committer, Journal
from touchline_server.store.pinned_draw import PinnedDraw
from touchline_server.store.schema import Schema
from touchline_server.store.scratch import ScratchDir
from touchline_server.store.write_path import WritePath


def new_store_generation() -> int:
    """Returns a positive number that no other store has: 62 random bits."""
    return secrets.randbits(62) + 1


class EpisodeStore:
    """A ring of whole episodes, addressed by row. Every method may be called from any thread."""

    def __init__(self, config: Config) -> None:
        """Creates an empty store; with ``storage.device = "disk"`` it locks the ``storage.scratch_dir``.

        Raises:
            StoreInUseError: another buffer uses the folder.
            StorageFailedError: the folder cannot be created or written.
        """
        self.capacity = config.buffer_size
        """Most rows that are stored at a time."""
        self._scratch = ScratchDir(config.storage.scratch_dir) if config.storage.device == "disk" else None
        self._ring = EpisodeRing(config)
        self.physical_rows = self._ring.physical_rows
        """Rows of the ring, at which physical rows wrap."""
        self.writes = WritePath(self._ring)
        """The way to change what is stored, for a committer and for holders of the write lock."""
        self.incoming = self._ring.incoming
        """The row convention: True if the first row's action, reward and done are undefined, False if the last row's are."""
        self.store_generation = new_store_generation()
        """The same as long as an id names the same episode; a durable store keeps it in its file."""
        self._committer: Committer | None = None
        self._drawn: Draw | None = None

    def close(self) -> None:
        """Releases the ``storage.scratch_dir``, if there is one. The store must not be used afterwards."""
        if self._scratch is not None:
            self._scratch.release()

    def attach(self, committer: Committer, journal: Journal) -> None:
        """Makes everything added from now on durable."""
        self._committer = committer
        self.writes.journal = journal

    def follow_writes(self, on_written: Callable[[Columns, np.ndarray], None], on_cleared: Callable[[], None]) -> None:
        """Has TorchRL's bookkeeping follow the ring. Both are called with the write lock held.

        Args:
            on_written: called with the columns and the physical rows, [n] int64, of each stored episode, before it is published.
            on_cleared: called after the table was emptied.
        """
        self._ring.on_written = on_written
        self._ring.on_cleared = on_cleared

    # Changing

    def add(self, episode: Episode) -> Stored:
        """Stores one episode, whole or not at all. Its arrays are copied.

        Raises:
            InvalidEpisodeError: it is malformed or does not fit the schema.
            KeyConflictError: its key was used for another payload.
            OverLimitError: names of stored episodes take all the memory they may. Not counted as refused, unlike the others.
            TooLargeError: it is the first, and there is no memory for the columns.
            StorageFullError: the durable store's disk is full.
            StorageFailedError: the durable store cannot be written.
        """
        return self.writes.add(episode) if self._committer is None else self._committer.add(episode)

    def submit(self, episode: Episode) -> Stored | CommitFuture:
        """Stores one episode like :meth:`add`, but does not wait for a durable store's disk.

        Returns:
            The answer, or a future of it. The episode's arrays must not change until the future is done.
        """
        return self.writes.add(episode) if self._committer is None else self._committer.submit(episode)

    def try_add(self, episode: Episode) -> Stored | None:
        """Stores one episode like :meth:`add`, or does nothing and returns None if it would have to wait. For an event loop's thread.

        It would have to wait for another add, for gathers in progress, for a disk or a device, or for columns to be allocated.

        Raises:
            ReplayError: as :meth:`add`.
        """
        return self.writes.try_add(episode)

    def clear(self) -> Counts:
        """Evicts every episode, forgets the schema, and releases the columns. Ids, keys and counts of what was added continue."""
        self.writes.clear()
        return self.counts()

    def discard(self) -> None:
        """Releases the columns of a store that will not be used any more. Changes nothing durable; a committer must be closed before."""
        with self.writes.lock:
            self._ring.empty()

    def count_refused(self, reason: str, episode: Episode | None = None) -> None:
        """Counts and logs an episode refused before it got here; one with a key only once, however often it is sent again."""
        self._ring.count_refused(reason, episode)

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls ``listener`` after every change, from the thread that made it; it must not block. Returns what ends the subscription."""
        return self.writes.subscriptions.subscribe(listener)

    # Reading

    @property
    def schema(self) -> Schema | None:
        """Schema of the columns; None before the first episode."""
        columns = self._ring.columns
        return columns.schema if columns is not None else None

    @property
    def columns(self) -> Columns | None:
        """The allocated columns; None before the first episode."""
        return self._ring.columns

    @property
    def law_settings(self) -> LawSettings:
        """Parameters of the laws."""
        return self._ring.index.selectors.settings

    @property
    def actors(self) -> NameTable:
        """Names of the stored episodes' actors and their numbers."""
        return self._ring.index.actors

    def actor_name(self, number: int) -> str:
        """Returns the name of an actor's number, as stored in the index and in batches."""
        return self.actors.name(number)

    def counts(self) -> Counts:
        """Returns the counts at this moment."""
        return self._ring.counts()

    def entries(self) -> np.ndarray:
        """Returns a copy of the index, [episodes, 5] int64, oldest first; columns as in :mod:`touchline_server.store.index`."""
        with self._ring.lock:
            return self._ring.index.entries.copy()

    def can_sample(self, horizon: int) -> bool:
        """Returns whether an episode of at least horizon + 1 rows is stored."""
        with self._ring.lock:
            return len(self._ring.index.eligible(horizon)) > 0

    def fill(self, horizon: int) -> Fill:
        """Returns how much can be sampled at this horizon."""
        with self._ring.lock:
            return self._ring.index.fill(horizon)

    def draw(
        self,
        batch_size: int,
        horizon: int,
        law: str,
        rng: np.random.Generator,
        *,
        batches: int = 1,
        options: LawOptions = NO_OPTIONS,
        pad: bool = False,
    ) -> PinnedDraw:
        """Draws batches, each from the same episodes, and pins their rows until the draw is released.

        Args:
            batch_size: slices in a batch.
            horizon: transitions in a slice.
            law: the sampling law.
            rng: the random numbers.
            batches: number of batches.
            options: parameters of the law.
            pad: whether every transition is a start.

        Raises:
            NotReadyError: no episode has horizon + 1 rows, or with ``pad`` 2 rows.
            InvalidArgumentError: the law does not fit the columns, or its parameters do not fit each other.
        """
        reach = 1 if pad else horizon
        with self._ring.lock:
            columns, selector = self._ready_to_draw(reach, law)
            draw = selector.draw(batch_size, reach, rng, batches=batches, options=options)
            pin = self._ring.epochs.pin()
            self._drawn = draw
        return PinnedDraw(draw, columns, self._ring.lock, self._ring.epochs, pin)

    def pin_drawn(
        self, draw: Draw, horizon: int, law: str, rng: np.random.Generator, *, options: LawOptions = NO_OPTIONS, pad: bool = False
    ) -> tuple[PinnedDraw, int]:
        """Protects slices that were drawn before and not kept pinned; those whose episodes are no longer stored are drawn again.

        Args:
            draw: the slices, as :meth:`draw` returned them. Not changed.
            horizon: transitions in a slice, as they were drawn; as for the law, its options and ``pad``.
            law: the sampling law.
            rng: random numbers of the slices that are drawn again.
            options: parameters of the law.
            pad: whether every transition is a start.

        Returns:
            The slices, and how many of them were drawn again.

        Raises:
            NotReadyError: as :meth:`draw`.
        """
        reach = 1 if pad else horizon
        with self._ring.lock:
            columns, selector = self._ready_to_draw(reach, law)
            # Ids ascend, are never used twice, and episodes go oldest first.
            gone = draw.episode_id < self._ring.index.oldest_id
            again = int(np.count_nonzero(gone))
            if again:
                draw = draw.replaced(gone, selector.draw(again, reach, rng, options=options))
            pin = self._ring.epochs.pin()
            self._drawn = draw
        return PinnedDraw(draw, columns, self._ring.lock, self._ring.epochs, pin), again

    def numbers_of(self, law: str, options: LawOptions) -> int:
        """Returns how many random numbers a slice takes by a law: see :meth:`Selector.numbers`."""
        with self._ring.lock:
            return self._ring.index.selectors.of(law).numbers(options)

    def _ready_to_draw(self, reach: int, law: str) -> tuple[Columns, Selector]:
        """Returns what a draw needs, with the lock held; raises as :meth:`draw`."""
        index, columns = self._ring.index, self._ring.columns
        if columns is None or not len(index.eligible(reach)):
            raise NotReadyError(index.fill(reach).explain_not_ready())
        selector = index.selectors.of(law)
        if selector.needs_task and not columns.schema.has_task_numbers:
            raise InvalidArgumentError(f"law: {law!r}, expected a table with a column task of integers, one in each row")
        return columns, selector

    @contextmanager
    def pin_episodes(self, reach: int, tracker: EpisodeTracker) -> Iterator[tuple[Columns, EpisodeChanges | None]]:
        """Keeps all rows from being overwritten until the block ends, for draws on a device. It must be short, as for :meth:`hold`.

        Args:
            reach: transitions that follow a start at least.
            tracker: the device's; it sees every change of the episodes once.

        Yields:
            The columns, and what has changed among the episodes that can be sampled; None if nothing has.

        Raises:
            NotReadyError: no episode has reach + 1 rows.
        """
        with self._ring.lock:
            index, columns = self._ring.index, self._ring.columns
            if columns is None or not len(index.eligible(reach)):
                raise NotReadyError(index.fill(reach).explain_not_ready())
            changes = tracker.changes(index.eligible(reach))
            pin = self._ring.epochs.pin()
        try:
            yield columns, changes
        finally:
            with self._ring.lock:
                self._ring.epochs.unpin(pin)

    def update_priorities(self, law: str, update: PriorityUpdate) -> int:
        """Sets priorities of slices, for draws by a law that has priorities.

        Returns:
            The number of slices whose episodes are stored; the others are ignored. None are if ids have begun again since they were drawn.

        Raises:
            InvalidArgumentError: a slice does not lie within its episode, or the law has no priorities. Nothing has changed.
        """
        if update.store_generation not in (0, self.store_generation):
            return 0
        with self._ring.lock:
            return self._ring.index.selectors.of(law).update(update.episode_id, update.start, update.priorities)

    def save_priorities(self, since: int) -> SavedPriorities | None:
        """Returns a copy of the priorities; None if there are none, or they have not changed since the save whose ``changes`` is given."""
        with self._ring.lock:
            selector = self._ring.index.selectors.find(PRIORITIZED)
            if not isinstance(selector, PrioritizedSelector) or selector.changes == since:
                return None
            return selector.save()

    def load_priorities(self, saved: SavedPriorities) -> int:
        """Sets the priorities of those of the saved episodes that are stored, and returns the number of these."""
        with self._ring.lock:
            selector = self._ring.index.selectors.of(PRIORITIZED)
            return selector.load(saved) if isinstance(selector, PrioritizedSelector) else 0

    @property
    def next_id(self) -> int:
        """Id of the next episode."""
        return self._ring.next_id

    @property
    def bytes_added(self) -> int:
        """Bytes of all episodes that were added since the start."""
        return self._ring.bytes_added

    def take_draw(self) -> Draw | None:
        """Returns the last draw since the call before, as an example of what is sampled; None if there was none."""
        draw, self._drawn = self._drawn, None
        return draw

    def some_entries(self, limit: int) -> np.ndarray:
        """Returns a copy of about ``limit`` entries of the index, evenly spaced by age, or of all if they are fewer; oldest first."""
        with self._ring.lock:
            entries = self._ring.index.entries
            return entries[:: max(len(entries) // limit, 1)].copy()

    def newest(self, limit: int, *, below_id: int | None = None, actor: str | None = None) -> list[IndexEntry]:
        """Returns the ``limit`` newest episodes, newest first: those with ids below one, and of one actor, if these are given."""
        with self._ring.lock:
            return self._ring.index.newest(limit, below_id=below_id, actor=actor)

    def entries_of(self, episode_ids: Sequence[int]) -> list[IndexEntry]:
        """Returns those of these episodes that are stored."""
        with self._ring.lock:
            return self._ring.index.find(episode_ids)

    def entries_between(self, first_id: int, last_id: int, *, actor: str | None, limit: int) -> list[IndexEntry]:
        """Returns the first ``limit`` stored episodes of a range of ids, of one actor if ``actor`` is given; oldest first."""
        with self._ring.lock:
            return self._ring.index.between(first_id, last_id, actor=actor, limit=limit)

    @contextmanager
    def hold(self, entries: Sequence[IndexEntry]) -> Iterator[tuple[Columns | None, list[IndexEntry]]]:
        """Keeps episodes from being overwritten until the block ends. It must be short: adds that evict wait for it.

        Yields:
            The columns, and those of the episodes that are still stored.
        """
        with self._ring.lock:
            held = self._ring.index.still_stored(entries)
            columns = self._ring.columns
            pin = self._ring.epochs.pin()
        try:
            yield columns, held
        finally:
            with self._ring.lock:
                self._ring.epochs.unpin(pin)
