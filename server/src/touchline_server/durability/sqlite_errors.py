"""What SQLite's errors mean for a durable store, and for what may be said of what was being written."""

from __future__ import annotations

import ctypes
import shutil
import sqlite3
from pathlib import Path

from touchline_server.durability.storage_state import UNCERTAIN, StorageMonitor
from touchline_server.errors import DamagedStoreError, StorageFailedError, StorageFullError, StorageUncertainError

FREE_BYTES = 1 << 20
"""A disk with less is full: SQLite's index of the log grows by 32 KiB, and its error for want of room there is one of many."""
HARMLESS = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_TOOBIG)
"""Errors before a commit that say nothing of the disk."""


def advice(path: Path) -> str:
    """Returns what to do about a damaged store."""
    return (
        f"run `touchline-server check --data-dir {path.parent}` to see what is damaged and `touchline-server recover --data-dir "
        f"{path.parent}` to keep what is whole"
    )


def has_no_room(error: BaseException, path: Path) -> bool:
    """Returns whether an error says that the disk is full."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR_SHMSIZE and _is_full(path))


def translate(error: sqlite3.Error, path: Path) -> ReplayStorageError:
    """Returns the domain's error of one of SQLite's, of reading or opening a file."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if has_no_room(error, path):
        return StorageFullError(f"{path.parent} is full: nothing was stored; free space there, adding goes on as soon as there is room")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or (isinstance(error, sqlite3.DatabaseError) and not code):
        return DamagedStoreError(f"{path} is damaged ({error}); {advice(path)}")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StorageFailedError(f"{path}: another process is writing to it or keeps it locked ({error}); nothing was stored")
    return StorageFailedError(f"{path}: {error}; nothing was stored, see to the disk and its permissions")


def translate_write(error: BaseException, path: Path, monitor: StorageMonitor, *, begun: bool) -> ReplayStorageError:
    """Returns the domain's error of a failed write, and notes what it says of the disk.

    Args:
        error: SQLite's; or another that came while a transaction was being committed.
        path: of the file.
        monitor: of its disk.
        begun: whether the commit had begun.
    """
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if has_no_room(error, path):
        full = f"{path.parent} is full: {{}}; free space there, adding goes on as soon as there is room"
        # A log without room for its last page has no commit in it; one whose index has no room may.
        return StorageFullError(full.format("nothing was stored" if code == sqlite3.SQLITE_FULL or not begun else UNCERTAIN))
    if code in HARMLESS and (code != sqlite3.SQLITE_NOMEM or not begun):
        return translate(error, path) if isinstance(error, sqlite3.Error) else StorageFailedError(f"{path}: {error}; nothing was stored")
    what = str(error) or type(error).__name__
    name = getattr(error, "sqlite_errorname", "")
    monitor.fail(f"{path.name}: {what}{f' ({name})' if name else ''}")
    rest = "see to the disk, then start the server again, which verifies what is stored"
    if begun:
        return StorageUncertainError(f"{path}: {what}; {UNCERTAIN}; nothing more is stored: {rest}")
    failed = translate(error, path) if isinstance(error, sqlite3.Error) else None
    if isinstance(failed, DamagedStoreError):
        return failed
    return StorageFailedError(f"{path}: {what}; nothing was stored, and nothing more is: {rest}")


def keep_open(connection: sqlite3.Connection) -> None:
    """Keeps a connection from being closed, by the end of the interpreter either: closing the last one writes to the file."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _is_full(path: Path) -> bool:
    try:
        return shutil.disk_usage(path.parent).free < FREE_BYTES
    except OSError:
        return False


ReplayStorageError = StorageFullError | StorageFailedError
