"""The journal of a durable store: commits, fsyncs and checkpoints of its SQLite file, and the mark of what was committed.

A failed write, fsync or checkpoint is never passed over: unless the disk was only full, the journal accepts nothing more, see
:mod:`touchline_server.durability.storage_state`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

from touchline_protos import Counts
from touchline_protos.log_lines import get_logger
from touchline_server.durability.data_dir import SNAPSHOT_STAMP, DataDir
from touchline_server.durability.database import FILE_NAME, Database
from touchline_server.durability.records import Change, make_change
from touchline_server.durability.storage_state import UNCERTAIN, StorageState
from touchline_server.errors import ReplayError, StorageFailedError, StorageFullError, StorageUncertainError
from touchline_server.metrics.histogram import Histogram
from touchline_server.store.inserts import PlannedInsert
from touchline_server.store.plan import InsertPlan

logger = get_logger(__name__)

ID_BLOCK = 1 << 16
"""Ids reserved ahead on disk, far more than can be queued, so that no id is used again after the machine went down."""
SHRINK_PAGES = 256
"""Free pages returned to the file system at a time."""
SPARE_BYTES = 1 << 20
"""Free space, beyond what was refused, that a full disk must have before adding is reported to go on."""

_journals: weakref.WeakSet[SqliteJournal] = weakref.WeakSet()


class SqliteJournal:
    """Writes plans to one data_dir: the :class:`~touchline_server.store.journal.Journal` of ``durability = "sync"`` and ``"batch"``.

    For the holder of the write lock, unless a method says otherwise. A journal belongs to the process that made it.

    Args:
        database: the open file; closed with the journal.
        data_dir: the locked folder; closed with the journal.
        durability: ``sync``, ``batch`` or ``memory``.
        sync_interval_s: longest time between a commit and its fsync, for ``batch`` and ``memory``.
        incoming: the row convention.
        next_id: id of the next episode.

    Raises:
        StorageFailedError: one of the folder's files is gone already.
    """

    may_wait = True

    def __init__(
        self, database: Database, data_dir: DataDir, *, durability: str, sync_interval_s: float, incoming: bool, next_id: int
    ) -> None:
        self._database = database
        self._data_dir = data_dir
        self._synced = durability == "sync"
        self._sync_interval_s = sync_interval_s
        self.incoming = incoming
        """The row convention: True if the first row's action, reward and done are undefined, False if the last row's are."""
        self._process = os.getpid()
        self._reserved = next_id
        self._unsynced_since: float | None = None
        self._may_shrink = True
        self.syncs = Histogram()
        """Durations of what makes commits durable: an fsync, or a commit that includes one."""
        self._counting = threading.Lock()
        self._refused_bytes = 0
        """Payload that a full disk refused last."""
        self.monitor = database.monitor
        """Whether what is written can be relied on."""
        data_dir.watch()
        self._log = os.open(f"{database.path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        _journals.add(self)

    @property
    def belongs_to_parent(self) -> bool:
        """Whether this is a forked child of the process that owns the journal. Any thread may ask."""
        return os.getpid() != self._process

    @property
    def counts(self) -> Counts:
        """The counts written last."""
        return self._database.counts()

    def check_writable(self) -> None:
        """Raises StorageFailedError if nothing can be written any more, or not by this process. Takes no lock; any thread may call it."""
        if self.belongs_to_parent:
            raise StorageFailedError(
                f"storage.data_dir: {self._data_dir.path} is the parent process's (process {self._process}); nothing was stored. In a "
                "forked child create a ReplayBuffer of its own, with another storage.data_dir or none"
            )
        self.monitor.check()

    # The steps of the write path

    def write(self, plan: InsertPlan) -> None:
        """Commits a plan. Raises as :meth:`commit` does."""
        changes = [make_change(insert, incoming=self.incoming, copy=False) for insert in plan.inserts]
        try:
            self.commit(changes, plan.counts(), next_id=plan.next_id)
        except StorageFullError:
            self.note_full(sum(change.size_bytes for change in changes))
            raise

    def undo(self, inserts: Sequence[PlannedInsert], counts: Counts) -> None:
        """Deletes episodes that were committed and are not in the ring.

        Their keys are forgotten too: they were never acknowledged, so they must not pass for duplicates when they are sent again.

        Raises:
            StorageUncertainError: it failed, so file and ring differ until the next start.
        """
        requests = [(insert.request.episode.key, insert.episode_id) for insert in inserts]
        keys = [(key, episode_id) for key, episode_id in requests if key is not None]
        try:
            self._database.forget([insert.episode_id for insert in inserts], counts=counts, keys=keys)
            self._record_commit(synced=True)
        except ReplayError as error:
            self.monitor.fail(f"episodes that could not be copied into memory remain in the file: {error}")
            raise StorageUncertainError(f"{error}; {UNCERTAIN}") from error

    def clear(self, counts: Counts, *, unwritten: Iterable[Change] = ()) -> None:
        """Empties the file. Raises as :meth:`Database.clear` does.

        Args:
            counts: the counts afterwards.
            unwritten: changes acknowledged but not yet written. Only their keys are.
        """
        self.check_writable()
        self._check_files()
        try:
            self._database.clear(unwritten, counts=counts)
            self._record_commit(synced=True)
        except StorageUncertainError as error:
            raise StorageUncertainError(f"clear: whether it is done is unknown until the server is restarted ({error})") from error
        self._may_shrink = True

    # Commits and housekeeping

    def has_reserved(self, next_id: int) -> bool:
        """Returns whether ids below ``next_id`` will never be used again, whatever happens to the machine."""
        return next_id <= self._reserved

    def commit(self, changes: Sequence[Change], counts: Counts, *, next_id: int) -> None:
        """Commits changes, with an fsync if the mode or a reservation of ids asks for one.

        Args:
            changes: the changes, in the order in which they apply.
            counts: the counts after them.
            next_id: id of the first episode after them.

        Raises:
            ReplayError: as :meth:`Database.commit`.
        """
        self._check_files()
        self._database.checkpoint_if_due()
        reserve = next_id + ID_BLOCK // 2 > self._reserved
        reserved = next_id + ID_BLOCK if reserve else self._reserved
        begin = time.monotonic()
        self._database.commit(changes, counts=counts, meta={"next_id": reserved}, sync=self._synced or reserve)
        if self._synced or reserve:
            self._count_sync(time.monotonic() - begin)
        self._reserved = reserved
        self._record_commit(synced=self._synced)
        if not self._synced and self._unsynced_since is None:
            self._unsynced_since = time.monotonic()
        if changes:
            self.monitor.recover()

    def checkpoint(self) -> None:
        """Moves the log into the main file, or as much of it as there is space for.

        Raises:
            StorageFailedError: reading, writing or an fsync failed.
        """
        with contextlib.suppress(StorageFullError):  # the rest stays in the log, which is on disk too
            self._database.checkpoint()

    def next_task_s(self, idle_s: float, retry_s: float) -> float | None:
        """Returns in how many seconds housekeeping is due; None if not before something is committed. From any thread.

        Args:
            idle_s: pause before the file is shrunk.
            retry_s: interval at which a full disk is looked at.
        """
        if self.monitor.state is StorageState.FAILED:
            return None
        unsynced_since = self._unsynced_since
        if unsynced_since is not None:
            return max(0.0, unsynced_since + self._sync_interval_s - time.monotonic())
        if self.monitor.state is StorageState.FULL:
            return retry_s
        return idle_s if self._may_shrink else None

    def sync_if_due(self) -> None:
        """Syncs what was committed ``sync_interval_s`` ago. Without the write lock, so adding continues meanwhile."""
        if self._unsynced_since is None or time.monotonic() < self._unsynced_since + self._sync_interval_s:
            return
        # Before the fsync, not after it: a commit that comes during the fsync may be missed by it and must set the time anew.
        self._unsynced_since = None
        begin = time.monotonic()
        try:
            os.fsync(self._log)
            self._count_sync(time.monotonic() - begin)
        except OSError as error:
            self.monitor.fail(f"{FILE_NAME}-wal: fsync: {error.strerror}")

    def shrink(self) -> None:
        """Returns some free pages to the file system."""
        if not self._may_shrink or self._unsynced_since is not None:
            return
        try:
            self._database.checkpoint_if_due()
            self._may_shrink = self._database.shrink(SHRINK_PAGES)
        except (ReplayError, sqlite3.Error) as error:
            self._may_shrink = False
            logger.warning("free pages remain in the durable store's file: %s", error)

    def note_full(self, size_bytes: int) -> None:
        """Reports the disk as full: it had no space for this many bytes. From any thread."""
        self._refused_bytes = size_bytes
        self.monitor.fill("storage.data_dir is on a disk that is full; free space there, adding goes on as soon as there is some")

    def check_space(self, counts: Counts, *, next_id: int) -> None:
        """Reports a full disk as usable once it has space again, so that health and Info do not have to wait for the next add."""
        if self.monitor.state is not StorageState.FULL:
            return
        try:
            if shutil.disk_usage(self._data_dir.path).free >= self._refused_bytes + SPARE_BYTES:
                self.commit([], counts, next_id=next_id)
                self.monitor.recover()
        except (OSError, StorageFullError, StorageFailedError) as error:
            logger.debug("the disk is still full: %s", error)

    def close(self, counts: Counts, *, next_id: int) -> None:
        """Closes the file cleanly: the next start continues with ``next_id``. After a failure, leaves everything as it is."""
        try:
            self._check_files()
            self._database.commit([], counts=counts, meta={"next_id": next_id}, sync=True)
            self._record_commit(synced=True)
            self.checkpoint()
        except (ReplayError, sqlite3.Error) as error:
            logger.error("the durable store was not closed cleanly: %s", error)
        finally:
            _journals.discard(self)
            os.close(self._log)
            self._database.close()
            self._data_dir.close()

    def abandon(self) -> None:
        """Releases the parent's files in a forked child, without touching them. The parent keeps its locks."""
        self._database.abandon()
        os.close(self._log)
        self._data_dir.close()

    @property
    def unsynced_s(self) -> float:
        """Seconds since the oldest commit that is not on disk yet; 0 if all are. From any thread."""
        since = self._unsynced_since
        return max(time.monotonic() - since, 0.0) if since is not None else 0.0

    def file_bytes(self) -> int:
        """Returns the size of the database and its log. From any thread."""
        return sum(file.stat().st_size for end in ("", "-wal") if (file := Path(f"{self._database.path}{end}")).exists())

    def last_snapshot_s(self) -> float:
        """Returns when the store was last copied by ``snapshot``, in seconds since 1970; 0 if it never was. From any thread."""
        stamp = self._data_dir.path / SNAPSHOT_STAMP
        return stamp.stat().st_mtime if stamp.exists() else 0.0

    def disk_free_bytes(self) -> int:
        """Returns the free space of the disk. From any thread."""
        return shutil.disk_usage(self._data_dir.path).free

    def _count_sync(self, duration_s: float) -> None:
        with self._counting:  # the committer's thread syncs while another one commits
            self.syncs.observe(duration_s)

    def _check_files(self) -> None:
        """Raises StorageFailedError if the files are not where the next start would look for them."""
        displaced = self._data_dir.displaced()
        if displaced:
            self.monitor.fail(displaced)
        self.monitor.check()

    def _record_commit(self, *, synced: bool) -> None:
        """Records a commit in the mark. Raises StorageUncertainError if it must not be acknowledged all the same."""
        try:
            self._data_dir.record_commit(self._database.commits, synced=synced)
        except (OSError, sqlite3.Error) as error:
            self.monitor.fail(f"the mark of what was committed: {error}")
        displaced = self._data_dir.displaced()
        if displaced:
            self.monitor.fail(displaced)
        self.monitor.check_written()


def _abandon_in_child() -> None:
    for journal in list(_journals):
        journal.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_in_child)
