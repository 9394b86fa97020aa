"""Every write, fsync and checkpoint of a durable store fails once or for good: no acknowledgement follows, and every answer was true.

What a killed server leaves is the folder as it is; what a power cut leaves is the files as they were synced last.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support import fault_tally
from support.durable_cases import MODES, assert_whole, contents, durable_config, keyed_episode
from support.failing_disk import RULES_VARIABLE, FailingDisk, Fault, failing_disk, kill_image, write_rules
from support.service_calls import Caller, ServerProcess, make_config, refused
from touchline import ReplayClient, UnavailableError
from touchline_server import ReplayBuffer, StorageFailedError, StorageFullError, StorageUncertainError
from touchline_server.durability import database
from touchline_server.durability.storage_state import StorageState
from touchline_server.service.app import ServerThread

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
    Fault("truncate", "-wal"),
]
BEFORE = 20
"""Number of episodes stored before the disk fails."""
DEADLINE_S = 60.0


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[FailingDisk]:
    # Small enough for checkpoints to happen among the few episodes of a test.
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
    """Returns the sequence numbers of the stored episodes, oldest first."""
    found = contents(buffer)
    assert_whole(found)
    return [sequence for _, (_, sequence, _) in sorted(found.items())]


class Account:
    """Answers that were given for each episode."""

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
        """Starts on a folder and compares its episodes; then sends all unacknowledged ones again.

        Args:
            folder: the folder after the failure.
            keeps: expected episodes: ``all`` acknowledged ones, or the ``oldest`` of them without a gap.
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
    durability: str, fault: Fault, times: int, disk: FailingDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault.call == "truncate":
        monkeypatch.setattr(database, "LOG_BYTES", 0)  # each checkpoint cuts the log
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


@pytest.mark.parametrize("durability", MODES)
def test_file_that_cannot_be_cut_ends_acknowledging(durability: str, disk: FailingDisk, tmp_path: Path) -> None:
    account = Account()
    buffer = opened(tmp_path / "data", durability)
    for sequence in range(BEFORE):
        account.add(buffer, sequence)
    buffer.clear()
    account.acknowledged.clear()
    disk.fail(Fault("truncate", "db"))
    sequence = BEFORE

    def add_until_failed() -> bool:
        nonlocal sequence
        account.add(buffer, sequence)
        sequence += 1
        return state_of(buffer) is StorageState.FAILED

    until(add_until_failed, "a file that cannot be cut was not noticed")
    known = len(account.acknowledged)
    for _ in range(10):
        add_until_failed()

    assert disk.failed.is_set() and len(account.acknowledged) == known
    assert sequences(buffer) == account.acknowledged
    kill_image(tmp_path / "data", tmp_path / "killed")
    buffer.close()
    disk.mend()
    account.check(tmp_path / "killed", keeps="oldest" if durability == "memory" else "all")


@pytest.mark.parametrize("fault", [Fault("sync", "db"), Fault("write", "db"), Fault("sync", "-wal"), Fault("write", "-wal")], ids=repr)
def test_failed_call_at_the_close_is_logged_and_loses_nothing(
    fault: Fault, disk: FailingDisk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    account = Account()
    buffer = opened(tmp_path / "data", "sync")
    for sequence in range(BEFORE):
        account.add(buffer, sequence)
    disk.fail(fault)

    buffer.close()

    assert disk.failed.is_set() and "the durable store was not closed cleanly" in caplog.text
    disk.mend()
    disk.cut_power(tmp_path / "data", tmp_path / "unpowered")
    for folder in (tmp_path / "unpowered", tmp_path / "data"):
        account.check(folder, keeps="all")


# The files themselves


REPLACED = ("touchline.db", "touchline.db-wal", "lock", "acknowledged")


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def move(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def replace(name: str) -> Callable[[Path], None]:
    def replace_file(folder: Path) -> None:
        copy = folder / "copy"
        shutil.copy(folder / name, copy)
        copy.rename(folder / name)

    return replace_file


@pytest.mark.parametrize(
    "harm",
    [remove, move, *map(replace, REPLACED)],
    ids=["all removed", "all moved", *(f"{name} replaced" for name in REPLACED)],
)
@pytest.mark.parametrize("durability", MODES)
def test_files_that_are_taken_away_end_adding_and_sampling_goes_on(durability: str, harm: Callable[[Path], None], tmp_path: Path) -> None:
    buffer = opened(tmp_path / "data", durability)
    for sequence in range(5):
        buffer.add_episode(keyed_episode(0, sequence))

    harm(tmp_path / "data")
    if durability == "memory":  # which acknowledges episodes in memory, before they are written
        with contextlib.suppress(StorageFailedError):
            buffer.add_episode(keyed_episode(0, 5))
        until(lambda: state_of(buffer) is StorageState.FAILED, "files that are gone were not noticed")
    for sequence in range(6, 10):
        with pytest.raises(StorageFailedError, match=r"in storage\.data_dir is (gone|no longer the file).*nothing was stored"):
            buffer.add_episode(keyed_episode(0, sequence))

    assert buffer.sample().episode_id.shape == (8,)
    buffer.close()


FORKING = """
import os, sys
from support.durable_cases import durable_config, keyed_episode
from touchline_server import ReplayBuffer, StorageFailedError
buffer = ReplayBuffer(durable_config(sys.argv[1], durability=sys.argv[2]))
buffer.add_episode(keyed_episode(0, 0))
child = os.fork()
if not child:
    for call in (lambda: buffer.add_episode(keyed_episode(0, 1)), lambda: buffer.table.submit(keyed_episode(0, 2)), buffer.clear):
        try:
            call()
        except StorageFailedError as error:
            print(error, flush=True)
    buffer.sample()
    buffer.close()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
buffer.add_episode(keyed_episode(0, 3))
buffer.close()
"""


@pytest.mark.parametrize("durability", MODES)
def test_forked_child_refuses_to_write_and_harms_nothing(durability: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING, str(tmp_path / "data"), durability],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.match(rf"storage\.data_dir: {tmp_path}/data is the parent process's \(process \d+\); nothing was stored", line), line
    buffer = opened(tmp_path / "data")
    assert sequences(buffer) == [0, 3]
    buffer.close()


def test_child_that_outlives_its_parent_does_not_keep_the_folder(tmp_path: Path) -> None:
    buffer = opened(tmp_path / "data")
    buffer.add_episode(keyed_episode(0, 0))
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)

    buffer.close()
    again = opened(tmp_path / "data")

    assert sequences(again) == [0]
    again.close()
    os.close(writing)
    os.waitpid(child, 0)
    os.close(reading)


def test_child_that_has_not_closed_its_copy_of_the_lock_yet_does_not_keep_the_folder(tmp_path: Path) -> None:
    buffer = opened(tmp_path / "data")
    # As in a child that was forked and has not run since.
    copies = [os.dup(int(one.name)) for one in Path("/proc/self/fd").iterdir() if one.is_symlink() and "lock" in str(one.readlink())]
    try:
        buffer.close()
        opened(tmp_path / "data").close()
    finally:
        for copy in copies:
            os.close(copy)
    assert copies


# Over the wire


def health(caller: Caller, service: str) -> tuple[int, str]:
    call = health_pb2_grpc.HealthStub(caller.channel).Check.with_call(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
    return call[0].status, str(dict(call[1].trailing_metadata()).get("touchline-health-detail", ""))


def test_health_and_info_say_that_adding_is_refused_and_goes_on_by_itself(
    disk: FailingDisk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    config = durable_config(tmp_path / "data", durability="sync")
    with ServerThread(config) as server, Caller(server.address) as caller, ReplayClient(server.address) as client:
        caller.add(keyed_episode(0, 0))
        assert health(caller, "touchline.v1.Replay/AddEpisode") == (serving, "")
        assert (client.info().storage_state, client.info().storage_reason) == ("ok", "")

        disk.fail(Fault("write", "-wal", full=True))
        assert refused(caller.add, keyed_episode(0, 1)).reason == "over-limit"
        until(lambda: health(caller, "touchline.v1.Replay/AddEpisode")[0] == not_serving, "health of a full disk")
        for service in ("", "touchline.v1.Replay"):
            status, detail = health(caller, service)
            assert status == serving and "disk that is full" in detail
        assert client.info().storage_state == "full" and "disk that is full" in client.info().storage_reason
        assert "adding is refused until there is space on the disk: " in caplog.text

        disk.mend()
        until(lambda: health(caller, "touchline.v1.Replay/AddEpisode") == (serving, ""), "health once there is space, without any add")
        assert client.info().storage_state == "ok"

        disk.fail(Fault("sync", "-wal", times=1))
        refusal = refused(caller.add, keyed_episode(0, 2))
        assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "storage-failed") and "may have been stored" in refusal.details
        until(lambda: health(caller, "touchline.v1.Replay/AddEpisode")[0] == not_serving, "health of a broken disk")
        assert "SQLITE_IOERR_FSYNC" in health(caller, "touchline.v1.Replay/AddEpisode")[1]
        assert client.info().storage_state == "failed"
        assert health(caller, "")[0] == serving
        assert caller.sample(batch_size=4).episode_id.shape == (4,)


def test_server_without_a_durable_store_serves_adding(tmp_path: Path) -> None:
    config = make_config()
    with ServerThread(config) as server, Caller(server.address) as caller, ReplayClient(server.address) as client:
        assert health(caller, "touchline.v1.Replay/AddEpisode") == (health_pb2.HealthCheckResponse.SERVING, "")
        assert client.info().storage_state == ""


def test_episode_of_a_failed_fsync_that_is_added_again_after_a_kill_is_stored_once(tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    options: dict[str, Any] = {
        "program": (str(Path(__file__).parents[1] / "support" / "failing_disk.py"),),
        "TOUCHLINE_STORAGE__DATA_DIR": str(tmp_path / "data"),
        "TOUCHLINE_STORAGE__DURABILITY": "sync",
        RULES_VARIABLE: str(rules),
    }
    episodes = [keyed_episode(0, sequence).columns for sequence in range(3)]
    with ServerProcess(tmp_path, **options) as process, ReplayClient(process.address, timeout_s=3) as client:
        client.add(episodes[0])
        write_rules(rules, Fault("sync", "-wal", times=1))
        with pytest.raises(UnavailableError, match="may have been stored: add it again with key=") as first:
            client.add(episodes[1])
        with pytest.raises(UnavailableError, match="takes nothing more until the server is started again") as second:
            client.add(episodes[2])
        assert client.sample(batch_size=4).action.shape[1] == 4
        process.signal(signal.SIGKILL)
        process.wait()
    write_rules(rules)

    with ServerProcess(tmp_path, **options) as process, ReplayClient(process.address, timeout_s=30) as client:
        assert client.num_eps == 2  # the episode of the failed fsync is stored, so "nothing was stored" would have been wrong
        for error, episode in ((first, episodes[1]), (second, episodes[2])):
            assert error.value.key is not None
            client.add(episode, key=error.value.key)
        assert client.num_eps == 3
