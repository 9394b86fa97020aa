"""The thread of a durable store: commits what waits, and keeps the file in order while nothing does."""

from __future__ import annotations

import enum
import threading
from abc import ABC, abstractmethod

from touchline_protos import Counts
from touchline_protos.log_lines import get_logger
from touchline_server.durability.journal import SqliteJournal
from touchline_server.durability.storage_state import StorageMonitor
from touchline_server.errors import StorageFailedError, StorageFullError
from touchline_server.store.write_path import WritePath

logger = get_logger(__name__)

RETRY_S = 1.0
"""Interval between attempts to write what is in memory already, and between two looks at a full disk."""
IDLE_S = 0.2
"""Pause after which free pages return to the file system."""


class CommitterState(enum.Enum):
    """What a committer does with an episode."""

    OPEN = "open"
    """Accepts it. Whether the disk does is for the :class:`StorageMonitor` to say."""
    CLOSING = "closing"
    """Refuses it; the thread commits what was accepted before."""
    CLOSED = "closed"
    """Refuses it; the file is closed."""


class BackgroundCommitter(ABC):
    """What the committers have in common: the thread and its end. Every method may be called from any thread.

    Lock order: the write lock, then ``_changed``. A thread that holds ``_changed`` never waits for the write lock.

    Args:
        writes: the write path, restored already.
        journal: the open journal; closed with the committer.
    """

    def __init__(self, writes: WritePath, journal: SqliteJournal) -> None:
        self._writes = writes
        self._sqlite = journal
        self._changed = threading.Condition()
        """Guards the state and whatever waits to be committed; notified after every change of them and after every commit."""
        self._state = CommitterState.OPEN
        try:
            journal.commit([], writes.counts(), next_id=writes.next_id)  # reserves ids
            journal.checkpoint()
        except StorageFullError:
            journal.note_full(0)
        self._thread = threading.Thread(target=self._run, name="touchline-commit", daemon=True)
        self._thread.start()

    @property
    def monitor(self) -> StorageMonitor:
        """The state of the disk."""
        return self._sqlite.monitor

    @property
    def database_journal(self) -> SqliteJournal:
        """The journal that writes to the database."""
        return self._sqlite

    @abstractmethod
    def pending(self) -> tuple[int, int]:
        """Returns the episodes that are accepted and not committed yet, and their bytes. From any thread."""

    def check_writable(self) -> None:
        """Raises StorageFailedError if nothing can be added any more, or not by this process."""
        self._sqlite.check_writable()
        if self._state is not CommitterState.OPEN:
            raise StorageFailedError("the durable store is closed; nothing was stored")

    def close(self) -> None:
        """Commits what waits and closes the file cleanly. Does nothing in a forked child, or if it is closed already."""
        if self._sqlite.belongs_to_parent:
            return
        with self._changed:
            if self._state is not CommitterState.OPEN:
                return
            self._state = CommitterState.CLOSING
            self._changed.notify_all()
        self._thread.join()
        with self._writes.lock:
            while self._has_work() and self._work():
                pass  # added between the thread's last look and its end
            self._drop_waiting()
            self._sqlite.close(self._durable_counts(), next_id=self._writes.next_id)
            self._state = CommitterState.CLOSED

    @abstractmethod
    def _has_work(self) -> bool:
        """Returns whether something waits that can be committed. Called with ``_changed`` held."""

    @abstractmethod
    def _work(self) -> bool:
        """Commits some of what waits; returns False if the disk does not take it at present."""

    @abstractmethod
    def _drop_waiting(self) -> None:
        """Refuses or logs what still waits: nothing more is committed. Called with the write lock held."""

    def _durable_counts(self) -> Counts:
        """Returns the counts of what is in the file. Called with the write lock held."""
        return self._writes.counts()

    def _wake(self) -> None:
        """Wakes the thread: there is something to commit, or to sync later."""
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            logger.exception("the thread that commits has ended")
            self.monitor.fail(f"the thread that commits has ended: {error!r}")
            with self._writes.lock:
                self._drop_waiting()

    def _loop(self) -> None:
        while True:
            with self._changed:
                if not self._has_work():
                    if self._state is not CommitterState.OPEN:
                        return
                    self._changed.wait(self._sqlite.next_task_s(IDLE_S, RETRY_S))
                has_work, closing = self._has_work(), self._state is not CommitterState.OPEN
            if has_work and not self._work():
                if closing:
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._state is not CommitterState.OPEN, RETRY_S)
            self._sqlite.sync_if_due()
            if not has_work:
                with self._writes.lock:
                    self._sqlite.shrink()
                    self._sqlite.check_space(self._durable_counts(), next_id=self._writes.next_id)
