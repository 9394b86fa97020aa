"""Result codes of SQLite. ``sqlite3`` names them, and gives each error its own, from Python 3.11 on only."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

IOERR = 10
CORRUPT = 11
FULL = 13
NOTADB = 26
FREE_BYTES = 1 << 20
"""A disk with less is full: SQLite's index of the log grows by 32 KiB, and its error for want of room there is one of many."""
INDEX_HAS_NO_ROOM = 4874
"""SQLite's extended code for it, SQLITE_IOERR_SHMSIZE; Python names no extended codes before 3.11, and gives none."""

_CODE_OF_TEXT = {
    "disk I/O error": IOERR,
    "malformed": CORRUPT,  # "database disk image is malformed", "malformed database schema (...)"
    "database or disk is full": FULL,
    "file is not a database": NOTADB,
}
"""What is in SQLite's message for a code; these texts have not changed since its version 3.7."""


def code_of(error: BaseException | None) -> int | None:
    """Returns the primary result code of an error of ``sqlite3``; None for another error, or one with a code that has no name here."""
    if not isinstance(error, sqlite3.Error):
        return None
    code: int | None = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF  # an extended code has its primary one in the low byte
    return next((code for text, code in _CODE_OF_TEXT.items() if text in str(error)), None)


def has_no_room(error: BaseException | None, path: Path) -> bool:
    """Returns whether an error says that the disk is full."""
    code = code_of(error)
    if code != IOERR:
        return code == FULL
    extended = getattr(error, "sqlite_errorcode", INDEX_HAS_NO_ROOM)
    with contextlib.suppress(OSError):
        return extended == INDEX_HAS_NO_ROOM and shutil.disk_usage(path.parent).free < FREE_BYTES
    return False
