"""Inspecting and repairing a spool from outside of its writer."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.spool_cases import LIMIT, damage, fill, keys_in, spooled
from touchline import SpoolError
from touchline._spool import file, maintenance
from touchline._spool.file import FILE_NAME, LOCK_NAME, FolderLock
from touchline._spool.queue import Spool
from touchline_protos.codec import Episode
from touchline_protos.files.locks import is_locked, open_private

PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: None, "not a spool: it does not exist"),
    "a file": (lambda folder: folder.write_text("x"), "not a spool: it is not a folder"),
    "an empty folder": (lambda folder: folder.mkdir(), r"not a spool: it has no spool\.db"),
    "noise": (lambda folder: _make(folder, random.Random(1).randbytes(20_000)), r"spool\.db: damaged .*move the folder"),
    "half a file": (lambda folder: _halve(folder), r"spool\.db: damaged .*move the folder"),
    "another application's": (lambda folder: _make(folder, b"", "CREATE TABLE x (y)"), "not a Touchline spool"),
    "a newer format": (lambda folder: (fill(folder, spooled(0)), _make(folder, None, "PRAGMA user_version = 7")), "written in format 7"),
}


def _make(folder: Path, content: bytes | None, statement: str = "") -> None:
    folder.mkdir(exist_ok=True)
    if content is not None:
        (folder / FILE_NAME).write_bytes(content)
    if statement:
        connection = sqlite3.connect(folder / FILE_NAME)
        connection.execute(statement)
        connection.commit()
        connection.close()


def _halve(folder: Path) -> None:
    fill(folder, *(spooled(number) for number in range(50)))
    os.truncate(folder / FILE_NAME, (folder / FILE_NAME).stat().st_size // 2)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def test_survey_tells_what_waits_what_was_refused_and_why_and_what_is_damaged(tmp_path: Path) -> None:
    before_s = time.time()
    fill(tmp_path, *(spooled(number) for number in range(9)), refused=2, table="pitch")
    damage(tmp_path, 5)

    report = maintenance.inspect(tmp_path)

    assert (report.holder, report.missing) == (None, 0)
    assert {episode.table for episode in (*report.waiting, *report.refused)} == {"pitch"}
    assert [episode.number for episode in report.waiting] == [3, 4, 6, 7, 8, 9]
    assert [(episode.number, episode.reason) for episode in report.refused] == [
        (1, "obs: as the test wants, for the 0th time"),
        (2, "obs: as the test wants, for the 1th time"),
    ]
    assert [episode.number for episode in report.damaged] == [5]
    assert all(episode.length == 11 and episode.size_bytes > 300 for episode in report.waiting)
    assert all(before_s <= episode.time_s <= time.time() for episode in report.waiting)
    assert report.disk_bytes == (tmp_path / FILE_NAME).stat().st_size


def test_survey_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "closed", spooled(0), spooled(1), refused=1)
    before = _content(tmp_path / "closed")

    maintenance.inspect(tmp_path / "closed")

    assert {name: data for name, data in _content(tmp_path / "closed").items() if not name.endswith(("-wal", "-shm"))} == before


def test_inspect_of_a_spool_in_use_does_not_disturb_its_writer(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit_bytes=LIMIT)
    counts = []
    for number in range(5):
        assert spool.put(spool.pack(spooled(number)), drop_oldest=False).kept
        report = maintenance.inspect(tmp_path)
        counts.append((len(report.waiting), report.holder, report.missing))
    taken = spool.peek()
    assert taken is not None
    spool.acknowledge(taken[0])
    counts.append((len(maintenance.inspect(tmp_path).waiting), maintenance.inspect(tmp_path).holder, 0))
    spool.close()

    assert counts == [(number, os.getpid(), 0) for number in (1, 2, 3, 4, 5, 4)]
    assert maintenance.inspect(tmp_path).holder is None


def test_survey_sees_what_a_killed_writer_left_in_the_log(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", limit_bytes=LIMIT)
    for number in range(3):
        spool.put(spool.pack(spooled(number)), drop_oldest=False)
    shutil.copytree(tmp_path / "spool", tmp_path / "killed", ignore=shutil.ignore_patterns("*-shm"))
    shutil.copytree(tmp_path / "killed", tmp_path / "log lost", ignore=shutil.ignore_patterns("*-wal"))
    spool.close()

    killed, log_lost = maintenance.inspect(tmp_path / "killed"), maintenance.inspect(tmp_path / "log lost")

    assert (len(killed.waiting), killed.missing) == (3, 0)
    assert (len(log_lost.waiting), log_lost.missing) == (0, 3)


def test_survey_of_a_file_that_a_writer_had_just_begun_finds_nothing(tmp_path: Path) -> None:
    _make(tmp_path, b"")

    report = maintenance.inspect(tmp_path)

    assert (report.waiting, report.refused, report.damaged, report.missing) == ([], [], [], 0)


@pytest.mark.parametrize("name", list(PLACES))
@pytest.mark.parametrize("act", [maintenance.inspect, maintenance.retry, lambda folder: maintenance.send(folder, "127.0.0.1:1")])
def test_folder_that_is_no_whole_spool_is_refused_with_what_to_do(tmp_path: Path, name: str, act: Callable[[Path], object]) -> None:
    make, words = PLACES[name]
    folder = tmp_path / "spool"
    make(folder)
    before = _content(folder)

    with pytest.raises(SpoolError, match=words):
        act(folder)

    after = _content(folder)
    assert after.get(FILE_NAME) == before.get(FILE_NAME)
    assert folder.exists() == (name != "nothing") and (name != "an empty folder" or not after)


def test_retried_episodes_wait_again_at_their_old_places(tmp_path: Path) -> None:
    episodes = [spooled(number) for number in range(6)]
    fill(tmp_path, *episodes, refused=3)
    damage(tmp_path, 2)

    assert keys_in(tmp_path) == [3, 4, 5]
    assert maintenance.retry(tmp_path) == 2
    report = maintenance.inspect(tmp_path)
    assert maintenance.retry(tmp_path) == 0

    assert (len(report.refused), [episode.number for episode in report.damaged]) == (0, [2])
    spool, found = Spool(tmp_path, limit_bytes=LIMIT), []
    while (taken := spool.peek()) is not None:
        assert isinstance(taken[1], Episode)
        found.append(taken[1].key)
        spool.acknowledge(taken[0])
    spool.close()
    assert found == [episodes[number].key for number in (0, 2, 3, 4, 5)]


@pytest.mark.parametrize("act", [maintenance.retry, lambda folder: maintenance.send(folder, "127.0.0.1:1")])
def test_spool_in_use_is_not_changed_from_outside(tmp_path: Path, act: Callable[[Path], object]) -> None:
    fill(tmp_path, spooled(0), spooled(1), refused=1)
    spool = Spool(tmp_path, limit_bytes=LIMIT)

    with pytest.raises(SpoolError, match=rf"is in use by process {os.getpid()}: stop that program first"):
        act(tmp_path)

    spool.close()
    assert len(maintenance.inspect(tmp_path).refused) == 1


def test_writer_that_starts_during_an_inspection_waits_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, spooled(0))
    looking = [os.open(tmp_path / LOCK_NAME, os.O_RDONLY)]
    fcntl.flock(looking[0], fcntl.LOCK_SH | fcntl.LOCK_NB)
    monkeypatch.setattr(file, "time", SimpleNamespace(sleep=lambda _: os.close(looking.pop())))

    FolderLock(tmp_path).release()

    assert looking == []


def test_lock_is_seen_while_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    os.close(open_private(path))
    before = is_locked(path)
    holder = FolderLock(tmp_path)
    held = is_locked(path)
    holder.release()

    assert (before, held, is_locked(path)) == (False, True, False)
