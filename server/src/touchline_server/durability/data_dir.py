"""A durable store's folder: one server at a time, and a mark of what was acknowledged that does not lie in the database itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from touchline_protos.files.locks import DISK_FULL, lock, open_private, rewrite
from touchline_protos.log_lines import get_logger
from touchline_server.config.source import why_unwritable
from touchline_server.durability.database import FILE_NAME
from touchline_server.errors import StorageFailedError, StoreInUseError

logger = get_logger(__name__)

LOCK_NAME = "lock"
MARK_NAME = "acknowledged"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class DurabilityMark:
    """What a server had acknowledged when it ended, however it ended."""

    commits: int
    """Transactions."""
    synced: bool
    """Whether each was on the disk before it was acknowledged."""
    boot_id: str
    """Of the machine's start: until its next one, what was committed is there, on the disk or not."""


class DataDir:
    """A data_dir that this process holds. A context manager.

    Raises:
        StoreInUseError: another process holds it.
        StorageFailedError: it cannot be made or opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
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
        """The database's file."""
        return self.path / FILE_NAME

    def mark(self) -> DurabilityMark | None:
        """Returns what was acknowledged; None where there is no mark, or none that can be read: it only ever adds to the checks."""
        return read_mark(self.path)

    def record_commit(self, commits: int, *, synced: bool) -> None:
        """Notes that so many transactions are committed. Not synced: it is to be there after the server's death, not the machine's.

        Raises:
            OSError: the disk does not take it, and not for want of room.
        """
        try:
            os.pwrite(self._mark, f"{commits:020d} {'sync ' if synced else 'batch'} {self._boot_id}\n".encode(), 0)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            # The episodes are committed all the same; what is lost is a check.
            logger.warning("%s: %s", self.path / MARK_NAME, error.strerror)

    def rewrite_log(self) -> None:
        """Writes the log that a server left behind over itself, and has it on the disk: see :func:`rewrite`. To be called before SQLite
        opens it.

        Raises:
            StorageFailedError: it cannot be read or written.
        """
        path = self.path / f"{FILE_NAME}-wal"
        try:
            rewrite(path)
        except OSError as error:
            raise StorageFailedError(f"{path}: {error.strerror}; see to the disk, nothing was changed") from None

    def watch(self) -> None:
        """Remembers which files are the store's, for :meth:`displaced`. To be called once the database is open.

        Raises:
            StorageFailedError: one of them is gone already.
        """
        for name in (LOCK_NAME, MARK_NAME, FILE_NAME, f"{FILE_NAME}-wal"):
            try:
                self._watched[self.path / name] = _identity(self.path / name)
            except OSError as error:
                raise StorageFailedError(f"storage.data_dir: {self.path / name}: {error.strerror}") from None

    def displaced(self) -> str:
        """Returns what has become of the store's files, if they are not where the next start would look; otherwise nothing."""
        for path, identity in self._watched.items():
            try:
                if _identity(path) != identity:
                    return f"{path.name} in storage.data_dir is not the file any more that this server opened"
            except OSError as error:
                return f"{path.name} in storage.data_dir is gone ({error.strerror})"
        return ""

    def close(self) -> None:
        """Lets go of it."""
        os.close(self._mark)
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def read_mark(data_dir: Path) -> DurabilityMark | None:
    """Returns what :meth:`DataDir.mark` does, of a folder that another process may hold."""
    try:
        words = (data_dir / MARK_NAME).read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return None
    return DurabilityMark(int(words[0]), words[1] == "sync", words[2]) if len(words) == 3 and words[0].isdecimal() else None


def boot_id() -> str:
    """Returns what names this start of the machine; ``unknown`` where nothing does."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"
