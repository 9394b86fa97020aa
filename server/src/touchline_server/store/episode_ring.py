"""The state of a table, and the apply step of the write path: columns, index, known keys and counts under one concurrency protocol.

Writing: the holder of the write lock evicts the oldest episodes (``lock`` held), waits until no reader may still see the rows that it is
about to overwrite, copies rows with ``lock`` released, and publishes the episode (``lock`` held). A copy that fails leaves nothing visible,
because the write cursor has not moved.

Sampling: draws and pins under ``lock``, gathers without it, unpins. So no gather reads a row that is being written, and a writer waits
only for gathers that were already in progress when it evicted.

Spare rows: if learners read the columns themselves, the ring has more rows than are stored at a time. Evicted rows are overwritten only
after as many more were added, so a learner that holds a batch for the length of some training steps delays no add.

Lock order: the write lock (:mod:`touchline_server.store.write_path`), then ``lock``. Nothing is called out to with ``lock`` held; a
callback that revokes a learner's rows is called with the write lock held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from touchline_protos import Counts
from touchline_protos.codec import Episode
from touchline_protos.log_lines import get_logger
from touchline_server.config.settings import Config
from touchline_server.errors import InvalidEpisodeError
from touchline_server.selectors.options import LawSettings
from touchline_server.store.allocation import allocate_columns
from touchline_server.store.columns import Columns
from touchline_server.store.dedup import DedupLedger
from touchline_server.store.episode_block import EpisodeBlock
from touchline_server.store.epochs import ReaderEpochs
from touchline_server.store.index import EpisodeIndex
from touchline_server.store.inserts import PlannedInsert, Stored
from touchline_server.store.refused_episodes import RefusedEpisodes, identify
from touchline_server.store.schema import EpisodeValidator, FirstRowCheck, Schema

logger = get_logger(__name__)

SHARED = ("on", "writable")
"""Values of ``storage.share_columns`` with which learners read the columns."""

SPARE_FRACTION = 16
"""The spare rows of shared columns are the buffer's rows divided by this."""

MIN_SPARE_ROWS = 1024
"""Fewest spare rows of shared columns, unless the buffer itself has fewer."""


@dataclass(slots=True)
class Totals:
    """What happened to a table since it was created. With what the index holds, all of :class:`Counts` follows from it."""

    steps_added: int = 0
    episodes_added: int = 0
    episodes_refused: int = 0
    episodes_duplicate: int = 0
    episodes_too_short: int = 0

    @classmethod
    def of(cls, counts: Counts) -> Totals:
        """Returns the totals of earlier counts."""
        return cls(**{name: getattr(counts, name) for name in cls.__slots__})

    def with_inserts(self, lengths: Sequence[int], horizon: int) -> Totals:
        """Returns the totals after episodes of these lengths were added too."""
        return Totals(
            self.steps_added + sum(lengths),
            self.episodes_added + len(lengths),
            self.episodes_refused,
            self.episodes_duplicate,
            self.episodes_too_short + sum(length <= horizon for length in lengths),
        )

    def counts(self, steps_stored: int, episodes_stored: int) -> Counts:
        """Returns the counts while this much is stored: what was added and is not stored was evicted."""
        # By position: naming nine arguments costs 1 % of a small add.
        return Counts(
            steps_stored,
            episodes_stored,
            self.steps_added,
            self.episodes_added,
            self.steps_added - steps_stored,
            self.episodes_added - episodes_stored,
            self.episodes_refused,
            self.episodes_duplicate,
            self.episodes_too_short,
        )


class EpisodeRing:
    """The state of one table. Methods that change it are for the holder of the write lock; the others for any thread.

    Args:
        config: capacity, horizon, row convention, device.
    """

    def __init__(self, config: Config) -> None:
        self.capacity = config.buffer_size
        """Most rows that are stored at a time."""
        self.physical_rows = config.buffer_size + spare_rows(config)
        """Rows of the ring, where it wraps."""
        self.horizon = 1 if config.sampling.pad == "end" else config.horizon
        """Transitions that follow a start at least, by the configuration: an episode of at most this many rows counts as too short."""
        self.incoming = config.sampling.row_convention == "incoming"
        """The row convention: True if the first row's action, reward and done are undefined, False if the last row's are."""
        self._storage = config.storage
        self._copy_threads = config.server.gather_threads
        self._validator = EpisodeValidator(
            capacity=self.capacity,
            incoming=self.incoming,
            allow_non_finite=config.storage.allow_non_finite,
        )
        self._first_row = FirstRowCheck(incoming=self.incoming)
        self.lock = threading.Lock()
        """Guards index, epochs, totals and which columns there are. Held briefly, never while rows are copied."""
        self.epochs = ReaderEpochs(self.lock, max_hold_s=config.ring.max_hold_s)
        self.index = EpisodeIndex(_law_settings(config, self.physical_rows), spare_rows=self.physical_rows - self.capacity)
        self.columns: Columns | None = None
        """The allocated columns; None before the first episode."""
        self.ledger = DedupLedger()
        self.totals = Totals()
        self.next_id = 0
        """Id of the next episode."""
        self.bytes_added = 0
        """Bytes of all episodes that were added since the start."""
        self._refused = RefusedEpisodes()
        self.on_written: Callable[[Columns, np.ndarray], None] | None = None
        """Called with the columns and the rows of each stored episode, before it is published: TorchRL's bookkeeping follows it."""
        self.on_cleared: Callable[[], None] | None = None
        """Called after the table was emptied."""

    def counts(self) -> Counts:
        """Returns the counts at this moment."""
        with self.lock:
            return self._counts()

    # Plan

    def check(self, episode: Episode, schema: Schema | None, *, values_checked: bool = False) -> Schema:
        """Returns the schema that the episode fits: the given one, or if there is none the one that it fixes.

        Raises:
            InvalidEpisodeError: the episode is malformed or does not fit.
            OverLimitError: names of stored episodes take all the memory they may.
        """
        schema = self._validator.check(episode.columns, schema, values_checked=values_checked)
        if not -(2**63) <= episode.policy_version < 2**63:
            raise InvalidEpisodeError(f"policy_version: {episode.policy_version}, expected a 64-bit integer")
        self.index.check_names(episode)
        self._first_row.check(episode)
        return schema

    def allocate(self, schema: Schema) -> Columns:
        """Returns columns that stay invisible until the first episode in them is applied. Raises as :func:`allocate_columns` does."""
        storage = self._storage
        return allocate_columns(
            schema,
            capacity=self.physical_rows,
            configured_device=storage.device,
            scratch_dir=storage.scratch_dir,
            share=storage.share_columns in SHARED,
            writable=storage.share_columns == "writable",
            copy_threads=self._copy_threads,
        )

    # Apply

    def apply(self, insert: PlannedInsert, columns: Columns) -> Stored:
        """Stores a planned insert. If it raises, the episodes evicted for it are gone and nothing else has changed.

        Args:
            insert: the next one of its plan.
            columns: the plan's columns.
        """
        # Also if nothing is to be evicted: readers of the spare rows, and an earlier wait may have been interrupted.
        self._make_room(insert.evicted, insert.length)
        columns.write(self.index.cursor, insert.request.episode.columns)
        return self._publish(insert, columns)

    def apply_block(self, inserts: Sequence[PlannedInsert], columns: Columns, block: EpisodeBlock) -> list[Stored]:
        """Stores the planned inserts of a block, each column with one copy. If it raises, only evictions have happened.

        Args:
            inserts: all of their plan; none of them evicts another one.
            columns: the plan's columns.
            block: their rows.
        """
        self._make_room([episode_id for insert in inserts for episode_id in insert.evicted], block.rows)
        columns.write(self.index.cursor, block.columns if columns.takes(block.device) else block.in_host_memory().columns)
        return [self._publish(insert, columns) for insert in inserts]

    def _publish(self, insert: PlannedInsert, columns: Columns) -> Stored:
        """Makes an insert visible whose rows were written at the cursor."""
        episode, first_row = insert.request.episode, self.index.cursor
        if self.on_written is not None:
            # Logical rows first_row to first_row + length - 1; physical rows wrap at the ring's end.
            self.on_written(columns, np.remainder(np.arange(first_row, first_row + insert.length), self.physical_rows))
        with self.lock:
            self.columns = columns
            self.next_id = insert.episode_id + 1
            self.index.append(episode, episode_id=insert.episode_id, length=insert.length)
            self.totals.steps_added += insert.length
            self.totals.episodes_added += 1
            self.bytes_added += insert.length * columns.row_bytes
            self.totals.episodes_too_short += insert.length <= self.horizon
            counts = self._counts()
        if insert.length <= self.horizon:
            _warn_of_short_episodes(counts.episodes_too_short, self.horizon)
        if episode.key is not None:
            self.ledger.remember(episode.key, insert.request.digest, insert.episode_id)
        return Stored(insert.episode_id, first_row, False, counts)

    def evict_through(self, episode_id: int) -> None:
        """Evicts every stored episode with this id or a smaller one. Readers may still see their rows."""
        with self.lock:
            self._evict_through(episode_id)
            self.index.release_names(self.epochs.oldest)

    def try_make_room(self, insert: PlannedInsert) -> bool:
        """Evicts the episodes that a planned insert evicts, but only if no reader is to be waited for; returns whether it did."""
        with self.lock:
            # Readers that come from here on draw after the eviction, so the copy need not wait for them.
            if self.epochs.active or self.epochs.is_held(self._first_kept(insert.length)):
                return False
            if insert.evicted:
                self._evict_through(insert.evicted[-1])
            self.index.release_names(self.epochs.oldest)
            return True

    def _make_room(self, evicted: Sequence[int], length: int) -> None:
        """Evicts episodes, by their ids, and waits until no reader sees the rows that ``length`` new ones will overwrite."""
        with self.lock:
            if evicted:
                self._evict_through(evicted[-1])
            self.epochs.wait_quiescent(self._first_kept(length))
            self.index.release_names(self.epochs.oldest)

    def _first_kept(self, length: int) -> int:
        """Returns the number of the oldest row that is not overwritten when ``length`` rows are added; see :class:`ReaderEpochs`.

        Row number n is at the same physical row as n + ``physical_rows``, and the rows that are added have the numbers from the end on.
        """
        return self.index.end + length - self.physical_rows

    def empty(self) -> None:
        """Evicts every episode, waits for readers, and releases the columns. Ids, keys and totals continue."""
        with self.lock:
            episodes, steps = len(self.index), self.index.steps
            if episodes:
                self._evict_through(self.next_id)
            self.epochs.wait_quiescent(self.index.end)
            columns, self.columns = self.columns, None
            if columns is not None:
                columns.settle()
            self.index.reset()
            self._first_row.reset()
        if columns is not None:
            columns.release()
        if self.on_cleared is not None:
            self.on_cleared()
        logger.info("cleared: %d episodes, %d steps", episodes, steps)

    def count_duplicate(self, episode_id: int) -> Stored:
        """Counts an episode that is stored already and returns the answer to it."""
        with self.lock:
            self.totals.episodes_duplicate += 1
            return Stored(episode_id, -1, True, self._counts())

    def count_refused(self, reason: str, episode: Episode | None) -> None:
        """Counts and logs a refused episode, from any thread; an episode with a key only once, however often it is sent again.

        Args:
            reason: what was wrong.
            episode: the episode; None if what was received could not be decoded into one.
        """
        identity = identify(episode)
        with self.lock:
            if not self._refused.is_new(identity):
                return
            self.totals.episodes_refused += 1
        sender = (episode.actor or (episode.key and episode.key.client_id)) if episode is not None else None
        logger.warning("refused an episode of %s: %s", repr(sender) if sender else "an unnamed actor", reason)

    def resume(self, counts: Counts, ledger: DedupLedger, *, next_id: int) -> None:
        """Takes over counts, keys and the next id from before a restart, after the stored episodes were applied again."""
        with self.lock:
            self.totals = Totals.of(counts)
        self.ledger = ledger
        self.next_id = max(self.next_id, next_id)

    def _evict_through(self, episode_id: int) -> None:
        before = self.index.evicted_rows
        self.index.evict_through(episode_id)
        self.epochs.advance(self.index.evicted_rows - before)

    def _counts(self) -> Counts:
        return self.totals.counts(self.index.steps, len(self.index))


def _warn_of_short_episodes(episodes: int, reach: int) -> None:
    """Warns of episodes that cannot be sampled: of the first, the tenth, the hundredth, ..."""
    if str(episodes).strip("0") == "1":
        remedy = ", except with pad='end'" if reach > 1 else ""
        logger.warning("%d episodes so far are shorter than a slice of %d steps and cannot be sampled%s", episodes, reach + 1, remedy)


def spare_rows(config: Config) -> int:
    """Returns the rows that a table's ring has beyond ``config.buffer_size``: a sixteenth of it or MIN_SPARE_ROWS if learners read it."""
    if config.storage.share_columns not in SHARED or config.storage.device == "disk":
        return 0
    return max(config.buffer_size // SPARE_FRACTION, min(MIN_SPARE_ROWS, config.buffer_size))


def _law_settings(config: Config, physical_rows: int) -> LawSettings:
    """Returns a table's parameters of its laws."""
    sampling = config.sampling
    return LawSettings(
        capacity=physical_rows,
        recent_steps=sampling.recent_steps,
        recent_half_life=sampling.recent_half_life,
        priority_alpha=sampling.priority_alpha,
        priority_beta=sampling.priority_beta,
        priority_eta=sampling.priority_eta,
    )
