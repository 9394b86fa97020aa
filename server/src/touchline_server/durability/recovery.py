"""Recovery of a damaged store: reads its rows from the pages themselves and writes those that are whole to a new file.

Only a row's own checksum decides, and an episode's also covers its columns. So it does not matter what else of the file is left: a header,
the structures that lead to the row, a log, the end of the file.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from touchline_protos import Counts
from touchline_protos.files.locks import sync
from touchline_protos.files.sqlite import row_checksum
from touchline_server.durability.data_dir import MARK_NAME, DataDir, DurabilityMark, boot_id
from touchline_server.durability.database import COUNT_NAMES, FILE_NAME, GENERATION_KEY, OLDEST_KEY, TABLES, Database
from touchline_server.durability.group_commit import MAX_GROUP_BYTES
from touchline_server.durability.journal import ID_BLOCK
from touchline_server.durability.pages import MAGIC, Cell, PageFile, Value
from touchline_server.durability.records import EpisodeRow, numpy_dtype, payloads_of, schema_of, schema_text
from touchline_server.durability.restore import as_row
from touchline_server.durability.sqlite_errors import translate
from touchline_server.errors import DamagedStoreError, InvalidEpisodeError, ReplayError, StorageFailedError, StoreMismatchError
from touchline_server.store.dedup import DedupLedger, payload_digest, sender_name
from touchline_server.store.schema import Schema

MAX_COMBINATIONS = 64
"""Most combinations of rows that are tried for an episode, if older copies of some of its rows are found."""
_SETTINGS = ("commits", "next_id", "row_convention", GENERATION_KEY)
"""Names that every store has in ``meta``."""
_RETURN, _TIME = 7, 8
"""Columns of ``episodes`` that hold floats: SQLite stores 3.0 as 3."""

Progress = Callable[[int, int], None]


@dataclass
class Recovery:
    """The result of a recovery."""

    episodes: int = 0
    """Number of episodes kept."""
    steps: int = 0
    """Number of their steps."""
    lost: list[str] = field(default_factory=list)
    """One line for each thing that is lost, or may be incomplete."""
    replaced: bool = False
    """Whether the new file has replaced the old one."""


def recover(data_dir: Path, progress: Progress | None = None, *, accept_loss: bool = False) -> Recovery:
    """Writes what is whole to a new database, and keeps the old one beside it, unchanged, under a name that ends in ``.damaged``.

    Args:
        data_dir: the folder.
        progress: called with the number of episodes done so far and the total.
        accept_loss: whether to replace the old database even if something is lost; if False, everything then stays as it was.

    Returns:
        What is kept, what is lost, and whether the new database is in place.

    Raises:
        StoreInUseError: a server uses the folder.
        StorageFailedError: there is no store, the disk is full, or there are too many old databases already.
        StoreMismatchError: the file belongs to another application, or has another format.
        DamagedStoreError: nothing of a store is left.
    """
    path = require_database(data_dir)
    fresh_path = path.with_suffix(".recovered")
    with DataDir(data_dir) as held:
        kept_as = _free_name(path)
        _remove(fresh_path)
        try:
            with PageFile(path) as pages:
                found = _Found(pages, path)
                recovery = _write(found, fresh_path, held.mark(), progress)
        except ReplayError:
            _remove(fresh_path)
            raise
        except sqlite3.Error as error:
            _remove(fresh_path)
            raise translate(error, fresh_path) from error
        except OSError as error:
            _remove(fresh_path)
            raise StorageFailedError(f"{path}: {error.strerror}; nothing was changed") from None
        if recovery.lost and not accept_loss:
            _remove(fresh_path)
            return recovery
        for suffix in ("", "-wal", "-shm"):
            source = Path(f"{path}{suffix}")
            if source.exists():
                source.rename(f"{kept_as}{suffix}")
        fresh_path.rename(path)
        (data_dir / MARK_NAME).unlink(missing_ok=True)
        sync(data_dir)
    recovery.replaced = True
    return recovery


def require_database(data_dir: Path) -> Path:
    """Returns the path of the database in a folder; raises StorageFailedError if there is none."""
    path = data_dir / FILE_NAME
    try:
        found = path.is_file()
    except OSError as error:
        raise StorageFailedError(f"{path}: {error.strerror}") from None
    if not found:
        raise StorageFailedError(f"{data_dir}: there is no {FILE_NAME}, expected the storage.data_dir of a touchline-server")
    return path


def whole_episodes(path: Path) -> tuple[int, int]:
    """Returns how many episodes and steps of a file are whole, even if SQLite cannot open it. Raises as :func:`recover` does."""
    try:
        with PageFile(path) as pages:
            found = _Found(pages, path)
            lengths = [row.length for row in found.episodes() if found.columns(row) is not None]
    except OSError as error:
        raise StorageFailedError(f"{path}: {error.strerror}") from None
    return len(lengths), sum(lengths)


class _Found:
    """Every row found in a file, by table. The data of columns are read on demand."""

    def __init__(self, pages: PageFile, path: Path) -> None:
        self._pages = pages
        self.path = path
        self._rows: dict[int, EpisodeRow] = {}
        self._payloads: dict[int, dict[int, list[Cell]]] = {}
        """Cells of each episode by row number: more than one if older copies are found."""
        self.meta: dict[str, Value] = {}
        self.counts: dict[str, int] = {}
        self.senders: dict[int, tuple[str, int, int, int]] = {}
        """Client id, incarnation, smallest number not forgotten and newest episode of each sender, by its row number."""
        self.runs: dict[tuple[int, int], int] = {}
        """Stop of each interval, by sender and start."""
        self.keys: dict[int, tuple[int, int, int]] = {}
        """Sender, sequence number and digest of each recent episode, by its id."""
        for cell in pages.cells():
            try:
                self._sort(cell, pages.row(cell))
            except (ValueError, TypeError):
                continue  # not one of the store's rows, or incomplete
        self._check_something()

    def _check_something(self) -> None:
        """Raises StoreMismatchError or DamagedStoreError if there is nothing of a store."""
        header = self._pages.page(1)
        application, version = int.from_bytes(header[68:72]), int.from_bytes(header[60:64])
        ours = header.startswith(MAGIC) and application == TABLES.application_id
        if ours and version != TABLES.version:
            raise StoreMismatchError(
                f"{self.path}: written in format {version}, this touchline-server reads format {TABLES.version}; install one that reads it"
            )
        if not (ours or self._rows or self.meta or self.counts or self.senders):
            raise DamagedStoreError(
                f"{self.path}: nothing of a touchline-server store is left in it; put a copy back, or remove {self.path.parent} or "
                "choose another storage.data_dir to start with nothing"
            )

    def schema(self) -> Schema | None:
        """Returns the schema as it was written; None if it is lost or was never fixed."""
        try:
            return schema_of(str(self.meta["schema"]))
        except (ValueError, TypeError, KeyError):
            return None

    def number(self, name: str) -> int:
        """Returns a number in ``meta``; 0 if it is lost."""
        value = self.meta.get(name)
        return value if isinstance(value, int) else 0

    def episodes(self) -> list[EpisodeRow]:
        """Returns the rows of episodes, oldest first, except for evicted ones: deleted rows may still be in the file."""
        rows = [self._rows[number] for number in sorted(self._rows)]
        oldest = self.meta.get(OLDEST_KEY)
        if isinstance(oldest, int):
            return [row for row in rows if row.id >= oldest]
        stored = self.counts.get("episodes_stored")
        return rows if stored is None else rows[len(rows) - min(stored, len(rows)) :]

    def columns(self, row: EpisodeRow) -> dict[str, np.ndarray] | None:
        """Returns an episode's columns as they were written; None if they are not whole."""
        candidates = self._payloads.get(row.id, {})
        choices = itertools.product(*(candidates[number] for number in sorted(candidates)))
        for cells in itertools.islice(choices, MAX_COMBINATIONS):
            try:
                columns = self._assemble(cells)
            except (ValueError, TypeError, MemoryError, RecursionError):
                continue
            if columns and payload_digest(columns) == row.digest and all(len(array) == row.length for array in columns.values()):
                return columns
        return None

    def _assemble(self, cells: tuple[Cell, ...]) -> dict[str, np.ndarray]:
        found: dict[str, tuple[str, str, list[bytes]]] = {}
        for cell in cells:
            _, _, column, _, dtype, shape, data = self._pages.row(cell, whole=True)
            found.setdefault(column, (dtype, shape, []))[2].append(data)  # type: ignore[arg-type]
        return {
            column: np.frombuffer(b"".join(parts), numpy_dtype(dtype)).reshape(json.loads(shape))
            for column, (dtype, shape, parts) in found.items()
        }

    def _sort(self, cell: Cell, values: list[Value]) -> None:
        """Adds a row to its table, which follows from its number of values and its checksum."""
        if cell.rowid is None:
            if len(values) in (3, 4) and row_checksum(*values[:-1]) == values[-1]:
                self._sort_indexed(values)
            return
        if not values or values[0] is not None:  # the row number, which SQLite keeps in the cell
            return
        if len(values) in (6, 7) and isinstance(values[1], int) and isinstance(values[2], str) and isinstance(values[5], str):
            copies = self._payloads.setdefault(values[1], {}).setdefault(cell.rowid, [])
            if cell not in copies:
                copies.append(cell)
            return
        values[0] = cell.rowid
        match values:
            case [number, str(client_id), int(incarnation), int(below), last_episode, checksum]:
                if row_checksum(number, client_id, incarnation, below) == checksum:
                    last_episode = last_episode if isinstance(last_episode, int) else 0
                    _, _, *older = self.senders.get(cell.rowid, (client_id, incarnation, 0, 0))
                    self.senders[cell.rowid] = (client_id, incarnation, max(below, older[0]), max(last_episode, older[1]))
            case [number, int(sender), int(sequence), int(digest), checksum]:
                if row_checksum(number, sender, sequence, digest) == checksum:
                    self.keys[cell.rowid] = (sender, sequence, digest)
            case _ if len(values) == 11:
                for position in (_RETURN, _TIME):
                    value = values[position]
                    values[position] = float(value) if isinstance(value, int) else value
                if row_checksum(*values[:-1]) == values[-1]:
                    self._rows[cell.rowid] = as_row(tuple(values), self.path)

    def _sort_indexed(self, values: list[Value]) -> None:
        match values:
            case [int(sender), int(first), int(after), _]:
                self.runs[sender, first] = max(after, self.runs.get((sender, first), 0))
            case [str(name), int(value), _] if name in COUNT_NAMES:
                self.counts[name] = max(value, self.counts.get(name, 0))
            case [str(name), value, _]:
                known = self.meta.get(name)
                # These numbers only ever grow, so the larger one is the newer.
                self.meta[name] = max(value, known) if isinstance(value, int) and isinstance(known, int) else value


def _write(found: _Found, target: Path, mark: DurabilityMark | None, progress: Progress | None) -> Recovery:
    recovery = Recovery()
    with closing(Database(target)) as fresh:
        fresh.connection.execute("BEGIN IMMEDIATE")
        ledger = _Ledger(found)
        schema, rows, written = found.schema(), found.episodes(), 0
        for position, row in enumerate(rows):
            columns = found.columns(row)
            if columns is None:
                recovery.lost.append(f"episode {row.id}: its columns are damaged or missing")
            else:
                schema = schema if schema is not None else Schema.of(columns)
                try:
                    schema.check(columns)
                except InvalidEpisodeError as error:
                    recovery.lost.append(f"episode {row.id}: {str(error).partition(';')[0]}")
                    continue
                fresh.insert_episode(row, payloads_of(columns, copy=False))
                written += sum(array.nbytes for array in columns.values())
                if written > MAX_GROUP_BYTES:
                    written = 0
                    _begin_next(fresh)
                recovery.episodes += 1
                recovery.steps += row.length
                ledger.remember(row)
            if progress is not None:
                progress(position + 1, len(rows))
        ledger.write(fresh)
        fresh.set_counts(_counts(found, recovery, rows_lost=len(recovery.lost)))
        _check_settings(found, mark, recovery)
        if found.counts.get("episodes_evicted", 1) and not _ledger_is_whole(found.path):
            recovery.lost.append("the ledger may lack rows: an episode that was evicted may be taken for new if it is sent again")
        # Far enough ahead that no id is used again, whatever the lost ones were.
        newest = max((*(row.id for row in rows), *found.keys), default=-1)
        reserved = max(found.number("next_id"), newest + 1) + ID_BLOCK
        meta: dict[str, object] = {"commits": 1, "next_id": reserved}
        meta |= {name: found.meta[name] for name in ("row_convention", GENERATION_KEY, "capacity") if found.meta.get(name) is not None}
        if schema is not None:
            meta["schema"] = schema_text(schema)
        fresh.set_meta(meta)
        fresh.connection.execute("COMMIT")
        fresh.checkpoint()  # only the file is moved, not its log
    return recovery


def _begin_next(fresh: Database) -> None:
    """Ends a transaction and begins another: in a single one, the log would grow as large as the file."""
    fresh.connection.execute("COMMIT")
    fresh.checkpoint()
    fresh.connection.execute("BEGIN IMMEDIATE")


def _counts(found: _Found, recovery: Recovery, *, rows_lost: int) -> Counts:
    """Returns the counts of what is kept; records what is missing by the old counts."""
    counts = {name: found.counts.get(name, 0) for name in COUNT_NAMES}
    if found.counts.keys() != counts.keys():
        recovery.lost.append("counts: they begin again with what is kept, and how many episodes there were is not known")
    else:
        without_row = counts["episodes_stored"] - recovery.episodes - rows_lost
        if without_row > 0:
            recovery.lost.append(f"{without_row} of {counts['episodes_stored']} episodes: nothing of them is left but their number")
    for name, stored in (("episodes", recovery.episodes), ("steps", recovery.steps)):
        added = max(counts[f"{name}_added"], stored)
        counts |= {f"{name}_added": added, f"{name}_evicted": added - stored, f"{name}_stored": stored}
    return Counts(**counts)


def _check_settings(found: _Found, mark: DurabilityMark | None, recovery: Recovery) -> None:
    for name in _SETTINGS:
        if name not in found.meta:
            what = "; the next start takes the configured one, so make sure that it is right" if name == "row_convention" else ""
            recovery.lost.append(f"the setting {name} of the file{what}")
    known = "commits" in found.meta or not found.meta
    missing = mark.commits - found.number("commits") if mark is not None and known else 0
    if mark is not None and missing > 0 and (mark.synced or mark.boot_id == boot_id()):
        recovery.lost.append(f"the last {missing} acknowledged transactions are missing")


def _ledger_is_whole(path: Path) -> bool:
    """Returns whether SQLite itself can read the whole ledger: then no row of it was overlooked."""
    try:
        with closing(Database(path, read_only=True)) as database:
            database.ledger.load(DedupLedger())
    except (ReplayError, sqlite3.Error, ValueError, TypeError):
        return False
    return True


class _Ledger:
    """What is left of a ledger, with the names of its senders."""

    def __init__(self, found: _Found) -> None:
        self._keys = DedupLedger()
        self._senders: dict[bytes, tuple[str, int]] = {}
        self._last_episodes: dict[bytes, int] = {}
        names: dict[int, bytes] = {}
        for number, (client_id, incarnation, below, last_episode) in sorted(found.senders.items(), key=lambda item: item[1][3]):
            name = names[number] = self._keys.restore(client_id, incarnation, forgotten_below=below)
            self._senders[name] = (client_id, incarnation)
            self._last_episodes[name] = last_episode
        for (sender, first), after in sorted(found.runs.items()):
            if sender in names:
                try:
                    self._keys.restore_interval(names[sender], first, after)
                except ValueError:
                    continue  # an older copy of a known interval
        for episode_id, (sender, sequence, digest) in sorted(found.keys.items()):
            if sender in names:
                self._keys.restore_recent(names[sender], sequence, digest, episode_id)

    def remember(self, row: EpisodeRow) -> None:
        """Adds an episode that is kept, if its rows of the ledger were lost."""
        if row.key is None:
            return
        try:
            if self._keys.find(row.key, row.digest) is None:
                self._keys.remember(row.key, row.digest, row.id)
        except ReplayError:
            return  # the key is known, with another payload or below a forgotten interval: it stays so
        name = sender_name(row.key.client_id, row.key.incarnation)
        self._senders[name] = (row.key.client_id, row.key.incarnation)
        self._last_episodes[name] = max(row.id, self._last_episodes.get(name, 0))

    def write(self, fresh: Database) -> None:
        """Writes the ledger to a new database."""
        numbers: dict[bytes, int] = {}
        for name, below, runs in self._keys.senders():
            number = numbers[name] = len(numbers) + 1
            fresh.ledger.insert_sender(number, *self._senders[name], forgotten_below=below, last_episode=self._last_episodes[name])
            fresh.ledger.insert_intervals(number, runs)
        for name, sequence, digest, episode_id in self._keys.recent():
            if name in numbers:
                fresh.ledger.insert_key(episode_id, numbers[name], sequence, digest)


def _free_name(path: Path) -> Path:
    for number in range(1, 1000):
        name = Path(f"{path}.damaged" if number == 1 else f"{path}.damaged-{number}")
        if not name.exists():
            return name
    raise StorageFailedError(f"{path}.damaged: there are too many of them; remove those that are not needed")


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
