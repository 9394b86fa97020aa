"""The state of a table, and the apply step of the write path: columns, index, known keys and counts under one concurrency protocol.

Writing: the holder of the write lock evicts the oldest episodes (``lock`` held), waits until no gather drawn before the eviction is still
reading, copies rows with ``lock`` released, and publishes the episode (``lock`` held). A copy that fails leaves nothing visible, because
the write cursor has not moved.

Sampling: draws and pins under ``lock``, gathers without it, unpins. So no gather reads a row that is being written, and a writer waits
only for gathers that were already in progress when it evicted.

Lock order: the write lock (:mod:`touchline_server.store.write_path`), then ``lock``. Nothing is called out to with ``lock`` held.
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
from touchline_server.store.epochs import ReaderEpochs
from touchline_server.store.index import EpisodeIndex
from touchline_server.store.inserts import PlannedInsert, Stored
from touchline_server.store.refused_episodes import RefusedEpisodes, identify
from touchline_server.store.schema import EpisodeValidator, FirstRowCheck, Schema

logger = get_logger(__name__)


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
        self.horizon = 1 if config.sampling.pad == "end" else config.horizon
        """Transitions that follow a start at least, by the configuration: an episode of at most this many rows counts as too short."""
        self.incoming = config.sampling.row_convention == "incoming"
        """The row convention: True if the first row's action, reward and done are undefined, False if the last row's are."""
        self._storage = config.storage
        self._validator = EpisodeValidator(
            capacity=self.capacity,
            incoming=self.incoming,
            allow_non_finite=config.storage.allow_non_finite,
        )
        self._first_row = FirstRowCheck(incoming=self.incoming)
        self.lock = threading.Lock()
        """Guards index, epochs, totals and which columns there are. Held briefly, never while rows are copied."""
        self.epochs = ReaderEpochs(self.lock)
        self.index = EpisodeIndex(_law_settings(config))
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

    def check(self, episode: Episode, schema: Schema | None) -> Schema:
        """Returns the schema that the episode fits: the given one, or if there is none the one that it fixes.

        Raises:
            InvalidEpisodeError: the episode is malformed or does not fit.
            OverLimitError: names of stored episodes take all the memory they may.
        """
        schema = self._validator.check(episode.columns, schema)
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
            capacity=self.capacity,
            configured_device=storage.device,
            scratch_dir=storage.scratch_dir,
            share=storage.share_columns == "on",
        )

    # Apply

    def apply(self, insert: PlannedInsert, columns: Columns) -> Stored:
        """Stores a planned insert. If it raises, the episodes evicted for it are gone and nothing else has changed.

        Args:
            insert: the next one of its plan.
            columns: the plan's columns.
        """
        # Also if nothing is to be evicted: an earlier wait for readers may have been interrupted.
        self.evict_through(insert.evicted[-1] if insert.evicted else -1)
        episode, first_row = insert.request.episode, self.index.cursor
        columns.write(first_row, episode.columns)
        if self.on_written is not None:
            # Logical rows first_row to first_row + length - 1; physical rows wrap at the capacity.
            self.on_written(columns, np.remainder(np.arange(first_row, first_row + insert.length), self.capacity))
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
        """Evicts every stored episode with this id or a smaller one, and waits until no reader uses their rows any more."""
        with self.lock:
            self._evict_through(episode_id)
            self.epochs.wait_quiescent()
            self.index.release_names()

    def try_evict_through(self, episode_id: int) -> bool:
        """Evicts like :meth:`evict_through`, but only if there are no readers; returns whether it did. Never waits for a reader."""
        with self.lock:
            if self.epochs.active:
                return False
            # Readers that come from here on draw after the eviction, so the copy need not wait for them.
            self._evict_through(episode_id)
            self.index.release_names()
            return True

    def empty(self) -> None:
        """Evicts every episode, waits for readers, and releases the columns. Ids, keys and totals continue."""
        with self.lock:
            episodes, steps = len(self.index), self.index.steps
            if episodes:
                self._evict_through(self.next_id)
            self.epochs.wait_quiescent()
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
        if self.index.evict_through(episode_id):
            self.epochs.advance()

    def _counts(self) -> Counts:
        return self.totals.counts(self.index.steps, len(self.index))


def _warn_of_short_episodes(episodes: int, reach: int) -> None:
    """Warns of episodes that cannot be sampled: of the first, the tenth, the hundredth, ..."""
    if str(episodes).strip("0") == "1":
        remedy = ", except with pad='end'" if reach > 1 else ""
        logger.warning("%d episodes so far are shorter than a slice of %d steps and cannot be sampled%s", episodes, reach + 1, remedy)


def _law_settings(config: Config) -> LawSettings:
    """Returns a table's parameters of its laws."""
    sampling = config.sampling
    return LawSettings(
        capacity=config.buffer_size,
        recent_steps=sampling.recent_steps,
        recent_half_life=sampling.recent_half_life,
        priority_alpha=sampling.priority_alpha,
        priority_beta=sampling.priority_beta,
        priority_eta=sampling.priority_eta,
    )
