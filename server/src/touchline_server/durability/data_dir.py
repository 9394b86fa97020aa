"""A durable store's folder: its lock, and a mark of what was acknowledged, kept apart from the database so that it can check it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from touchline_protos.files.locks import DISK_FULL, lock, open_private, release, rewrite
from touchline_protos.log_lines import get_logger
from touchline_server.config.source import why_unwritable
from touchline_server.durability.database import FILE_NAME
from touchline_server.errors import StorageFailedError, StoreInUseError

logger = get_logger(__name__)

LOCK_NAME = "lock"
MARK_NAME = "acknowledged"
SNAPSHOT_STAMP = "last-snapshot"
"""Name of an empty file whose time is that of the last snapshot."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class DurabilityMark:
    """What a server had acknowledged when it stopped, cleanly or not."""

    commits: int
    """Number of transactions."""
    synced: bool
    """Whether each transaction was on disk before it was acknowledged."""
    boot_id: str
    """Id of the machine's current boot. Until the next boot, what was committed survives even if it was not synced."""


class DataDir:
    """A data_dir locked by this process. A context manager.

    Raises:
        StoreInUseError: another process has locked it.
        StorageFailedError: it cannot be created or opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._owner = os.getpid()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open_private(self.path / LOCK_NAME)
        except OSError as error:
            raise StorageFailedError(f"storage.data_dir: {self.path}: {why_unwritable(error)}") from None
        try:
            lock(self._lock)
        except OSError:
            os.close(self._lock)
            raise StoreInUseError(
                f"storage.data_dir: {self.path} is in use by another touchline-server; stop it or choose another folder"
            ) from None
        try:
            self._mark = open_private(self.path / MARK_NAME)
        except OSError as error:
            os.close(self._lock)
            raise StorageFailedError(f"storage.data_dir: {self.path}: {why_unwritable(error)}") from None
        self._boot_id = boot_id()
        self._watched: dict[Path, tuple[int, int]] = {}

    @property
    def database(self) -> Path:
        """Path of the database."""
        return self.path / FILE_NAME

    def mark(self) -> DurabilityMark | None:
        """Returns what was acknowledged; None if there is no readable mark, which then checks nothing."""
        return read_mark(self.path)

    def record_commit(self, commits: int, *, synced: bool) -> None:
        """Records how many transactions are committed. The mark is not synced: it has to survive the server's death, not the machine's.

        Raises:
            OSError: writing failed, for another reason than a full disk.
        """
        try:
            os.pwrite(self._mark, f"{commits:020d} {'sync ' if synced else 'batch'} {self._boot_id}\n".encode(), 0)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            # The episodes are committed nevertheless; only a check is lost.
            logger.warning("%s: %s", self.path / MARK_NAME, error.strerror)

    def rewrite_log(self) -> None:
        """Overwrites the log that a server left behind with its own content and syncs it: see :func:`rewrite`. Call it before SQLite opens
        the file.

        Raises:
            StorageFailedError: the log cannot be read or written.
        """
        path = self.path / f"{FILE_NAME}-wal"
        try:
            rewrite(path)
        except OSError as error:
            raise StorageFailedError(f"{path}: {error.strerror}; check the disk, nothing was changed") from None

    def watch(self) -> None:
        """Remembers which files are the store's, for :meth:`displaced`. Call it once the database is open.

        Raises:
            StorageFailedError: one of them is gone already.
        """
        for name in (LOCK_NAME, MARK_NAME, FILE_NAME, f"{FILE_NAME}-wal"):
            try:
                self._watched[self.path / name] = _identity(self.path / name)
            except OSError as error:
                raise StorageFailedError(f"storage.data_dir: {self.path / name}: {error.strerror}") from None

    def displaced(self) -> str:
        """Returns what happened to the store's files if they are not where the next start would look; empty if they are."""
        for path, identity in self._watched.items():
            try:
                if _identity(path) != identity:
                    return f"{path.name} in storage.data_dir is no longer the file that this server opened"
            except OSError as error:
                return f"{path.name} in storage.data_dir is gone ({error.strerror})"
        return ""

    def close(self) -> None:
        """Releases the lock; in a forked child, closes only this process's handles."""
        os.close(self._mark)
        release(self._lock, owner=self._owner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def read_mark(data_dir: Path) -> DurabilityMark | None:
    """Returns the mark of a folder that another process may have locked, like :meth:`DataDir.mark`."""
    try:
        words = (data_dir / MARK_NAME).read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return None
    return DurabilityMark(int(words[0]), words[1] == "sync", words[2]) if len(words) == 3 and words[0].isdecimal() else None


def boot_id() -> str:
    """Returns the id of the machine's current boot; ``unknown`` if the system has none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"
