"""The spool's file: its content, its lock, its size, and its errors if it is damaged."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.codec_cases import IDS, INT64, episodes, same_episode
from support.fresh_process import run_in_fresh_process
from touchline import InvalidEpisodeError, SpoolError, TooLargeError
from touchline._actor.queue import PutResult, QueueTicket
from touchline._spool.file import FILE_NAME
from touchline._spool.queue import MAX_REFUSED, Spool
from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.files.sqlite import pragma

LIMIT = 4 << 20


def traced(number: int, rows: int = 20, *, width: int = 16) -> Episode:
    """Returns an episode that follows from its number."""
    rng = np.random.default_rng(number)
    columns = {"obs": rng.standard_normal((rows, width), dtype=np.float32), "reward": rng.standard_normal(rows, dtype=np.float32)}
    return Episode(columns, key=EpisodeKey("robot", 1, number), actor="left", policy_version=number)


def put(spool: Spool, episode: Episode, *, drop_oldest: bool = False) -> PutResult:
    return spool.put(spool.pack(episode), drop_oldest=drop_oldest)


def peek(spool: Spool) -> tuple[QueueTicket, Episode]:
    taken = spool.peek()
    assert taken is not None
    waiting, episode = taken
    assert isinstance(episode, Episode), episode
    return waiting, episode


def numbers(spool: Spool) -> list[int]:
    return [key.sequence for key in spool.waiting_keys()]


def fill(spool: Spool, rows: int = 500) -> int:
    """Puts episodes until the spool is full; returns how many."""
    count = 0
    while put(spool, traced(count, rows)).kept:
        count += 1
    return count


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "robots" / "spool"


@pytest.fixture
def spool(folder: Path) -> Iterator[Spool]:
    spool = Spool(folder, limit_bytes=LIMIT)
    yield spool
    spool.close()


# Keeping


@given(episode=episodes(), key=st.builds(EpisodeKey, IDS, INT64, INT64))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_episode_comes_back_exactly_in_another_process(
    tmp_path_factory: pytest.TempPathFactory, episode: Episode, key: EpisodeKey
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    episode = Episode(episode.columns, key, episode.actor, episode.policy_version)
    first = Spool(folder, limit_bytes=LIMIT)
    assert put(first, episode).kept
    first.close()

    second = Spool(folder, limit_bytes=LIMIT)
    _, found = peek(second)
    second.close()

    assert second.resumed == 1
    assert same_episode(found, episode)


def test_oldest_goes_first_and_is_forgotten_once_acknowledged(spool: Spool) -> None:
    for number in range(3):
        put(spool, traced(number))

    waiting, first = peek(spool)
    assert peek(spool)[0] == waiting, "it stays until it is acknowledged"
    spool.acknowledge(waiting)

    assert first.policy_version == 0
    assert numbers(spool) == [1, 2]


def test_episode_longer_than_a_blob_is_kept_in_parts(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_protos.files.sqlite.PART_BYTES", 10_000)
    episode = traced(7, 500)

    put(spool, episode)
    waiting, found = peek(spool)
    spool.acknowledge(waiting)

    assert same_episode(found, episode)
    assert spool._connection is not None
    assert spool._connection.execute("SELECT count(*) FROM payloads").fetchone() == (0,)


def test_only_what_must_outlive_a_power_loss_waits_for_the_disk(spool: Spool) -> None:
    assert spool._connection is not None
    assert spool._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    statements: list[str] = []
    synchronous: dict[str, int] = {}

    def note(statement: str) -> None:
        statements.append(statement)

    spool._connection.set_trace_callback(note)
    put(spool, traced(0))
    synchronous["put"] = spool._connection.execute("PRAGMA synchronous").fetchone()[0]
    spool.acknowledge(peek(spool)[0])
    synchronous["remove"] = spool._connection.execute("PRAGMA synchronous").fetchone()[0]

    assert synchronous == {"put": 2, "remove": 1}  # FULL, NORMAL
    order = [statement.split()[0] for statement in statements if statement.split()[0] in ("BEGIN", "COMMIT")]
    assert order == ["BEGIN", "COMMIT"] * 2
    assert statements.index("PRAGMA synchronous = FULL") < next(i for i, text in enumerate(statements) if text.startswith("INSERT"))


def test_episode_that_no_message_can_hold_is_refused_immediately(spool: Spool) -> None:
    episode = Episode({"obs": np.zeros((2, 3), np.complex64)}, key=EpisodeKey("robot", 1, 0))

    with pytest.raises(InvalidEpisodeError, match="obs"):
        spool.pack(episode)


def test_bool_column_that_no_server_takes_is_an_invalid_episode_and_no_damage(spool: Spool) -> None:
    column = np.array([0, 1, 2], np.uint8).view(np.bool_)
    put(spool, Episode({"flag": column}, key=EpisodeKey("robot", 1, 0)))

    taken = spool.peek()

    assert taken is not None and type(taken[1]) is InvalidEpisodeError


# Space


def test_folder_never_takes_more_than_the_limit_whatever_is_put_and_removed(folder: Path) -> None:
    rng = random.Random(1)
    spool = Spool(folder, limit_bytes=LIMIT)
    kept = largest = 0
    for number in range(300):
        kept += put(spool, traced(number, rng.choice([2, 50, 800, 5000])), drop_oldest=number % 3 == 0).kept
        largest = max(largest, sum(file.stat().st_size for file in folder.iterdir()))
        if rng.random() < 0.3 and (taken := spool.peek()) is not None:
            spool.acknowledge(taken[0])
            largest = max(largest, sum(file.stat().st_size for file in folder.iterdir()))
    spool.close()

    assert kept > 100
    assert LIMIT // 2 < largest <= LIMIT


def test_full_spool_keeps_most_of_its_limit_and_takes_nothing_more(spool: Spool) -> None:
    count = fill(spool)
    size = spool.pack(traced(0, 500)).size_bytes

    assert put(spool, traced(count, 500)) == PutResult(False)
    assert numbers(spool) == list(range(count))
    assert count * size > LIMIT // 2


def test_acknowledged_episodes_free_their_space(spool: Spool) -> None:
    count = fill(spool)

    spool.acknowledge(peek(spool)[0])
    spool.acknowledge(peek(spool)[0])

    assert put(spool, traced(count, 500)).kept
    assert numbers(spool) == list(range(2, count + 1))


def test_drop_oldest_frees_space_and_spares_the_episode_being_sent(spool: Spool) -> None:
    count = fill(spool)
    peek(spool)

    admission = put(spool, traced(count, 500), drop_oldest=True)

    assert admission.kept
    dropped = [waiting.key.sequence for waiting in admission.dropped]
    assert dropped == list(range(1, 1 + len(dropped))) and dropped
    assert {waiting.length for waiting in admission.dropped} == {500}
    assert numbers(spool) == [0, *range(1 + len(dropped), count + 1)]


def test_drop_oldest_drops_nothing_where_that_would_not_be_enough(spool: Spool) -> None:
    put(spool, traced(0, 20_000))
    peek(spool)
    put(spool, traced(1, 500))

    admission = put(spool, traced(2, 20_000), drop_oldest=True)

    assert admission == PutResult(False)
    assert numbers(spool) == [0, 1]


def test_number_of_episodes_is_bounded_where_it_was_asked_for(folder: Path) -> None:
    spool = Spool(folder, limit_bytes=LIMIT, max_pending=2)
    assert [put(spool, traced(number)).kept for number in range(3)] == [True, True, False]

    admission = put(spool, traced(3), drop_oldest=True)
    found = numbers(spool)
    spool.close()

    assert [waiting.key.sequence for waiting in admission.dropped] == [0]
    assert found == [1, 3]


def test_episode_too_large_for_an_empty_spool_is_refused_with_the_sizes(spool: Spool) -> None:
    with pytest.raises(TooLargeError, match=rf"needs \d+ bytes of spool, whose limit is {LIMIT}: raise spool_limit_bytes"):
        spool.pack(traced(0, 60_000))


def test_largest_episode_that_is_not_too_large_fits(spool: Spool) -> None:
    fits, too_large = 1, 60_000
    while too_large - fits > 1:
        rows = (fits + too_large) // 2
        try:
            spool.pack(traced(0, rows))
        except TooLargeError:
            too_large = rows
        else:
            fits = rows

    assert put(spool, traced(0, fits)).kept
    assert spool.size_bytes <= LIMIT


def test_drained_spool_returns_its_space(spool: Spool) -> None:
    count = fill(spool)
    full = spool.size_bytes

    for _ in range(count):
        spool.acknowledge(peek(spool)[0])

    assert spool.size_bytes < full // 4


def test_smaller_limit_keeps_stored_episodes_and_accepts_none_until_there_is_space(folder: Path) -> None:
    spool = Spool(folder, limit_bytes=LIMIT)
    count = fill(spool)
    spool.close()

    smaller = Spool(folder, limit_bytes=LIMIT // 2)
    refused = put(smaller, traced(count, 500))
    while not put(smaller, traced(count, 500)).kept:
        smaller.acknowledge(peek(smaller)[0])
    left = numbers(smaller)
    size = smaller.size_bytes
    smaller.close()

    assert refused == PutResult(False)
    assert left == list(range(left[0], count + 1)) and 0 < left[0] < count
    assert size <= LIMIT // 2


def test_full_disk_counts_as_a_full_spool_and_keeps_stored_episodes(spool: Spool) -> None:
    put(spool, traced(0))
    assert spool._connection is not None
    pages = spool._connection.execute("PRAGMA page_count").fetchone()[0]
    spool._connection.execute(f"PRAGMA max_page_count = {pages + 5}")  # effect of a full disk on SQLite

    full = put(spool, traced(1, 500))
    spool._connection.execute("PRAGMA max_page_count = 1000000")
    again = put(spool, traced(1, 500))

    assert full == PutResult(False)
    assert again.kept
    assert numbers(spool) == [0, 1]


def test_write_that_fails_is_reported_and_can_be_retried(spool: Spool) -> None:
    assert spool._connection is not None
    spool._connection.execute("PRAGMA query_only = ON")

    failed = put(spool, traced(0))
    spool._connection.execute("PRAGMA query_only = OFF")
    again = put(spool, traced(0))

    assert not failed.kept and isinstance(failed.error, SpoolError) and FILE_NAME in str(failed.error)
    assert again.kept
    assert numbers(spool) == [0]


# Refused ones


def test_refused_episode_leaves_the_queue_and_is_kept_with_the_reason(spool: Spool, folder: Path) -> None:
    put(spool, traced(0))
    put(spool, traced(1))

    spool.dead_letter(peek(spool)[0], InvalidEpisodeError("obs: not of the schema"))
    spool.close()
    again = Spool(folder, limit_bytes=LIMIT)
    left = numbers(again)
    again.close()

    assert left == [1] and again.resumed == 1
    with sqlite3.connect(folder / FILE_NAME) as connection:
        assert connection.execute("SELECT sequence, reason FROM episodes WHERE state = 85").fetchall() == [(0, "obs: not of the schema")]


def test_refused_episodes_are_kept_up_to_a_number(spool: Spool) -> None:
    for number in range(MAX_REFUSED + 3):
        put(spool, traced(number))
        spool.dead_letter(peek(spool)[0], InvalidEpisodeError("no"))

    assert spool._connection is not None
    kept = [number for (number,) in spool._connection.execute("SELECT sequence FROM episodes ORDER BY id")]
    assert kept == list(range(3, MAX_REFUSED + 3))


def test_refused_episodes_are_removed_before_the_spool_is_full(spool: Spool) -> None:
    put(spool, traced(0, 500))
    put(spool, traced(1, 500))
    for _ in range(2):
        spool.dead_letter(peek(spool)[0], InvalidEpisodeError("no"))

    count = fill(spool)

    assert spool._connection is not None
    assert spool._connection.execute("SELECT count(*) FROM episodes WHERE state = 85").fetchone() == (0,)
    assert numbers(spool) == list(range(count))


# One writer


def test_second_writer_on_a_folder_is_refused_and_the_first_goes_on(spool: Spool, folder: Path) -> None:
    with pytest.raises(SpoolError, match=rf"in use by another writer \(process {os.getpid()}\)"):
        Spool(folder, limit_bytes=LIMIT)

    assert put(spool, traced(0)).kept


def test_system_without_locks_is_refused_before_anything_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._spool.file.HAS_LOCKS", False)

    with pytest.raises(SpoolError, match="lacks POSIX file locks"):
        Spool(folder, limit_bytes=LIMIT)

    assert not folder.exists()


def test_lock_ends_with_the_process(folder: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from touchline._spool.queue import Spool
spool = Spool(Path({str(folder)!r}), limit_bytes=1 << 22)
print("open", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        with pytest.raises(SpoolError, match=rf"in use by another writer \(process {other.pid}\)"):
            Spool(folder, limit_bytes=LIMIT)
        other.kill()

    spool = Spool(folder, limit_bytes=LIMIT)
    assert put(spool, traced(0)).kept
    spool.close()


def test_forked_child_cannot_use_the_spool_and_leaves_it_whole(folder: Path) -> None:
    run_in_fresh_process(__file__, "check_forked_child", str(folder))


def check_forked_child(path: str) -> None:
    folder = Path(path)
    spool = Spool(folder, limit_bytes=LIMIT)
    put(spool, traced(0))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            refusals = 0
            for use in (spool.peek, lambda: Spool(folder, limit_bytes=LIMIT)):
                try:
                    use()
                except SpoolError as error:
                    refusals += "parent process" in str(error)
            other = Spool(folder.with_name("mine"), limit_bytes=LIMIT)
            code = 0 if refusals == 2 and put(other, traced(5)).kept else 2
        finally:
            os._exit(code)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with pytest.raises(SpoolError, match="in use by another writer"):
        Spool(folder, limit_bytes=LIMIT)  # the child's end has not released it
    put(spool, traced(1))
    assert numbers(spool) == [0, 1]


def test_closed_spool_raises_closed_error(spool: Spool) -> None:
    spool.close()
    spool.close()

    with pytest.raises(SpoolError, match="was closed"):
        spool.peek()


# Damaged and foreign files


def _closed(folder: Path, count: int = 6) -> Path:
    spool = Spool(folder, limit_bytes=LIMIT)
    for number in range(count):
        put(spool, traced(number, 60))
    spool.close()
    return folder / FILE_NAME


def test_newer_format_is_refused_with_what_to_do(folder: Path) -> None:
    connection = sqlite3.connect(_closed(folder))
    connection.execute("PRAGMA user_version = 3")
    connection.close()

    with pytest.raises(SpoolError, match="written in format 3, this version of touchline reads formats 1 to 2; install one that reads it"):
        Spool(folder, limit_bytes=LIMIT)


def test_other_database_is_refused_and_unchanged(folder: Path) -> None:
    folder.mkdir(parents=True)
    connection = sqlite3.connect(folder / FILE_NAME)
    connection.execute("CREATE TABLE mine (value)")
    connection.close()
    before = (folder / FILE_NAME).read_bytes()

    with pytest.raises(SpoolError, match="not a Touchline spool"):
        Spool(folder, limit_bytes=LIMIT)

    assert (folder / FILE_NAME).read_bytes() == before


def _version(folder: Path) -> int:
    with contextlib.closing(sqlite3.connect(folder / FILE_NAME)) as connection:
        return pragma(connection, "user_version")


def test_episodes_keep_their_table_when_writers_of_others_follow(folder: Path) -> None:
    for number, table in enumerate(["", "demos", "demos", "über"]):
        spool = Spool(folder, limit_bytes=LIMIT, table=table)
        assert put(spool, traced(number)).kept
        spool.close()

    spool, found = Spool(folder, limit_bytes=LIMIT, table="demos"), []
    while (taken := spool.peek()) is not None:
        found.append((taken[0].table, taken[0].key.sequence))
        spool.acknowledge(taken[0])
    spool.close()

    assert found == [("", 0), ("demos", 1), ("demos", 2), ("über", 3)]


def test_only_a_spool_of_several_tables_gets_the_format_that_older_versions_refuse(folder: Path) -> None:
    versions = []
    for table in ["demos", "demos", "online", "online"]:
        spool = Spool(folder, limit_bytes=LIMIT, table=table)
        assert put(spool, traced(0)).kept
        spool.close()
        versions.append(_version(folder))
    spool = Spool(folder, limit_bytes=LIMIT, table=None)
    while (taken := spool.peek()) is not None:
        spool.acknowledge(taken[0])
    spool.close()
    Spool(folder, limit_bytes=LIMIT, table="demos").close()

    assert versions == [1, 1, 2, 2]
    assert _version(folder) == 1


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_file_that_sqlite_cannot_read_is_refused_with_a_remedy_and_the_lock_is_released(folder: Path, damage: str) -> None:
    path = _closed(folder)
    if damage == "text":
        path.write_bytes(b"no database" * 1000)
    else:
        os.truncate(path, 5000)

    for _ in range(2):
        with pytest.raises(SpoolError, match=r"move the folder .* away"):
            Spool(folder, limit_bytes=LIMIT)


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(SpoolError, match="spool_dir"):
        Spool(tmp_path / "file" / "spool", limit_bytes=LIMIT)


def test_log_that_was_cut_is_reported_once_and_numbers_continue_after_it(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(folder, limit_bytes=LIMIT)
    for number in range(5):
        put(spool, traced(number, 60))
    killed = tmp_path / "killed"
    shutil.copytree(folder, killed)
    spool.close()
    log = killed / f"{FILE_NAME}-wal"
    os.truncate(log, log.stat().st_size // 4)

    first = Spool(killed, limit_bytes=LIMIT)
    left = numbers(first)
    put(first, traced(5, 60))
    first.close()
    second = Spool(killed, limit_bytes=LIMIT)
    after = numbers(second)
    second.close()

    assert left == list(range(len(left))) and 0 < len(left) < 5
    assert first.missing == 5 - len(left)
    assert f"the last {first.missing} episodes written to it are missing" in caplog.text
    assert second.missing == 0 and after == [*left, 5]


def test_damaged_episode_is_reported_set_aside_and_the_others_go_on(folder: Path) -> None:
    path = _closed(folder)
    payload = traced(2, 60).columns["obs"].tobytes()[:64]
    data = path.read_bytes()
    assert payload in data
    path.write_bytes(data.replace(payload, payload[:30] + bytes([payload[30] ^ 1]) + payload[31:]))  # possibly also a stale copy

    spool = Spool(folder, limit_bytes=LIMIT)
    seen = []
    while (taken := spool.peek()) is not None:
        waiting, found = taken
        seen.append((waiting.key.sequence, type(found)))
        if isinstance(found, Episode):
            spool.acknowledge(waiting)
        else:
            spool.dead_letter(waiting, found)
    spool.close()
    again = Spool(folder, limit_bytes=LIMIT)
    again.close()

    assert seen == [(number, SpoolError if number == 2 else Episode) for number in range(6)]
    assert again.resumed == 0
