"""The durable store in one process: restarts, exactly once, groups, a full disk, refusals, maintenance."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.durable_cases import MODES, assert_whole, bits, contents, durable_config, keyed_episode, stored_keys
from support.service_calls import eventually
from support.store_cases import as_bits
from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.files import sqlite
from touchline_protos.types.dtypes import BFLOAT16
from touchline_server import (
    DamagedStoreError,
    InvalidEpisodeError,
    KeyConflictError,
    ReplayBuffer,
    StorageFailedError,
    StorageFullError,
    StoreInUseError,
    StoreMismatchError,
)
from touchline_server.cli import main as cli
from touchline_server.durability import background, journal, maintenance, recovery, write_behind
from touchline_server.durability.background import BackgroundCommitter
from touchline_server.durability.data_dir import DataDir
from touchline_server.durability.database import FILE_NAME
from touchline_server.durability.storage_state import StorageState
from touchline_server.store import dedup
from touchline_server.store.columns import Columns


@pytest.fixture(params=MODES)
def durability(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """Opens buffers on one folder, and closes those that a test leaves open."""
    buffers: list[ReplayBuffer] = []

    def open_buffer(**options: Any) -> ReplayBuffer:
        buffers.append(ReplayBuffer(durable_config(tmp_path / "data", **options)))
        return buffers[-1]

    yield open_buffer
    for buffer in buffers:
        buffer.close()


Opener = Callable[..., ReplayBuffer]


def committer(buffer: ReplayBuffer) -> BackgroundCommitter:
    assert buffer.table._committer is not None
    return buffer.table._committer


def limit_pages(buffer: ReplayBuffer, more: int) -> None:
    """Limits the database to ``more`` pages above its present size."""
    with buffer.store.writes.lock:
        connection = committer(buffer)._sqlite._database.connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + more}")


def free_space(buffer: ReplayBuffer) -> None:
    with buffer.store.writes.lock:
        committer(buffer)._sqlite._database.connection.execute("PRAGMA max_page_count = 1000000")


# Restart


def test_restart_restores_ring_counts_schema_and_ids(durability: str, opened: Opener) -> None:
    buffer = opened(durability=durability)
    for sequence in range(60):
        buffer.add_episode(keyed_episode(sequence % 3, sequence))
    before, counts, next_id = contents(buffer), buffer.counts(), buffer.store.writes.next_id
    buffer.close()

    buffer = opened(durability=durability)

    assert contents(buffer) == before
    assert list(before) == sorted(before)
    assert_whole(before)
    assert buffer.counts() == counts
    assert counts.episodes_evicted > 0
    assert buffer.store.writes.next_id == next_id
    with pytest.raises(InvalidEpisodeError, match="obs: an unknown column"):
        buffer.add({"obs": np.zeros((5, 2)), "action": np.zeros((5, 1)), "reward": np.zeros(5)})


def test_restart_restores_every_dtype_and_shape_bit_for_bit(opened: Opener) -> None:
    rng = np.random.default_rng(0)
    dtypes = ["?", "u1", "i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8", BFLOAT16]
    columns = {
        f"extra{number}": rng.integers(0, 2, (7, 3), dtype=np.uint8).astype(dtype)
        if dtype == "?"
        else np.frombuffer(rng.bytes(21 * np.dtype(dtype).itemsize), np.dtype(dtype)).reshape(7, 3)
        for number, dtype in enumerate(dtypes)
    }
    columns |= {"obs": np.zeros((7, 0), np.float32), "action": np.ones((7, 2, 2)), "reward": np.ones((7, 1), "<f2")}
    buffer = opened()
    buffer.add_episode(Episode(columns))
    buffer.close()

    found = contents(opened())

    assert found[0][2] == {name: as_bits(array) for name, array in columns.items()}


def test_same_seed_draws_the_same_batches_after_a_restart(opened: Opener) -> None:
    buffer = opened(capacity=2_000)
    for sequence in range(30):
        buffer.add_episode(keyed_episode(0, sequence))
    before = buffer.sample(seed=5)
    buffer.close()

    after = opened(capacity=2_000).sample(seed=5)

    assert as_bits(after.obs["state"]) == as_bits(before.obs["state"])
    assert as_bits(after.episode_id) == as_bits(before.episode_id)


def test_clear_empties_durably_and_the_next_schema_may_differ(durability: str, opened: Opener, tmp_path: Path) -> None:
    buffer = opened(durability=durability)
    for sequence in range(20):
        buffer.add_episode(keyed_episode(0, sequence))
    buffer.clear()
    other = Episode({"obs": np.ones((6, 2), np.float32), "action": np.ones((6, 1)), "reward": np.ones(6)})
    assert buffer.add_episode(other).episode_id == 20
    assert buffer.add_episode(keyed_episode(0, 3)).duplicate
    buffer.close()

    buffer = opened(durability=durability)

    assert [columns for _, _, columns in contents(buffer).values()] == [bits(other)]
    assert (buffer.counts().episodes_added, buffer.counts().episodes_evicted) == (21, 20)
    assert buffer.add_episode(keyed_episode(0, 4)).duplicate


# Exactly once


def test_retry_after_restart_and_eviction_is_a_duplicate(durability: str, opened: Opener) -> None:
    buffer = opened(durability=durability)
    ids = {sequence: buffer.add_episode(keyed_episode(1, sequence)).episode_id for sequence in range(50)}
    assert buffer.counts().episodes_evicted > 30
    buffer.close()

    buffer = opened(durability=durability)

    answers = {sequence: buffer.add_episode(keyed_episode(1, sequence)) for sequence in range(50)}
    assert all(answer.duplicate for answer in answers.values())
    assert {sequence: answer.episode_id for sequence, answer in answers.items()} == ids
    assert not buffer.add_episode(keyed_episode(1, 0, incarnation=2)).duplicate
    with pytest.raises(KeyConflictError):
        buffer.add_episode(replace(keyed_episode(1, 7), key=EpisodeKey("client-1", 1, 8)))


def ledger_state(buffer: ReplayBuffer) -> tuple[list[Any], list[Any]]:
    return list(buffer.store._ring.ledger.senders()), list(buffer.store._ring.ledger.recent())


@pytest.fixture
def little_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that soon has to forget."""
    for name, limit in (("SENDERS", 4), ("RECENT", 4), ("INTERVALS", 5), ("ALL_INTERVALS", 11)):
        monkeypatch.setattr(dedup, f"MAX_{name}", limit)


@pytest.mark.usefixtures("little_ledger")
def test_ledger_in_the_file_equals_the_one_in_memory_with_gaps_and_limits(durability: str, opened: Opener) -> None:
    buffer = opened(durability=durability)
    rng = np.random.default_rng(3)
    for sequence in rng.permutation(90)[:60]:
        with_key = replace(keyed_episode(0, int(sequence)), key=EpisodeKey(f"c{sequence % 5}", 1, int(sequence)))
        try:
            buffer.add_episode(with_key)
        except KeyConflictError:
            continue  # too far behind a forgotten gap
    kept = ledger_state(buffer)
    forgotten = buffer.store._ring.ledger.forgotten_senders, buffer.store._ring.ledger.forgotten_intervals
    buffer.close()

    assert ledger_state(opened()) == kept
    assert min(forgotten) > 0


@pytest.mark.usefixtures("little_ledger")
def test_sender_forgotten_and_seen_again_in_one_group_is_known_by_its_new_episode(opened: Opener) -> None:
    buffer = opened(durability="sync")
    buffer.add_episode(keyed_episode(0, 0))
    with buffer.store.writes.lock:
        receipts = [buffer.table.submit(keyed_episode(client, 1)) for client in (1, 2, 3, 4, 0)]
    assert not any(receipt.result(30).duplicate for receipt in receipts)  # type: ignore[union-attr]
    kept = ledger_state(buffer)
    buffer.close()

    buffer = opened()

    assert ledger_state(buffer) == kept
    assert buffer.add_episode(keyed_episode(0, 1)).duplicate


@pytest.mark.usefixtures("little_ledger")
def test_recovered_ledger_equals_the_one_before(opened: Opener, tmp_path: Path) -> None:
    buffer = opened()
    for number in range(9):
        buffer.add_episode(keyed_episode(number % 3, number // 3 * 2))
    kept = ledger_state(buffer)
    buffer.close()

    recovered = recovery.recover(tmp_path / "data")

    assert recovered.lost == []
    assert ledger_state(opened()) == kept


def test_recover_adds_stored_episodes_to_a_ledger_that_lost_them(opened: Opener, tmp_path: Path) -> None:
    buffer = opened()
    for sequence in range(6):
        buffer.add_episode(keyed_episode(sequence % 2, sequence))
    senders, recent = ledger_state(buffer)
    buffer.close()
    connection = sqlite3.connect(tmp_path / "data" / FILE_NAME)
    connection.execute("UPDATE senders SET incarnation = 9 WHERE id = 1")
    connection.execute("UPDATE keys SET digest = digest + 1 WHERE episode_id = 5")
    connection.execute("UPDATE runs SET after = after + 1 WHERE sender = 2 AND first = 3")
    connection.commit()
    connection.close()
    with pytest.raises(DamagedStoreError, match="a row of the table senders is damaged"):
        opened()

    recovered = recovery.recover(tmp_path / "data")

    assert recovered.lost == []  # nothing was ever evicted, so what the ledger knew stands in the episodes
    buffer = opened()
    assert ledger_state(buffer) == (senders, recent[:5])
    assert all(buffer.add_episode(keyed_episode(sequence % 2, sequence)).duplicate for sequence in range(6))


def test_same_key_in_one_group_is_stored_once(opened: Opener) -> None:
    buffer = opened(durability="sync")
    episode = keyed_episode(0, 0)
    with buffer.store.writes.lock:  # nothing is committed before all are queued
        receipts = [buffer.table.submit(episode) for _ in range(5)]
        other = buffer.table.submit(replace(keyed_episode(0, 1), key=episode.key))

    answers = [receipt.result(60) for receipt in receipts]  # type: ignore[union-attr]

    assert [answer.duplicate for answer in answers] == [False, True, True, True, True]
    assert {answer.episode_id for answer in answers} == {0}
    with pytest.raises(KeyConflictError):
        other.result(60)  # type: ignore[union-attr]
    assert buffer.counts().episodes_duplicate == 4


# Groups


def test_threads_share_transactions_and_every_episode_is_stored(durability: str, opened: Opener, tmp_path: Path) -> None:
    buffer = opened(durability=durability, capacity=100_000)
    start = threading.Barrier(8)

    def add(client: int) -> list[int]:
        start.wait()
        return [buffer.add_episode(keyed_episode(client, sequence)).episode_id for sequence in range(25)]

    with ThreadPoolExecutor(8) as pool:
        ids = [number for numbers in pool.map(add, range(8)) for number in numbers]
    buffer.close()

    assert sorted(ids) == list(range(200))
    found = contents(opened(capacity=100_000))
    assert len(found) == 200
    assert_whole(found)


def test_group_larger_than_the_ring_evicts_its_own_oldest(opened: Opener, tmp_path: Path) -> None:
    buffer = opened(durability="sync", capacity=100)
    with buffer.store.writes.lock:
        receipts = [buffer.table.submit(keyed_episode(0, sequence)) for sequence in range(40)]
    assert [receipt.result(60).episode_id for receipt in receipts] == list(range(40))  # type: ignore[union-attr]
    before = contents(buffer)
    buffer.close()

    assert list(stored_keys(tmp_path / "data" / "touchline.db")) == list(before)
    assert contents(opened(capacity=100)) == before


def test_torchrl_extend_is_durable_too(opened: Opener) -> None:
    from tensordict import TensorDict

    buffer = opened(durability="sync")
    data = TensorDict({"obs": np.ones((12, 2), np.float32), "action": np.ones((12, 1)), "reward": np.zeros(12)}, [12])
    buffer.as_torchrl().extend(data)
    buffer.close()

    assert opened().counts().steps_stored == 12


# The disk


@pytest.mark.parametrize("mode", ["sync", "batch"])
def test_full_disk_refuses_only_the_group_and_adding_resumes(mode: str, opened: Opener) -> None:
    buffer = opened(durability=mode, capacity=100_000)
    for sequence in range(10):
        buffer.add_episode(keyed_episode(0, sequence))
    limit_pages(buffer, 4)
    before, counts = contents(buffer), buffer.counts()

    with pytest.raises(StorageFullError, match="is full: nothing was stored; free space there"):
        for sequence in range(10, 100):
            buffer.add_episode(keyed_episode(0, sequence))
    refused_at = buffer.counts().episodes_added

    assert contents(buffer).items() >= before.items()
    assert buffer.counts().episodes_refused == counts.episodes_refused + 1
    assert buffer.sample().episode_id.shape == (8,)
    free_space(buffer)
    assert buffer.add_episode(keyed_episode(0, refused_at)).episode_id == refused_at
    found = contents(buffer)
    buffer.close()
    assert contents(opened(capacity=100_000)) == found


def test_episode_retried_on_a_full_disk_counts_as_refused_once(opened: Opener) -> None:
    buffer = opened(durability="batch", capacity=100_000)
    buffer.add_episode(keyed_episode(0, 0))
    limit_pages(buffer, 4)
    sequence = 1
    with pytest.raises(StorageFullError):
        while True:
            buffer.add_episode(keyed_episode(0, sequence))
            sequence += 1

    for _ in range(3):
        with pytest.raises(StorageFullError):
            buffer.add_episode(keyed_episode(0, sequence))

    assert buffer.counts().episodes_refused == 1


def test_full_disk_before_the_first_episode_fixes_no_schema(opened: Opener) -> None:
    buffer = opened(durability="sync")
    limit_pages(buffer, 0)

    with pytest.raises(StorageFullError):
        buffer.add({"obs": np.ones((400, 200)), "action": np.ones((400, 1)), "reward": np.ones(400)})

    assert buffer.store.schema is None
    free_space(buffer)
    buffer.add({"obs": np.ones((6, 2)), "action": np.ones((6, 1)), "reward": np.ones(6)})
    assert buffer.counts().episodes_stored == 1


def test_first_episode_that_cannot_be_copied_leaves_no_schema_behind(
    opened: Opener, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = opened(durability=durability)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("planned failure")

    with monkeypatch.context() as patch:
        patch.setattr(write_behind if durability == "memory" else journal, "make_change", fail)
        with pytest.raises(MemoryError):
            buffer.add_episode(keyed_episode(0, 0))
    other = Episode({name: np.zeros((12, 2), np.float32) for name in ("obs", "action")} | {"reward": np.zeros(12, np.float32)})

    assert buffer.store.schema is None
    assert buffer.add_episode(other).counts.episodes_stored == 1
    assert [sorted(columns) for _, _, columns in contents(buffer).values()] == [["action", "obs", "reward"]]


def test_full_disk_in_memory_mode_keeps_what_it_acknowledged_and_bounds_it(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "MAX_UNWRITTEN_PLANS", 20)
    monkeypatch.setattr(background, "RETRY_S", 0.01)
    buffer = opened(durability="memory", capacity=100_000)
    buffer.add_episode(keyed_episode(0, 0))
    limit_pages(buffer, 0)

    with pytest.raises(StorageFullError):
        for sequence in range(1, 1_000):
            buffer.add_episode(keyed_episode(0, sequence))
    acknowledged = contents(buffer)

    assert 20 <= len(acknowledged) < 1_000
    free_space(buffer)
    buffer.close()
    assert contents(opened(capacity=100_000)) == acknowledged


def test_committed_group_that_cannot_be_copied_leaves_ring_and_file_equal(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = opened(durability="sync", capacity=200)
    for sequence in range(10):
        buffer.add_episode(keyed_episode(0, sequence))
    write_rows = Columns._write_rows

    def fail(columns: Columns, name: str, first_row: int, source: np.ndarray) -> None:
        if name == "reward" and len(source) == keyed_episode(0, 11).length:
            raise MemoryError("planned failure")
        write_rows(columns, name, first_row, source)

    monkeypatch.setattr(Columns, "_write_rows", fail)
    with buffer.store.writes.lock:
        receipts = [buffer.table.submit(keyed_episode(0, sequence)) for sequence in (10, 11, 12, 12)]
    receipts[0].result(60)  # type: ignore[union-attr]
    for receipt in receipts[1:]:
        with pytest.raises(MemoryError):
            receipt.result(60)  # type: ignore[union-attr]
    monkeypatch.undo()
    buffer.add_episode(keyed_episode(0, 13))
    before, counts, known = contents(buffer), buffer.counts(), ledger_state(buffer)
    buffer.close()

    buffer = opened(capacity=200)

    assert contents(buffer) == before
    assert buffer.counts() == counts
    assert ledger_state(buffer) == known
    assert_whole(before)
    assert not any(buffer.add_episode(keyed_episode(0, sequence)).duplicate for sequence in (11, 12))


def test_episode_that_could_not_be_copied_is_stored_when_sent_again_after_a_restart(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = opened(durability="sync")
    for sequence in (0, 1):
        buffer.add_episode(keyed_episode(0, sequence))

    def fail(columns: Columns, name: str, first_row: int, source: np.ndarray) -> None:
        raise MemoryError("planned failure")

    monkeypatch.setattr(Columns, "_write_rows", fail)
    with pytest.raises(MemoryError):
        buffer.add_episode(keyed_episode(0, 2))
    monkeypatch.undo()
    buffer.close()
    buffer = opened(durability="sync")

    stored = buffer.add_episode(keyed_episode(0, 2))

    assert not stored.duplicate
    assert contents(buffer)[stored.episode_id][2] == bits(keyed_episode(0, 2))
    assert buffer.add_episode(keyed_episode(0, 2)).duplicate


def test_failed_fsync_is_reported_and_nothing_more_is_acknowledged(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = opened(durability="batch")
    failed = threading.Event()

    def fail(number: int) -> None:
        failed.set()
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        buffer.add_episode(keyed_episode(0, 0))
        assert failed.wait(60)
        eventually(lambda: committer(buffer).monitor.state is StorageState.FAILED, "the failure is noted", every_s=0.001)

    for add in (buffer.add_episode, buffer.table.submit):
        with pytest.raises(StorageFailedError, match="takes nothing more until the server is started again"):
            add(keyed_episode(0, 1))
    assert buffer.sample().episode_id.shape == (8,)


def test_column_longer_than_a_blob_is_kept_in_parts(opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "PART_BYTES", 100)
    first = opened()
    first.add_episode(keyed_episode(0, 0))
    expected = contents(first)
    first.close()
    connection = sqlite3.connect(tmp_path / "data" / FILE_NAME)
    most, longest = connection.execute("SELECT max(part), max(length(data)) FROM payloads").fetchone()
    connection.close()

    assert most > 0
    assert longest == 100
    assert contents(opened()) == expected


# Refusals


def test_second_buffer_on_the_folder_is_refused(opened: Opener) -> None:
    first = opened()

    with pytest.raises(StoreInUseError, match="in use by another touchline-server"):
        opened()

    first.close()
    opened()


def test_closed_buffer_refuses_adds(durability: str, opened: Opener) -> None:
    buffer = opened(durability=durability)
    buffer.close()

    with pytest.raises(StorageFailedError, match="closed"):
        buffer.add_episode(keyed_episode(0, 0))
    with pytest.raises(StorageFailedError, match="closed"):
        buffer.table.submit(keyed_episode(0, 0))


def test_newer_format_and_foreign_file_are_refused(opened: Opener, tmp_path: Path) -> None:
    opened().close()
    file = tmp_path / "data" / "touchline.db"
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA user_version = 3")
    connection.close()
    with pytest.raises(StoreMismatchError, match="written in format 3, this touchline-server reads format 2"):
        opened()
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA application_id = 7")
    connection.close()
    with pytest.raises(StoreMismatchError, match="not a store of touchline-server's"):
        opened()


def test_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")

    with pytest.raises(StorageFailedError, match="Not a directory"):
        DataDir(tmp_path / "file" / "data")


def test_key_beyond_sqlite_types_is_refused(opened: Opener) -> None:
    buffer = opened()

    for key in (EpisodeKey("a", 2**63, 0), EpisodeKey("a", 0, 2**63), EpisodeKey("\ud800", 0, 0)):
        with pytest.raises(InvalidEpisodeError, match=r"key\."):
            buffer.add_episode(replace(keyed_episode(0, 0), key=key))
    assert buffer.counts().episodes_refused == 3


# Maintenance


def test_snapshot_of_a_store_in_use_is_consistent(opened: Opener, tmp_path: Path) -> None:
    buffer = opened(capacity=2_000)
    for sequence in range(30):
        buffer.add_episode(keyed_episode(0, sequence))
    before = contents(buffer)

    maintenance.snapshot(tmp_path / "data", tmp_path / "copy")
    for sequence in range(30, 40):
        buffer.add_episode(keyed_episode(0, sequence))

    assert maintenance.check(tmp_path / "copy").damage == []
    copy = ReplayBuffer(durable_config(tmp_path / "copy", capacity=2_000))
    assert contents(copy) == before
    assert copy.add_episode(keyed_episode(0, 12)).duplicate
    assert copy.store.writes.next_id >= 30
    copy.close()
    with pytest.raises(StorageFailedError, match="exists already"):
        maintenance.snapshot(tmp_path / "data", tmp_path / "copy")


def test_snapshot_has_its_own_generation_because_both_continue_with_the_same_ids(opened: Opener, tmp_path: Path) -> None:
    buffer = opened()
    buffer.add_episode(keyed_episode(0, 0))

    maintenance.snapshot(tmp_path / "data", tmp_path / "copy")

    copy = ReplayBuffer(durable_config(tmp_path / "copy"))
    try:
        assert copy.store.store_generation not in (buffer.store.store_generation, 0)
        assert contents(copy) == contents(buffer)
    finally:
        copy.close()


def test_commands_check_and_copy_a_store_in_use(opened: Opener, tmp_path: Path) -> None:
    buffer, runner, data_dir = opened(), CliRunner(), str(tmp_path / "data")
    buffer.add_episode(keyed_episode(0, 0))

    copied = runner.invoke(cli.app, ["snapshot", "--data-dir", data_dir, str(tmp_path / "copy")])
    checked = [runner.invoke(cli.app, ["check", "--data-dir", folder]) for folder in (data_dir, str(tmp_path / "copy"))]
    refused = runner.invoke(cli.app, ["recover", "--data-dir", data_dir])

    assert (copied.exit_code, copied.stdout) == (0, f"{tmp_path / 'copy' / 'touchline.db'}\n")
    assert [(result.exit_code, result.stdout) for result in checked] == [(0, f"1 episodes, {buffer.size} steps are whole\n")] * 2
    assert (refused.exit_code, "is in use by another touchline-server" in refused.stderr) == (1, True)


def test_check_of_a_store_in_use_reports_and_changes_nothing(opened: Opener, tmp_path: Path) -> None:
    buffer = opened()
    for sequence in range(30):
        buffer.add_episode(keyed_episode(0, sequence))

    report = maintenance.check(tmp_path / "data")

    assert report.damage == []
    assert (report.episodes, report.steps) == (buffer.num_eps, buffer.size)
    assert not buffer.add_episode(keyed_episode(0, 30)).duplicate


def test_deleted_database_is_detected(opened: Opener, tmp_path: Path) -> None:
    buffer = opened()
    buffer.add_episode(keyed_episode(0, 0))
    buffer.close()
    os.unlink(tmp_path / "data" / "touchline.db")

    with pytest.raises(DamagedStoreError, match="is missing, although something was stored in it"):
        opened()


def test_check_of_an_unreadable_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageFailedError, match=r"File name too long|there is no touchline\.db"):
        maintenance.check(tmp_path / ("x" * 300))
