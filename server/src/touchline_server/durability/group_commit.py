"""Group commit, for ``durability = "sync"`` and ``"batch"``: episodes that wait at the same time share a transaction.

A thread that adds and waits commits whatever is queued, its own episode among it; what was only submitted is committed by the committer's
thread. Either holds the write lock, so the database has one user at a time.

Group commit: D. J. DeWitt et al., "Implementation techniques for main memory database systems", SIGMOD 1984, section 5.2.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from touchline_protos.codec import Episode
from touchline_protos.log_lines import get_logger
from touchline_server.durability.background import RETRY_S, BackgroundCommitter, CommitterState
from touchline_server.durability.journal import SqliteJournal
from touchline_server.durability.storage_state import UNCERTAIN, StorageState
from touchline_server.errors import StorageUncertainError
from touchline_server.store.dedup import payload_digest
from touchline_server.store.inserts import AddRequest, CommitFuture, Stored
from touchline_server.store.write_path import WritePath

logger = get_logger(__name__)

MAX_GROUP_BYTES = 64 << 20
"""Most payload in one transaction, unless a single episode has more."""
MAX_QUEUED_BYTES = 256 << 20
"""Most payload that waits to be committed; beyond it, submitting waits."""
MAX_QUEUED_EPISODES = 4096
"""Most episodes that wait to be committed; beyond it, submitting waits."""


@dataclass(eq=False, slots=True)
class _Pending:
    request: AddRequest
    future: CommitFuture
    size_bytes: int


class GroupCommitter(BackgroundCommitter):
    """Queues episodes and takes them through the write path in groups. Every method may be called from any thread.

    Args:
        writes: the write path, restored already.
        journal: the open journal; closed with the committer.
    """

    def __init__(self, writes: WritePath, journal: SqliteJournal) -> None:
        self._queue: deque[_Pending] = deque()
        self._queued_bytes = 0
        super().__init__(writes, journal)

    def pending(self) -> tuple[int, int]:
        """Returns the episodes that are queued and not committed yet, and their bytes."""
        return len(self._queue), self._queued_bytes

    def submit(self, episode: Episode) -> CommitFuture:
        """Queues an episode; waits only while the queue is full. Its arrays must not change until the future is done."""
        self.check_writable()
        pending = self._pending(episode)
        self._enqueue(pending)
        return pending.future

    def add(self, episode: Episode) -> Stored:
        """Stores an episode and returns once it is as durable as configured. Raises as :meth:`EpisodeStore.add` does."""
        self.check_writable()
        pending = self._pending(episode)
        if threading.current_thread() is threading.main_thread() and not self._writes.lock._is_owned():  # type: ignore[attr-defined]
            # Ctrl-C interrupts only this thread; between the commit and the ring it would leave the two different.
            self._enqueue(pending)
            return pending.future.result()
        with self._changed:
            self.check_writable()
            self._append(pending)
        # While this thread waits for the lock, another one may commit this episode too, in its own transaction.
        with self._writes.lock:
            while not pending.future.done():
                self._commit_group()
        return pending.future.result()

    @staticmethod
    def _pending(episode: Episode) -> _Pending:
        future = CommitFuture()
        future.set_running_or_notify_cancel()  # cancelling it could not take back what may be committed already
        return _Pending(AddRequest(episode, payload_digest(episode.columns)), future, episode.size_bytes)

    def _enqueue(self, pending: _Pending) -> None:
        with self._changed:
            while self._is_full() and self._state is CommitterState.OPEN and self.monitor.state is not StorageState.FAILED:
                self._changed.wait(RETRY_S)
            self.check_writable()
            self._append(pending)
            self._changed.notify_all()

    def _append(self, pending: _Pending) -> None:
        self._queue.append(pending)
        self._queued_bytes += pending.size_bytes

    def _is_full(self) -> bool:
        return self._queued_bytes > MAX_QUEUED_BYTES or len(self._queue) >= MAX_QUEUED_EPISODES

    def _has_work(self) -> bool:
        return bool(self._queue)

    def _work(self) -> bool:
        with self._writes.lock:
            self._commit_group()
        return True

    def _drop_waiting(self) -> None:
        while self._queue:
            self._commit_group()  # which the journal refuses

    def _take_group(self) -> list[_Pending]:
        group: list[_Pending] = []
        with self._changed:
            size_bytes = 0
            while self._queue and (not group or size_bytes + self._queue[0].size_bytes <= MAX_GROUP_BYTES):
                group.append(self._queue.popleft())
                size_bytes += group[-1].size_bytes
            self._queued_bytes -= size_bytes
            self._changed.notify_all()
        return group

    def _commit_group(self) -> None:
        """Stores what is queued, as much as fits into one transaction, and answers it. The write lock is held."""
        group = self._take_group()
        if not group:
            return
        begin_s = time.thread_time()
        try:
            outcomes = self._writes.commit([pending.request for pending in group])
        except BaseException as error:
            interrupted = not isinstance(error, Exception)
            if interrupted:
                self.monitor.fail(f"interrupted while episodes were being stored ({type(error).__name__})")
            for pending in group:
                pending.future.set_exception(StorageUncertainError(f"interrupted; {UNCERTAIN}") if interrupted else error)
            if interrupted:
                raise
            logger.exception("a group of %d episodes was not stored", len(group))
            return
        self._wake()  # an fsync will be due
        cost_s = (time.thread_time() - begin_s) / len(group)
        for pending, outcome in zip(group, outcomes, strict=True):
            pending.future.cost_s = cost_s
            if isinstance(outcome, Stored):
                pending.future.set_result(outcome)
            else:
                pending.future.set_exception(outcome)
