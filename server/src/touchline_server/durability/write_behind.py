"""Write-behind, for ``durability = "memory"``: an episode is acknowledged once it is in memory, and committed a moment later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from touchline_protos import Counts
from touchline_protos.codec import Episode
from touchline_protos.log_lines import get_logger
from touchline_server.durability.background import BackgroundCommitter
from touchline_server.durability.journal import SqliteJournal
from touchline_server.durability.records import Change, make_change
from touchline_server.durability.storage_state import StorageState
from touchline_server.errors import StorageFailedError, StorageFullError
from touchline_server.store.dedup import payload_digest
from touchline_server.store.inserts import AddRequest, PlannedInsert, Stored
from touchline_server.store.plan import InsertPlan
from touchline_server.store.write_path import WritePath

logger = get_logger(__name__)

MAX_GROUP_BYTES = 64 << 20
"""Most payload in one transaction, unless a single episode has more."""
MAX_UNWRITTEN_BYTES = 256 << 20
"""Most payload that is in memory only; beyond it, a thread that adds writes some of it first."""
MAX_UNWRITTEN_PLANS = 4096
"""Most plans that are in memory only; beyond it, a thread that adds writes some of them first."""


@dataclass(eq=False, slots=True)
class _Unwritten:
    """A plan that is in memory and not in the file."""

    changes: list[Change]
    counts: Counts
    """The counts after this plan."""
    next_id: int
    """Id of the first episode after this plan."""
    size_bytes: int
    episodes: int
    """Episodes that it stores."""


class WriteBehindJournal:
    """A :class:`~touchline_server.store.journal.Journal` that copies plans into memory and writes them when told to.

    For the holder of the write lock; :attr:`is_full`, :attr:`has_unwritten` and :attr:`write_error` may be read without it.

    Args:
        journal: what is written to.
    """

    may_wait = True

    def __init__(self, journal: SqliteJournal) -> None:
        self._sqlite = journal
        self._write_behind: deque[_Unwritten] = deque()
        self._unwritten_bytes = 0
        self._unwritten_episodes = 0
        self._group_bytes = MAX_GROUP_BYTES
        """Most payload that the next transaction tries: less after a failure, since less may fit."""
        self.write_error = ""
        """Why what is in memory cannot be written at present; empty if it can."""

    @property
    def has_unwritten(self) -> bool:
        """Whether something is in memory only."""
        return bool(self._write_behind)

    @property
    def is_full(self) -> bool:
        """Whether as much is in memory only as may be."""
        return self._unwritten_bytes > MAX_UNWRITTEN_BYTES or len(self._write_behind) >= MAX_UNWRITTEN_PLANS

    @property
    def counts(self) -> Counts:
        """The counts written last."""
        return self._sqlite.counts

    def check_writable(self) -> None:
        """Raises StorageFailedError if nothing can be written any more, or not by this process. Takes no lock; any thread may call it."""
        self._sqlite.check_writable()

    def write(self, plan: InsertPlan) -> None:
        """Copies a plan, to be written later. Writes only if ids have to be reserved, which must be on disk before they are used."""
        self._sqlite.check_writable()  # again: the thread that held the write lock before may have failed
        if not self._sqlite.has_reserved(plan.next_id):
            try:
                self._sqlite.commit([], self.counts, next_id=plan.next_id)
            except StorageFullError:
                self._sqlite.note_full(sum(insert.request.episode.size_bytes for insert in plan.inserts))
                raise
        changes = [make_change(insert, incoming=self._sqlite.incoming, copy=True) for insert in plan.inserts]
        self._append(changes, plan.counts(), plan.next_id)

    def undo(self, inserts: Sequence[PlannedInsert], counts: Counts) -> None:
        """Drops changes of the plan copied last, except that what they evicted is still evicted."""
        ids = {insert.episode_id for insert in inserts}
        last = self._write_behind.pop()
        self._forget(last)
        kept = [change for change in last.changes if change.insert is None or change.insert.row.id not in ids]
        kept.append(Change([episode_id for insert in inserts for episode_id in insert.evicted]))
        self._append(kept, counts, last.next_id)

    def clear(self, counts: Counts) -> None:
        """Empties the file and drops what is not written yet, except for its keys. Raises as :meth:`SqliteJournal.clear` does."""
        self._sqlite.clear(counts, unwritten=[change for unwritten in self._write_behind for change in unwritten.changes])
        self._write_behind.clear()
        self._unwritten_bytes = self._unwritten_episodes = 0
        self.write_error = ""

    def write_some(self) -> bool:
        """Commits as many plans as go into one transaction; returns False if the disk does not take them at present."""
        group: list[_Unwritten] = []
        group_bytes = 0
        for unwritten in self._write_behind:
            group_bytes += unwritten.size_bytes
            if group and group_bytes > self._group_bytes:
                break
            group.append(unwritten)
        if not group:
            return True
        changes = [change for unwritten in group for change in unwritten.changes]
        try:
            self._sqlite.commit(changes, group[-1].counts, next_id=group[-1].next_id)
        except (StorageFullError, StorageFailedError) as error:
            if not self.write_error:
                logger.error("%d acknowledged episodes are only in memory: %s", len(self._write_behind), error)
            self._group_bytes = max(1, self._group_bytes // 8)
            self.write_error = str(error)
            return False
        self._group_bytes = min(MAX_GROUP_BYTES, self._group_bytes * 2)
        self.write_error = ""
        for unwritten in group:
            self._write_behind.popleft()
            self._forget(unwritten)
        return True

    def report_lost(self) -> None:
        """Logs what was acknowledged and will not be written."""
        if self._write_behind:
            logger.error(
                "%d episodes were acknowledged in memory and could not be written, they may be lost: %s",
                len(self._write_behind),
                self.write_error,
            )

    def note_full(self, size_bytes: int) -> None:
        """Reports the disk as full: it had no space for this many bytes. From any thread."""
        self._sqlite.note_full(size_bytes)

    @property
    def unwritten(self) -> tuple[int, int]:
        """Episodes that are in memory only, and their bytes."""
        return self._unwritten_episodes, self._unwritten_bytes

    def _append(self, changes: list[Change], counts: Counts, next_id: int) -> None:
        size_bytes, episodes = sum(change.size_bytes for change in changes), sum(change.insert is not None for change in changes)
        self._write_behind.append(_Unwritten(changes, counts, next_id, size_bytes, episodes))
        self._unwritten_bytes += size_bytes
        self._unwritten_episodes += episodes

    def _forget(self, unwritten: _Unwritten) -> None:
        self._unwritten_bytes -= unwritten.size_bytes
        self._unwritten_episodes -= unwritten.episodes


class WriteBehindCommitter(BackgroundCommitter):
    """Takes each episode through the write path in the caller's thread; its own thread writes what the journal keeps in memory.

    Args:
        writes: the write path, restored already.
        journal: the open journal; closed with the committer.
        count_refused: counts an episode that is refused before it gets to the write path.
    """

    def __init__(self, writes: WritePath, journal: SqliteJournal, *, count_refused: Callable[[str, Episode], None]) -> None:
        self.journal = WriteBehindJournal(journal)
        """The journal of the write path."""
        self._count_refused = count_refused
        super().__init__(writes, journal)

    def pending(self) -> tuple[int, int]:
        """Returns the episodes that are in memory only, and their bytes."""
        return self.journal.unwritten

    def submit(self, episode: Episode) -> Stored:
        """Stores an episode, as :meth:`add`."""
        return self.add(episode)

    def add(self, episode: Episode) -> Stored:
        """Stores an episode in memory; waits for the disk only if too much is in memory only. Raises as :meth:`EpisodeStore.add` does."""
        self.check_writable()
        while self.journal.is_full and self._work():
            pass  # the disk does not keep up: this thread writes what others left
        self.check_writable()
        if self.journal.is_full:
            self.journal.note_full(episode.size_bytes)
            self._count_refused(self.journal.write_error, episode)
            raise StorageFullError(self.journal.write_error)
        request = AddRequest(episode, payload_digest(episode.columns))
        with self._writes.lock:
            self.check_writable()  # again: it may have been closed before this thread's turn
            stored = self._writes.store(request)
        self._wake()
        return stored

    def _has_work(self) -> bool:
        return self.journal.has_unwritten and self.monitor.state is not StorageState.FAILED

    def _work(self) -> bool:
        with self._writes.lock:
            return self.journal.write_some()

    def _drop_waiting(self) -> None:
        self.journal.report_lost()

    def _durable_counts(self) -> Counts:
        return self.journal.counts if self.journal.has_unwritten else self._writes.counts()
