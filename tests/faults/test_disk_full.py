"""The disk fills under a running server: adding is refused, sampling goes on, adding resumes once there is space."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from support.durable_cases import MODES, assert_whole, contents, durable_config, keyed_episode
from support.service_calls import Caller, ServerProcess, eventually, refused
from support.small_disk import fill, mounted
from touchline_server import ReplayBuffer, StorageFullError

DISK_BYTES = 128 << 20
ROOM_BYTES = 2 << 20
"""Free space of the disk before the first episode."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", DISK_BYTES) as folder:
        yield folder


@pytest.mark.parametrize("durability", MODES)
def test_full_disk_refuses_adds_goes_on_sampling_and_resumes(durability: str, small_disk: Path, tmp_path: Path) -> None:
    data_dir, ballast = small_disk / "data", small_disk / "ballast"
    acknowledged: dict[int, int] = {}
    with (
        ServerProcess(
            tmp_path,
            TOUCHLINE_CONFIG__BUFFER_SIZE="1000000",
            TOUCHLINE_STORAGE__DATA_DIR=str(data_dir),
            TOUCHLINE_STORAGE__DURABILITY=durability,
        ) as process,
        Caller(process.address) as caller,
    ):
        ballast.write_bytes(bytes(DISK_BYTES - ROOM_BYTES))

        def fill() -> None:
            for _ in range(20_000):
                sequence = len(acknowledged)
                acknowledged[sequence] = caller.add(keyed_episode(0, sequence)).episode_id

        refusal = refused(fill)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "over-limit"), refusal
        assert refusal.retry_after_ms == "5000"
        assert f"{data_dir} is full" in refusal.details
        for _ in range(10):
            assert caller.sample(batch_size=16).episode_id.shape == (16,)

        ballast.unlink()
        resumed = []

        def add_again() -> bool:
            try:
                resumed.append(caller.add(keyed_episode(0, len(acknowledged))).episode_id)
            except grpc.RpcError:
                return False
            return True

        eventually(add_again, "adding resumes")
        acknowledged[len(acknowledged)] = resumed[0]
        process.signal(signal.SIGTERM)
        assert process.wait() == 0, process.log

    buffer = ReplayBuffer(durable_config(data_dir, capacity=1_000_000))
    found = contents(buffer)
    buffer.close()
    assert_whole(found)
    assert {sequence: episode_id for episode_id, (_, sequence, _) in found.items()} == acknowledged


@pytest.mark.parametrize("durability", MODES)
def test_start_on_a_full_disk_samples_and_adding_resumes_once_there_is_space(durability: str, small_disk: Path) -> None:
    data_dir, ballast = small_disk / "data", small_disk / "ballast"
    config = durable_config(data_dir, durability=durability)
    buffer = ReplayBuffer(config)
    for sequence in range(5):
        buffer.add_episode(keyed_episode(0, sequence))
    before = contents(buffer)
    buffer.close()
    fill(ballast)

    buffer = ReplayBuffer(config)
    assert contents(buffer) == before
    for _ in range(3):
        with pytest.raises(StorageFullError, match="is full: nothing was stored; free space there, adding goes on"):
            buffer.add_episode(keyed_episode(0, 5))
    assert buffer.sample().episode_id.shape == (8,)
    assert buffer.storage_monitor is not None and buffer.storage_monitor.state.value == "full"

    ballast.unlink()
    eventually(lambda: buffer.storage_monitor is not None and buffer.storage_monitor.state.value == "ok", "the free space is noticed")
    buffer.add_episode(keyed_episode(0, 5))
    found = contents(buffer)
    buffer.close()
    buffer = ReplayBuffer(config)
    assert contents(buffer) == found
    assert len(found) == 6
    buffer.close()
