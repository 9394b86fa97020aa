"""Queue of ended episodes on the actor's own disk: they outlive the process, and are sent under their first keys.

SQLite keeps them, in WAL mode. An episode that :meth:`Spool.put` kept is committed and fsynced. An acknowledged episode is deleted without
an fsync, because sending it again does no harm. For the same reason a disk that refuses the deletion does not stop sending: the outcome is
kept in memory until it can be written.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from touchline._actor.queue import Peeked, PutResult, QueueItem, QueueTicket
from touchline._rpc.encoding import encode_episode
from touchline._rpc.fork import gate, leak_parent_object, register_after_fork
from touchline._spool.file import (
    COLUMNS,
    DAMAGED,
    FILE_NAME,
    PARTS_PER_EPISODE,
    REFUSED,
    SQLITE_ERRORS,
    WAITING,
    FolderLock,
    mark_inherited,
    open_database,
    recovery_advice,
    set_state,
    table_of,
    to_spool_error,
)
from touchline._spool.journal import SpoolJournal
from touchline._spool.space import SpoolSpace
from touchline._spool.sqlite_codes import has_no_space
from touchline.errors import InvalidEpisodeError, SpoolError, TooLargeError, TouchlineError
from touchline_protos.codec import CodecError, CodecLimits, Episode, EpisodeKey, decode_add_episode
from touchline_protos.files.sqlite import parts, row_checksum
from touchline_protos.log_lines import get_logger

LIMITS = CodecLimits(max_episode_bytes=1 << 31)
"""Limits for reading an episode back: whatever could be written can be read."""
MAX_REFUSED = 64
"""Maximum number of refused episodes that are kept; older ones are deleted, and any of them earlier if their space is needed."""

logger = get_logger(__name__)

_IS_WAITING = f"state NOT IN ({REFUSED}, {DAMAGED})"
"""An unknown state is damage; the row's checksum finds it when the episode is next."""
_Row = tuple[Any, ...]


class Spool:
    """Queue of episodes in a folder that only this writer uses. See :class:`~touchline._actor.queue.EpisodeQueue`.

    The folder never takes more than ``limit_bytes``, including the database's log and free pages; an episode takes twice its size while it
    is being written. An episode that fails its checksum is never sent; it stays in the file, marked as damaged.

    Args:
        folder: folder on a local disk, made if it does not exist. SQLite's log needs shared memory, which network file systems lack.
        limit_bytes: maximum size of the folder.
        max_pending: maximum number of episodes that wait; None for as many as fit.
        table: name of the server's table that new episodes are for; None takes the one that the file names. Episodes of earlier writers
            keep theirs.
        max_refused: number of refused episodes that are kept, the most recent ones; None keeps all.

    Raises:
        SpoolError: another writer uses the folder, or its file is damaged, has a newer format, or is not a spool.
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
        self._space = SpoolSpace(self._path, limit_bytes=limit_bytes)
        self._max_pending = max_pending
        self._max_refused = max_refused
        self._lock = threading.Lock()
        self._sending = -1
        """Highest id that was peeked at; it and those below are being sent."""
        self._unmarkable: set[int] = set()
        """Ids of damaged episodes that the file cannot mark as such; this writer passes over them."""
        self._unwritten: dict[int, tuple[int, str] | None] = {}
        """Outcomes that the file does not have yet, by id: the state and reason to write, or None to delete the episode."""
        self._unwritten_logged = False
        with gate:
            self._folder_lock = FolderLock(self._folder)
            try:
                self._connection: sqlite3.Connection | None = open_database(self._folder, table=table)
                self._journal = SpoolJournal(self._connection, self._path, log_bytes=self._space.log_bytes)
                self._next, self._count = self._scan(self._connection)
                self.table = table_of(self._connection) or "" if table is None else table
                """Name of the server's table that new episodes are for."""
            except BaseException as error:
                self._folder_lock.release()
                if isinstance(error, SQLITE_ERRORS):
                    raise to_spool_error(error, self._path) from error
                raise
        register_after_fork(self)
        self.resumed = self._count
        self.missing = max(0, self._folder_lock.read_mark() - self._next + 1)
        """Number of the most recent episodes of earlier writers that the file has lost; they may have been acknowledged before."""
        if self.missing:
            logger.error(
                "%s: the last %d episodes written to it are missing: its log was damaged or cut. Those not acknowledged are lost",
                self._path,
                self.missing,
            )
            self._next += self.missing

    @property
    def spool_dir(self) -> str:
        """Path of the folder."""
        return str(self._folder)

    @property
    def size_bytes(self) -> int:
        """Bytes of the folder's files on the disk now."""
        return self._space.used_bytes

    def pack(self, episode: Episode) -> QueueItem:
        """Returns the episode as an encoded message."""
        assert episode.key is not None
        message = encode_episode(episode, table=self.table)
        least_bytes = self._space.least_limit(len(message))
        if least_bytes > self._space.limit_bytes:
            raise TooLargeError(
                f"the episode has {len(message)} bytes and needs {least_bytes} bytes of spool, whose limit is {self._space.limit_bytes}: "
                "raise spool_limit_bytes, or cut episodes with max_steps"
            )
        return QueueItem(episode.key, episode.length, len(message), message)

    def put(self, item: QueueItem, *, drop_oldest: bool, force: bool = False) -> PutResult:
        """Appends an episode if there is space; once it returns that the episode was kept, it is on the disk."""
        assert isinstance(item.content, bytes)
        dropped: list[QueueTicket] = []
        try:
            with self._open() as connection:
                self._journal.check()
                self._write_outcomes(connection)
                if not self._make_space(connection, item, dropped if drop_oldest else None):
                    return PutResult(False, dropped)
                self._insert(connection, item, item.content)
                self._journal.trim(shrink=not self._count)
        except SpoolError as error:
            if has_no_space(error.__cause__, self._path):
                logger.error("%s: the disk is full", self._path)
                return PutResult(False, dropped)
            return PutResult(False, dropped, error)
        return PutResult(True, dropped)

    def peek(self, after: QueueTicket | None = None) -> Peeked | None:
        """Returns the oldest episode without removing it, or the next one behind ``after``; its columns are views of the message read."""
        with self._open() as connection:
            row = self._oldest(connection, WAITING, after=after.number if after is not None else -1)
            if row is None:
                return None
            ticket = _ticket(row)
            self._sending = ticket.number
            if row_checksum(*row[:-1]) != row[-1]:
                return ticket, self._damage_error(ticket, "its row")
            try:
                message = b"".join(
                    data
                    for (data,) in connection.execute(
                        "SELECT data FROM payloads WHERE number BETWEEN ? AND ? ORDER BY number", _payload_range(row[0])
                    )
                )
            except (sqlite3.DatabaseError, UnicodeDecodeError, TypeError) as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                return ticket, self._damage_error(ticket, f"its payload ({error})")
            if len(message) != row[5] or zlib.crc32(message) != row[9]:
                return ticket, self._damage_error(ticket, "its payload")
        try:
            table, episode = decode_add_episode(message, limits=LIMITS)
        except CodecError as error:
            return ticket, InvalidEpisodeError(str(error))
        return replace(ticket, table=table), episode

    def acknowledge(self, ticket: QueueTicket) -> None:
        """Removes an episode that was peeked at."""
        self._settle(ticket, None)

    def dead_letter(self, ticket: QueueTicket, error: TouchlineError) -> None:
        """Takes an episode that was peeked at out of the queue, and keeps it with the reason: as damaged after a SpoolError, else as
        refused.

        Of the refused episodes, only the ``max_refused`` most recent are kept.
        """
        self._settle(ticket, (DAMAGED if isinstance(error, SpoolError) else REFUSED, str(error)[:1000]))

    def waiting_keys(self) -> list[EpisodeKey]:
        """Returns the keys of all episodes in the queue, oldest first."""
        with self._open() as connection:
            rows = connection.execute(f"SELECT id, client_id, incarnation, sequence FROM episodes WHERE {_IS_WAITING} ORDER BY id")
            return [EpisodeKey(*key) for number, *key in rows if not self._is_settled(number)]

    def close(self) -> None:
        """Moves the log into the main file and releases the folder. Closing again does nothing."""
        with gate, self._lock:
            if self._connection is not None:
                with contextlib.suppress(*SQLITE_ERRORS, SpoolError):
                    self._write_outcomes(self._connection)
                if self._unwritten:
                    logger.warning("%s: %d answered episodes will be sent again, which does no harm", self._path, len(self._unwritten))
                self._journal.close()
                self._connection = None
                self._folder_lock.release()

    def after_fork_in_child(self) -> None:
        """Abandons the file without touching it: the spool stays the parent's."""
        if self._connection is not None:
            leak_parent_object(self._connection)
            self._connection = None
            self._folder_lock.release()
            mark_inherited(self._folder)
        self._lock = threading.Lock()

    # The methods below are called under the lock, and inside the gate: a fork waits until no thread is inside SQLite, whose own locks would
    # stay locked in the child.

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with gate, self._lock:
            if self._connection is None:
                raise SpoolError(f"{self._path}: the spool was closed, or belongs to the parent process")
            try:
                yield self._connection
            except SQLITE_ERRORS as error:
                raise to_spool_error(error, self._path) from error
            except MemoryError as error:
                raise SpoolError(f"{self._path}: not enough memory to read or write an episode") from error

    def _is_settled(self, number: int) -> bool:
        """Returns whether an episode that still waits in the file has been answered."""
        return number in self._unmarkable or number in self._unwritten

    def _settle(self, ticket: QueueTicket, outcome: tuple[int, str] | None) -> None:
        with self._open() as connection:
            self._unwritten[ticket.number] = outcome
            self._count -= 1
            try:
                self._write_outcomes(connection)
            except (*SQLITE_ERRORS, SpoolError) as error:
                if not self._unwritten_logged:
                    logger.warning("%s: cannot remove answered episodes for now, sending continues: %s", self._path, error)
                self._unwritten_logged = True
            else:
                self._unwritten_logged = False
                self._journal.trim(shrink=not self._count)

    def _write_outcomes(self, connection: sqlite3.Connection) -> None:
        """Writes outcomes to the file. What cannot be written stays in memory; raises the error."""
        if self._unwritten and not self._journal.failure:
            try:
                self._write_first_outcome(connection)
            except SQLITE_ERRORS as error:
                if not has_no_space(error, self._path):
                    raise
                self._journal.reuse_log()
        while self._unwritten and not self._journal.failure:
            self._write_first_outcome(connection)

    def _write_first_outcome(self, connection: sqlite3.Connection) -> None:
        number, outcome = next(iter(self._unwritten.items()))
        if outcome is None:
            self._delete(connection, number)
        else:
            self._mark(connection, number, *outcome)
        del self._unwritten[number]

    def _mark(self, connection: sqlite3.Connection, number: int, state: int, reason: str) -> None:
        """Writes why an episode is not sent, and deletes the oldest refused ones above ``max_refused``."""
        try:
            with self._journal.transaction(sync=True):
                set_state(connection, number, state, reason)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if state != DAMAGED or has_no_space(error, self._path) or self._journal.failure:
                raise
            logger.exception("%s: cannot mark the damaged episode %d; this writer passes over it", self._path, number)
            self._unmarkable.add(number)
        if state == REFUSED and self._max_refused is not None:
            refused = connection.execute("SELECT id FROM episodes WHERE state = ? ORDER BY id DESC", (REFUSED,)).fetchall()
            for (old,) in refused[self._max_refused :]:
                self._delete(connection, old)

    def _scan(self, connection: sqlite3.Connection) -> tuple[int, int]:
        """Returns the next id and the number of episodes that wait; logs what else is in the file."""
        waiting = dead = 0
        for row in connection.execute("SELECT id, length, state FROM episodes"):
            if not all(isinstance(value, int) for value in row):
                raise SpoolError(f"{self._path}: damaged (a row of the table episodes); {recovery_advice(self._path)}")
            if row[2] in (REFUSED, DAMAGED):
                dead += 1
            else:
                waiting += 1
        if dead:
            logger.warning("%s: it keeps %d refused or damaged episodes; `touchline spool show` says why", self._path, dead)
        (last,) = connection.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()
        return (last if isinstance(last, int) else 0) + 1, waiting

    def _oldest(self, connection: sqlite3.Connection, state: int, *, after: int = -1) -> _Row | None:
        condition = _IS_WAITING if state == WAITING else f"state = {REFUSED}"
        rows = connection.execute(f"SELECT {COLUMNS}, row_checksum FROM episodes WHERE ({condition}) AND id > ? ORDER BY id", (after,))
        return next((row for row in rows if not self._is_settled(row[0])), None)

    def _insert(self, connection: sqlite3.Connection, item: QueueItem, message: bytes) -> None:
        key = (item.key.client_id, item.key.incarnation, item.key.sequence)
        row = (self._next, *key, item.length, len(message), time.time(), WAITING, "", zlib.crc32(message))
        with self._journal.transaction(sync=True, size_bytes=len(message)):
            connection.execute(f"INSERT INTO episodes VALUES ({', '.join('?' * (len(row) + 1))})", (*row, row_checksum(*row)))
            for part, data in enumerate(parts(message)):
                connection.execute("INSERT INTO payloads VALUES (?, ?)", (self._next * PARTS_PER_EPISODE + part, data))
        self._folder_lock.write_mark(self._next)
        self._next += 1
        self._count += 1

    def _delete(self, connection: sqlite3.Connection, number: int) -> None:
        with self._journal.transaction(sync=False):
            connection.execute("DELETE FROM payloads WHERE number BETWEEN ? AND ?", _payload_range(number))
            connection.execute("DELETE FROM episodes WHERE id = ?", (number,))

    def _damage_error(self, ticket: QueueTicket, where: str) -> SpoolError:
        return SpoolError(
            f"{self._path}: episode {ticket.number} is damaged, {where} is not what was written; it is kept and not sent. The disk may be "
            "failing"
        )

    def _make_space(self, connection: sqlite3.Connection, item: QueueItem, dropped: list[QueueTicket] | None) -> bool:
        """Returns whether an item has space; for it, deletes refused episodes and, if there is a list, drops waiting ones into that."""
        if not self._is_crowded(self._count) and self._space.fits(connection, self._journal, item.size_bytes):
            return True
        if not self._could_make_space(connection, item, dropping=dropped is not None):
            return False  # so nothing is deleted without success
        while True:
            crowded = self._is_crowded(self._count)
            if not crowded and self._space.fits(connection, self._journal, item.size_bytes):
                return True
            if not crowded and self._space.fits_shrunk(connection, item.size_bytes):
                self._journal.shrink()
                if self._space.fits(connection, self._journal, item.size_bytes):
                    return True
            refused = None if crowded else self._oldest(connection, REFUSED)
            if refused is not None:
                self._delete(connection, refused[0])
                logger.warning("%s: deleted the refused episode %d to make space", self._path, refused[0])
                continue
            victim = next(self._droppable(connection), None) if dropped is not None else None
            if victim is None or dropped is None:
                return False
            self._delete(connection, victim[0])
            self._count -= 1
            dropped.append(_ticket(victim))

    def _is_crowded(self, episodes: int) -> bool:
        return self._max_pending is not None and episodes >= self._max_pending

    def _could_make_space(self, connection: sqlite3.Connection, item: QueueItem, *, dropping: bool) -> bool:
        """Returns whether an item would fit once every refused episode and, if ``dropping``, every droppable one was deleted."""
        droppable = list(self._droppable(connection)) if dropping else []
        refused_sizes = [size for (size,) in connection.execute("SELECT size_bytes FROM episodes WHERE state = ?", (REFUSED,))]
        return not self._is_crowded(self._count - len(droppable)) and self._space.fits_shrunk(
            connection, item.size_bytes, deleted=[*(row[5] for row in droppable), *refused_sizes]
        )

    def _droppable(self, connection: sqlite3.Connection) -> Iterator[_Row]:
        rows = connection.execute(f"SELECT {COLUMNS} FROM episodes WHERE state = ? ORDER BY id", (WAITING,))
        return (row for row in rows if row[0] > self._sending and not self._is_settled(row[0]))


def _payload_range(number: int) -> tuple[int, int]:
    """Returns the first and the last number that the parts of an episode's payload may have."""
    return number * PARTS_PER_EPISODE, number * PARTS_PER_EPISODE + PARTS_PER_EPISODE - 1


def _ticket(row: _Row) -> QueueTicket:
    incarnation, sequence, length = (value if isinstance(value, int) else -1 for value in row[2:5])  # a damaged row may hold anything
    return QueueTicket(row[0], EpisodeKey(str(row[1]), incarnation, sequence), length)
