"""Restoring a table at start: reads a durable store, verifies it, and puts its episodes back into the ring."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from touchline_protos import Counts
from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.files.sqlite import row_checksum
from touchline_protos.log_lines import get_logger
from touchline_server.config.settings import Config
from touchline_server.durability.background import BackgroundCommitter
from touchline_server.durability.data_dir import DataDir, boot_id
from touchline_server.durability.database import GENERATION_KEY, Database
from touchline_server.durability.group_commit import GroupCommitter
from touchline_server.durability.journal import SqliteJournal
from touchline_server.durability.records import EpisodeRow, numpy_dtype
from touchline_server.durability.sqlite_errors import advice, translate
from touchline_server.durability.write_behind import WriteBehindCommitter
from touchline_server.errors import DamagedStoreError, InvalidEpisodeError, StoreMismatchError
from touchline_server.store.dedup import DedupLedger, payload_digest
from touchline_server.store.episode_store import EpisodeStore
from touchline_server.store.inserts import AddRequest, PlannedInsert
from touchline_server.store.schema import Schema

logger = get_logger(__name__)

CAPACITY_KEY = "capacity"
"""Name in ``meta`` of the capacity of the ring that the store was last used with."""

Progress = Callable[[int, int], None]
"""Callback with the number of rows read so far and the total."""


def open_durable(
    store: EpisodeStore, config: Config, progress: Progress | None = None, *, accept_eviction: bool = False
) -> BackgroundCommitter:
    """Locks ``storage.data_dir`` for this process, restores what is in it into the ring, and makes the store durable there.

    Args:
        store: the empty store.
        config: the configuration.
        progress: called with the number of rows read so far and the total.
        accept_eviction: whether stored episodes that do not fit into the ring may be evicted.

    Returns:
        The committer, which the caller closes.

    Raises:
        StoreInUseError: another process uses the folder.
        StoreMismatchError: it was written in another format or under another row convention, or holds more than the ring does and
            eviction is not accepted. Nothing was changed.
        DamagedStoreError: something in it is not as it was written. Nothing was changed.
        StorageFailedError: it cannot be read or written.
        TooLargeError: there is no memory for its columns.
    """
    data_dir = DataDir(config.durable_dir)
    database: Database | None = None
    try:
        _refuse_if_missing(data_dir)
        data_dir.rewrite_log()
        database = Database(data_dir.database)
        try:
            for damage in database.damaged_values():
                raise DamagedStoreError(f"{database.path}: {damage}; {advice(database.path)}")
            _check_acknowledged(data_dir, database)
            _check_convention(database, config.sampling.row_convention, store)
            restore(store, database, progress, accept_eviction=accept_eviction, key=config.key)
            _note_capacity(database, store.capacity)
        except sqlite3.Error as error:
            raise translate(error, database.path) from error
        return _attach(store, config, database, data_dir)
    except BaseException:
        if database is not None:
            database.close()
        data_dir.close()
        raise


def _attach(store: EpisodeStore, config: Config, database: Database, data_dir: DataDir) -> BackgroundCommitter:
    """Puts the journal and the committer of the configured durability behind the store."""
    storage, writes = config.storage, store.writes
    journal = SqliteJournal(
        database,
        data_dir,
        durability=storage.durability,
        sync_interval_s=storage.sync_interval_ms / 1000,
        incoming=store.incoming,
        next_id=writes.next_id,
    )
    if storage.durability == "memory":
        committer = WriteBehindCommitter(writes, journal, count_refused=store.count_refused)
        store.attach(committer, committer.journal)
        return committer
    group_committer = GroupCommitter(writes, journal)
    store.attach(group_committer, journal)
    return group_committer


def restore(
    store: EpisodeStore,
    database: Database,
    progress: Progress | None = None,
    *,
    accept_eviction: bool = False,
    key: Callable[[str, str], str] = "{}.{}".format,
) -> None:
    """Restores episodes, counts, keys and the next id into an empty store. Raises as :func:`open_durable` does.

    Args:
        store: the empty store.
        database: the open database.
        progress: called with the rows read so far and all rows.
        accept_eviction: whether stored episodes that do not fit into the ring may be evicted.
        key: function that returns the full name of a section's key, for messages.
    """
    begin_s = time.monotonic()
    schema, counts, ledger = database.schema(), database.counts(), restored_ledger(database)
    rows = list(episode_rows(database.connection, database.path))
    _check_counts(database.path, counts, rows)
    reserved = database.meta("next_id", 0)
    if not isinstance(reserved, int):
        raise DamagedStoreError(f"{database.path}: the next id is not readable; {advice(database.path)}")
    if rows and schema is None:
        raise DamagedStoreError(f"{database.path}: the schema is missing; {advice(database.path)}")
    kept = _newest(rows, store.capacity)
    dropped = rows[: len(rows) - len(kept)]
    if dropped and not accept_eviction:
        raise StoreMismatchError(_eviction_text(database, rows, dropped, store.capacity, key))
    schema = replace(schema, restored_from=str(database.path.parent)) if kept and schema is not None else None
    counts = _without(counts, dropped)
    store.writes.restore(
        _stored_episodes(database, kept, schema, progress),
        schema,
        counts=counts,
        ledger=ledger,
        next_id=max(reserved, rows[-1].id + 1 if rows else 0),
    )
    if dropped:
        _drop(database, dropped, counts, store.capacity, key)
    _log_restored(database.path, schema, counts, seconds=time.monotonic() - begin_s)


def _stored_episodes(
    database: Database, rows: Sequence[EpisodeRow], schema: Schema | None, progress: Progress | None
) -> Iterator[PlannedInsert]:
    """Yields the episodes of these rows, each verified, in the form in which the write path applies them."""
    total, read = sum(row.length for row in rows), 0
    for row in rows:
        columns = read_columns(database.connection, row, database.path)
        _check_fits(columns, row, schema, database.path)
        episode = Episode(columns, row.key, row.actor, row.policy_version)
        yield PlannedInsert(AddRequest(episode, row.digest), row.id, row.length, (), None)
        read += row.length
        if progress is not None:
            progress(read, total)


def restored_ledger(database: Database) -> DedupLedger:
    """Returns the ledger in a database. Raises as :meth:`LedgerTables.load` does."""
    ledger = DedupLedger()
    database.ledger.load(ledger)
    return ledger


def episode_rows(connection: sqlite3.Connection, path: Path) -> Iterator[EpisodeRow]:
    """Yields the rows of ``episodes``, oldest first.

    Raises:
        DamagedStoreError: a row's checksum is wrong.
    """
    for values in connection.execute("SELECT * FROM episodes ORDER BY id"):
        yield as_row(values, path)


def as_row(values: tuple[object, ...], path: Path) -> EpisodeRow:
    """Returns a row of ``episodes``. Raises as :func:`episode_rows` does."""
    *content, checksum = values
    if row_checksum(*content) != checksum:
        raise DamagedStoreError(f"{path}: the row of episode {values[0]} is damaged; {advice(path)}")
    number, client_id, incarnation, sequence, *rest = content
    key = EpisodeKey(client_id, incarnation, sequence) if client_id is not None else None  # type: ignore[arg-type]
    return EpisodeRow(number, key, *rest)  # type: ignore[arg-type]


def read_columns(connection: sqlite3.Connection, row: EpisodeRow, path: Path) -> dict[str, np.ndarray]:
    """Returns an episode's columns, [rows, ...] by dotted name: read-only views of SQLite's bytes.

    Raises:
        DamagedStoreError: they are not as they were stored.
    """
    found: dict[str, tuple[str, str, list[bytes]]] = {}
    query = "SELECT column, dtype, shape, data FROM payloads WHERE episode_id = ? ORDER BY row"
    for column, dtype, shape, data in connection.execute(query, (row.id,)):
        found.setdefault(column, (dtype, shape, []))[2].append(data)
    columns = {}
    try:
        for column, (dtype, shape, parts) in found.items():
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            columns[column] = np.frombuffer(data, numpy_dtype(dtype)).reshape(json.loads(shape))
    except (ValueError, TypeError) as error:
        raise DamagedStoreError(f"{path}: column {column!r} of episode {row.id} is damaged ({error}); {advice(path)}") from None
    if not columns or payload_digest(columns) != row.digest:
        raise DamagedStoreError(f"{path}: the payload of episode {row.id} is damaged; {advice(path)}")
    return columns


def _check_fits(columns: dict[str, np.ndarray], row: EpisodeRow, schema: Schema | None, path: Path) -> None:
    try:
        if schema is not None:
            schema.check(columns)
    except InvalidEpisodeError as error:
        raise DamagedStoreError(f"{path}: episode {row.id} does not fit the schema ({error}); {advice(path)}") from None
    if any(len(array) != row.length for array in columns.values()):
        raise DamagedStoreError(f"{path}: episode {row.id} does not have {row.length} rows in every column; {advice(path)}")


def _newest(rows: list[EpisodeRow], capacity: int) -> list[EpisodeRow]:
    free = capacity
    for position in range(len(rows) - 1, -1, -1):
        free -= rows[position].length
        if free < 0:
            return rows[position + 1 :]
    return rows


def _eviction_text(
    database: Database, rows: list[EpisodeRow], dropped: list[EpisodeRow], capacity: int, key: Callable[[str, str], str]
) -> str:
    stored, lost = sum(row.length for row in rows), sum(row.length for row in dropped)
    size, before = key("config", "buffer_size"), database.meta(CAPACITY_KEY)
    earlier = f"it was {before} when this store was last used, " if isinstance(before, int) and before != capacity else ""
    return (
        f"{size}: {capacity} rows, expected at least {stored}: {earlier}and {database.path.parent} holds {len(rows)} episodes "
        f"of {stored} rows, so this start would evict the oldest {len(dropped)} of them ({lost} rows) for good; nothing was changed. Set "
        f"{size} back, or accept it: --accept-eviction, {key('storage', 'accept_eviction')} = true, or "
        "ReplayBuffer(config, accept_eviction=True)"
    )


def _without(counts: Counts, dropped: Sequence[EpisodeRow]) -> Counts:
    """Returns the counts after these episodes are evicted."""
    steps = sum(row.length for row in dropped)
    return replace(
        counts,
        steps_stored=counts.steps_stored - steps,
        episodes_stored=counts.episodes_stored - len(dropped),
        steps_evicted=counts.steps_evicted + steps,
        episodes_evicted=counts.episodes_evicted + len(dropped),
    )


def _drop(database: Database, dropped: Sequence[EpisodeRow], counts: Counts, capacity: int, key: Callable[[str, str], str]) -> None:
    logger.warning(
        "config.buffer_size is %d rows, less than what is stored: the newest episodes are kept, the %d oldest (%d rows) are evicted, as "
        "accepted",
        capacity,
        len(dropped),
        sum(row.length for row in dropped),
    )
    database.forget([row.id for row in dropped], counts=counts)


def _log_restored(path: Path, schema: Schema | None, counts: Counts, *, seconds: float) -> None:
    if schema is None:
        logger.info("%s holds no episodes: starting empty", path)
        return
    columns = ", ".join(f"{spec.name} {spec}" for spec in schema.columns)
    stored = counts.episodes_stored, counts.steps_stored
    logger.info("restored %d episodes, %d steps from %s in %.1f s; columns: %s", *stored, path, seconds, columns)


def _note_capacity(database: Database, capacity: int) -> None:
    """Writes down the capacity, for the error of a later start with a smaller one."""
    if database.meta(CAPACITY_KEY) == capacity:
        return
    try:
        database.set_meta({CAPACITY_KEY: capacity})
    except sqlite3.Error as error:
        logger.warning("%s: the buffer size was not recorded: %s", database.path, error)  # a full disk, which the first add reports


def _check_counts(path: Path, counts: Counts, rows: Sequence[EpisodeRow]) -> None:
    for name, found in (("episodes", len(rows)), ("steps", sum(row.length for row in rows))):
        added, evicted, stored = (getattr(counts, f"{name}_{what}") for what in ("added", "evicted", "stored"))
        if not found == stored == added - evicted:
            raise DamagedStoreError(
                f"{path}: {found} {name} are there, {stored} were stored ({added} added, {evicted} evicted); {advice(path)}"
            )


def _refuse_if_missing(data_dir: DataDir) -> None:
    mark = data_dir.mark()
    if mark is not None and mark.commits and not data_dir.database.exists():
        raise DamagedStoreError(
            f"{data_dir.database} is missing, although something was stored in it; put it back, or remove the whole folder to start with "
            "nothing"
        )


def _check_acknowledged(data_dir: DataDir, database: Database) -> None:
    """Refuses a database that lacks what was acknowledged. A truncated, damaged or deleted log leaves no other trace."""
    mark, commits = data_dir.mark(), database.commits
    if mark is None or commits >= mark.commits:
        return
    lost = mark.commits - commits
    if not mark.synced and mark.boot_id != boot_id():
        logger.warning(
            "%s: the machine went down before its last %d transactions were on the disk: they are lost, as storage.durability allowed",
            database.path,
            lost,
        )
        return
    raise DamagedStoreError(
        f"{database.path}: its last {lost} transactions are missing: {database.path.name}-wal was damaged or deleted; put it back, or "
        f"{advice(database.path)}"
    )


def _check_convention(database: Database, configured: str, store: EpisodeStore) -> None:
    """Refuses a database of another row convention and adopts its generation; a new database takes both from the store."""
    found = database.meta("row_convention")
    if found is None:
        database.set_meta({"row_convention": configured, GENERATION_KEY: store.store_generation})
    elif found != configured:
        raise StoreMismatchError(
            f'{database.path}: written with sampling.row_convention = "{found}", configured is "{configured}"; set it so, or choose '
            "another storage.data_dir"
        )
    generation = database.meta(GENERATION_KEY)
    store.store_generation = generation if isinstance(generation, int) else 0
