"""Commands on a durable store: check it, take a consistent copy. :mod:`touchline_server.durability.recovery` repairs one."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from touchline_protos.files.locks import sync
from touchline_protos.files.sqlite import row_checksum
from touchline_server.durability.data_dir import MARK_NAME, SNAPSHOT_STAMP, DataDir, read_mark
from touchline_server.durability.database import FILE_NAME, GENERATION_KEY, Database, connect
from touchline_server.durability.records import EpisodeRow
from touchline_server.durability.recovery import Progress, require_database, whole_episodes
from touchline_server.durability.restore import as_row, read_columns
from touchline_server.durability.sqlite_errors import translate
from touchline_server.durability.table_list import TableList, read_table_list, stores_of
from touchline_server.errors import DamagedStoreError, ReplayError, StorageFailedError, StoreMismatchError
from touchline_server.store.dedup import DedupLedger
from touchline_server.store.episode_store import new_store_generation
from touchline_server.store.schema import Schema

MAX_FINDINGS = 20
"""Most lines of SQLite's own check that are reported."""


@dataclass
class CheckReport:
    """What was found in a store."""

    episodes: int = 0
    """Number of episodes that are whole."""
    steps: int = 0
    """Number of their steps."""
    damage: list[str] = field(default_factory=list)
    """One line for each thing that is not as it was written."""


def check(data_dir: Path, progress: Progress | None = None) -> CheckReport:
    """Verifies SQLite's structures, every episode's checksum, the ledger and the counts. Changes nothing; a server may be running.

    Raises:
        StorageFailedError: there is no store, or it cannot be read at all.
        StoreMismatchError: it has another format, or is not a Touchline store.
        DamagedStoreError: nothing of a store is left in it.
    """
    path = require_database(data_dir)
    report = CheckReport()
    try:
        database = Database(path, read_only=True)
    except (DamagedStoreError, StoreMismatchError) as error:
        report.episodes, report.steps = whole_episodes(path)
        report.damage.append(f"SQLite cannot open it: {str(error).partition(';')[0]}")
        return report
    try:
        database.connection.execute("BEGIN")  # a consistent state, whatever a server adds meanwhile
        commits = _number(database, "commits")
        for (line,) in _guarded(database.connection, f"PRAGMA integrity_check({MAX_FINDINGS})", report):
            if line != "ok":
                report.damage.append(f"SQLite: {line}")
        _check_episodes(database, report, progress)
        _check_rest(database, report)
    finally:
        database.close()
    mark = read_mark(data_dir)
    if mark is not None and mark.commits > commits and not _is_held(data_dir):
        report.damage.append(f"the last {mark.commits - commits} acknowledged transactions are missing")
    return report


def snapshot_all(data_dir: Path, target: Path) -> list[Path]:
    """Copies the store of every table, each as :func:`snapshot` does, and the list of the tables that were created at run time.

    Returns:
        The copies' files.

    Raises:
        StorageFailedError: as :func:`snapshot`. What was copied before is complete.
    """
    stores, created = stores_of(data_dir) or {"": data_dir}, read_table_list(data_dir)
    files = [snapshot(store, target / name) for name, store in stores.items()]
    if created:
        TableList(target, hold=False).write(created)
    return files


def snapshot(data_dir: Path, target: Path) -> Path:
    """Copies a consistent state of a store, even while a server uses it: adding and sampling continue. The copy has its own generation.

    Returns:
        The copy's file: its folder is a data_dir that a server can start on.

    Raises:
        StorageFailedError: there is no store, no space for the copy, or the folder has a store already.
    """
    path = require_database(data_dir)
    file = target / FILE_NAME
    unfinished = target / f"{FILE_NAME}.unfinished"
    try:
        target.mkdir(parents=True, exist_ok=True)
        if file.exists() or (target / MARK_NAME).exists():
            raise StorageFailedError(f"{file} exists already; choose another folder")
        unfinished.unlink(missing_ok=True)
        source, copy = connect(path), connect(unfinished)
        try:
            # All pages in one step, so that commits meanwhile, which go to the log, do not restart the copy.
            source.backup(copy, pages=-1)
            # From here on, the two use the same ids for different episodes.
            generation = new_store_generation()
            copy.execute(
                "INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", (GENERATION_KEY, generation, row_checksum(GENERATION_KEY, generation))
            )
            copy.execute("PRAGMA journal_mode = DELETE")
        finally:
            copy.close()
            source.close()
        sync(unfinished)
        unfinished.rename(file)
        sync(target)
    except sqlite3.Error as error:
        raise translate(error, path) from error
    except OSError as error:
        raise StorageFailedError(f"{target}: {error.strerror}") from None
    with contextlib.suppress(OSError):  # the copy is complete, also of a folder that cannot be written
        (data_dir / SNAPSHOT_STAMP).touch()
    return file


def _guarded(connection: sqlite3.Connection, query: str, report: CheckReport, *arguments: object) -> Iterator[tuple[object, ...]]:
    """Yields a query's rows as far as SQLite can read them; records the error at which it stops."""
    try:
        yield from connection.execute(query, arguments)
    except (sqlite3.Error, OverflowError) as error:
        finding = f"SQLite: {error} ({query})"
        if finding not in report.damage:
            report.damage.append(finding)


def _check_episodes(database: Database, report: CheckReport, progress: Progress | None) -> None:
    numbers = [row[0] for row in _guarded(database.connection, "SELECT id FROM episodes ORDER BY id", report)]
    schema = _schema(database, report)
    for position, number in enumerate(numbers):
        whole = _read_whole(database, int(str(number)), schema, report)
        if whole is not None:
            report.episodes += 1
            report.steps += whole[0].length
        if progress is not None:
            progress(position + 1, len(numbers))


def _check_rest(database: Database, report: CheckReport) -> None:
    try:
        database.ledger.load(DedupLedger())
        damage, counts = database.damaged_values(), database.counts()
    except (ReplayError, sqlite3.Error, TypeError, ValueError) as error:
        report.damage.append(str(error))
        return
    if damage:
        report.damage += damage
        return
    for name, found in (("episodes", report.episodes), ("steps", report.steps)):
        added, evicted, stored = (getattr(counts, f"{name}_{what}") for what in ("added", "evicted", "stored"))
        if not found == stored == added - evicted:
            report.damage.append(f"{found} whole {name}, expected {stored} by the counts")


def _schema(database: Database, report: CheckReport) -> Schema | None:
    try:
        if any(line.startswith("meta: 'schema'") for line in database.damaged_values()):
            return None  # reported with the others; each episode knows its own columns
        return database.schema()
    except (DamagedStoreError, sqlite3.Error) as error:
        report.damage.append(str(error))
        return None


def _read_whole(
    database: Database, number: int, schema: Schema | None, report: CheckReport
) -> tuple[EpisodeRow, dict[str, np.ndarray]] | None:
    """Returns an episode; records the damage and returns None if it is not as it was written."""
    try:
        values = database.connection.execute("SELECT * FROM episodes WHERE id = ?", (number,)).fetchone()
        if values is None:
            raise DamagedStoreError("its row cannot be found again")
        row = as_row(values, database.path)
        columns = read_columns(database.connection, row, database.path)
        if schema is not None:
            schema.check(columns)
        if any(len(array) != row.length for array in columns.values()):
            raise DamagedStoreError(f"not {row.length} rows in every column")
    except (ReplayError, sqlite3.Error, OverflowError, MemoryError) as error:
        report.damage.append(f"episode {number}: {str(error).partition(';')[0]}")
        return None
    return row, columns


def _meta(database: Database, name: str) -> object:
    try:
        return database.meta(name)
    except sqlite3.Error:
        return None


def _number(database: Database, name: str) -> int:
    value = _meta(database, name)
    return value if isinstance(value, int) else 0


def _is_held(data_dir: Path) -> bool:
    """Returns whether a server uses the folder: its mark is then ahead of the state that was read."""
    try:
        DataDir(data_dir).close()
    except ReplayError:
        return True
    return False
