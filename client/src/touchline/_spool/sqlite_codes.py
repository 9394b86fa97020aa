"""Result codes of SQLite. Python's ``sqlite3`` has them only from 3.11 on."""

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
"""Free bytes below which a disk counts as full. SQLite's index of the log grows by 32 KiB, and fails with a code of many meanings."""
INDEX_HAS_NO_SPACE = 4874
"""SQLITE_IOERR_SHMSIZE, the extended code of an index that cannot grow; Python reports no extended codes before 3.11."""

_CODE_OF_TEXT = {
    "disk I/O error": IOERR,
    "malformed": CORRUPT,  # "database disk image is malformed", "malformed database schema (...)"
    "database or disk is full": FULL,
    "file is not a database": NOTADB,
}
"""Text in SQLite's message for each code; unchanged since SQLite 3.7."""


def code_of(error: BaseException | None) -> int | None:
    """Returns the primary result code of an error; None if it is not SQLite's, or its code is not known here."""
    if not isinstance(error, sqlite3.Error):
        return None
    code: int | None = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF  # the low byte of an extended code is its primary code
    return next((code for text, code in _CODE_OF_TEXT.items() if text in str(error)), None)


def has_no_space(error: BaseException | None, path: Path) -> bool:
    """Returns whether an error says that the disk is full."""
    code = code_of(error)
    if code != IOERR:
        return code == FULL
    extended = getattr(error, "sqlite_errorcode", INDEX_HAS_NO_SPACE)
    with contextlib.suppress(OSError):
        return extended == INDEX_HAS_NO_SPACE and shutil.disk_usage(path.parent).free < FREE_BYTES
    return False
