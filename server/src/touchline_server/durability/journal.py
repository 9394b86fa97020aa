"""The writing half of a durable store: commits, fsyncs, checkpoints and the mark of what was committed, each with its failures seen.

For whoever holds the store's write lock, unless a method says otherwise. A journal belongs to the process that made it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence

from touchline_protos.codec import EpisodeKey
from touchline_protos.log_lines import get_logger
from touchline_server.durability.data_dir import DataDir
from touchline_server.durability.database import FILE_NAME, Database
from touchline_server.durability.records import Change
from touchline_server.durability.storage_state import UNCERTAIN, StorageState
from touchline_server.errors import ReplayError, StorageFailedError, StorageFullError, StorageUncertainError

logger = get_logger(__name__)

ID_BLOCK = 1 << 16
"""Ids reserved ahead on the disk, many times those that can be queued: none is given out again after a death of the machine."""
SHRINK_PAGES = 256
"""Free pages that go back to the file system in one step."""
ROOM_BYTES = 1 << 20
"""What a disk that was full must have beyond what it refused, before adding is said to go on."""

_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


class Journal:
    """Writes to one data_dir.

    Args:
        database: its file; closed with this.
        data_dir: its folder; closed with this.
        durability: ``sync``, ``batch`` or ``memory``.
        sync_interval_s: longest time between a commit and its fsync, for ``batch`` and ``memory``.
        next_id: of the next episode.

    Raises:
        StorageFailedError: the folder's files are gone already.
    """

    def __init__(self, database: Database, data_dir: DataDir, *, durability: str, sync_interval_s: float, next_id: int) -> None:
        self._database = database
        self._data_dir = data_dir
        self._synced = durability == "sync"
        self._sync_interval_s = sync_interval_s
        self._process = os.getpid()
        self._reserved = next_id
        self._unsynced_since: float | None = None
        self._may_shrink = True
        self._wanted_bytes = 0
        self.monitor = database.monitor
        """Whether what is written can be relied upon."""
        data_dir.watch()
        self._log = os.open(f"{database.path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        _journals.add(self)

    @property
    def is_parents(self) -> bool:
        """Whether this is a forked child of the process that the journal belongs to."""
        return os.getpid() != self._process

    @property
    def counts(self) -> dict[str, int]:
        """The counts as they were written last."""
        return self._database.counts()

    def check_writable(self) -> None:
        """Raises StorageFailedError if nothing can be written any more, or not by this process. From any thread."""
        if self.is_parents:
            raise StorageFailedError(
                f"storage.data_dir: {self._data_dir.path} is the parent process's (process {self._process}); nothing was stored. In a "
                "forked child make a ReplayBuffer of its own, with another storage.data_dir or none"
            )
        self.monitor.check()

    def has_reserved(self, episode_id: int) -> bool:
        """Returns whether an id will not be given out again, whatever happens to the machine."""
        return episode_id < self._reserved

    def write(self, changes: Sequence[Change], figures: Mapping[str, int], *, next_id: int) -> None:
        """Commits, with an fsync if the mode or a reservation of ids asks for one.

        Args:
            changes: in order.
            figures: the counts after them.
            next_id: of the episode after them.

        Raises:
            ReplayError: as :meth:`Database.commit`.
        """
        self._check_place()
        self._database.checkpoint_if_due()
        reserve = next_id + ID_BLOCK // 2 > self._reserved
        reserved = next_id + ID_BLOCK if reserve else self._reserved
        self._database.commit(changes, figures=figures, meta={"next_id": reserved}, sync=self._synced or reserve)
        self._reserved = reserved
        self._note_commit(synced=self._synced)
        if not self._synced and self._unsynced_since is None:
            self._unsynced_since = time.monotonic()
        if changes:
            self.monitor.recover()

    def checkpoint(self) -> None:
        """Moves the log into the main file, or as much of it as there is room for.

        Raises:
            StorageFailedError: reading, writing or an fsync failed.
        """
        with contextlib.suppress(StorageFullError):  # what is in the log stays there, on the disk
            self._database.checkpoint()

    def forget(self, episode_ids: Sequence[int], figures: Mapping[str, int], keys: Iterable[tuple[EpisodeKey, int]]) -> None:
        """Takes episodes back that were committed and are not in the ring.

        Raises:
            StorageUncertainError: it could not be done, so file and ring differ until the next start.
        """
        try:
            self._database.forget(episode_ids, figures=figures, keys=keys)
            self._note_commit(synced=True)
        except ReplayError as error:
            self.monitor.fail(f"episodes that memory could not take are left in the file: {error}")
            raise StorageUncertainError(f"{error}; {UNCERTAIN}") from error

    def clear(self, unwritten: Iterable[Change], figures: Mapping[str, int]) -> None:
        """Empties the file. Raises as :meth:`Database.clear` does."""
        self.check_writable()
        self._check_place()
        try:
            self._database.clear(unwritten, figures=figures)
            self._note_commit(synced=True)
        except StorageUncertainError as error:
            raise StorageUncertainError(f"clear: whether it is done is not known before the server is started again ({error})") from error
        self._may_shrink = True

    # What the committing thread does besides

    def next_task_s(self, idle_s: float, retry_s: float) -> float | None:
        """Returns after how many seconds :meth:`do_tasks` has something to do; None: not before something is committed.

        Args:
            idle_s: rest before the file is shrunk.
            retry_s: between two looks for room on a full disk.
        """
        if self.monitor.state is StorageState.FAILED:
            return None
        if self._unsynced_since is not None:
            return max(0.0, self._unsynced_since + self._sync_interval_s - time.monotonic())
        if self.monitor.state is StorageState.FULL:
            return retry_s
        return idle_s if self._may_shrink else None

    def sync_if_due(self) -> None:
        """Has on the disk what was committed ``sync_interval_s`` ago. Without the write lock: who adds goes on meanwhile."""
        if self._unsynced_since is None or time.monotonic() < self._unsynced_since + self._sync_interval_s:
            return
        self._unsynced_since = None  # before: what is committed meanwhile may miss this one
        try:
            os.fsync(self._log)
        except OSError as error:
            self.monitor.fail(f"{FILE_NAME}-wal: fsync: {error.strerror}")

    def shrink(self) -> None:
        """Gives some free pages back to the file system."""
        if not self._may_shrink or self._unsynced_since is not None:
            return
        try:
            self._database.checkpoint_if_due()
            self._may_shrink = self._database.shrink(SHRINK_PAGES)
        except (ReplayError, sqlite3.Error) as error:
            self._may_shrink = False
            logger.warning("free pages stay in the durable store's file: %s", error)

    def note_full(self, size_bytes: int) -> None:
        """Notes that the disk had no room for so many bytes. From any thread."""
        self._wanted_bytes = size_bytes
        self.monitor.fill("storage.data_dir is on a disk that is full; free space there, adding goes on as soon as there is room")

    def look_for_room(self, figures: Mapping[str, int], *, next_id: int) -> None:
        """Notes that a full disk has room again, though nobody adds: health and Info would speak of a full one until then."""
        if self.monitor.state is not StorageState.FULL:
            return
        try:
            if shutil.disk_usage(self._data_dir.path).free >= self._wanted_bytes + ROOM_BYTES:
                self.write([], figures, next_id=next_id)
                self.monitor.recover()
        except (OSError, StorageFullError, StorageFailedError) as error:
            logger.debug("no room yet: %s", error)

    def close(self, figures: Mapping[str, int], *, next_id: int) -> None:
        """Closes the file as whole: the next start goes on with the next id. After a failure leaves everything as it is."""
        try:
            self._check_place()
            self._database.commit([], figures=figures, meta={"next_id": next_id}, sync=True)
            self._note_commit(synced=True)
            self.checkpoint()
        except (ReplayError, sqlite3.Error) as error:
            logger.error("the durable store was not closed in order: %s", error)
        finally:
            _journals.discard(self)
            os.close(self._log)
            self._database.close()
            self._data_dir.close()

    def leave_to_parent(self) -> None:
        """In a forked child: lets go of the parent's files without touching them. Its locks are its own for as long as it lives."""
        self._database.abandon()
        os.close(self._log)
        self._data_dir.close()

    def _check_place(self) -> None:
        """Raises StorageFailedError if the files are not where the next start would look for them."""
        displaced = self._data_dir.displaced()
        if displaced:
            self.monitor.fail(displaced)
        self.monitor.check()

    def _note_commit(self, *, synced: bool) -> None:
        """Marks what was committed. Raises StorageUncertainError if it is not to be acknowledged all the same."""
        try:
            self._data_dir.acknowledge(self._database.commits, synced=synced)
        except (OSError, sqlite3.Error) as error:
            self.monitor.fail(f"the mark of what was committed: {error}")
        displaced = self._data_dir.displaced()
        if displaced:
            self.monitor.fail(displaced)
        self.monitor.check_written()


def _leave_to_parent() -> None:
    for journal in list(_journals):
        journal.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
