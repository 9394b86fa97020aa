"""What a person does with a durable store: check it, take a consistent copy. :mod:`touchline_server.durability.recovery` mends one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from touchline_protos.files.locks import sync
from touchline_protos.files.sqlite import row_checksum
from touchline_server.durability.data_dir import MARK_NAME, DataDir, read_mark
from touchline_server.durability.database import FILE_NAME, GENERATION_KEY, Database, connect
from touchline_server.durability.records import EpisodeRow
from touchline_server.durability.recovery import Progress, existing, whole_episodes
from touchline_server.durability.restore import as_row, read_columns
from touchline_server.durability.sqlite_errors import translate
from touchline_server.errors import DamagedStoreError, ReplayError, StorageFailedError, StoreMismatchError
from touchline_server.store.dedup import DedupLedger
from touchline_server.store.episode_store import new_store_generation
from touchline_server.store.schema import Schema

MAX_FINDINGS = 20
"""Lines of SQLite's own check that are told."""


@dataclass
class CheckReport:
    """What was found in a store."""

    episodes: int = 0
    """Those that are whole."""
    steps: int = 0
    damage: list[str] = field(default_factory=list)
    """One line for each thing that is not as it was written."""


def check(data_dir: Path, progress: Progress | None = None) -> CheckReport:
    """Verifies SQLite's structures, every episode's checksum, the ledger and the counts. Changes nothing; a server may be running.

    Raises:
        StorageFailedError: there is no store, or it cannot be read at all.
        StoreMismatchError: it is of another format, or none of ours.
        DamagedStoreError: nothing of a store is left in it.
    """
    path = existing(data_dir)
    findings = CheckReport()
    try:
        database = Database(path, read_only=True)
    except (DamagedStoreError, StoreMismatchError) as error:
        findings.episodes, findings.steps = whole_episodes(path)
        findings.damage.append(f"SQLite cannot open it: {str(error).partition(';')[0]}")
        return findings
    try:
        database.connection.execute("BEGIN")  # one moment's state, whatever a server adds meanwhile
        commits = _number(database, "commits")
        for (line,) in _guarded(database.connection, f"PRAGMA integrity_check({MAX_FINDINGS})", findings):
            if line != "ok":
                findings.damage.append(f"SQLite: {line}")
        _check_episodes(database, findings, progress)
        _check_rest(database, findings)
    finally:
        database.close()
    mark = read_mark(data_dir)
    if mark is not None and mark.commits > commits and not _is_held(data_dir):
        findings.damage.append(f"the last {mark.commits - commits} acknowledged transactions are missing")
    return findings


def snapshot(data_dir: Path, target: Path) -> Path:
    """Copies one moment's state of a store, also while a server uses it: adding and sampling go on. The copy has a lineage of its own.

    Returns:
        The copy's file: its folder is a data_dir that a server can start on.

    Raises:
        StorageFailedError: there is no store, no room for the copy, or one is there already.
    """
    path = existing(data_dir)
    file = target / FILE_NAME
    unfinished = target / f"{FILE_NAME}.unfinished"
    try:
        target.mkdir(parents=True, exist_ok=True)
        if file.exists() or (target / MARK_NAME).exists():
            raise StorageFailedError(f"{file} is there already; choose another folder")
        unfinished.unlink(missing_ok=True)
        source, copy = connect(path), connect(unfinished)
        try:
            # All pages in one step: what is committed meanwhile goes to the log and does not start the copy again.
            source.backup(copy, pages=-1)
            # From here on the two give the same ids to different episodes.
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
    return file


def _guarded(connection: sqlite3.Connection, query: str, findings: CheckReport, *arguments: object) -> Iterator[tuple[object, ...]]:
    """Yields a query's rows up to where SQLite cannot go on, which is noted."""
    try:
        yield from connection.execute(query, arguments)
    except (sqlite3.Error, OverflowError) as error:
        finding = f"SQLite: {error} ({query})"
        if finding not in findings.damage:
            findings.damage.append(finding)


def _check_episodes(database: Database, findings: CheckReport, progress: Progress | None) -> None:
    numbers = [row[0] for row in _guarded(database.connection, "SELECT id FROM episodes ORDER BY id", findings)]
    schema = _schema(database, findings)
    for position, number in enumerate(numbers):
        whole = _read_whole(database, int(str(number)), schema, findings)
        if whole is not None:
            findings.episodes += 1
            findings.steps += whole[0].length
        if progress is not None:
            progress(position + 1, len(numbers))


def _check_rest(database: Database, findings: CheckReport) -> None:
    try:
        database.ledger.load(DedupLedger())
        damage, counts = database.damaged_values(), database.counts()
    except (ReplayError, sqlite3.Error, TypeError, ValueError) as error:
        findings.damage.append(str(error))
        return
    if damage:
        findings.damage += damage
        return
    for name, found in (("episodes", findings.episodes), ("steps", findings.steps)):
        added, evicted, stored = (getattr(counts, f"{name}_{what}") for what in ("added", "evicted", "stored"))
        if not found == stored == added - evicted:
            findings.damage.append(f"{found} whole {name}, expected {stored} by the counts")


def _schema(database: Database, findings: CheckReport) -> Schema | None:
    try:
        if any(line.startswith("meta: 'schema'") for line in database.damaged_values()):
            return None  # which is told with the others; each episode says what its columns are
        return database.schema()
    except (DamagedStoreError, sqlite3.Error) as error:
        findings.damage.append(str(error))
        return None


def _read_whole(
    database: Database, number: int, schema: Schema | None, findings: CheckReport
) -> tuple[EpisodeRow, dict[str, np.ndarray]] | None:
    """Returns an episode, None where it is not as it was written, which is noted."""
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
        findings.damage.append(f"episode {number}: {str(error).partition(';')[0]}")
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
    """Returns whether a server uses it: its mark is then ahead of the moment that was read."""
    try:
        DataDir(data_dir).close()
    except ReplayError:
        return True
    return False
