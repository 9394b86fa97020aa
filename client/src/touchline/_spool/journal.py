"""Writing half of a spool's file: transactions, checkpoints, and whether written data can be relied upon.

After a failed fsync the kernel may have dropped the pages that it could not write, and the next fsync succeeds nevertheless. So once a
write has failed for any reason except a full disk, the spool accepts nothing more until it is opened again; what it holds is still sent.
"""

from __future__ import annotations

import contextlib
import ctypes
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from touchline._spool.file import PAGE_BYTES, SQLITE_ERRORS
from touchline._spool.sqlite_codes import CORRUPT, IOERR, NOTADB, code_of, has_no_space
from touchline.errors import SpoolError
from touchline_protos.files.sqlite import pragma
from touchline_protos.log_lines import get_logger

FRAME_BYTES = PAGE_BYTES + 24
COMMIT_BYTES = 8 * FRAME_BYTES
"""Bytes that a transaction adds to the log besides its payload."""

logger = get_logger(__name__)


class SpoolJournal:
    """Writer of a spool's file. The caller holds the spool's lock.

    Args:
        connection: connection to the file.
        path: path of the file.
        log_bytes: length at which the write-ahead log is truncated; at half of it, it is moved into the main file.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, *, log_bytes: int) -> None:
        self._connection = connection
        self._path = path
        self._log = path.with_name(f"{path.name}-wal")
        self._log_bytes = log_bytes
        self._logged_bytes = 0
        self._synchronous = ""
        self.failure = ""
        """Reason why written data can no longer be relied upon; empty while it can."""
        # SQLite's automatic checkpoints, after a commit, would fail silently.
        connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()

    def check(self) -> None:
        """Raises SpoolError if nothing more is accepted."""
        if self.failure:
            raise SpoolError(
                f"{self._path}: {self.failure}; it accepts nothing more until it is opened again, and what it holds is still being sent. "
                "Check the disk, close this writer and make another one, which checks the whole file"
            )

    @contextlib.contextmanager
    def transaction(self, *, sync: bool, size_bytes: int = 0) -> Iterator[None]:
        """Runs the body as a transaction.

        Args:
            sync: whether the transaction must survive a loss of power.
            size_bytes: payload that it writes.

        Raises:
            SpoolError: an earlier write failed, and nothing more is accepted.
            sqlite3.Error: writing failed. Nothing was written if the disk is full or the commit had not committing; otherwise it is not
                known.
        """
        self.check()
        self._checkpoint_if_due()
        synchronous = "FULL" if sync else "NORMAL"
        if synchronous != self._synchronous:
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            self._synchronous = synchronous
        committing = False
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            committing = True
            self._connection.execute("COMMIT")
        except BaseException as error:
            self._record_failure(error, committing=committing)
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        self._logged_bytes += size_bytes + COMMIT_BYTES

    def trim(self, *, shrink: bool) -> None:
        """Keeps the log short, and with ``shrink`` returns free pages to the file system. A failure is only logged: what is committed stays
        so."""
        if self.failure:
            return
        try:
            if self.log_size > self._log_bytes:
                self._checkpoint("TRUNCATE")
            if shrink and pragma(self._connection, "freelist_count") * PAGE_BYTES > self._log_bytes:
                self.shrink()
        except (*SQLITE_ERRORS, SpoolError) as error:
            logger.warning("%s: could not be trimmed: %s", self._path, error)

    def shrink(self) -> None:
        """Returns free pages and the log to the file system; raises as :meth:`transaction` does."""
        self._checkpoint("TRUNCATE")
        step = max(1, self._log_bytes // 4 // FRAME_BYTES)
        while pragma(self._connection, "freelist_count"):
            with self.transaction(sync=False, size_bytes=step * FRAME_BYTES):
                self._connection.execute(f"PRAGMA incremental_vacuum({step})").fetchall()
            if self.log_size > self._log_bytes // 2:
                self._checkpoint("TRUNCATE")
        self._checkpoint("TRUNCATE")

    def reuse_log(self) -> None:
        """Moves the log into the main file as far as the main file has space, so that the log's file is written again from its start."""
        with contextlib.suppress(*SQLITE_ERRORS):
            self._checkpoint("PASSIVE")

    @property
    def log_size(self) -> int:
        """Size of the log's file in bytes."""
        try:
            return self._log.stat().st_size
        except OSError:
            return 0

    def close(self) -> None:
        """Closes the file, which moves the log into it. After a failure it leaves both as they are, because closing writes."""
        if self.failure:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
            return
        with contextlib.suppress(sqlite3.Error):  # committed transactions are in the log
            self._checkpoint("PASSIVE")
        if self.failure:
            self.close()
            return
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def _checkpoint_if_due(self) -> None:
        if self._logged_bytes >= self._log_bytes // 2:
            try:
                self._checkpoint("PASSIVE")
            except sqlite3.Error as error:
                if not has_no_space(error, self._path):
                    raise

    def _checkpoint(self, mode: str) -> None:
        try:
            self._connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
        except sqlite3.Error as error:
            self._record_failure(error, committing=False)
            raise
        self._logged_bytes = 0

    def _record_failure(self, error: BaseException, *, committing: bool) -> None:
        """Records a failure after which written data cannot be relied upon."""
        if has_no_space(error, self._path) or not (committing or code_of(error) in (IOERR, CORRUPT, NOTADB)):
            return
        self.failure = str(error) or type(error).__name__
        logger.error(
            "%s: writing failed (%s): the spool accepts nothing more, so episodes that end from now on do not outlive this process. What "
            "it holds is still being sent; it may hold an episode that was being written",
            self._path,
            self.failure,
        )
