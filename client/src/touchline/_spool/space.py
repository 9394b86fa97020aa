"""Space accounting of a spool: whether another episode fits into the folder's limit, whatever SQLite does with it.

The limit holds for all of SQLite's files together: the main file with its free pages, the write-ahead log, and the log's index.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from touchline._spool.file import FILE_NAME, PAGE_BYTES
from touchline._spool.journal import FRAME_BYTES, SpoolJournal
from touchline_protos.files.sqlite import pragma

LOG_BYTES = 4 << 20
"""Length of the write-ahead log at which it is moved into the main file; less if the limit is small."""
SHARED_BYTES = 64 << 10
"""Maximum size of SQLite's index of the log and the lock file together."""
SPARE_PAGES = 16
"""Pages that writing an episode may touch besides its payload: its row, the trees above, the free list, the map of pages."""
PAYLOAD_PAGE_BYTES = PAGE_BYTES - 4
"""Payload of an overflow page; the rest is the link to the next one."""


class SpoolSpace:
    """Accounting of one spool's files. Not thread-safe.

    Args:
        path: path of the main file.
        limit_bytes: maximum size of all files together.
    """

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        self._path = path
        self.limit_bytes = limit_bytes
        """Maximum size of all files together."""
        self.log_bytes = min(LOG_BYTES, limit_bytes // 8)
        """Length at which the log is moved into the main file."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the files on the disk now."""
        return sum(_size(self._path.with_name(f"{FILE_NAME}{suffix}")) for suffix in ("", "-wal", "-shm"))

    def least_limit(self, size_bytes: int) -> int:
        """Returns the lowest limit under which an empty spool takes an episode whose message has ``size_bytes``.

        The message is written to the log first and then copied into the main file, so it counts twice.
        """
        pages = _pages_for(size_bytes)
        return (SPARE_PAGES + pages) * PAGE_BYTES + self.log_bytes + pages * FRAME_BYTES + SHARED_BYTES

    def fits(self, connection: sqlite3.Connection, journal: SpoolJournal, size_bytes: int) -> bool:
        """Returns whether an episode fits into the files as they are."""
        main_bytes = max(self._main_bytes(connection, size_bytes), pragma(connection, "page_count") * PAGE_BYTES, _size(self._path))
        return self._is_within(main_bytes, max(self.log_bytes, journal.log_size), size_bytes)

    def fits_shrunk(self, connection: sqlite3.Connection, size_bytes: int, *, deleted: Iterable[object] = ()) -> bool:
        """Returns whether an episode would fit after the free pages and the log were returned to the file system.

        Args:
            connection: connection to the main file.
            size_bytes: size of the episode's message.
            deleted: sizes of messages that would be deleted first, as the file has them; a damaged size counts as nothing.
        """
        freed_pages = sum(size // PAYLOAD_PAGE_BYTES for size in deleted if isinstance(size, int))
        return self._is_within(self._main_bytes(connection, size_bytes) - freed_pages * PAGE_BYTES, self.log_bytes, size_bytes)

    def _main_bytes(self, connection: sqlite3.Connection, size_bytes: int) -> int:
        """Returns the size of the main file without free pages, after an episode was written."""
        used_pages = pragma(connection, "page_count") - pragma(connection, "freelist_count")
        return (used_pages + _pages_for(size_bytes)) * PAGE_BYTES

    def _is_within(self, main_bytes: int, log_bytes: int, size_bytes: int) -> bool:
        return main_bytes + log_bytes + _pages_for(size_bytes) * FRAME_BYTES + SHARED_BYTES <= self.limit_bytes


def _pages_for(size_bytes: int) -> int:
    """Returns the maximum number of pages that an episode needs."""
    payload_pages = -(-size_bytes // PAYLOAD_PAGE_BYTES)
    # The map of pages takes one page in 819 (PAGE_BYTES // 5); 800 is on the safe side.
    return payload_pages + payload_pages // 800 + SPARE_PAGES


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
