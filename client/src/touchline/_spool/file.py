"""The file of a spool: its tables, the lock on its folder, and what is said where it cannot be used.

``episodes`` has one row an episode, ``payloads`` its encoded ``AddEpisodeRequest``, in parts where it is longer than SQLite's longest blob.
Two checksums guard each episode: ``payload_checksum`` the message, which holds the key, ``row_checksum`` the row.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from touchline._spool.sqlite_codes import CORRUPT, NOTADB, code_of, has_no_room
from touchline.errors import SpoolError
from touchline_protos.files.locks import DISK_FULL, HAS_LOCKS, is_locked, lock, open_private, rewrite, sync
from touchline_protos.files.sqlite import FormatError, SqliteFormat, row_checksum
from touchline_protos.log_lines import get_logger

FILE_NAME = "spool.db"
LOCK_NAME = "lock"
MARK_NAME = "mark"
"""File with the number of the last episode that was taken over, beside the database so that the log's end cannot be lost unnoticed."""
PAGE_BYTES = 4096
PARTS_PER_EPISODE = 16
"""A part's number in ``payloads`` is the episode's id times this, plus its place: protobuf's 2 GiB are 8 parts."""

WAITING, REFUSED, DAMAGED = 0, 0x55, 0xAA
"""States of an episode: to be sent; refused by the server for good; not what was written. No flipped bit makes one of another."""

FORMAT = SqliteFormat(
    application_id=0x746C7370,
    version=1,
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
"""Of ``episodes``, all that ``row_checksum`` is made of, in its order."""

LOOKS = 10
POLL_INTERVAL_S = 0.02
"""A folder that is taken is looked at so often, so far apart: who shows a spool takes a share of the lock for a moment."""

SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What the module raises; the second where SQLite's own message quotes what is damaged."""

logger = get_logger(__name__)

_inherited: set[Path] = set()
"""Folders whose spool the parent process had open at a fork: SQLite must not open the same file again in the child."""


def mark_inherited(folder: Path) -> None:
    """In a forked child: says that a folder is the parent's."""
    _inherited.add(folder)


class FolderLock:
    """A folder that one writer holds; it ends with the process, however that ends.

    Raises:
        SpoolError: another writer holds it, or it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        if not HAS_LOCKS:
            raise SpoolError("spool_dir: this system has no file locks of POSIX, which a spool needs; leave it out")
        if folder in _inherited:
            raise SpoolError(f"spool_dir: {folder} is the parent process's; in a forked child name a folder of its own")
        try:
            missing = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = open_private(folder / LOCK_NAME)
        except OSError as error:
            raise SpoolError(f"spool_dir: {folder}: {error.strerror}") from None
        try:
            _lock(self._handle)
        except BlockingIOError:
            holder = _read_number(self._handle)
            os.close(self._handle)
            raise SpoolError(
                f"spool_dir: {folder} is in use by another writer{f' (process {holder})' if holder else ''}; close it, or give each writer "
                "a folder of its own"
            ) from None
        except OSError as error:
            os.close(self._handle)
            raise SpoolError(f"spool_dir: {folder} cannot be locked ({error.strerror}); name one on a local disk") from None
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            if error.errno not in DISK_FULL:  # then the number is not known, and the lock is held all the same
                os.close(self._handle)
                raise SpoolError(f"spool_dir: {folder / LOCK_NAME}: {error.strerror}") from None
        try:
            self._mark = open_private(folder / MARK_NAME)
        except OSError as error:
            os.close(self._handle)
            raise SpoolError(f"spool_dir: {folder / MARK_NAME}: {error.strerror}") from None
        # What a power loss must not take are the folders' entries, too.
        for parent in (folder, *folder.parents):
            _sync_entries(parent)
            if parent == missing:
                break

    def read_mark(self) -> int:
        """Returns the number of the last episode that was taken over; 0 where none was, or where the mark cannot be read."""
        return _read_number(self._mark)

    def write_mark(self, number: int) -> None:
        """Notes the number of an episode that is on the disk. Not synced: a loss of power may take it, and with it a check."""
        with contextlib.suppress(OSError):
            os.pwrite(self._mark, f"{number:020d}\n".encode(), 0)

    def release(self) -> None:
        """Lets another writer have it; in a forked child only this process's copy of the handles goes."""
        os.close(self._mark)
        os.close(self._handle)


def _lock(handle: int) -> None:
    """Takes a folder's lock.

    Raises:
        BlockingIOError: another holds it, and for more than a moment.
    """
    for _ in range(LOOKS - 1):
        with contextlib.suppress(BlockingIOError):
            return lock(handle)
        time.sleep(POLL_INTERVAL_S)
    lock(handle)


def _read_number(handle: int) -> int:
    """Returns the number that a file begins with; 0 where there is none."""
    text = os.pread(handle, 40, 0).split()
    return int(text[0]) if text and text[0].isdigit() else 0


def read_number(path: Path) -> int:
    """Returns the number that the lock's or the mark's file has; 0 where there is none.

    Raises:
        OSError: the file is there and cannot be read.
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
    """Refuses a folder without a spool, before anything is made in it.

    Raises:
        SpoolError: there is none, or it cannot be read.
    """
    try:
        if (folder / FILE_NAME).is_file():
            if os.access(folder / FILE_NAME, os.R_OK):
                return
            raise SpoolError(f"{folder / FILE_NAME} cannot be read by this user; run it as the one that the writer runs as")
        found = "it has no spool.db" if folder.is_dir() else "it is no folder" if folder.exists() else "there is no such folder"
    except OSError as error:
        found = f"it cannot be looked into ({error.strerror})"
    raise SpoolError(f"{folder} is not a spool: {found}; name the spool_dir of an EpisodeWriter")


def is_in_use(folder: Path) -> bool:
    """Returns whether a writer, or another command, holds a folder."""
    try:
        return HAS_LOCKS and is_locked(folder / LOCK_NAME)
    except OSError:
        return False


def open_database(folder: Path, *, table: str | None) -> sqlite3.Connection:
    """Opens the file in a folder that is locked, and makes it where there is none.

    Args:
        folder: of the file.
        table: that its episodes are for; None: whatever the file says.

    Raises:
        SpoolError: it is damaged, of a newer format, of another table, or no spool.
    """
    path = folder / FILE_NAME
    try:
        rewrite(path.with_name(f"{FILE_NAME}-wal"))
    except OSError as error:
        raise SpoolError(f"{path}-wal: {error.strerror}; see to the disk, nothing was changed") from None
    connection = _connect(str(path), path)
    try:
        try:
            _prepare(connection, path, table)
        except sqlite3.Error as error:
            if not has_no_room(error, path):
                raise
            # The index of the log, shared with `touchline spool show`, has no room. One in memory needs none.
            connection.close()
            connection = _connect(str(path), path)
            connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
            _prepare(connection, path, table)
            logger.warning("%s is full: `touchline spool show` cannot look into the spool before this writer is closed", folder)
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
    """Opens the file in a folder that a writer may be using, to read it alone; gives None where nothing was ever written to it.

    Raises:
        SpoolError: it is damaged, of a newer format, or no spool; also where the body finds damage.
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
    """Returns the name of the server's table that a file's episodes are for; None where the file does not say."""
    found = connection.execute("SELECT value FROM meta WHERE name = 'table'").fetchone()
    return str(found[0]) if found is not None else None


def set_state(connection: sqlite3.Connection, number: int, state: int, reason: str) -> None:
    """Says what an episode is waiting for, or why it is not; in a transaction of the caller's."""
    row = list(connection.execute(f"SELECT {COLUMNS} FROM episodes WHERE id = ?", (number,)).fetchone())
    row[7:9] = state, reason
    connection.execute(
        "UPDATE episodes SET state = ?, reason = ?, row_checksum = ? WHERE id = ?", (state, reason, row_checksum(*row), number)
    )


def to_spool_error(error: Exception, path: Path) -> SpoolError:
    """Returns what a failure of SQLite means."""
    if isinstance(error, UnicodeDecodeError) or code_of(error) in (CORRUPT, NOTADB):
        return SpoolError(f"{path}: damaged ({error}); {recovery_advice(path)}")
    return SpoolError(f"{path}: {error}")


def recovery_advice(path: Path) -> str:
    """Returns what to do about a damaged spool."""
    return (
        f"move the folder {path.parent} away to start with an empty one (what waits in it is then not sent; "
        "`sqlite3 spool.db .recover` may save rows)"
    )


def _sync_entries(folder: Path) -> None:
    """Has the file system write a folder's entries down, where it can."""
    with contextlib.suppress(OSError):
        sync(folder)


def _connect(name: str, path: Path) -> sqlite3.Connection:
    try:
        return sqlite3.connect(name, isolation_level=None, check_same_thread=False, timeout=10.0, uri=name.startswith("file:"))
    except sqlite3.Error as error:
        raise to_spool_error(error, path) from error


def _set_up(connection: sqlite3.Connection) -> None:
    connection.text_factory = lambda data: data.decode(errors="replace")  # the checksums tell damage
    connection.execute("PRAGMA mmap_size = 0")  # a damaged file would be a SIGBUS


def _to_format_error(error: FormatError, path: Path) -> SpoolError:
    if error.version is None:
        return SpoolError(
            f"{path}: not a spool of touchline's, or its first page is damaged; name another spool_dir, or {recovery_advice(path)}"
        )
    return SpoolError(
        f"{path}: written in format {error.version}, this touchline reads format {FORMAT.version}; install one that reads it, or name "
        "another spool_dir"
    )


def check_structure(connection: sqlite3.Connection, path: Path) -> None:
    """Reads all of a file: a page that lost rows would be no error to SQLite otherwise.

    Raises:
        SpoolError: it is damaged.
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
    found = table_of(connection)
    if table is not None and found is not None and found != table:
        raise SpoolError(f"{path}: its episodes are for the table {found!r}, the client's is {table!r}; name another spool_dir")
    for statement in ("journal_mode = WAL", "secure_delete = OFF", "fullfsync = ON", "checkpoint_fullfsync = ON"):
        connection.execute(f"PRAGMA {statement}").fetchall()
