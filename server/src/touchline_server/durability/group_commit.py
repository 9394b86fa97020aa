"""Group commit: what waits to be stored is committed together, then published to the ring in the same order.

Everything happens under the store's write lock, so the database has one user at a time. A thread of this module's commits what was
submitted; a thread that adds and waits commits what is queued by itself, its own episode among it. With ``durability = "memory"`` an
episode is published first, and the thread commits behind.

After a write, an fsync or a checkpoint has failed for another reason than want of room, nothing is acknowledged any more: see
:mod:`touchline_server.durability.storage_state`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from touchline_protos.codec import Episode
from touchline_protos.log_lines import get_logger
from touchline_server.durability.data_dir import DataDir
from touchline_server.durability.database import Database
from touchline_server.durability.inserts import check_storable, make_insert
from touchline_server.durability.journal import Journal
from touchline_server.durability.plan import CommitPlan, PlannedInsert
from touchline_server.durability.records import Change
from touchline_server.durability.storage_state import UNCERTAIN, StorageMonitor, StorageState
from touchline_server.errors import OverLimitError, ReplayError, StorageFailedError, StorageFullError, StorageUncertainError
from touchline_server.store.committer import CommitFuture, Stored
from touchline_server.store.dedup import payload_digest
from touchline_server.store.episode_store import EpisodeStore

logger = get_logger(__name__)

MAX_GROUP_BYTES = 64 << 20
"""Payload of one transaction, unless one episode alone has more."""
MAX_QUEUED_BYTES = 256 << 20
"""Payload that waits to be committed; submitting waits for room."""
MAX_QUEUED_EPISODES = 4096
RETRY_S = 1.0
"""Between attempts to write what is in memory already, and between two looks for room, while the disk is full."""
IDLE_S = 0.2
"""Rest after which free pages go back to the file system."""


@dataclass(eq=False, slots=True)
class _Pending:
    episode: Episode
    digest: int
    receipt: CommitFuture
    size_bytes: int


@dataclass(eq=False, slots=True)
class _Unwritten:
    """An episode that is in memory and not in the database."""

    change: Change
    figures: dict[str, int]
    """The counts with it and without those after it."""
    size_bytes: int


class GroupCommitter:
    """Stores episodes in a database and in the ring. Every method may be called from any thread.

    Args:
        store: the ring; restored already.
        database: its durable half.
        data_dir: the database's folder.
        durability: ``sync``, ``batch`` or ``memory``.
        sync_interval_s: longest time between a commit and its fsync, for ``batch`` and ``memory``.
    """

    def __init__(self, store: EpisodeStore, database: Database, data_dir: DataDir, *, durability: str, sync_interval_s: float) -> None:
        self._store = store
        self._in_memory = durability == "memory"
        self._journal = Journal(database, data_dir, durability=durability, sync_interval_s=sync_interval_s, next_id=store.next_id)
        self._queue: deque[_Pending] = deque()
        self._behind: deque[_Unwritten] = deque()
        self._queued_bytes = 0
        self._behind_group_bytes = MAX_GROUP_BYTES
        self._fault = ""
        """Why what is in memory cannot be written at present."""
        self._state = threading.Condition()
        self._closed = False
        try:
            self._journal.write([], self._figures(), next_id=store.next_id)
            self._journal.checkpoint()
        except StorageFullError:
            self._journal.note_full(0)
        self._thread = threading.Thread(target=self._run, name="touchline-commit", daemon=True)
        self._thread.start()

    def submit(self, episode: Episode) -> CommitFuture:
        """Queues an episode and returns at once, unless the queue is full. Its arrays must stay as they are until it is answered."""
        self.check_writable()
        pending = self._pend(episode)
        if self._in_memory:
            self._store_in_memory(pending)
        else:
            self._enqueue(pending)
        return pending.receipt

    def add(self, episode: Episode) -> Stored:
        """Stores an episode and returns once it is as durable as configured. Raises as :meth:`EpisodeStore.add` does."""
        self.check_writable()
        pending = self._pend(episode)
        if self._in_memory:
            self._store_in_memory(pending)
            return pending.receipt.result()
        if threading.current_thread() is threading.main_thread() and not self._store.write_lock._is_owned():  # type: ignore[attr-defined]
            # Ctrl-C reaches this thread only, and between the commit and the ring would have the two disagree.
            self._enqueue(pending)
            return pending.receipt.result()
        with self._state:
            self.check_writable()
            self._queue.append(pending)
            self._queued_bytes += pending.size_bytes
        # Who waits here while another commits finds itself committed with the others that waited, in one transaction.
        with self._store.write_lock:
            while not pending.receipt.done():
                self._commit_group()
        return pending.receipt.result()

    @property
    def monitor(self) -> StorageMonitor:
        """The state of the disk."""
        return self._journal.monitor

    def check_writable(self) -> None:
        """Raises StorageFailedError if nothing can be added any more, or not by this process."""
        self._journal.check_writable()
        if self._closed:
            raise StorageFailedError("the durable store is closed; nothing was stored")

    def clear(self, forget: Callable[[], None], figures: dict[str, int]) -> None:
        """Empties the database, then calls ``forget``. The caller holds the write lock.

        Args:
            forget: empties the ring.
            figures: the counts after it.
        """
        self.check_writable()
        # What is in memory alone is forgotten without having been written, except for its keys.
        self._journal.clear([unwritten.change for unwritten in self._behind], figures)
        with self._state:
            self._queued_bytes -= sum(unwritten.size_bytes for unwritten in self._behind)
            self._behind.clear()
            self._fault = ""
            self._state.notify_all()
        forget()

    def close(self) -> None:
        """Commits what waits, and closes the database as whole: the next start goes on with the next id. Does nothing in a forked
        child."""
        if self._journal.is_parents:
            return
        with self._state:
            if self._closed:
                return
            self._closed = True
            self._state.notify_all()
        self._thread.join()
        with self._store.write_lock:
            self._journal.close(self._durable_figures(), next_id=self._store.next_id)

    # Queueing

    @staticmethod
    def _pend(episode: Episode) -> _Pending:
        receipt = CommitFuture()
        receipt.set_running_or_notify_cancel()  # a caller that leaves cannot take back what may be committed already
        return _Pending(episode, payload_digest(episode.columns), receipt, episode.size_bytes)

    def _enqueue(self, pending: _Pending) -> None:
        with self._state:
            while self._is_full() and not self._closed and self.monitor.state is not StorageState.FAILED:
                self._state.wait(RETRY_S)
            self.check_writable()
            self._queue.append(pending)
            self._queued_bytes += pending.size_bytes
            self._state.notify_all()

    def _is_full(self) -> bool:
        return self._queued_bytes > MAX_QUEUED_BYTES or len(self._queue) + len(self._behind) >= MAX_QUEUED_EPISODES

    def _store_in_memory(self, pending: _Pending) -> None:
        """Publishes an episode and leaves it to the thread to commit it."""
        while self._is_full() and self._commit_behind():
            pass  # the disk does not keep up: who adds writes what others left
        self.check_writable()
        if self._is_full():
            self._journal.note_full(pending.size_bytes)
            self._refuse(pending, StorageFullError(self._fault))
            return
        begin = time.thread_time()
        with self._store.write_lock:
            try:
                self.check_writable()  # again: the one that had the lock before may have failed
                if not self._journal.has_reserved(self._store.next_id):  # ids are given out before the commit that would reserve them
                    self._journal.write([], self._figures(), next_id=self._store.next_id)
            except StorageFullError as error:
                self._journal.note_full(pending.size_bytes)
                self._refuse(pending, error)
                return
            plan = CommitPlan(self._store)
            try:
                change = self._plan(plan, pending, copy=True)
                if change is not None:
                    episode_id = plan.planned[-1].episode_id
                    stored = self._store.publish(pending.episode, plan.columns, digest=pending.digest, episode_id=episode_id)
            except BaseException:
                plan.rollback()
                raise
            if change is not None:
                with self._state:
                    self._behind.append(_Unwritten(change, self._figures(), pending.size_bytes))
                    self._queued_bytes += pending.size_bytes
                    self._state.notify_all()
                pending.receipt.set_result(stored)
        pending.receipt.cost_s = time.thread_time() - begin
        self._store.notify()

    # Committing

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            logger.exception("the thread that commits has ended")
            self.monitor.fail(f"the thread that commits has ended: {error!r}")
            with self._store.write_lock:
                while self._queue:
                    self._commit_group()  # which refuses them

    def _work(self) -> None:
        while True:
            with self._state:
                if not self._queue and not self._has_unwritten():
                    if self._closed:
                        self._log_lost()
                        return
                    self._state.wait(self._journal.next_task_s(IDLE_S, RETRY_S))
                work, last = bool(self._queue or self._has_unwritten()), self._closed
            if work:
                with self._store.write_lock:
                    if self._queue:
                        self._commit_group()
                if self._behind and not self._commit_behind() and self._has_unwritten():
                    if last:
                        self._log_lost()
                        return
                    with self._state:
                        self._state.wait_for(lambda: self._closed, RETRY_S)
            self._journal.sync_if_due()
            if not work:
                with self._store.write_lock:
                    self._journal.shrink()
                    self._journal.look_for_room(self._durable_figures(), next_id=self._store.next_id)

    def _has_unwritten(self) -> bool:
        """Returns whether there is something in memory alone that may still be written."""
        return bool(self._behind) and self.monitor.state is not StorageState.FAILED

    def _log_lost(self) -> None:
        if self._behind:
            logger.error(
                "%d episodes were acknowledged in memory and could not be written, they may be lost: %s", len(self._behind), self._fault
            )

    def _take_group(self) -> list[_Pending]:
        group: list[_Pending] = []
        with self._state:
            size_bytes = 0
            while self._queue and (not group or size_bytes + self._queue[0].size_bytes <= MAX_GROUP_BYTES):
                group.append(self._queue.popleft())
                size_bytes += group[-1].size_bytes
            self._queued_bytes -= size_bytes
            self._state.notify_all()
        return group

    def _commit_group(self) -> None:
        """Stores what is queued, as much as goes into one transaction, and answers it. Under the write lock."""
        group = self._take_group()
        if not group:
            return
        try:
            self._store_group(group)
        except BaseException as error:
            interrupted = not isinstance(error, Exception)
            if interrupted:
                self.monitor.fail(f"interrupted while episodes were being stored ({type(error).__name__})")
            for pending in group:
                if not pending.receipt.done():
                    pending.receipt.set_exception(StorageUncertainError(f"interrupted; {UNCERTAIN}") if interrupted else error)
            if interrupted:
                raise
            logger.exception("a group of %d episodes was not stored", len(group))
        self._store.notify()

    def _store_group(self, group: Sequence[_Pending]) -> None:
        begin = time.thread_time()
        plan = CommitPlan(self._store)
        accepted: list[tuple[_Pending, PlannedInsert]] = []
        changes = []
        answers: list[tuple[_Pending, int]] = []
        try:
            for pending in group:
                duplicate_of = plan.duplicate_of(pending.episode, pending.digest)
                if duplicate_of is not None:
                    answers.append((pending, duplicate_of))
                    continue
                change = self._plan(plan, pending, copy=False)
                if change is not None:
                    changes.append(change)
                    accepted.append((pending, plan.planned[-1]))
            if changes:
                self._write(changes, plan.figures())
        except Exception as error:
            plan.rollback()
            if not isinstance(error, ReplayError):
                raise
            if isinstance(error, StorageFullError):
                self._journal.note_full(sum(pending.size_bytes for pending, _ in accepted))
            for pending, _ in (*accepted, *answers):
                self._refuse(pending, error)
            return
        results: list[tuple[_Pending, Stored]] = []
        for position, (pending, planned) in enumerate(accepted):
            try:
                stored = self._store.publish(pending.episode, plan.columns, digest=pending.digest, episode_id=planned.episode_id)
            except Exception as error:
                lost = {planned.episode_id for _, planned in accepted[position:]}
                self._undo_commit(accepted[position:])
                for left in (
                    *(left for left, _ in accepted[position:]),
                    *(left for left, episode_id in answers if episode_id in lost),
                ):
                    self._refuse(left, error)
                answers = [(left, episode_id) for left, episode_id in answers if episode_id not in lost]
                break
            results.append((pending, stored))
        results += [(pending, self._store.count_duplicate(episode_id)) for pending, episode_id in answers]
        share_s = (time.thread_time() - begin) / len(group)
        for pending, stored in results:
            pending.receipt.cost_s = share_s
            pending.receipt.set_result(stored)

    def _plan(self, plan: CommitPlan, pending: _Pending, *, copy: bool) -> Change | None:
        """Returns what an episode changes; None where it is refused or stored already, which is answered here."""
        episode = pending.episode
        try:
            known = self._store.find(episode, pending.digest)
            if known is not None:
                pending.receipt.set_result(self._store.count_duplicate(known))
                return None
            check_storable(episode)
            planned = plan.admit(episode, pending.digest)
        except ReplayError as error:
            self._refuse(pending, error)
            return None
        return make_insert(episode, pending.digest, planned, incoming=self._store.incoming, copy=copy)

    def _refuse(self, pending: _Pending, error: Exception) -> None:
        if isinstance(error, StorageFullError) or not isinstance(error, OverLimitError):  # the latter only says to come again
            self._store.count_refused(str(error), pending.episode)
        pending.receipt.set_exception(error)

    def _undo_commit(self, accepted: Sequence[tuple[_Pending, PlannedInsert]]) -> None:
        """Forgets in the database what the ring could not take after it was committed."""
        ids = [planned.episode_id for _, planned in accepted]
        logger.error("the ring did not take episodes %s: they are taken out of the durable store again", ids)
        self._store.skip_ids(ids[-1] + 1)
        # They have evicted others from the database already, which the ring now follows.
        self._store.evict(sum(planned.length for _, planned in accepted))
        keys = [(pending.episode.key, planned.episode_id) for pending, planned in accepted if pending.episode.key is not None]
        # Their keys too: they were never acknowledged, and must not be taken for stored when they are sent again.
        self._journal.forget(ids, self._figures(), keys)

    def _commit_behind(self) -> bool:
        """Writes what is in memory already; returns whether it could."""
        with self._store.write_lock:
            group: list[_Unwritten] = []
            group_bytes = 0
            for unwritten in self._behind:
                group_bytes += unwritten.size_bytes
                if group and group_bytes > self._behind_group_bytes:
                    break
                group.append(unwritten)
            if not group:
                return True
            try:
                self._write([unwritten.change for unwritten in group], group[-1].figures)
            except (StorageFullError, StorageFailedError) as error:
                if not self._fault:
                    logger.error("%d episodes that were acknowledged are in memory alone: %s", len(self._behind), error)
                # Where there is some room, fewer may fit.
                self._behind_group_bytes = max(1, self._behind_group_bytes // 8)
                with self._state:
                    self._fault = str(error)
                    self._state.notify_all()
                return False
            self._behind_group_bytes = min(MAX_GROUP_BYTES, self._behind_group_bytes * 2)
            with self._state:
                self._fault = ""
                for unwritten in group:
                    self._behind.popleft()
                    self._queued_bytes -= unwritten.size_bytes
                self._state.notify_all()
        return True

    def _write(self, changes: Sequence[Change], figures: dict[str, int]) -> None:
        self._journal.write(changes, figures, next_id=changes[-1].row.id + 1)
        with self._state:
            self._state.notify_all()  # an fsync will be due

    def _figures(self) -> dict[str, int]:
        return self._store.figures()

    def _durable_figures(self) -> dict[str, int]:
        """Returns the counts without what is in memory alone."""
        return self._journal.counts if self._behind else self._figures()
