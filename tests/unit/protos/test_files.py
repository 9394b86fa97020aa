"""What a spool's and a durable store's files have in common: what a file says that it is, its blobs' parts, and the lock beside it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from touchline_protos.files import sqlite
from touchline_protos.files.locks import lock, open_private
from touchline_protos.files.sqlite import FormatError, SqliteFormat, parts, pragma

TABLES = SqliteFormat(application_id=77, version=3, page_bytes=8192, statements="CREATE TABLE things (name TEXT);")


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(tmp_path / "file.db", isolation_level=None)
    yield connection
    connection.close()


def add_one(connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO things VALUES ('first')")


def test_empty_file_is_made_once_with_its_first_rows(connection: sqlite3.Connection) -> None:
    for _ in range(2):
        TABLES.prepare(connection, lambda: add_one(connection))

    assert connection.execute("SELECT * FROM things").fetchall() == [("first",)]
    assert [pragma(connection, name) for name in ("application_id", "user_version", "page_size", "auto_vacuum")] == [77, 3, 8192, 2]


def test_file_that_could_not_be_made_whole_is_empty(connection: sqlite3.Connection, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("killed here")

    with pytest.raises(RuntimeError):
        TABLES.prepare(connection, fail)
    connection.close()

    again = sqlite3.connect(tmp_path / "file.db", isolation_level=None)
    TABLES.prepare(again, lambda: add_one(again))
    assert again.execute("SELECT * FROM things").fetchall() == [("first",)]
    again.close()


@pytest.mark.parametrize(
    ("statement", "version"),
    [
        ("PRAGMA application_id = 78", None),
        ("PRAGMA application_id = 0", None),  # tables, and nothing that says whose
        ("PRAGMA user_version = 4", 4),
        ("PRAGMA user_version = 0", 0),
    ],
)
def test_file_of_another_kind_is_refused_and_not_changed(connection: sqlite3.Connection, statement: str, version: int | None) -> None:
    TABLES.prepare(connection)
    connection.execute(statement)
    before = connection.execute("PRAGMA data_version").fetchone(), connection.total_changes

    with pytest.raises(FormatError) as caught:
        TABLES.prepare(connection, lambda: add_one(connection))

    assert caught.value.version == version
    assert (connection.execute("PRAGMA data_version").fetchone(), connection.total_changes) == before


@pytest.mark.parametrize(("size", "expected"), [(0, [0]), (1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (11, [4, 4, 3])])
def test_parts_concatenate_to_the_bytes_and_are_within_the_limit(monkeypatch: pytest.MonkeyPatch, size: int, expected: list[int]) -> None:
    monkeypatch.setattr(sqlite, "PART_BYTES", 4)
    data = bytes(range(size))

    for given in (data, memoryview(data)):
        found = list(parts(given))
        assert [len(part) for part in found] == expected
        assert b"".join(found) == data


def test_lock_is_one_holders_until_it_closes_the_file(tmp_path: Path) -> None:
    first, second = open_private(tmp_path / "lock"), open_private(tmp_path / "lock")
    lock(first)

    with pytest.raises(BlockingIOError):
        lock(second)
    os.close(first)
    lock(second)
    os.close(second)

    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
