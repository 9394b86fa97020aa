"""Maps SQLite's errors to the domain's: what failed, and whether something may have been stored."""

from __future__ import annotations

import ctypes
import shutil
import sqlite3
from pathlib import Path

from touchline_server.durability.storage_state import UNCERTAIN, StorageMonitor
from touchline_server.errors import DamagedStoreError, StorageFailedError, StorageFullError, StorageUncertainError

FREE_BYTES = 1 << 20
"""A disk with less free space counts as full. SQLite's index of the log grows by 32 KiB, and its error on a full disk has other causes."""
HARMLESS = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_TOOBIG)
"""Errors before a commit that do not mean that the disk is failing."""


def advice(path: Path) -> str:
    """Returns what to do about a damaged store."""
    return (
        f"run `touchline-server check --data-dir {path.parent}` to see what is damaged and `touchline-server recover --data-dir "
        f"{path.parent}` to keep what is whole"
    )


def has_no_room(error: BaseException, path: Path) -> bool:
    """Returns whether an error means that the disk is full."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR_SHMSIZE and _is_full(path))


def translate(error: sqlite3.Error, path: Path) -> ReplayStorageError:
    """Returns the domain's error for one of SQLite's from opening or reading a file."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if has_no_room(error, path):
        return StorageFullError(f"{path.parent} is full: nothing was stored; free space there, adding goes on as soon as there is some")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or (isinstance(error, sqlite3.DatabaseError) and not code):
        return DamagedStoreError(f"{path} is damaged ({error}); {advice(path)}")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StorageFailedError(f"{path}: another process is writing to it or keeps it locked ({error}); nothing was stored")
    return StorageFailedError(f"{path}: {error}; nothing was stored, check the disk and its permissions")


def translate_write(error: BaseException, path: Path, monitor: StorageMonitor, *, begun: bool) -> ReplayStorageError:
    """Returns the domain's error for a failed write, and reports the state of the disk to its monitor.

    Args:
        error: SQLite's error, or another exception raised during a commit.
        path: path of the file.
        monitor: the disk's monitor.
        begun: whether the commit had begun.
    """
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if has_no_room(error, path):
        full = f"{path.parent} is full: {{}}; free space there, adding goes on as soon as there is some"
        # If the log's last page did not fit, there is no commit in it; if only its index did not fit, there may be.
        return StorageFullError(full.format("nothing was stored" if code == sqlite3.SQLITE_FULL or not begun else UNCERTAIN))
    if code in HARMLESS and (code != sqlite3.SQLITE_NOMEM or not begun):
        return translate(error, path) if isinstance(error, sqlite3.Error) else StorageFailedError(f"{path}: {error}; nothing was stored")
    what = str(error) or type(error).__name__
    name = getattr(error, "sqlite_errorname", "")
    monitor.fail(f"{path.name}: {what}{f' ({name})' if name else ''}")
    rest = "check the disk, then restart the server, which verifies what is stored"
    if begun:
        return StorageUncertainError(f"{path}: {what}; {UNCERTAIN}; nothing more is stored: {rest}")
    failed = translate(error, path) if isinstance(error, sqlite3.Error) else None
    if isinstance(failed, DamagedStoreError):
        return failed
    return StorageFailedError(f"{path}: {what}; nothing was stored, and nothing more is: {rest}")


def keep_open(connection: sqlite3.Connection) -> None:
    """Keeps a connection from ever being closed, even at interpreter exit: closing the last one writes to the file."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _is_full(path: Path) -> bool:
    try:
        return shutil.disk_usage(path.parent).free < FREE_BYTES
    except OSError:
        return False


ReplayStorageError = StorageFullError | StorageFailedError
