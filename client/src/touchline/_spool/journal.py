"""The writing half of a spool's file: transactions, checkpoints, and whether what is written can be relied upon.

After a failed fsync the kernel may have dropped the pages that it could not write, and the next fsync succeeds all the same. So once a
write has failed for another reason than want of room, a spool takes nothing more before it is opened anew; what it has goes on being sent.
"""

from __future__ import annotations

import contextlib
import ctypes
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from touchline._spool.file import PAGE_BYTES, SQLITE_ERRORS
from touchline._spool.sqlite_codes import CORRUPT, IOERR, NOTADB, code_of, has_no_room
from touchline.errors import SpoolError
from touchline_protos.files.sqlite import pragma
from touchline_protos.log_lines import get_logger

FRAME_BYTES = PAGE_BYTES + 24
COMMIT_BYTES = 8 * FRAME_BYTES
"""What a transaction adds to the log beside its payload."""

logger = get_logger(__name__)


class SpoolJournal:
    """Writes to a spool's file, for whoever holds the spool's lock.

    Args:
        connection: to the file.
        path: of the file.
        log_bytes: length of the write-ahead log at which it is cut; at half of it, it is moved into the main file.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, *, log_bytes: int) -> None:
        self._connection = connection
        self._path = path
        self._log = path.with_name(f"{path.name}-wal")
        self._log_bytes = log_bytes
        self._logged_bytes = 0
        self._synchronous = ""
        self.failure = ""
        """Why nothing that is written can be relied upon any more; empty while it can."""
        # SQLite's own checkpoints, after a commit, would fail without a word.
        connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()

    def check(self) -> None:
        """Raises SpoolError if nothing is taken any more."""
        if self.failure:
            raise SpoolError(
                f"{self._path}: {self.failure}; it keeps nothing more before it is opened anew, what is in it goes on being sent. See to "
                "the disk, close this writer and make another, which reads and checks all of it"
            )

    @contextlib.contextmanager
    def transaction(self, *, sync: bool, size_bytes: int = 0) -> Iterator[None]:
        """Runs the body as a transaction.

        Args:
            sync: whether it is to outlive a loss of power.
            size_bytes: payload that it writes.

        Raises:
            SpoolError: nothing is written any more.
            sqlite3.Error: writing failed. Only if the disk is full, or the commit had not begun, is it known that nothing was written.
        """
        self.check()
        self._checkpoint_if_due()
        synchronous = "FULL" if sync else "NORMAL"
        if synchronous != self._synchronous:
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            self._synchronous = synchronous
        begun = False
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            begun = True
            self._connection.execute("COMMIT")
        except BaseException as error:
            self._record_failure(error, begun=begun)
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        self._logged_bytes += size_bytes + COMMIT_BYTES

    def trim(self, *, shrink: bool) -> None:
        """Keeps the log short, and gives free pages back where ``shrink`` says so. What is committed stays so, whatever becomes of this."""
        if self.failure:
            return
        try:
            if self.log_size > self._log_bytes:
                self._checkpoint("TRUNCATE")
            if shrink and pragma(self._connection, "freelist_count") * PAGE_BYTES > self._log_bytes:
                self.shrink()
        except (*SQLITE_ERRORS, SpoolError) as error:
            logger.warning("%s: not tidied: %s", self._path, error)

    def shrink(self) -> None:
        """Gives free pages and the log back to the file system. Raises as :meth:`transaction` does."""
        self._checkpoint("TRUNCATE")
        step = max(1, self._log_bytes // 4 // FRAME_BYTES)
        while pragma(self._connection, "freelist_count"):
            with self.transaction(sync=False, size_bytes=step * FRAME_BYTES):
                self._connection.execute(f"PRAGMA incremental_vacuum({step})").fetchall()
            if self.log_size > self._log_bytes // 2:
                self._checkpoint("TRUNCATE")
        self._checkpoint("TRUNCATE")

    def reuse_log(self) -> None:
        """Has the log begin anew in the room that its file has already, as far as the main file has room."""
        with contextlib.suppress(*SQLITE_ERRORS):
            self._checkpoint("PASSIVE")

    @property
    def log_size(self) -> int:
        """Of the log's file."""
        try:
            return self._log.stat().st_size
        except OSError:
            return 0

    def close(self) -> None:
        """Closes the file, which moves the log into it; after a failure leaves both as they are, since to close is to write."""
        if self.failure:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
            return
        with contextlib.suppress(sqlite3.Error):  # what is committed is in the log
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
                if not has_no_room(error, self._path):
                    raise

    def _checkpoint(self, mode: str) -> None:
        try:
            self._connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
        except sqlite3.Error as error:
            self._record_failure(error, begun=False)
            raise
        self._logged_bytes = 0

    def _record_failure(self, error: BaseException, *, begun: bool) -> None:
        """Notes what a failure says of the disk."""
        if has_no_room(error, self._path) or not (begun or code_of(error) in (IOERR, CORRUPT, NOTADB)):
            return
        self.failure = str(error) or type(error).__name__
        logger.error(
            "%s: writing failed (%s): the spool keeps nothing more, so episodes that end from now on do not outlive this process. What is "
            "in it goes on being sent; an episode whose writing had begun may be in it",
            self._path,
            self.failure,
        )
