"""The durable store's SQLite file, in WAL mode: its tables and the statements on them. Not thread-safe.

``episodes`` has one row for each episode, ``payloads`` its columns, ``senders``, ``runs`` and ``keys`` the ledger of
:mod:`touchline_server.store.dedup`, ``counts`` the counts, ``meta`` the rest. Rows carry a CRC-32 of their values, an episode's of its
payload too: any flipped bit, and any damage within 32 consecutive bits, is detected; other damage escapes once in 4 billion times.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from touchline_protos import Counts
from touchline_protos.codec import EpisodeKey
from touchline_protos.files.sqlite import FormatError, SqliteFormat, parts, pragma, row_checksum
from touchline_protos.log_lines import get_logger
from touchline_server.durability.ledger import LedgerTables
from touchline_server.durability.records import Change, EpisodeRow, Payload, schema_of, schema_text
from touchline_server.durability.sqlite_errors import advice, has_no_room, keep_open, translate, translate_write
from touchline_server.durability.storage_state import StorageMonitor, StorageState
from touchline_server.errors import DamagedStoreError, StorageFullError, StoreMismatchError
from touchline_server.store.schema import Schema

FILE_NAME = "touchline.db"
COUNT_NAMES = tuple(field.name for field in fields(Counts))
GENERATION_KEY = "lineage"
"""Name in ``meta`` of the store's generation."""
OLDEST_KEY = "oldest_id"
"""Name in ``meta`` of an id below which no episode is stored."""
CHECKPOINT_BYTES = 32 << 20
"""Length of the write-ahead log above which it is moved into the main file before the next commit."""
CHECKPOINT_RETRY_BYTES = 8 << 20
"""Bytes committed between two attempts to move the log, if a reader prevents it."""
LOG_BYTES = 64 << 20
"""Length of the log's file above which it is truncated; below, it is overwritten."""
COMMIT_BYTES = 64 << 10
"""Bytes that a commit adds to the log besides its payload: the pages of tables and indexes that it changes."""

BUSY_MS = 10_000
"""Milliseconds to wait for another process that is writing to the file."""

logger = get_logger(__name__)

TABLES = SqliteFormat(
    application_id=0x746C6E65,
    version=2,
    page_bytes=8192,
    statements="""
CREATE TABLE meta (name TEXT PRIMARY KEY, value, checksum INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE episodes (
    id INTEGER PRIMARY KEY, client_id TEXT, incarnation INTEGER, sequence INTEGER, actor TEXT NOT NULL, policy_version INTEGER NOT NULL,
    length INTEGER NOT NULL, return REAL, time REAL NOT NULL, digest INTEGER NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE payloads (
    row INTEGER PRIMARY KEY, episode_id INTEGER NOT NULL, column TEXT NOT NULL, part INTEGER NOT NULL, dtype TEXT NOT NULL,
    shape TEXT NOT NULL, data BLOB NOT NULL);
CREATE INDEX payloads_of_episode ON payloads (episode_id);
CREATE TABLE senders (
    id INTEGER PRIMARY KEY, client_id TEXT NOT NULL, incarnation INTEGER NOT NULL, forgotten_below INTEGER NOT NULL,
    last_episode INTEGER NOT NULL, checksum INTEGER NOT NULL, UNIQUE (client_id, incarnation));
CREATE INDEX senders_by_age ON senders (last_episode);
CREATE TABLE runs (
    sender INTEGER NOT NULL, first INTEGER NOT NULL, after INTEGER NOT NULL, checksum INTEGER NOT NULL, PRIMARY KEY (sender, first)
    ) WITHOUT ROWID;
CREATE INDEX runs_by_end ON runs (sender, after);
CREATE TABLE keys (
    episode_id INTEGER PRIMARY KEY, sender INTEGER NOT NULL, sequence INTEGER NOT NULL, digest INTEGER NOT NULL, checksum INTEGER NOT NULL);
""",
)


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Opens a file. Callers begin and end transactions themselves."""
    uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_MS / 1000)
    connection.execute("PRAGMA mmap_size = 0")  # mapped, a damaged file would raise SIGBUS
    return connection


class Database:
    """The file of one data_dir, for the holder of the write lock.

    Args:
        path: path of the file.
        read_only: True leaves the file and its log unchanged, even on close.

    Raises:
        StoreMismatchError: the file is not a Touchline store, or of a newer format.
        DamagedStoreError: SQLite cannot read it.
        StorageFailedError: it cannot be opened or created.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.monitor = StorageMonitor()
        """Whether what is written can be relied on."""
        self._synchronous = ""
        self._logged_bytes = 0
        try:
            self._open(read_only=read_only)
        except sqlite3.Error as error:
            raise translate(error, path) from error
        self.ledger = LedgerTables(self._connection, path, advice(path))
        """The tables of the deduplication ledger."""

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection, for reading and for PRAGMAs."""
        return self._connection

    @property
    def commits(self) -> int:
        """Number of transactions committed so far."""
        value = self.meta("commits", 0)
        return value if isinstance(value, int) else 0

    def meta(self, name: str, default: object = None) -> object:
        """Returns a value of the table ``meta``, which :meth:`damaged_values` verifies, names included."""
        row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return default if row is None else row[0]

    def damaged_values(self) -> list[str]:
        """Returns a line for each value in ``meta`` and ``counts`` that is not as it was written."""
        return [
            f"{table}: {name!r} is damaged"
            for table in ("meta", "counts")
            for name, value, checksum in self._connection.execute(f"SELECT name, value, checksum FROM {table}")
            if row_checksum(name, value) != checksum
        ]

    def schema(self) -> Schema | None:
        """Returns the columns' schema; None if no episode has fixed it.

        Raises:
            DamagedStoreError: it is not readable.
        """
        text = self.meta("schema")
        if text is None:
            return None
        try:
            return schema_of(str(text))
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedStoreError(f"{self.path}: the schema is not readable ({error}); {advice(self.path)}") from None

    def counts(self) -> Counts:
        """Returns the counts in the file, even if :meth:`damaged_values` lists one of them; a missing count is 0."""
        found = dict(self._connection.execute("SELECT name, value FROM counts"))
        return Counts(**{name: found[name] for name in COUNT_NAMES if name in found})

    def commit(self, changes: Sequence[Change], *, counts: Counts, meta: Mapping[str, object], sync: bool) -> None:
        """Inserts episodes and deletes those evicted for them, all or none.

        Args:
            changes: the changes, in the order in which they apply.
            counts: the counts after the changes.
            meta: values of ``meta`` that change in the same transaction.
            sync: whether to return only once everything is on disk, and not merely with the operating system.

        Raises:
            StorageFullError: the disk is full. Nothing has changed, unless the text says otherwise.
            StorageUncertainError: writing failed after the commit had begun. Whether anything has changed is unknown.
            StorageFailedError: writing failed before that, now or earlier. Nothing has changed.
        """

        def write() -> None:
            for change in changes:
                self._apply(change)
            self._note(counts, meta)

        self._transact(write, sync=sync, size_bytes=sum(change.size_bytes for change in changes))

    def forget(self, episode_ids: Iterable[int], *, counts: Counts, keys: Iterable[tuple[EpisodeKey, int]] = ()) -> None:
        """Deletes episodes, in a transaction of its own. Raises as :meth:`commit` does.

        Args:
            episode_ids: ids of the episodes.
            counts: the counts afterwards.
            keys: keys to forget, each with its episode's id: those of episodes that were never acknowledged. Other keys stay known.
        """

        def write() -> None:
            self._forget(episode_ids)
            for key, episode_id in keys:
                self.ledger.forget(key, episode_id)
            self._note(counts, {})

        self._transact(write, sync=True)

    def clear(self, unwritten: Iterable[Change], *, counts: Counts) -> None:
        """Deletes every episode and the schema; keys and counts stay. Raises as :meth:`commit` does.

        Args:
            unwritten: changes that were acknowledged and are not in the file. Only their keys are written.
            counts: the counts afterwards.
        """

        def write() -> None:
            (newest,) = self._connection.execute("SELECT max(id) FROM episodes").fetchone()
            self._connection.execute("DELETE FROM payloads")
            self._connection.execute("DELETE FROM episodes")
            self._connection.execute("DELETE FROM meta WHERE name = 'schema'")
            for change in unwritten:
                row = change.insert.row if change.insert is not None else None
                if row is not None and row.key is not None:
                    self.ledger.remember(row.key, row.digest, row.id)
            self._note(counts, {} if newest is None else {OLDEST_KEY: newest + 1})

        self._transact(write, sync=True, size_bytes=CHECKPOINT_BYTES)

    def shrink(self, pages: int) -> bool:
        """Returns up to ``pages`` free pages at the file's end to the file system, and whether there are more. Raises as :meth:`commit`
        does."""
        free = pragma(self._connection, "freelist_count")
        if free:
            count = min(pages, free)
            vacuum = f"PRAGMA incremental_vacuum({count})"
            self._transact(lambda: self._connection.execute(vacuum).fetchall(), sync=False, size_bytes=count * TABLES.page_bytes)
        return free > pages

    def checkpoint_if_due(self) -> None:
        """Moves the log into the main file if it is long enough. A full disk is not an error: what is committed stays in the log.

        Raises:
            StorageFailedError: reading, writing or an fsync failed. Nothing was begun on the caller's behalf.
        """
        if self._logged_bytes < CHECKPOINT_BYTES:
            return
        self._logged_bytes = CHECKPOINT_BYTES - CHECKPOINT_RETRY_BYTES
        try:
            if self.checkpoint():
                self._logged_bytes = 0
        except StorageFullError as error:
            logger.warning("%s: the log stays as it is: %s", self.path, error)

    def checkpoint(self) -> bool:
        """Moves the log into the main file, except for what readers still use; returns whether that was all of it.

        SQLite's own checkpoints, after a commit and on close, would fail silently.

        Raises:
            StorageFullError: the disk is full; nothing is lost.
            StorageFailedError: reading, writing or an fsync failed.
        """
        self.monitor.check()
        try:
            _, pages, moved = self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if moved == pages and self._log_size() > LOG_BYTES:
                self._connection.execute("PRAGMA busy_timeout = 0")
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                self._connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        except sqlite3.Error as error:
            raise translate_write(error, self.path, self.monitor, begun=False) from error
        return bool(moved == pages)

    def insert_episode(self, row: EpisodeRow, payloads: Sequence[Payload]) -> None:
        """Writes an episode's rows, inside the caller's transaction."""
        values = row.values
        self._connection.execute(f"INSERT INTO episodes VALUES ({', '.join('?' * (len(values) + 1))})", (*values, row_checksum(*values)))
        for payload in payloads:
            shape = json.dumps(payload.shape)
            for part, data in enumerate(parts(payload.data)):
                self._connection.execute(
                    "INSERT INTO payloads (episode_id, column, part, dtype, shape, data) VALUES (?, ?, ?, ?, ?, ?)",
                    (row.id, payload.column, part, payload.dtype, shape, data),
                )

    def set_meta(self, meta: Mapping[str, object]) -> None:
        """Writes values of ``meta``, inside the caller's transaction or in one of its own."""
        self._set("meta", meta)

    def set_counts(self, counts: Counts) -> None:
        """Writes the counts, inside the caller's transaction."""
        self._set("counts", {name: getattr(counts, name) for name in COUNT_NAMES})

    def close(self) -> None:
        """Closes the file, which moves the rest of the log into it. After a failure, abandons it instead: another write could do harm."""
        if self.monitor.state is StorageState.FAILED:
            self.abandon()
        else:
            self._connection.close()

    def abandon(self) -> None:
        """Leaves the files as they are until the process ends, because closing a connection writes to them."""
        keep_open(self._connection)

    def _open(self, *, read_only: bool) -> None:
        self._connection = connect(self.path, read_only=read_only)
        try:
            self._check_format()
            if not read_only:
                self._prepare()
        except sqlite3.Error as error:
            if read_only or not has_no_room(error, self.path):
                raise
            # There is no space for the index of the log, which other processes share. An index in memory needs none.
            self._connection.close()
            self._connection = connect(self.path)
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
            self._check_format()
            self._prepare()
            logger.warning("%s is full: `check` and `snapshot` cannot look into the store before the server's next start", self.path.parent)

    def _log_size(self) -> int:
        with contextlib.suppress(OSError):
            return os.stat(f"{self.path}-wal").st_size
        return 0

    def _check_format(self) -> None:
        try:
            TABLES.check(self._connection)
        except FormatError as error:
            if error.version is None:
                raise StoreMismatchError(
                    f"{self.path}: not a store of touchline-server's, or its first page is damaged; if it was one, `touchline-server "
                    f"recover --data-dir {self.path.parent}` keeps what is whole; or choose another storage.data_dir"
                ) from None
            raise StoreMismatchError(
                f"{self.path}: written in format {error.version}, this touchline-server reads format {TABLES.version}; install one that "
                "reads it or choose another storage.data_dir"
            ) from None

    def _prepare(self) -> None:
        TABLES.prepare(self._connection)
        for statement in ("journal_mode = WAL", "wal_autocheckpoint = 0"):
            self._connection.execute(f"PRAGMA {statement}").fetchall()

    def _transact(self, write: Callable[[], object], *, sync: bool, size_bytes: int = 0) -> None:
        self.monitor.check()
        connection, begun = self._connection, False
        try:
            synchronous = "FULL" if sync else "NORMAL"
            if synchronous != self._synchronous:
                connection.execute(f"PRAGMA synchronous = {synchronous}")
                self._synchronous = synchronous
            connection.execute("BEGIN IMMEDIATE")
            write()
            begun = True
            connection.execute("COMMIT")
        except BaseException as error:
            self.ledger.rolled_back()
            self._roll_back()
            if isinstance(error, sqlite3.Error) or begun:
                raise translate_write(error, self.path, self.monitor, begun=begun) from error
            raise
        self._logged_bytes += size_bytes + COMMIT_BYTES

    def _roll_back(self) -> None:
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            self.monitor.fail(f"a transaction could not be rolled back: {error}")

    def _set(self, table: str, values: Mapping[str, object]) -> None:
        rows = [(name, value, row_checksum(name, value)) for name, value in values.items()]
        self._connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", rows)

    def _note(self, counts: Counts, meta: Mapping[str, object]) -> None:
        self.set_counts(counts)
        (oldest,) = self._connection.execute("SELECT min(id) FROM episodes").fetchone()
        if oldest is not None:
            # A recovery may find deleted episodes in the file's free pages.
            meta = {OLDEST_KEY: oldest, **meta}
        self.set_meta({"commits": self.commits + 1, **meta})

    def _forget(self, episode_ids: Iterable[int]) -> None:
        for episode_id in episode_ids:
            self._connection.execute("DELETE FROM payloads WHERE episode_id = ?", (episode_id,))
            self._connection.execute("DELETE FROM episodes WHERE id = ?", (episode_id,))

    def _apply(self, change: Change) -> None:
        self._forget(change.evicted)
        if change.schema is not None:
            self.set_meta({"schema": schema_text(change.schema)})
        if change.insert is None:
            return
        row = change.insert.row
        self.insert_episode(row, change.insert.payloads)
        if row.key is not None:
            self.ledger.remember(row.key, row.digest, row.id)
