"""What a person does with a durable store: check it, recover what is whole, take a consistent copy."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from touchline_protos.files import sync
from touchline_protos.tables import row_checksum
from touchline_server.data_dir import MARK_NAME, DataDir, Mark, read_mark
from touchline_server.database import FILE_NAME, Database, connect, translate
from touchline_server.durable import ID_BLOCK
from touchline_server.errors import DamagedStoreError, ReplayError, StorageFailedError
from touchline_server.ledger import KeyLedger, sender_name
from touchline_server.records import EpisodeRow, payloads_of, schema_text
from touchline_server.restoring import as_row, read_columns
from touchline_server.schema import Schema
from touchline_server.store import new_lineage

Progress = Callable[[int, int], None]
MAX_FINDINGS = 20
"""Lines of SQLite's own check that are told."""


@dataclass
class Findings:
    """What was found in a store."""

    episodes: int = 0
    """Those that are whole."""
    steps: int = 0
    damage: list[str] = field(default_factory=list)
    """One line for each thing that is not as it was written."""


def check(data_dir: Path, progress: Progress | None = None) -> Findings:
    """Verifies SQLite's structures, every episode's checksum, the ledger and the counts. Changes nothing; a server may be running.

    Raises:
        StorageFailedError: there is no store, or it cannot be opened at all.
        StoreMismatchError: it is of another format, or none of ours.
    """
    path = _existing(data_dir)
    findings = Findings()
    database = Database(path)
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


def recover(data_dir: Path, progress: Progress | None = None) -> Findings:
    """Puts what is whole into a fresh database and keeps the old one beside it, its name ending in ``.damaged``.

    Returns:
        What is in the fresh one, and what was not whole.

    Raises:
        StoreInUseError: a server uses it.
        StorageFailedError: there is no store, there is no room, or a recovery's leftovers are in the way.
        DamagedStoreError: nothing of it can be read.
    """
    path = _existing(data_dir)
    fresh_path = path.with_suffix(".recovered")
    with DataDir(data_dir) as held:
        kept = _free_name(path)
        fresh_path.unlink(missing_ok=True)
        findings = Findings()
        old: Database | None = None
        try:
            old = Database(path)
            _copy_whole(old, fresh_path, findings, held.mark(), progress)
        except sqlite3.Error as error:
            raise translate(error, path) from error
        finally:
            # Closing would move the log into the file that is kept as it was found; there is no other way to let go of it.
            if old is not None:
                old.close()
        for suffix in ("", "-wal", "-shm"):
            source = Path(f"{path}{suffix}")
            if source.exists():
                source.rename(f"{kept}{suffix}")
        fresh_path.rename(path)
        (data_dir / MARK_NAME).unlink(missing_ok=True)
        sync(data_dir)
    return findings


def snapshot(data_dir: Path, target: Path) -> Path:
    """Copies one moment's state of a store, also while a server uses it: adding and sampling go on. The copy has a lineage of its own.

    Returns:
        The copy's file: its folder is a data_dir that a server can start on.

    Raises:
        StorageFailedError: there is no store, no room for the copy, or one is there already.
    """
    path = _existing(data_dir)
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
            lineage = new_lineage()
            copy.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", ("lineage", lineage, row_checksum("lineage", lineage)))
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


def _existing(data_dir: Path) -> Path:
    path = data_dir / FILE_NAME
    try:
        found = path.is_file()
    except OSError as error:
        raise StorageFailedError(f"{path}: {error.strerror}") from None
    if not found:
        raise StorageFailedError(f"{data_dir}: there is no {FILE_NAME}, expected the storage.data_dir of a touchline-server")
    return path


def _free_name(path: Path) -> Path:
    for number in range(1, 1000):
        name = Path(f"{path}.damaged" if number == 1 else f"{path}.damaged-{number}")
        if not name.exists():
            return name
    raise StorageFailedError(f"{path}.damaged: there are too many of them; remove those that nobody needs")


def _guarded(connection: sqlite3.Connection, query: str, findings: Findings, *arguments: object) -> Iterator[tuple[object, ...]]:
    """Yields a query's rows up to where SQLite cannot go on, which is noted."""
    try:
        yield from connection.execute(query, arguments)
    except (sqlite3.Error, OverflowError) as error:
        finding = f"SQLite: {error} ({query})"
        if finding not in findings.damage:
            findings.damage.append(finding)


def _check_episodes(database: Database, findings: Findings, progress: Progress | None) -> None:
    numbers = [row[0] for row in _guarded(database.connection, "SELECT id FROM episodes ORDER BY id", findings)]
    schema = _schema(database, findings)
    for position, number in enumerate(numbers):
        whole = _read_whole(database, int(str(number)), schema, findings)
        if whole is not None:
            findings.episodes += 1
            findings.steps += whole[0].length
        if progress is not None:
            progress(position + 1, len(numbers))


def _check_rest(database: Database, findings: Findings) -> None:
    try:
        database.ledger.load(KeyLedger())
        damage, figures = database.damaged_values(), database.counts()
    except (ReplayError, sqlite3.Error, TypeError, ValueError) as error:
        findings.damage.append(str(error))
        return
    if damage:
        findings.damage += damage
        return
    for name, found in (("episodes", findings.episodes), ("steps", findings.steps)):
        stored = figures.get(f"{name}_stored", 0)
        if not found == stored == figures.get(f"{name}_added", 0) - figures.get(f"{name}_evicted", 0):
            findings.damage.append(f"{found} whole {name}, expected {stored} by the counts")


def _schema(database: Database, findings: Findings) -> Schema | None:
    try:
        if any(line.startswith("meta: 'schema'") for line in database.damaged_values()):
            return None  # which is told with the others; each episode says what its columns are
        return database.schema()
    except (DamagedStoreError, sqlite3.Error) as error:
        findings.damage.append(str(error))
        return None


def _read_whole(
    database: Database, number: int, schema: Schema | None, findings: Findings
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


def _copy_whole(old: Database, target: Path, findings: Findings, mark: Mark | None, progress: Progress | None) -> None:
    fresh = Database(target)
    try:
        fresh.connection.execute("BEGIN IMMEDIATE")
        schema = _schema(old, findings)
        ledger = _whole_ledger(old, findings)
        numbers = _episode_ids(old, findings)
        newest = -1
        for position, number in enumerate(numbers):
            newest = max(newest, number)
            whole = _read_whole(old, number, schema, findings)
            if whole is not None:
                row, columns = whole
                schema = schema if schema is not None else Schema.of(columns)
                fresh.insert_episode(row, payloads_of(columns, copy=False))
                findings.episodes += 1
                findings.steps += row.length
                _remember(ledger, row)
            if progress is not None:
                progress(position + 1, len(numbers))
        _write_ledger(fresh, ledger)
        commits = _number(old, "commits")
        if mark is not None and mark.commits > commits:
            findings.damage.append(f"the last {mark.commits - commits} acknowledged transactions are missing")
        fresh.set_counts(_recovered_figures(old, findings))
        # Far enough that no id is given out again, whatever the lost ones were.
        reserved = max(_number(old, "next_id"), newest + 1) + ID_BLOCK
        meta: dict[str, object] = {"commits": 1, "next_id": reserved}
        for name in ("row_convention", "lineage"):
            value = _meta(old, name)
            if value is not None:
                meta[name] = value
        if schema is not None:
            meta["schema"] = schema_text(schema)
        fresh.set_meta(meta)
        fresh.connection.execute("COMMIT")
    finally:
        fresh.close()


def _episode_ids(old: Database, findings: Findings) -> list[int]:
    """Returns every episode's id that can be found from either end of either table."""
    numbers: set[int] = set()
    for source in ("SELECT id FROM episodes", "SELECT episode_id FROM payloads"):
        for order in ("ASC", "DESC"):
            name = source.split()[1]
            numbers.update(int(str(row[0])) for row in _guarded(old.connection, f"{source} ORDER BY {name} {order}", findings))
    return sorted(numbers)


@dataclass
class _Ledger:
    """What is left of a ledger, and what its senders are called."""

    keys: KeyLedger = field(default_factory=KeyLedger)
    senders: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    """Client id and incarnation by name."""
    last_episodes: dict[bytes, int] = field(default_factory=dict)
    """The id of its newest episode by name."""


def _whole_ledger(old: Database, findings: Findings) -> _Ledger:
    ledger = _Ledger()
    names: dict[object, bytes] = {}
    lost = 0
    for number, client_id, incarnation, below, last_episode, checksum in _guarded(
        old.connection, "SELECT * FROM senders ORDER BY last_episode", findings
    ):
        if row_checksum(number, client_id, incarnation, below) == checksum:
            name = ledger.keys.restore(client_id, incarnation, forgotten_below=below)  # type: ignore[arg-type]
            names[number] = name
            ledger.senders[name] = (client_id, incarnation)  # type: ignore[assignment]
            ledger.last_episodes[name] = last_episode  # type: ignore[assignment]
        else:
            lost += 1
    for sender, first, after, checksum in _guarded(old.connection, "SELECT * FROM runs ORDER BY sender, first", findings):
        try:
            if row_checksum(sender, first, after) != checksum:
                raise ValueError
            ledger.keys.restore_run(names[sender], first, after)  # type: ignore[arg-type]
        except (KeyError, ValueError):
            lost += 1
    newest = -1
    for episode_id, sender, sequence, digest, checksum in _guarded(old.connection, "SELECT * FROM keys ORDER BY episode_id", findings):
        if sender in names and row_checksum(episode_id, sender, sequence, digest) == checksum and newest < episode_id:  # type: ignore[operator]
            ledger.keys.restore_recent(names[sender], sequence, digest, episode_id)  # type: ignore[arg-type]
            newest = episode_id  # type: ignore[assignment]
        else:
            lost += 1
    if lost:
        findings.damage.append(f"{lost} rows of the ledger: an episode that was evicted may be taken for new if it is sent again")
    return ledger


def _remember(ledger: _Ledger, row: EpisodeRow) -> None:
    """Has the ledger know an episode that is stored, where its rows of it were lost."""
    if row.key is None:
        return
    try:
        if ledger.keys.find(row.key, row.digest) is None:
            ledger.keys.remember(row.key, row.digest, row.id)
    except ReplayError:
        return  # known under this key, by another payload or beyond its gaps: it stays so
    name = sender_name(row.key.client_id, row.key.incarnation)
    ledger.senders[name] = (row.key.client_id, row.key.incarnation)
    ledger.last_episodes[name] = max(row.id, ledger.last_episodes.get(name, 0))


def _write_ledger(fresh: Database, ledger: _Ledger) -> None:
    numbers: dict[bytes, int] = {}
    for name, below, runs in ledger.keys.senders():
        number = numbers[name] = len(numbers) + 1
        fresh.ledger.insert_sender(number, *ledger.senders[name], forgotten_below=below, last_episode=ledger.last_episodes[name])
        fresh.ledger.insert_runs(number, runs)
    for name, sequence, digest, episode_id in ledger.keys.recent():
        if name in numbers:
            fresh.ledger.insert_key(episode_id, numbers[name], sequence, digest)


def _recovered_figures(old: Database, findings: Findings) -> Mapping[str, int]:
    try:
        damage = old.damaged_values()
        if damage:
            raise ValueError("; ".join(damage))
        figures = {name: int(value) for name, value in old.counts().items()}
    except (sqlite3.Error, ValueError, TypeError) as error:
        findings.damage.append(f"the counts ({error}): they begin again with what is stored")
        figures = {}
    for name, stored in (("episodes", findings.episodes), ("steps", findings.steps)):
        added = max(figures.get(f"{name}_added", 0), stored)
        figures |= {f"{name}_added": added, f"{name}_evicted": added - stored, f"{name}_stored": stored}
    return figures


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
