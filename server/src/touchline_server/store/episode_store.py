"""The episode store: columns, index and counts under one concurrency protocol.

Adding: one writer at a time evicts the oldest episodes whose rows it needs (index lock), waits until no gather that was drawn before
is still reading, copies with the index unlocked, and publishes (index lock). A copy that fails leaves nothing visible: the write
cursor has not moved.

Sampling: draws and pins under the index lock, gathers unlocked, unpins. So no gather ever reads a row that is being written, and
adding waits only for gathers that are already under way.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields

import numpy as np

from touchline_protos import Counts
from touchline_protos.codec import Episode
from touchline_protos.log_lines import get_logger
from touchline_server.config.settings import Config
from touchline_server.errors import InvalidEpisodeError, KeyConflictError, NotReadyError, TooLargeError
from touchline_server.store.allocation import allocate_columns
from touchline_server.store.catalogue import Catalogue, Entry
from touchline_server.store.columns import Columns
from touchline_server.store.committer import CommitFuture, Committer, Stored
from touchline_server.store.dedup import DedupLedger, payload_digest
from touchline_server.store.epochs import ReaderEpochs
from touchline_server.store.index import Fill
from touchline_server.store.pinned_draw import PinnedDraw, locate_batches
from touchline_server.store.refused_episodes import RefusedEpisodes, identify
from touchline_server.store.schema import EpisodeValidator, FirstRowCheck, Schema
from touchline_server.store.scratch import ScratchDir

logger = get_logger(__name__)


def new_lineage() -> int:
    """Returns a number that no other store has."""
    return secrets.randbits(62) + 1


class EpisodeStore:
    """A ring of whole episodes, addressed by row. Every method may be called from any thread."""

    def __init__(self, config: Config) -> None:
        """Makes an empty store; with ``storage.device = "disk"`` it takes the ``storage.scratch_dir``.

        Raises:
            StoreInUseError: another has the folder.
            StorageFailedError: the folder cannot be made or written.
        """
        self._config = config
        self.capacity = config.buffer_size
        self._scratch = ScratchDir(config.storage.scratch_dir) if config.storage.device == "disk" else None
        self.on_written: Callable[[Columns, np.ndarray], None] | None = None
        """Called under the write lock with the columns and the rows of each stored episode: TorchRL's bookkeeping follows it."""
        self.on_cleared: Callable[[], None] | None = None
        """Called under the write lock after the table was emptied."""
        self._validator = EpisodeValidator(
            capacity=self.capacity,
            incoming=config.sampling.row_convention == "incoming",
            allow_non_finite=config.storage.allow_non_finite,
        )
        self._first_row = FirstRowCheck(incoming=self._validator.incoming)
        self.write_lock = threading.RLock()
        """Held by whoever changes what is stored; reentrant. Sampling does not need it."""
        self._lock = threading.Lock()
        self._pins = ReaderEpochs(self._lock)
        self._catalogue = Catalogue(self.capacity)
        self.actors = self._catalogue.actors
        self.lineage = new_lineage()
        """The same for as long as an id names the same episode: a durable store's is that of its file."""
        self._columns: Columns | None = None
        self._ledger = DedupLedger()
        self._refused = RefusedEpisodes()
        self._next_id = 0
        self._figures = {field.name: 0 for field in fields(Counts)}
        self._listeners: list[Callable[[], None]] = []
        self._committer: Committer | None = None

    def close(self) -> None:
        """Lets go of the ``storage.scratch_dir``, if there is one. Nothing may be added, sampled or read from then on."""
        if self._scratch is not None:
            self._scratch.release()

    @property
    def schema(self) -> Schema | None:
        """The columns' schema; None before the first episode."""
        columns = self._columns
        return columns.schema if columns is not None else None

    @property
    def columns(self) -> Columns | None:
        """The allocated columns; None before the first episode."""
        return self._columns

    def counts(self) -> Counts:
        """Returns the figures of this moment."""
        with self._lock:
            return self._counts()

    def actor_name(self, number: int) -> str:
        """Returns the name behind an actor's number."""
        return self.actors.name(number)

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Has ``listener`` called, from the adding thread, after every change of what is stored; it must not block.

        Returns:
            What ends the subscription.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def entries(self) -> np.ndarray:
        """Returns a copy of the index, [episodes, 5] int64, oldest first; columns as in :mod:`touchline_server.store.index`."""
        with self._lock:
            return self._catalogue.index.entries.copy()

    def can_sample(self, horizon: int) -> bool:
        """Returns whether an episode of at least horizon + 1 rows is stored."""
        with self._lock:
            return len(self._catalogue.index.eligible(horizon)) > 0

    def fill(self, horizon: int) -> Fill:
        """Returns how much can be sampled at this horizon."""
        with self._lock:
            return self._catalogue.index.fill(horizon)

    def add(self, episode: Episode) -> Stored:
        """Stores one episode, whole or not at all. The episode's arrays are copied.

        Raises:
            InvalidEpisodeError: it is malformed or does not fit the schema. Counted as refused.
            KeyConflictError: its key was used for another payload. Counted as refused.
            TooLargeError: there is no memory for the columns that the first episode asks for. Counted as refused.
            StorageFullError: the durable store, where there is one, has no room for it. Counted as refused.
            StorageFailedError: the durable store cannot be written. Counted as refused.
        """
        if self._committer is not None:
            return self._committer.add(episode)
        stored = self._add_and_tell(episode, may_wait=True)
        assert stored is not None
        return stored

    def submit(self, episode: Episode) -> Stored | CommitFuture:
        """Stores an episode as :meth:`add` does, without waiting for the disk where there is a durable store.

        Returns:
            The answer, or what will hold the answer or the error; until then the episode's arrays must stay as they are.
        """
        return self.add(episode) if self._committer is None else self._committer.submit(episode)

    def try_add(self, episode: Episode) -> Stored | None:
        """Stores an episode as :meth:`add` does, from a thread that must not wait: an event loop's.

        Returns:
            None, and nothing was done, where it would have to wait: for another that adds, for gathers under way, for the disk, for a
            device, or for the columns to be allocated.

        Raises:
            ReplayError: as :meth:`add`.
        """
        if self._committer is not None or self._columns is None or not self._columns.in_host_memory:
            return None
        if not self.write_lock.acquire(blocking=False):
            return None
        try:
            # Again: it may have been cleared before this one's turn.
            if self._columns is None or self._pinned():
                return None
            return self._add_and_tell(episode, may_wait=False)
        finally:
            self.write_lock.release()

    def attach(self, committer: Committer) -> None:
        """Has everything that is added from now on go through a durable store."""
        self._committer = committer

    def check_writable(self) -> None:
        """Raises StorageFailedError if a durable store takes nothing any more, or is another process's. Takes no lock."""
        if self._committer is not None:
            self._committer.check_writable()

    def count_refused(self, reason: str, episode: Episode | None = None) -> None:
        """Counts and logs an episode that was refused, here or before it became one; once, however often its sender tries again."""
        identity = identify(episode)
        with self._lock:
            if not self._refused.is_new(identity):
                return
            self._figures["episodes_refused"] += 1
        sender = (episode.actor or (episode.key and episode.key.client_id)) if episode is not None else None
        logger.warning("refused an episode of %s: %s", repr(sender) if sender else "an unnamed actor", reason)

    def clear(self) -> Counts:
        """Forgets every episode and the schema, and releases the columns. Ids, keys and counts of what was added go on."""
        self.check_writable()
        with self.write_lock:
            if self._committer is None:
                self._forget_all()
            else:
                figures = self.figures()
                figures |= {"steps_evicted": figures["steps_added"], "episodes_evicted": figures["episodes_added"]}
                figures |= {"steps_stored": 0, "episodes_stored": 0}
                self._committer.clear(self._forget_all, figures)
        self.notify()
        return self.counts()

    def draw(self, batch_size: int, horizon: int, law: str, rng: np.random.Generator, *, batches: int = 1) -> PinnedDraw:
        """Draws batches, one after the other from the same episodes, and pins their rows until the draw is released.

        Raises:
            NotReadyError: no episode has horizon + 1 rows.
        """
        with self._lock:
            index, columns = self._catalogue.index, self._columns
            if columns is None or not len(index.eligible(horizon)):
                raise NotReadyError(index.fill(horizon).explain_not_ready())
            draw = index.selectors.of(law).draw(batch_size, horizon, rng, batches=batches)
            pin = self._pins.pin()
        try:
            located = locate_batches(draw, columns, batches=batches, horizon=horizon)
        except BaseException:  # there may be no memory for the rows of a large batch
            with self._lock:
                self._pins.unpin(pin)
            raise
        return PinnedDraw(located, self._lock, self._pins, pin)

    def entries_of(self, episode_ids: Sequence[int]) -> list[Entry]:
        """Returns those of these episodes that are stored."""
        with self._lock:
            return self._catalogue.find(episode_ids)

    def entries_between(self, first_id: int, last_id: int, *, actor: str | None, limit: int) -> list[Entry]:
        """Returns the first ``limit`` stored episodes of a range of ids, of one actor where one is named; oldest first."""
        with self._lock:
            return self._catalogue.between(first_id, last_id, actor=actor, limit=limit)

    @contextmanager
    def hold(self, entries: Sequence[Entry]) -> Iterator[tuple[Columns | None, list[Entry]]]:
        """Keeps episodes from being overwritten until the block ends, which must be soon: who adds and evicts waits for it.

        Returns:
            The columns, and those of the episodes that are still stored.
        """
        with self._lock:
            held = self._catalogue.still_stored(entries)
            columns = self._columns
            pin = self._pins.pin()
        try:
            yield columns, held
        finally:
            with self._lock:
                self._pins.unpin(pin)

    def read(self, entry: Sequence[int] | np.ndarray, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Returns a stored episode's columns as fresh arrays. The caller makes sure that no add runs meanwhile."""
        columns = self._columns
        if columns is None:
            return {}
        _, first_row, length, _, _ = (int(figure) for figure in entry)
        rows = np.remainder(np.arange(first_row, first_row + length), self.capacity)
        episode = {}
        for spec in columns.schema.columns:
            if names is None or spec.name in names:
                episode[spec.name] = np.empty((length, *spec.shape), spec.dtype)
                columns.gather(spec.name, rows, episode[spec.name])
        return episode

    # What the durable store works with, under the write lock

    @property
    def incoming(self) -> bool:
        """Whether the first row's action, reward and done are undefined, and not the last one's."""
        return self._validator.incoming

    @property
    def next_id(self) -> int:
        """The id of the next episode."""
        return self._next_id

    def skip_ids(self, next_id: int) -> None:
        """Gives no id below ``next_id`` out."""
        self._next_id = max(self._next_id, next_id)

    def figures(self) -> dict[str, int]:
        """Returns a copy of the counts by name."""
        return asdict(self.counts())

    def index_view(self) -> np.ndarray:
        """Returns what :meth:`entries` does, as a view: valid until the next change."""
        return self._catalogue.index.entries

    def is_too_short(self, length: int) -> bool:
        """Returns whether an episode of so many rows is never sampled at the configured horizon."""
        return length <= self._config.horizon

    def find(self, episode: Episode, digest: int) -> int | None:
        """Returns the id under which the episode is stored already, -1 where only its key is known, None where it is new.

        Raises:
            InvalidEpisodeError: the key is malformed.
            KeyConflictError: the key was used for another payload.
        """
        known = self._ledger.find(episode.key, digest) if episode.key is not None else None
        return known.episode_id if known is not None else None

    def count_duplicate(self, episode_id: int) -> Stored:
        """Counts an episode that is stored already and returns the answer to it."""
        with self._lock:
            self._figures["episodes_duplicate"] += 1
            return Stored(episode_id, -1, True, self._counts())

    def check(self, episode: Episode, schema: Schema | None) -> Schema:
        """Returns the schema that the episode fits: the given one, or where there is none the one that it fixes.

        Raises:
            InvalidEpisodeError: it is malformed or does not fit.
            OverLimitError: there is no room for another name.
        """
        schema = self._validator.check(episode.columns, schema)
        if not -(2**63) <= episode.policy_version < 2**63:
            raise InvalidEpisodeError(f"policy_version: {episode.policy_version}, expected a 64-bit integer")
        self._catalogue.check_names(episode)
        self._first_row.check(episode)
        return schema

    def allocate(self, schema: Schema) -> Columns:
        """Returns columns for the first episode, seen by nobody before that is published. Raises as :func:`allocate_columns` does."""
        storage = self._config.storage
        return allocate_columns(schema, capacity=self.capacity, wanted_device=storage.device, scratch_dir=storage.scratch_dir)

    def evict(self, length: int) -> None:
        """Makes room for so many rows, or for all that there are."""
        with self._lock:
            evicted = self._catalogue.evict_for(min(length, self.capacity))
            self._count_evicted(evicted.episodes, evicted.steps)
            self._pins.wait_quiescent()
            self._catalogue.forget_names()

    def publish(self, episode: Episode, columns: Columns | None, *, digest: int, episode_id: int) -> Stored:
        """Stores a checked episode in the ring and makes it visible; what it needs the room of is evicted."""
        if columns is None:
            raise ValueError("an episode without columns to store it in")
        length = episode.length
        self.evict(length)
        first_row = self._catalogue.index.cursor
        try:
            columns.write(first_row, episode.columns)
            if self.on_written is not None:
                self.on_written(columns, np.remainder(np.arange(first_row, first_row + length), self.capacity))
        except BaseException:
            if self._columns is None:
                columns.release()
            raise
        with self._lock:
            self._columns = columns
            self._next_id = episode_id + 1
            self._catalogue.append(episode, episode_id=episode_id)
            self._figures["steps_added"] += length
            self._figures["episodes_added"] += 1
            self._figures["episodes_too_short"] += self.is_too_short(length)
            counts = self._counts()
        if episode.key is not None:
            self._ledger.remember(episode.key, digest, episode_id)
        return Stored(episode_id, first_row, False, counts)

    def resume(self, figures: Mapping[str, int], ledger: DedupLedger, *, next_id: int) -> None:
        """Takes over, after the stored episodes were published again, what else was known before a restart."""
        with self._lock:
            self._figures.update(figures)
        self._ledger = ledger
        self.skip_ids(next_id)

    def notify(self) -> None:
        """Tells the subscribers that something changed."""
        for listener in tuple(self._listeners):
            listener()

    def _forget_all(self) -> None:
        with self._lock:
            evicted = self._catalogue.evict_for(self.capacity)
            self._count_evicted(evicted.episodes, evicted.steps)
            self._pins.wait_quiescent()
            columns, self._columns = self._columns, None
            if columns is not None:
                columns.settle()
            self._catalogue.start_over()
            self._first_row.reset()
        if columns is not None:
            columns.release()
        if self.on_cleared is not None:
            self.on_cleared()
        logger.info("cleared: %d episodes, %d steps", evicted.episodes, evicted.steps)

    def _add_and_tell(self, episode: Episode, *, may_wait: bool) -> Stored | None:
        try:
            digest = payload_digest(episode.columns) if episode.key is not None else 0
            with self.write_lock:
                stored = self._add(episode, digest, may_wait=may_wait)
        except (InvalidEpisodeError, KeyConflictError, TooLargeError) as error:
            self.count_refused(str(error), episode)
            raise
        if stored is not None:
            self.notify()
        return stored

    def _add(self, episode: Episode, digest: int, *, may_wait: bool) -> Stored | None:
        known = self.find(episode, digest)
        if known is not None:
            return self.count_duplicate(known)
        schema = self.check(episode, self.schema)
        if not may_wait and not self._evict_at_once(episode.length):
            return None
        columns = self._columns if self._columns is not None else self.allocate(schema)
        return self.publish(episode, columns, digest=digest, episode_id=self._next_id)

    def _pinned(self) -> bool:
        with self._lock:
            return self._pins.held

    def _evict_at_once(self, length: int) -> bool:
        """Makes room as :meth:`evict` does, where nobody reads; returns whether it did. Who reads from then on holds no writer up."""
        with self._lock:
            if self._pins.held:
                return False
            evicted = self._catalogue.evict_for(min(length, self.capacity))
            self._count_evicted(evicted.episodes, evicted.steps)
            self._catalogue.forget_names()
            return True

    def _count_evicted(self, episodes: int, steps: int) -> None:
        self._figures["episodes_evicted"] += episodes
        self._figures["steps_evicted"] += steps
        if episodes:
            self._pins.retire()

    def _counts(self) -> Counts:
        figures = self._figures
        figures["steps_stored"] = self._catalogue.index.steps
        figures["episodes_stored"] = len(self._catalogue.index)
        return Counts(**figures)
