"""File of a spool: its tables, the lock on its folder, and the errors for a spool that cannot be used.

``episodes`` has one row per episode, ``payloads`` its encoded ``AddEpisodeRequest``, in parts if that exceeds SQLite's longest blob. Two
checksums guard each episode: ``payload_checksum`` covers the message, which contains the key and the table, ``row_checksum`` the row.

``meta`` has the table of the last writer. While every episode is for that table the file has format 1. A writer for another table sets
format 2, whose only difference is that episodes may be for several tables: readers of format 1 send all of them to their own table.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from touchline._spool.sqlite_codes import CORRUPT, NOTADB, code_of, has_no_space
from touchline.errors import SpoolError
from touchline_protos.files.locks import DISK_FULL, HAS_LOCKS, is_locked, lock, open_private, release, rewrite, sync
from touchline_protos.files.sqlite import FormatError, SqliteFormat, row_checksum
from touchline_protos.log_lines import get_logger

FILE_NAME = "spool.db"
LOCK_NAME = "lock"
MARK_NAME = "mark"
"""File with the id of the last episode written, outside the database, so that a log that loses its end is noticed."""
PAGE_BYTES = 4096
PARTS_PER_EPISODE = 16
"""Numbers in ``payloads`` reserved for each episode: id * 16 + index of the part. Protobuf's limit of 2 GiB makes 8 parts."""

WAITING, REFUSED, DAMAGED = 0, 0x55, 0xAA
"""States of an episode: to be sent; refused by the server for good; not what was written. No single flipped bit turns one into another."""

MIXED_VERSION = 2
"""Version of a file whose episodes may be for several tables."""

FORMAT = SqliteFormat(
    application_id=0x746C7370,
    version=1,
    later=(MIXED_VERSION,),
    page_bytes=PAGE_BYTES,
    statements="""
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE episodes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, client_id TEXT NOT NULL, incarnation INTEGER NOT NULL, sequence INTEGER NOT NULL,
    length INTEGER NOT NULL, size_bytes INTEGER NOT NULL, time REAL NOT NULL, state INTEGER NOT NULL, reason TEXT NOT NULL,
    payload_checksum INTEGER NOT NULL, row_checksum INTEGER NOT NULL);
CREATE TABLE payloads (number INTEGER PRIMARY KEY, data BLOB NOT NULL);
""",
)

COLUMNS = "id, client_id, incarnation, sequence, length, size_bytes, time, state, reason, payload_checksum"
"""Columns of ``episodes`` that ``row_checksum`` covers, in its order."""

LOCK_ATTEMPTS = 10
LOCK_INTERVAL_S = 0.02
"""Attempts at the folder's lock, and the time between them: `touchline spool show` takes a share of it for a moment."""

SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""Errors of SQLite; the second one if its message quotes damaged text."""

logger = get_logger(__name__)

_inherited: set[Path] = set()
"""Folders whose spool the parent process had open at a fork: SQLite must not open the same file in the child."""


def mark_inherited(folder: Path) -> None:
    """Marks a folder as the parent's, in a forked child."""
    _inherited.add(folder)


class FolderLock:
    """Exclusive lock on a spool's folder. It ends with the process, however that ends.

    Args:
        folder: folder of the spool, made if it does not exist.

    Raises:
        SpoolError: another writer holds the lock, or the folder cannot be made or locked.
    """

    def __init__(self, folder: Path) -> None:
        if not HAS_LOCKS:
            raise SpoolError("spool_dir: this system lacks POSIX file locks, which a spool needs; omit spool_dir")
        if folder in _inherited:
            raise SpoolError(f"spool_dir: {folder} belongs to the parent process; in a forked child, name another folder")
        try:
            missing = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = open_private(folder / LOCK_NAME)
            self._owner = os.getpid()
        except OSError as error:
            raise SpoolError(f"spool_dir: {folder}: {error.strerror}") from None
        # From here on the handle must be closed on failure, or this process would keep the lock.
        try:
            self._lock_and_name_holder(folder)
            self._mark = _open_mark(folder)
        except SpoolError:
            os.close(self._handle)
            raise
        # A loss of power must not take the folders' entries, either.
        for parent in (folder, *folder.parents):
            _sync_entries(parent)
            if parent == missing:
                break

    def _lock_and_name_holder(self, folder: Path) -> None:
        try:
            _lock(self._handle)
        except BlockingIOError:
            holder = _read_number(self._handle)
            raise SpoolError(
                f"spool_dir: {folder} is in use by another writer{f' (process {holder})' if holder else ''}; close it, or give each writer "
                "a folder of its own"
            ) from None
        except OSError as error:
            raise SpoolError(f"spool_dir: {folder} cannot be locked ({error.strerror}); name one on a local disk") from None
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            if error.errno not in DISK_FULL:  # on a full disk the process id stays unknown, but the lock is held
                raise SpoolError(f"spool_dir: {folder / LOCK_NAME}: {error.strerror}") from None

    def read_mark(self) -> int:
        """Returns the id of the last episode written; 0 if there is none, or the mark cannot be read."""
        return _read_number(self._mark)

    def write_mark(self, number: int) -> None:
        """Writes the id of an episode that is on the disk. Not synced: a loss of power may take the mark, and with it only a check."""
        with contextlib.suppress(OSError):
            os.pwrite(self._mark, f"{number:020d}\n".encode(), 0)

    def release(self) -> None:
        """Releases the lock; in a forked child, closes only this process's handles."""
        os.close(self._mark)
        release(self._handle, owner=self._owner)


def _open_mark(folder: Path) -> int:
    try:
        return open_private(folder / MARK_NAME)
    except OSError as error:
        raise SpoolError(f"spool_dir: {folder / MARK_NAME}: {error.strerror}") from None


def _lock(handle: int) -> None:
    """Locks a folder's lock file.

    Raises:
        BlockingIOError: another process holds the lock for more than a moment.
    """
    for _ in range(LOCK_ATTEMPTS - 1):
        with contextlib.suppress(BlockingIOError):
            return lock(handle)
        time.sleep(LOCK_INTERVAL_S)
    lock(handle)


def _read_number(handle: int) -> int:
    """Returns the number at the start of a file; 0 if there is none."""
    text = os.pread(handle, 40, 0).split()
    return int(text[0]) if text and text[0].isdigit() else 0


def read_number(path: Path) -> int:
    """Returns the number in the lock's or the mark's file; 0 if there is none.

    Raises:
        OSError: the file exists but cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        return _read_number(handle)
    finally:
        os.close(handle)


def require_spool(folder: Path) -> None:
    """Checks that a folder has a spool, and makes nothing in it.

    Raises:
        SpoolError: there is no spool, or it cannot be read.
    """
    try:
        if (folder / FILE_NAME).is_file():
            if os.access(folder / FILE_NAME, os.R_OK):
                return
            raise SpoolError(f"{folder / FILE_NAME} is not readable by this user; run this as the writer's user")
        found = "it has no spool.db" if folder.is_dir() else "it is not a folder" if folder.exists() else "it does not exist"
    except OSError as error:
        found = f"it cannot be read ({error.strerror})"
    raise SpoolError(f"{folder} is not a spool: {found}; name the spool_dir of an EpisodeWriter")


def is_in_use(folder: Path) -> bool:
    """Returns whether a writer, or another command, holds the folder's lock."""
    try:
        return HAS_LOCKS and is_locked(folder / LOCK_NAME)
    except OSError:
        return False


def open_database(folder: Path, *, table: str | None) -> sqlite3.Connection:
    """Opens the file in a folder that the caller has locked, and makes it if there is none.

    Args:
        folder: folder of the file.
        table: name of the server's table that new episodes are for; None leaves the file's.

    Raises:
        SpoolError: the file is damaged, has a newer format, or is not a spool.
    """
    path = folder / FILE_NAME
    try:
        rewrite(path.with_name(f"{FILE_NAME}-wal"))
    except OSError as error:
        raise SpoolError(f"{path}-wal: {error.strerror}; check the disk, nothing was changed") from None
    connection = _connect(str(path), path)
    try:
        try:
            _prepare(connection, path, table)
        except sqlite3.Error as error:
            if not has_no_space(error, path):
                raise
            # The log's index, which `touchline spool show` shares, does not fit on the disk. An exclusive lock keeps it in memory.
            connection.close()
            connection = _connect(str(path), path)
            connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
            _prepare(connection, path, table)
            logger.warning("%s: the disk is full; `touchline spool show` works again after this writer is closed", folder)
    except SQLITE_ERRORS as error:
        connection.close()
        raise to_spool_error(error, path) from error
    except SpoolError:
        connection.close()
        raise
    _sync_entries(folder)
    return connection


@contextlib.contextmanager
def open_readonly(folder: Path) -> Iterator[sqlite3.Connection | None]:
    """Opens the file in a folder that a writer may be using, read-only; yields None if nothing was ever written to it.

    Raises:
        SpoolError: the file is damaged, has a newer format, or is not a spool; also for damage that the body of the ``with`` finds.
    """
    path = folder / FILE_NAME
    with contextlib.closing(_connect(f"file:{quote(str(path))}?mode=ro", path)) as connection:
        try:
            _set_up(connection)
            yield connection if FORMAT.check(connection) else None
        except FormatError as error:
            raise _to_format_error(error, path) from None
        except SQLITE_ERRORS as error:
            raise to_spool_error(error, path) from error


def table_of(connection: sqlite3.Connection) -> str | None:
    """Returns the name of the server's table that a file's last writer wrote for; None if the file does not name one."""
    found = connection.execute("SELECT value FROM meta WHERE name = 'table'").fetchone()
    return str(found[0]) if found is not None else None


def set_state(connection: sqlite3.Connection, number: int, state: int, reason: str) -> None:
    """Sets the state of an episode and the reason for it, in a transaction of the caller."""
    row = list(connection.execute(f"SELECT {COLUMNS} FROM episodes WHERE id = ?", (number,)).fetchone())
    row[7:9] = state, reason
    connection.execute(
        "UPDATE episodes SET state = ?, reason = ?, row_checksum = ? WHERE id = ?", (state, reason, row_checksum(*row), number)
    )


def to_spool_error(error: Exception, path: Path) -> SpoolError:
    """Returns the error of a spool for one of SQLite."""
    if isinstance(error, UnicodeDecodeError) or code_of(error) in (CORRUPT, NOTADB):
        return SpoolError(f"{path}: damaged ({error}); {recovery_advice(path)}")
    return SpoolError(f"{path}: {error}")


def recovery_advice(path: Path) -> str:
    """Returns what to do about a damaged spool, as the end of an error text."""
    return (
        f"move the folder {path.parent} away to start with an empty one (episodes in it are then not sent; "
        "`sqlite3 spool.db .recover` may save rows)"
    )


def _sync_entries(folder: Path) -> None:
    """Syncs a folder's entries, if the file system can."""
    with contextlib.suppress(OSError):
        sync(folder)


def _connect(name: str, path: Path) -> sqlite3.Connection:
    try:
        return sqlite3.connect(name, isolation_level=None, check_same_thread=False, timeout=10.0, uri=name.startswith("file:"))
    except sqlite3.Error as error:
        raise to_spool_error(error, path) from error


def _set_up(connection: sqlite3.Connection) -> None:
    connection.text_factory = lambda data: data.decode(errors="replace")  # checksums find damaged text
    connection.execute("PRAGMA mmap_size = 0")  # reading a damaged mapping would raise SIGBUS


def _to_format_error(error: FormatError, path: Path) -> SpoolError:
    if error.version is None:
        return SpoolError(
            f"{path}: not a Touchline spool, or its first page is damaged; name another spool_dir, or {recovery_advice(path)}"
        )
    return SpoolError(
        f"{path}: written in format {error.version}, this version of touchline reads formats {FORMAT.version} to {MIXED_VERSION}; "
        "install one that reads it, or name another spool_dir"
    )


def check_structure(connection: sqlite3.Connection, path: Path) -> None:
    """Checks all pages of a file: SQLite does not notice by itself that a page has lost rows.

    Raises:
        SpoolError: the file is damaged.
    """
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise SpoolError(f"{path}: damaged ({' '.join(verdict.split())}); {recovery_advice(path)}")


def _prepare(connection: sqlite3.Connection, path: Path, table: str | None) -> None:
    _set_up(connection)
    connection.execute("PRAGMA synchronous = FULL")
    try:
        FORMAT.prepare(connection, lambda: connection.execute("INSERT INTO meta VALUES ('table', ?)", (table or "",)))
    except FormatError as error:
        raise _to_format_error(error, path) from None
    check_structure(connection, path)
    for statement in ("journal_mode = WAL", "secure_delete = OFF", "fullfsync = ON", "checkpoint_fullfsync = ON"):
        connection.execute(f"PRAGMA {statement}").fetchall()
    if table is not None and table_of(connection) != table:
        _change_table(connection, table)


def _change_table(connection: sqlite3.Connection, table: str) -> None:
    """Makes a file ready for episodes of another table, beside those that it has. Durable when this returns."""
    (empty,) = connection.execute("SELECT NOT EXISTS (SELECT 1 FROM episodes)").fetchone()
    version = FORMAT.version if empty else MIXED_VERSION
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('table', ?)", (table,))
    connection.execute("COMMIT")
