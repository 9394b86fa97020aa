"""Ended episodes on the actor's own disk: they outlive the process and go out under the keys that they were given first.

SQLite in WAL mode keeps them. An episode that :meth:`Spool.put` kept is committed and fsynced; one that is acknowledged is deleted without
an fsync, because sending it again does no harm. For the same reason a disk that takes no deletion does not hold up sending: what is
settled is known in memory until it can be written.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from touchline._actor.queue import PutResult, QueueItem, QueueTicket
from touchline._rpc.encoding import encode_episode
from touchline._rpc.fork import gate, leak_parent_object, register_after_fork
from touchline._spool.file import (
    COLUMNS,
    DAMAGED,
    FILE_NAME,
    PAGE_BYTES,
    PARTS_PER_EPISODE,
    REFUSED,
    SQLITE_ERRORS,
    WAITING,
    FolderLock,
    mark_inherited,
    open_database,
    set_state,
    table_of,
    to_spool_error,
)
from touchline._spool.journal import FRAME_BYTES, SpoolJournal
from touchline._spool.sqlite_codes import has_no_room
from touchline.errors import InvalidEpisodeError, SpoolError, TooLargeError, TouchlineError
from touchline_protos.codec import CodecError, CodecLimits, Episode, EpisodeKey, decode_add_episode
from touchline_protos.files.sqlite import parts, pragma, row_checksum
from touchline_protos.log_lines import get_logger

LIMITS = CodecLimits(max_episode_bytes=1 << 31)
"""Of what is read back: all that could be written."""
MAX_REFUSED = 64
"""Refused episodes that are kept, the newest; they are deleted earlier where their room is wanted."""
LOG_BYTES = 4 << 20
"""Length of the write-ahead log at which it is moved into the main file; less where the limit is small."""
SHARED_BYTES = 64 << 10
"""What SQLite's index of the log and the lock file take at most."""
SPARE_PAGES = 16
"""Beside its payload an episode may dirty so many: its row, the trees above, the free list, the map of pages."""

logger = get_logger(__name__)

_IS_WAITING = f"state NOT IN ({REFUSED}, {DAMAGED})"
"""A state that is none is damage, which the row's checksum tells when its turn comes."""
_Row = tuple[Any, ...]


class Spool:
    """Episodes in a folder that this writer holds alone. See :class:`~touchline._actor.queue.EpisodeQueue`.

    The folder never takes more than ``limit_bytes``, the log and the free pages of the database included; an episode takes its size twice
    while it is being written. One that is damaged, by the checksum, is set aside and never sent; it stays in the file.

    Args:
        folder: made if it is not there. On a local disk: SQLite's log needs shared memory, which network file systems lack.
        limit_bytes: what the folder may take.
        max_pending: episodes that may wait; None for as many as fit.
        table: of the server, that the episodes are for; None: of the table that the file names.
        max_refused: refused episodes that are kept, the newest; None keeps all.

    Raises:
        SpoolError: another writer holds the folder, or its file is damaged, of a newer format, or no spool.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit_bytes: int,
        max_pending: int | None = None,
        table: str | None = "",
        max_refused: int | None = MAX_REFUSED,
    ) -> None:
        self._folder = folder.resolve()
        self._path = self._folder / FILE_NAME
        self._limit_bytes = limit_bytes
        self._log_bytes = min(LOG_BYTES, limit_bytes // 8)
        self._max_pending = max_pending
        self._max_refused = max_refused
        self._lock = threading.Lock()
        self._sending = -1
        self._skipped: set[int] = set()
        self._settled: dict[int, tuple[int, str] | None] = {}
        """What is answered and not yet noted in the file, by number: the state and the reason to write, None to delete it."""
        self._settled_told = False
        with gate:
            self._holder = FolderLock(self._folder)
            try:
                self._connection: sqlite3.Connection | None = open_database(self._folder, table=table)
                self._journal = SpoolJournal(self._connection, self._path, log_bytes=self._log_bytes)
                self._next, self._count, rows = self._survey(self._connection)
                self.table = table_of(self._connection) or "" if table is None else table
                """Of the server, that the episodes are for."""
            except BaseException as error:
                self._holder.release()
                if isinstance(error, SQLITE_ERRORS):
                    raise to_spool_error(error, self._path) from error
                raise
        register_after_fork(self)
        self.resumed = (self._count, rows)
        self.missing = max(0, self._holder.read_mark() - self._next + 1)
        """Episodes of earlier writers, the newest, that were taken over and are not in the file; perhaps acknowledged since."""
        if self.missing:
            logger.error(
                "%s: the last %d episodes that it took over are not there: its log was damaged or cut. Those not acknowledged are lost",
                self._path,
                self.missing,
            )
            self._next += self.missing

    @property
    def spool_dir(self) -> str:
        """The folder."""
        return str(self._folder)

    @property
    def size_bytes(self) -> int:
        """What the folder's files take on the disk now."""
        return sum(_size(self._folder / f"{FILE_NAME}{suffix}") for suffix in ("", "-wal", "-shm"))

    def pack(self, episode: Episode) -> QueueItem:
        """Returns the episode as a message."""
        assert episode.key is not None
        message = encode_episode(episode, table=self.table)
        pages = _pages_for(len(message))
        least = (SPARE_PAGES + pages) * PAGE_BYTES + self._log_bytes + pages * FRAME_BYTES + SHARED_BYTES
        if least > self._limit_bytes:
            raise TooLargeError(
                f"the episode has {len(message)} bytes and needs {least} of the spool, whose limit is {self._limit_bytes}: raise "
                "spool_limit_bytes, or cut episodes by max_steps"
            )
        return QueueItem(episode.key, episode.length, len(message), message)

    def put(self, item: QueueItem, *, drop_oldest: bool, force: bool = False) -> PutResult:
        """Appends an episode if there is room; where it returns that it is kept, it is on the disk."""
        assert isinstance(item.content, bytes)
        dropped: list[QueueTicket] = []
        try:
            with self._open() as connection:
                self._journal.check()
                self._write_settled(connection)
                if not self._make_room(connection, item, dropped if drop_oldest else None):
                    return PutResult(False, dropped)
                self._insert(connection, item, item.content)
                self._journal.trim(shrink=not self._count)
        except SpoolError as error:
            if has_no_room(error.__cause__, self._path):
                logger.error("%s: the disk is full", self._path)
                return PutResult(False, dropped)
            return PutResult(False, dropped, error)
        return PutResult(True, dropped)

    def peek(self, after: QueueTicket | None = None) -> tuple[QueueTicket, Episode | TouchlineError] | None:
        """Returns the oldest episode, or the oldest behind ``after``, its columns views of the message that was read; or why it cannot be
        sent."""
        with self._open() as connection:
            row = self._oldest(connection, WAITING, after=after.number if after is not None else -1)
            if row is None:
                return None
            waiting = _waiting(row)
            self._sending = waiting.number
            if row_checksum(*row[:-1]) != row[-1]:
                return waiting, self._damage(waiting, "its row")
            try:
                message = b"".join(
                    data
                    for (data,) in connection.execute(
                        "SELECT data FROM payloads WHERE number BETWEEN ? AND ? ORDER BY number", _parts(row[0])
                    )
                )
            except (sqlite3.DatabaseError, UnicodeDecodeError, TypeError) as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                return waiting, self._damage(waiting, f"its payload ({error})")
            if len(message) != row[5] or zlib.crc32(message) != row[9]:
                return waiting, self._damage(waiting, "its payload")
        try:
            _, episode = decode_add_episode(message, limits=LIMITS)
        except CodecError as error:
            return waiting, InvalidEpisodeError(str(error))
        return waiting, episode

    def acknowledge(self, waiting: QueueTicket) -> None:
        """Forgets an episode that was taken."""
        self._settle(waiting, None)

    def dead_letter(self, waiting: QueueTicket, error: TouchlineError) -> None:
        """Keeps an episode that was taken out of the queue, with the reason; the newest ``max_refused`` of those that were refused."""
        self._settle(waiting, (DAMAGED if isinstance(error, SpoolError) else REFUSED, str(error)[:1000]))

    def waiting_keys(self) -> list[EpisodeKey]:
        """Returns the keys of all that wait, oldest first."""
        with self._open() as connection:
            rows = connection.execute(f"SELECT id, client_id, incarnation, sequence FROM episodes WHERE {_IS_WAITING} ORDER BY id")
            return [EpisodeKey(*key) for number, *key in rows if not self._is_out(number)]

    def close(self) -> None:
        """Moves the log into the main file and lets another writer have the folder. Closing again does nothing."""
        with gate, self._lock:
            if self._connection is not None:
                with contextlib.suppress(*SQLITE_ERRORS, SpoolError):
                    self._write_settled(self._connection)
                if self._settled:
                    logger.warning(
                        "%s: %d episodes that were answered are sent once more, which does no harm", self._path, len(self._settled)
                    )
                self._journal.close()
                self._connection = None
                self._holder.release()

    def after_fork_in_child(self) -> None:
        """Forgets the file without touching it: the spool stays the parent's."""
        if self._connection is not None:
            leak_parent_object(self._connection)
            self._connection = None
            self._holder.release()
            mark_inherited(self._folder)
        self._lock = threading.Lock()

    # Inside, under the lock. A fork waits until no thread is inside SQLite, whose own locks a child would find taken for ever.

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with gate, self._lock:
            if self._connection is None:
                raise SpoolError(f"{self._path}: the spool was closed, or is the parent process's")
            try:
                yield self._connection
            except SQLITE_ERRORS as error:
                raise to_spool_error(error, self._path) from error
            except MemoryError as error:
                raise SpoolError(f"{self._path}: this process has no memory left to read or write an episode with") from error

    def _is_out(self, number: int) -> bool:
        """Returns whether an episode that lies in the file does not wait any more."""
        return number in self._skipped or number in self._settled

    def _settle(self, waiting: QueueTicket, outcome: tuple[int, str] | None) -> None:
        with self._open() as connection:
            self._settled[waiting.number] = outcome
            self._count -= 1
            try:
                self._write_settled(connection)
            except (*SQLITE_ERRORS, SpoolError) as error:
                if not self._settled_told:
                    logger.warning("%s: episodes that are answered cannot be taken out for now, sending goes on: %s", self._path, error)
                self._settled_told = True
            else:
                self._settled_told = False
                self._journal.trim(shrink=not self._count)

    def _write_settled(self, connection: sqlite3.Connection) -> None:
        """Notes in the file what is answered. What cannot be written stays in memory; raises why."""
        if self._settled and not self._journal.failure:
            try:
                self._write_first_settled(connection)
            except SQLITE_ERRORS as error:
                if not has_no_room(error, self._path):
                    raise
                self._journal.reuse_log()
        while self._settled and not self._journal.failure:
            self._write_first_settled(connection)

    def _write_first_settled(self, connection: sqlite3.Connection) -> None:
        number, outcome = next(iter(self._settled.items()))
        if outcome is None:
            self._delete(connection, number)
        else:
            state, reason = outcome
            try:
                self._mark(connection, number, state, reason)
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                if state != DAMAGED or has_no_room(error, self._path) or self._journal.failure:
                    raise
                logger.exception("%s: the damaged episode %d cannot be marked; this writer passes over it", self._path, number)
                self._skipped.add(number)
            if state == REFUSED and self._max_refused is not None:
                refused = connection.execute("SELECT id FROM episodes WHERE state = ? ORDER BY id DESC", (REFUSED,)).fetchall()
                for (old,) in refused[self._max_refused :]:
                    self._delete(connection, old)
        del self._settled[number]

    def _survey(self, connection: sqlite3.Connection) -> tuple[int, int, int]:
        """Returns the next id, and how many episodes and rows wait; says what else lies there."""
        count = rows = aside = 0
        for row in connection.execute("SELECT id, length, state FROM episodes"):
            if not all(isinstance(value, int) for value in row):
                raise SpoolError(f"{self._path}: damaged (a row of the table episodes); move the folder {self._folder} away to start anew")
            if row[2] in (REFUSED, DAMAGED):
                aside += 1
            else:
                count, rows = count + 1, rows + row[1]
        if aside:
            logger.warning("%s: %d episodes lie there that were refused or are damaged; the column `reason` says why", self._path, aside)
        (last,) = connection.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()
        return (last if isinstance(last, int) else 0) + 1, count, rows

    def _oldest(self, connection: sqlite3.Connection, state: int, *, after: int = -1) -> _Row | None:
        which = _IS_WAITING if state == WAITING else f"state = {REFUSED}"
        rows = connection.execute(f"SELECT {COLUMNS}, row_checksum FROM episodes WHERE ({which}) AND id > ? ORDER BY id", (after,))
        return next((row for row in rows if not self._is_out(row[0])), None)

    def _insert(self, connection: sqlite3.Connection, item: QueueItem, message: bytes) -> None:
        key = (item.key.client_id, item.key.incarnation, item.key.sequence)
        row = (self._next, *key, item.length, len(message), time.time(), WAITING, "", zlib.crc32(message))
        with self._journal.transaction(sync=True, size_bytes=len(message)):
            connection.execute(f"INSERT INTO episodes VALUES ({', '.join('?' * (len(row) + 1))})", (*row, row_checksum(*row)))
            for part, data in enumerate(parts(message)):
                connection.execute("INSERT INTO payloads VALUES (?, ?)", (self._next * PARTS_PER_EPISODE + part, data))
        self._holder.write_mark(self._next)
        self._next += 1
        self._count += 1

    def _delete(self, connection: sqlite3.Connection, number: int) -> None:
        with self._journal.transaction(sync=False):
            connection.execute("DELETE FROM payloads WHERE number BETWEEN ? AND ?", _parts(number))
            connection.execute("DELETE FROM episodes WHERE id = ?", (number,))

    def _mark(self, connection: sqlite3.Connection, number: int, state: int, reason: str) -> None:
        with self._journal.transaction(sync=True):
            set_state(connection, number, state, reason)

    def _damage(self, waiting: QueueTicket, where: str) -> SpoolError:
        return SpoolError(
            f"{self._path}: episode {waiting.number} is damaged, {where} is not what was written; it is set aside and not sent. The disk "
            "may be failing"
        )

    # Room.

    def _make_room(self, connection: sqlite3.Connection, item: QueueItem, dropped: list[QueueTicket] | None) -> bool:
        """Returns whether there is room; deletes refused episodes for it and, where a list is given, drops waiting ones into it."""
        pages = _pages_for(item.size_bytes)
        if (self._max_pending is None or self._count < self._max_pending) and self._fits(connection, pages):
            return True
        droppable = list(self._droppable(connection)) if dropped is not None else []
        crowd = self._count - len(droppable) if dropped is not None else self._count
        refused_sizes = connection.execute("SELECT size_bytes FROM episodes WHERE state = ?", (REFUSED,))
        sizes = [row[5] for row in droppable] + [size for (size,) in refused_sizes]
        freed = sum(size // (PAGE_BYTES - 4) for size in sizes if isinstance(size, int))
        if (self._max_pending is not None and crowd >= self._max_pending) or not self._fits(connection, pages, freed, shrunk=True):
            return False
        while True:
            crowded = self._max_pending is not None and self._count >= self._max_pending
            if not crowded and self._fits(connection, pages):
                return True
            if not crowded and self._fits(connection, pages, shrunk=True):
                self._journal.shrink()
                if self._fits(connection, pages):
                    return True
            refused = None if crowded else self._oldest(connection, REFUSED)
            if refused is not None:
                self._delete(connection, refused[0])
                logger.warning("%s: the refused episode %d is deleted, its room is wanted", self._path, refused[0])
                continue
            victim = next(self._droppable(connection), None) if dropped is not None else None
            if victim is None or dropped is None:
                return False
            self._delete(connection, victim[0])
            self._count -= 1
            dropped.append(_waiting(victim))

    def _droppable(self, connection: sqlite3.Connection) -> Iterator[_Row]:
        rows = connection.execute(f"SELECT {COLUMNS} FROM episodes WHERE state = ? ORDER BY id", (WAITING,))
        return (row for row in rows if row[0] > self._sending and not self._is_out(row[0]))

    def _fits(self, connection: sqlite3.Connection, pages: int, freed: int = 0, *, shrunk: bool = False) -> bool:
        """Returns whether so many more pages keep within the limit: now, or after free pages and the log were given back."""
        count, free = pragma(connection, "page_count"), pragma(connection, "freelist_count")
        main = (count - free - freed + pages) * PAGE_BYTES
        log = self._log_bytes
        if not shrunk:
            main = max(main, count * PAGE_BYTES, _size(self._path))
            log = max(log, self._journal.log_size)
        return main + log + pages * FRAME_BYTES + SHARED_BYTES <= self._limit_bytes


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _parts(number: int) -> tuple[int, int]:
    return number * PARTS_PER_EPISODE, number * PARTS_PER_EPISODE + PARTS_PER_EPISODE - 1


def _pages_for(size_bytes: int) -> int:
    """Returns how many pages an episode may need at most; the map of pages takes one in 819."""
    data = -(-size_bytes // (PAGE_BYTES - 4))
    return data + data // 800 + SPARE_PAGES


def _waiting(row: _Row) -> QueueTicket:
    incarnation, sequence, length = (value if isinstance(value, int) else -1 for value in row[2:5])  # a damaged row may hold anything
    return QueueTicket(row[0], EpisodeKey(str(row[1]), incarnation, sequence), length)
