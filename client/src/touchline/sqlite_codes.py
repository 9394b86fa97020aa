"""Result codes of SQLite. ``sqlite3`` names them, and gives each error its own, from Python 3.11 on only."""

from __future__ import annotations

import sqlite3

IOERR = 10
CORRUPT = 11
FULL = 13
NOTADB = 26

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
