"""The file of a spool: its tables, the lock on its folder, and what is said where it cannot be used.

``episodes`` has one row an episode, ``payloads`` its encoded ``AddEpisodeRequest``, in parts where it is longer than SQLite's longest blob.
Two checksums guard each episode: ``payload_checksum`` the message, which holds the key, ``row_checksum`` the row.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from touchline.errors import SpoolError
from touchline_protos.files import HAS_LOCKS, lock, open_own, sync
from touchline_protos.tables import FormatError, Tables

FILE_NAME = "spool.db"
LOCK_NAME = "lock"
MARK_NAME = "mark"
"""File with the number of the last episode that was taken over, beside the database so that the log's end cannot be lost unnoticed."""
PAGE_BYTES = 4096
PARTS = 16
"""A part's number in ``payloads`` is the episode's id times this, plus its place: protobuf's 2 GiB are 8 parts."""

WAITING, REFUSED, DAMAGED = 0, 0x55, 0xAA
"""States of an episode: to be sent; refused by the server for good; not what was written. No flipped bit makes one of another."""

TABLES = Tables(
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

SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What the module raises; the second where SQLite's own message quotes what is damaged."""

_inherited: set[Path] = set()
"""Folders whose spool the parent process had open at a fork: SQLite must not open the same file again in the child."""


def inherit(folder: Path) -> None:
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
            self._handle = open_own(folder / LOCK_NAME)
        except OSError as error:
            raise SpoolError(f"spool_dir: {folder}: {error.strerror}") from None
        try:
            lock(self._handle)
        except BlockingIOError:
            holder = os.pread(self._handle, 20, 0).decode("ascii", "replace").strip()
            os.close(self._handle)
            raise SpoolError(
                f"spool_dir: {folder} is in use by another writer{f' (process {holder})' if holder else ''}; close it, or give each writer "
                "a folder of its own"
            ) from None
        except OSError as error:
            os.close(self._handle)
            raise SpoolError(f"spool_dir: {folder} cannot be locked ({error.strerror}); name one on a local disk") from None
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)
        try:
            self._mark = open_own(folder / MARK_NAME)
        except OSError as error:
            os.close(self._handle)
            raise SpoolError(f"spool_dir: {folder / MARK_NAME}: {error.strerror}") from None
        # What a power loss must not take are the folders' entries, too.
        for parent in (folder, *folder.parents):
            _sync_entries(parent)
            if parent == missing:
                break

    def marked(self) -> int:
        """Returns the number of the last episode that was taken over; 0 where none was, or where the mark cannot be read."""
        text = os.pread(self._mark, 40, 0).split()
        return int(text[0]) if text and text[0].isdigit() else 0

    def mark(self, number: int) -> None:
        """Notes the number of an episode that is on the disk. Not synced: a loss of power may take it, and with it a check."""
        with contextlib.suppress(OSError):
            os.pwrite(self._mark, f"{number:020d}\n".encode(), 0)

    def release(self) -> None:
        """Lets another writer have it; in a forked child only this process's copy of the handles goes."""
        os.close(self._mark)
        os.close(self._handle)


def open_file(folder: Path, *, table: str) -> sqlite3.Connection:
    """Opens the file in a folder that is locked, and makes it where there is none.

    Raises:
        SpoolError: it is damaged, of a newer format, of another table, or no spool.
    """
    path = folder / FILE_NAME
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    except sqlite3.Error as error:
        raise translate(error, path) from error
    try:
        _prepare(connection, path, table)
    except SQLITE_ERRORS as error:
        connection.close()
        raise translate(error, path) from error
    except SpoolError:
        connection.close()
        raise
    _sync_entries(folder)
    return connection


def translate(error: Exception, path: Path) -> SpoolError:
    """Returns what a failure of SQLite means."""
    if isinstance(error, UnicodeDecodeError) or getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return SpoolError(f"{path}: damaged ({error}); {advice(path)}")
    return SpoolError(f"{path}: {error}")


def is_full(error: BaseException | None) -> bool:
    """Returns whether the disk is."""
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def advice(path: Path) -> str:
    """Returns what to do about a damaged spool."""
    return (
        f"move the folder {path.parent} away to start with an empty one (what waits in it is then not sent; "
        "`sqlite3 spool.db .recover` may save rows)"
    )


def _sync_entries(folder: Path) -> None:
    """Has the file system write a folder's entries down, where it can."""
    with contextlib.suppress(OSError):
        sync(folder)


def _prepare(connection: sqlite3.Connection, path: Path, table: str) -> None:
    connection.text_factory = lambda data: data.decode(errors="replace")  # the checksums tell damage
    connection.execute("PRAGMA mmap_size = 0")  # a damaged file would be a SIGBUS
    connection.execute("PRAGMA synchronous = FULL")
    try:
        TABLES.prepare(connection, lambda: connection.execute("INSERT INTO meta VALUES ('table', ?)", (table,)))
    except FormatError as error:
        if error.version is None:
            raise SpoolError(
                f"{path}: not a spool of touchline's, or its first page is damaged; name another spool_dir, or {advice(path)}"
            ) from None
        raise SpoolError(
            f"{path}: written in format {error.version}, this touchline reads format {TABLES.version}; install one that reads it, or name "
            "another spool_dir"
        ) from None
    # A page that lost rows would be no error to SQLite otherwise.
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise SpoolError(f"{path}: damaged ({' '.join(verdict.split())}); {advice(path)}")
    found = connection.execute("SELECT value FROM meta WHERE name = 'table'").fetchone()
    if found is not None and found[0] != table:
        raise SpoolError(f"{path}: its episodes are for the table {found[0]!r}, the client's is {table!r}; name another spool_dir")
    for statement in ("journal_mode = WAL", "secure_delete = OFF", "fullfsync = ON", "checkpoint_fullfsync = ON"):
        connection.execute(f"PRAGMA {statement}").fetchall()
