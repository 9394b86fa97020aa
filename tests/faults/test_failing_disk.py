"""Every write, fsync and checkpoint of a durable store fails once or for good: nothing is acknowledged after, and what was said is true.

What a killed server leaves is the folder as it is; what a power cut leaves is the files as they were synced last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fault_tally
from durable_cases import MODES, assert_whole, contents, durable_config, keyed_episode
from failing_disk import FailingDisk, Fault, failing_disk, kill_image
from touchline_server import ReplayBuffer, StorageFailedError, StorageFullError, StorageUncertainError, database
from touchline_server.storage_state import StorageState

FAULTS = [
    Fault("write", "-wal"),
    Fault("write", "-wal", done=True),
    Fault("write", "-wal", skip=3),
    Fault("sync", "-wal"),
    Fault("sync", "-wal", done=True),
    Fault("write", "db"),
    Fault("write", "db", skip=2),
    Fault("sync", "db"),
    Fault("sync", "db", done=True),
    Fault("write", "acknowledged"),
]
BEFORE = 20
"""Episodes that are stored before the disk fails."""
DEADLINE_S = 60.0


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[FailingDisk]:
    # So that the few episodes of a test see checkpoints.
    monkeypatch.setattr(database, "CHECKPOINT_BYTES", 400_000)
    monkeypatch.setattr(database, "CHECKPOINT_RETRY_BYTES", 100_000)
    with failing_disk() as disk:
        disk.synced = {}
        yield disk


def opened(folder: Path, durability: str = "batch", **storage: Any) -> ReplayBuffer:
    return ReplayBuffer(durable_config(folder, capacity=100_000, durability=durability, storage={"sync_interval_ms": 1} | storage))


def state_of(buffer: ReplayBuffer) -> StorageState:
    assert buffer.storage_monitor is not None
    return buffer.storage_monitor.state


def until(reached: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < ends, what
        time.sleep(0.001)


def sequences(buffer: ReplayBuffer) -> list[int]:
    """The sequence numbers of what is stored, oldest first."""
    found = contents(buffer)
    assert_whole(found)
    return [sequence for _, (_, sequence, _) in sorted(found.items())]


class Account:
    """What was said of each episode."""

    def __init__(self) -> None:
        self.acknowledged: list[int] = []
        self.refused: list[int] = []
        self.uncertain: list[int] = []

    def add(self, buffer: ReplayBuffer, sequence: int) -> None:
        try:
            buffer.add_episode(keyed_episode(0, sequence))
        except StorageUncertainError as error:
            assert "may have been stored" in str(error) and "nothing was stored" not in str(error)
            self.uncertain.append(sequence)
        except (StorageFailedError, StorageFullError) as error:
            assert "nothing was stored" in str(error) and "may have been stored" not in str(error)
            self.refused.append(sequence)
        else:
            self.acknowledged.append(sequence)

    def check(self, folder: Path, *, keeps: str) -> None:
        """Starts on what is left and compares; then all that was not acknowledged is sent again.

        Args:
            folder: what is left.
            keeps: ``all`` that was acknowledged, or the ``oldest`` of it without a gap.
        """
        buffer = opened(folder)
        found = sequences(buffer)
        kept = [sequence for sequence in found if sequence in set(self.acknowledged)]
        assert kept == self.acknowledged[: len(kept)]
        assert keeps == "oldest" or kept == self.acknowledged
        assert not set(found) & set(self.refused)
        assert len(found) == len(set(found))
        for sequence in (*self.acknowledged, *self.uncertain, *self.refused):
            buffer.add_episode(keyed_episode(0, sequence))
        again = sequences(buffer)
        assert len(again) == len(set(again)) and set(again) == {*self.acknowledged, *self.uncertain, *self.refused}
        buffer.close()


@pytest.mark.parametrize("times", [1, 1 << 30], ids=["once", "for-good"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.call}{fault.file}{'-done' * fault.done}{fault.skip or ''}")
@pytest.mark.parametrize("durability", MODES)
def test_failed_call_ends_acknowledging_and_what_was_said_is_true(
    durability: str, fault: Fault, times: int, disk: FailingDisk, tmp_path: Path
) -> None:
    folder, account = tmp_path / "data", Account()
    buffer = opened(folder, durability)
    for sequence in range(BEFORE):
        account.add(buffer, sequence)

    disk.fail(Fault(**{**vars(fault), "times": times}))
    after = 0
    for sequence in range(BEFORE, 1_000):
        known = state_of(buffer) is StorageState.FAILED
        account.add(buffer, sequence)
        assert not known or sequence in account.refused
        after += known
        if after == 20:
            break
        if disk.failed.is_set():
            until(lambda: state_of(buffer) is StorageState.FAILED, "a failed call was not noticed")

    assert disk.failed.is_set() and after == 20
    assert account.acknowledged[:BEFORE] == list(range(BEFORE))
    assert buffer.storage_monitor is not None and buffer.storage_monitor.reason
    assert buffer.sample().episode_id.shape == (8,)
    assert sequences(buffer) == account.acknowledged
    with pytest.raises(StorageFailedError):
        buffer.clear()
    kill_image(folder, tmp_path / "killed")
    disk.cut_power(folder, tmp_path / "unpowered")
    buffer.close()
    disk.mend()
    in_memory = durability == "memory"
    account.check(tmp_path / "killed", keeps="oldest" if in_memory else "all")
    account.check(tmp_path / "unpowered", keeps="all" if durability == "sync" else "oldest")
    account.check(folder, keeps="oldest" if in_memory else "all")
    fault_tally.note(disk_failures=1, disk_refused=len(account.refused), disk_not_known=len(account.uncertain))
