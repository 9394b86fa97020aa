"""Stores damaged in many ways: recover keeps each episode whose own bytes are left, and reports what is lost."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.durable_cases import bits, contents, durable_config, keyed_episode
from support.fault_tally import FLIPS, note
from touchline_protos.codec import Episode
from touchline_server import DamagedStoreError, ReplayBuffer, StorageFullError, StoreMismatchError
from touchline_server.cli import main as cli
from touchline_server.durability import maintenance, recovery
from touchline_server.durability.database import FILE_NAME, Database

EPISODES = 60
DAMAGES = max(12, FLIPS // 2)
CAPACITY = 1_000
PAGE = 8192
FRAME = PAGE + 24


def large_episode(sequence: int) -> Episode:
    """Returns an episode with a column that takes pages of its own, besides columns that share pages with others."""
    episode = keyed_episode(0, sequence)
    rng = np.random.default_rng(sequence)
    columns = episode.columns | {"obs.wide": rng.standard_normal((episode.length, 200), dtype=np.float32)}
    return replace(episode, columns=columns)


@dataclass
class Store:
    """A folder as its server left it, its episodes, and the place of each in the file."""

    folder: Path
    episodes: dict[int, Any]
    pages: dict[int, set[int]]
    """Pages of each episode, once the log is in the file."""
    frames: list[tuple[int, bool]]
    """Page of each frame of the log, and whether a transaction ends with it."""

    def whole_without(self, pages: set[int]) -> set[int]:
        """Returns the episodes without any data on these pages."""
        return {number for number, own in self.pages.items() if not own & pages}


def fill(folder: Path) -> ReplayBuffer:
    buffer = ReplayBuffer(durable_config(folder, capacity=CAPACITY, durability="sync"))
    for sequence in range(EPISODES):
        buffer.add_episode(large_episode(sequence))
    assert buffer.counts().episodes_evicted > 5
    return buffer


@cache
def ever_stored() -> dict[int, Any]:
    """Returns every episode that a store ever had, by id, as :func:`contents` returns them."""
    episodes = ((sequence, large_episode(sequence)) for sequence in range(EPISODES))
    return {sequence: (str(episode.actor), sequence, bits(episode)) for sequence, episode in episodes}


def find_pages(file: Path, episodes: dict[int, Any]) -> dict[int, set[int]]:
    """Returns the pages that hold pieces of each episode's columns or its row, found by searching for the bytes."""
    image, found = file.read_bytes(), {}
    connection = sqlite3.connect(file)
    for number in episodes:
        (time_s,) = connection.execute("SELECT time FROM episodes WHERE id = ?", (number,)).fetchone()
        pieces = [struct.pack(">d", time_s)]
        for (data,) in connection.execute("SELECT data FROM payloads WHERE episode_id = ?", (number,)):
            pieces += [data[begin : begin + 32] for begin in [*range(0, len(data) - 32, 256), len(data) - 32]]
        # Search everywhere: data that was moved within the file may also remain in its old place.
        places = [[match.start() // PAGE + 1 for match in re.finditer(re.escape(piece), image)] for piece in pieces]
        assert places[0] and sum(map(bool, places)) > 0.8 * len(places)
        found[number] = set().union(*places)
    connection.close()
    return found


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that was closed cleanly."""
    folder = tmp_path_factory.mktemp("closed") / "data"
    with closing(fill(folder)) as buffer:
        episodes = contents(buffer)
    return Store(folder, episodes, find_pages(folder / FILE_NAME, episodes), [])


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store as a killed server leaves it: the last commits are only in the log."""
    root = tmp_path_factory.mktemp("killed")
    with closing(fill(root / "living")) as buffer:
        episodes = contents(buffer)
        shutil.copytree(root / "living", root / "data")
    shutil.copytree(root / "data", root / "merged")
    connection = sqlite3.connect(root / "merged" / FILE_NAME)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    log = (root / "data" / f"{FILE_NAME}-wal").read_bytes()
    salts, frames = log[16:24], []
    for begin in range(32, len(log) - FRAME + 1, FRAME):
        if log[begin + 8 : begin + 16] == salts:
            page, commit = struct.unpack(">II", log[begin : begin + 8])
            frames.append((page, commit > 0))
    assert len(frames) > 100
    yield Store(root / "data", episodes, find_pages(root / "merged" / FILE_NAME, episodes), frames)


def overwrite(file: Path, position: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        opened.write(data)


def recover(folder: Path, store: Store, must_keep: set[int], what: str) -> dict[int, Any]:
    """Recovers a store and compares the result with its former content."""
    check_runner, data_dir = CliRunner(), ["--data-dir", str(folder)]
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(FILE_NAME) and "shm" not in path.name}
    checked = check_runner.invoke(cli.app, ["check", *data_dir])
    first = check_runner.invoke(cli.app, ["recover", *data_dir])
    assert not any(isinstance(result.exception, Exception) for result in (checked, first)), (what, checked, first)
    if first.exit_code == 1 and (folder / FILE_NAME).read_bytes() == before[FILE_NAME]:
        # Nothing was changed, not by the check either, and the advice does not lead back to the check.
        after = {name: (folder / name).read_bytes() for name in before}
        assert after == before, what
        if not must_keep and "nothing of a touchline-server store is left" in first.stderr:
            return {}
        assert "touchline-server check" not in first.stderr, what
        assert "recover --accept-loss" in first.stderr, (what, first.stderr)
        accepted = check_runner.invoke(cli.app, ["recover", "--accept-loss", *data_dir])
        assert accepted.exit_code == 0, (what, accepted.stderr, accepted.exception)
    else:
        assert first.exit_code == 0, (what, first.stderr, first.exception)

    with closing(ReplayBuffer(durable_config(folder, capacity=CAPACITY))) as buffer:
        found = contents(buffer)
        duplicates = [buffer.add_episode(large_episode(sequence)).duplicate for sequence in range(EPISODES)] if first.exit_code == 0 else []

    # Without its log a file is in an earlier state, so it may contain episodes evicted since.
    assert all(ever_stored()[number] == episode for number, episode in found.items()), what
    assert must_keep <= found.keys(), (what, sorted(must_keep - found.keys()))
    if first.exit_code == 0:  # it reported that everything was kept
        assert found == store.episodes, what
        assert all(duplicates), what
    else:
        assert maintenance.check(folder).damage == [], what
    assert checked.exit_code == 0 or f"`touchline-server recover --data-dir {folder}` keeps what is whole" in checked.stderr, what
    for name, data in before.items():
        if first.exit_code == 1:
            assert (folder / name.replace(FILE_NAME, f"{FILE_NAME}.damaged")).read_bytes() == data, what
    return found


def cut_by(share: float, extra: int = 0) -> Callable[[Path], int]:
    def cut(file: Path) -> int:
        """Returns the number of whole pages."""
        size = int(file.stat().st_size * (1 - share)) // PAGE * PAGE + extra
        os.truncate(file, size)
        return size // PAGE

    return cut


CUTS: dict[str, Callable[[Path], int]] = {
    f"{share:.0%}{' at no page' if extra else ''}": cut_by(share, extra) for share in (0.01, 0.05, 0.5, 0.95) for extra in (0, 3000)
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", list(CUTS))
def test_file_that_was_cut_keeps_every_episode_before_the_cut(name: str, padded: bool, closed: Store, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(closed.folder, folder)
    file = folder / FILE_NAME
    size = file.stat().st_size
    left = CUTS[name](file)
    if padded:
        os.truncate(file, size)
    must_keep = closed.whole_without(set(range(left + 1, size // PAGE + 1)))
    assert len(must_keep) > 20 or name.startswith(("50", "95"))

    recover(folder, closed, must_keep, name)


HEADS: dict[str, tuple[int, bytes]] = {
    "the magic": (0, bytes(16)),
    "the header": (0, bytes(100)),
    "the first page": (0, bytes(PAGE)),
    "the first page, noise": (0, random.Random(0).randbytes(PAGE)),
    "its size of pages": (16, b"\x10\x00"),
    "its count of pages": (28, b"\x00\x00\x00\x07"),
    "its free list": (32, b"\x00\x00\x00\x09\x00\x00\x00\xff"),
    "its application": (68, b"\x00\x00\x00\x07"),
}


@pytest.mark.parametrize("state", ["closed", "killed"])
@pytest.mark.parametrize("name", list(HEADS))
def test_file_that_lost_its_head_keeps_everything(name: str, state: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store: Store = request.getfixturevalue(state)
    folder = tmp_path / "data"
    shutil.copytree(store.folder, folder)
    overwrite(folder / FILE_NAME, *HEADS[name])

    assert recover(folder, store, set(store.episodes), name) == store.episodes


def test_lost_log_and_its_index(killed: Store, tmp_path: Path) -> None:
    for number, suffixes in enumerate((["-shm"], ["-wal"], ["-wal", "-shm"])):
        folder = tmp_path / f"{number}"
        shutil.copytree(killed.folder, folder)
        for suffix in suffixes:
            (folder / f"{FILE_NAME}{suffix}").unlink()

        found = recover(folder, killed, set() if "-wal" in suffixes else set(killed.episodes), f"without {suffixes}")

        assert (found == killed.episodes) == ("-wal" not in suffixes)


def damage_file(rng: random.Random, folder: Path) -> tuple[str, set[int]]:
    """Damages the main file; returns the kind of damage and the changed pages."""
    file = folder / FILE_NAME
    pages = file.stat().st_size // PAGE
    match rng.randrange(4):
        case 0:
            left = rng.randrange(pages)
            os.truncate(file, left * PAGE + rng.choice([0, rng.randrange(PAGE)]))
            return f"cut to {left} pages", set(range(left + 1, pages + 1))
        case 1:
            chosen = set(rng.sample(range(1, pages + 1), rng.randint(1, max(1, pages // 8))))
            for page in chosen:
                overwrite(file, (page - 1) * PAGE, bytes(PAGE))
            return f"pages {chosen} zeroed", chosen
        case 2:
            chosen = set(rng.sample(range(1, pages + 1), rng.randint(1, max(1, pages // 8))))
            for page in chosen:
                overwrite(file, (page - 1) * PAGE, rng.randbytes(PAGE))
            return f"pages {chosen} overwritten", chosen
        case _:
            page, size = rng.randint(1, pages), rng.choice([1, 512, 4096])
            begin = (page - 1) * PAGE + rng.randrange(PAGE)
            size = min(size, pages * PAGE - begin)
            overwrite(file, begin, rng.randbytes(size))
            return f"{size} bytes from {begin}", set(range(begin // PAGE + 1, (begin + size - 1) // PAGE + 2))


def damage_log(rng: random.Random, store: Store, folder: Path) -> tuple[str, set[int]]:
    """Damages the log; returns the kind of damage and the changed pages of the database."""
    log, frames = folder / f"{FILE_NAME}-wal", store.frames
    newest = {page: frame for frame, (page, _) in enumerate(frames)}
    ends = [frame for frame, (_, commit) in enumerate(frames) if commit]
    match rng.randrange(3):
        case 0:
            left = rng.randrange(len(frames))
            os.truncate(log, 32 + left * FRAME + rng.choice([0, rng.randrange(FRAME)]))
            # Pages of an incomplete transaction are in their earlier state, so they may refer to missing ones.
            committed = max((end for end in ends if end < left), default=-1)
            return f"log cut to {left} frames", {page for page, frame in newest.items() if frame > committed}
        case 1:
            overwrite(log, 0, bytes(32))
            return "the log's header zeroed", set()
        case _:
            chosen = set(rng.sample(range(len(frames)), rng.randint(1, 10)))
            for frame in chosen:
                # At times all of the frame, at times only its page.
                head = rng.choice([0, 24])
                overwrite(log, 32 + frame * FRAME + head, bytes(FRAME - head))
            pages = {frames[frame][0] for frame in chosen if newest[frames[frame][0]] == frame}
            if ends[-1] in chosen:
                pages |= {frames[frame][0] for frame in range(ends[-2] + 1, len(frames))}
            return f"frames {chosen} zeroed", pages


@pytest.mark.timeout(600 + 3 * FLIPS)
@pytest.mark.parametrize("state", ["closed", "killed"])
def test_random_damage_costs_the_episodes_that_it_hits_and_no_other(state: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store: Store = request.getfixturevalue(state)
    lost = whole = 0
    for seed in range(DAMAGES):
        rng = random.Random(f"{state} {seed}")
        folder = tmp_path / f"{seed}"
        shutil.copytree(store.folder, folder)
        if state == "killed" and rng.random() < 0.7:
            what, pages = damage_log(rng, store, folder)
        else:
            what, pages = damage_file(rng, folder)
            if state == "killed":
                pages -= {page for page, _ in store.frames}  # which the log replaces
        must_keep = store.whole_without(pages)
        found = recover(folder, store, must_keep, f"seed {seed}: {what}")
        lost += len(store.episodes) - len(found)
        whole += len(found)
        shutil.rmtree(folder)
    note(damaged_stores=DAMAGES, damaged_episodes=lost, whole_episodes_kept=whole)
    assert lost and whole > lost / 4


def test_what_was_cleared_or_evicted_does_not_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with closing(fill(folder)) as buffer:
        buffer.clear()
        for sequence in range(EPISODES, EPISODES + 3):
            buffer.add_episode(large_episode(sequence))
        kept = contents(buffer)
        shutil.copytree(folder, tmp_path / "killed")
    folder = tmp_path / "killed"
    # Remove the free list, so that free pages are read, too.
    overwrite(folder / FILE_NAME, 0, bytes(100))

    recovered = recovery.recover(folder, accept_loss=True)

    with closing(ReplayBuffer(durable_config(folder, capacity=CAPACITY))) as buffer:
        assert contents(buffer) == kept
    assert recovered.episodes == 3


def test_ledger_that_is_damaged_is_a_loss_where_episodes_were_evicted(closed: Store, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(closed.folder, folder)
    connection = sqlite3.connect(folder / FILE_NAME)
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'runs'").fetchone()
    connection.close()
    overwrite(folder / FILE_NAME, (page - 1) * PAGE, bytes(PAGE))

    refused = recovery.recover(folder)
    accepted = recovery.recover(folder, accept_loss=True)

    assert (refused.replaced, accepted.replaced) == (False, True)
    assert (
        refused.lost == accepted.lost == ["the ledger may lack rows: an episode that was evicted may be taken for new if it is sent again"]
    )
    assert accepted.episodes == len(closed.episodes)


def test_recover_on_a_full_disk_changes_nothing_and_leaves_nothing(closed: Store, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in closed.folder.iterdir())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, f"size={size + size // 2}".encode()) != 0:
        pytest.skip("nothing may be mounted here")
    try:
        folder = disk / "data"
        shutil.copytree(closed.folder, folder)
        overwrite(folder / FILE_NAME, 0, bytes(100))
        before = {file.name: file.read_bytes() for file in folder.iterdir()}

        with pytest.raises(StorageFullError, match="is full"):
            recovery.recover(folder, accept_loss=True)

        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    finally:
        assert libc.umount2(bytes(disk), 2) == 0


def test_recover_of_a_large_store_takes_it_in_several_transactions(closed: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    shutil.copytree(closed.folder, folder)
    overwrite(folder / FILE_NAME, 0, bytes(100))
    logs, begin_next = [], recovery._begin_next

    def note_log(fresh: Database) -> None:
        logs.append(Path(f"{fresh.path}-wal").stat().st_size)
        begin_next(fresh)

    monkeypatch.setattr(recovery, "MAX_GROUP_BYTES", 100_000)
    monkeypatch.setattr(recovery, "_begin_next", note_log)

    assert recover(folder, closed, set(closed.episodes), "in pieces") == closed.episodes
    assert len(logs) >= 5
    assert max(logs) < 500_000


FOREIGN: dict[str, Callable[[Path], object]] = {
    "noise": lambda file: file.write_bytes(random.Random(1).randbytes(100_000)),
    "zeros": lambda file: file.write_bytes(bytes(100_000)),
    "text": lambda file: file.write_text("not a database\n" * 100),
    "nothing": lambda file: file.write_bytes(b""),
    "another application's": lambda file: _make(file, "CREATE TABLE notes (text); INSERT INTO notes VALUES ('a')"),
}


def _make(file: Path, statements: str) -> None:
    connection = sqlite3.connect(file)
    connection.executescript(statements)
    connection.close()


@pytest.mark.parametrize("name", list(FOREIGN))
def test_file_with_nothing_of_ours_is_left_as_it_is_and_no_command_points_at_another(name: str, tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    FOREIGN[name](file)
    before, runner = file.read_bytes(), CliRunner()

    results = [runner.invoke(cli.app, [command, "--data-dir", str(tmp_path)]) for command in ("check", "recover")]

    assert file.read_bytes() == before
    assert results[1].exit_code == 1
    assert "nothing of a touchline-server store is left in it; put a copy back" in results[1].stderr
    assert "touchline-server check" not in results[1].stderr


def test_newer_format_is_reported_by_both(closed: Store, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(closed.folder, folder)
    _make(folder / FILE_NAME, "PRAGMA user_version = 99")

    for act in (maintenance.check, recovery.recover):
        with pytest.raises(StoreMismatchError, match="written in format 99"):
            act(folder)


def test_damage_that_nothing_reads_is_no_loss(closed: Store, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(closed.folder, folder)
    connection = sqlite3.connect(folder / FILE_NAME)
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'payloads_of_episode'").fetchone()
    connection.close()
    overwrite(folder / FILE_NAME, (page - 1) * PAGE, bytes(PAGE))
    with pytest.raises(DamagedStoreError):
        ReplayBuffer(durable_config(folder, capacity=CAPACITY))

    assert recover(folder, closed, set(closed.episodes), "the index of payloads zeroed") == closed.episodes
