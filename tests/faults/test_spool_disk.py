"""A spool on a full or broken disk: its episodes are still sent, once each, and it reports truthfully what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from support import fault_tally
from support.client_faults import ScriptedServer, fail, trying_once
from support.failing_disk import FailingDisk, Fault, failing_disk, kill_image
from support.service_calls import eventually
from support.small_disk import fill as fill_disk
from support.small_disk import mounted
from touchline import EpisodeWriter, ReplayClient, SpoolError
from touchline._spool.queue import Spool
from touchline_protos.codec import Episode, EpisodeKey, decode_add_episode

LIMIT = 1 << 20
DISK_BYTES = 8 << 20
FAULTS = [
    Fault("write", "-wal"),
    Fault("write", "-wal", done=True),
    Fault("sync", "-wal"),
    Fault("sync", "-wal", done=True),
    Fault("write", "db"),
    Fault("sync", "db"),
    Fault("sync", "db", done=True),
]


class Server:
    """Stores each key once; does not answer while it is away."""

    def __init__(self) -> None:
        self.away = True
        self.received: list[int] = []

    def __call__(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        if self.away:
            fail(context, grpc.StatusCode.UNAVAILABLE)
        _, episode = decode_add_episode(request)
        self.received.append(int(episode.columns["obs"][0, 0]))
        return b""


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def client(server: Server) -> Iterator[ReplayClient]:
    with ScriptedServer(AddEpisode=server) as scripted, ReplayClient(scripted.address, actor="keeper") as client:
        yield trying_once(client)


def play(writer: EpisodeWriter, number: int) -> Any:
    for _ in range(2):
        writer.append({"obs": np.full(4000, number, np.float32), "action": np.zeros(4, np.float32), "reward": 0.0})
    return writer.end_episode()


def test_full_disk_keeps_nothing_from_being_sent_and_restarts_send_each_episode_once(
    server: Server, client: ReplayClient, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", DISK_BYTES) as disk:
        folder, ballast = disk / "spool", disk / "ballast"
        writer = EpisodeWriter(client, spool_dir=folder, when_full="drop-newest")
        for number in range(60):
            assert play(writer, number) is not None
        fill_disk(ballast)
        while play(writer, -1) is not None:
            pass
        dropped = writer.counters.dropped
        kept = writer.counters.pending

        server.away = False
        writer.flush(60)
        counters = writer.counters
        assert (counters.acknowledged, counters.pending, counters.dropped) == (kept, 0, dropped)
        assert [number for number in server.received if number >= 0] == list(range(60))
        writer.close(60)

        # The restart has less than a page: even SQLite's index of the log does not fit.
        fill_disk(ballast)
        before = len(server.received)
        again = EpisodeWriter(client, spool_dir=folder, when_full="drop-newest")
        again.flush(60)
        assert again.counters.pending == 0
        assert set(server.received[before:]) <= set(server.received[:before])
        ballast.unlink()
        assert play(again, 1000) is not None
        again.close(60)
        last = Spool(folder, limit_bytes=LIMIT)
        assert last.resumed == 0
        last.close()
    assert server.received[-1] == 1000


def test_full_disk_is_left_waiting_episodes_that_the_next_writer_sends(server: Server, client: ReplayClient, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", DISK_BYTES) as disk:
        folder, ballast = disk / "spool", disk / "ballast"
        writer = EpisodeWriter(client, spool_dir=folder)
        for number in range(30):
            play(writer, number)
        fill_disk(ballast)
        writer.close(0)
        fill_disk(ballast)
        server.away = False

        again = EpisodeWriter(client, spool_dir=folder)
        again.flush(60)
        again.close(60)

        # The episode that the first writer was sending when it was closed may arrive as well, under the same key.
        assert list(dict.fromkeys(server.received)) == list(range(30))


def test_full_disk_is_logged_once_and_answers_are_written_once_there_is_space(
    server: Server, client: ReplayClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with failing_disk() as disk:
        writer = EpisodeWriter(client, spool_dir=tmp_path / "spool")
        for number in range(10):
            play(writer, number)
        disk.fail(Fault("write", "-wal", full=True))
        server.away = False
        writer.flush(60)
        eventually(lambda: writer.counters.pending == 0, "everything is answered")
        disk.mend()
        play(writer, 10)
        writer.close(60)

        left = Spool(tmp_path / "spool", limit_bytes=LIMIT)
        assert left.resumed == 0
        left.close()
    assert sorted(server.received) == list(range(11))
    assert sum("cannot remove answered episodes for now" in line for line in caplog.messages) == 1


def traced(number: int) -> Episode:
    rng = np.random.default_rng(number)
    columns = {"obs": rng.standard_normal((20, 64), dtype=np.float32), "reward": rng.standard_normal(20, dtype=np.float32)}
    return Episode(columns, key=EpisodeKey("robot", 1, number), actor="left", policy_version=number)


def waiting(folder: Path) -> list[int]:
    """Returns the numbers of the episodes in a spool after a start on it, and asserts that each is whole."""
    spool = Spool(folder, limit_bytes=LIMIT)
    found, taken = [], spool.peek()
    while taken is not None:
        assert isinstance(taken[1], Episode)
        number = taken[1].policy_version
        assert all(np.array_equal(taken[1].columns[name], column) for name, column in traced(number).columns.items())
        found.append(number)
        taken = spool.peek(taken[0])
    spool.close()
    return found


@pytest.mark.parametrize("times", [1, 1 << 30], ids=["once", "for-good"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.call}{fault.file}{'-done' * fault.done}")
def test_failed_call_ends_keeping_and_what_was_kept_is_sent(fault: Fault, times: int, tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    with failing_disk() as disk:
        disk.synced = {}
        spool = Spool(folder, limit_bytes=LIMIT)
        kept = [number for number in range(10) if spool.put(spool.pack(traced(number)), drop_oldest=False).kept]
        assert kept == list(range(10))

        disk.fail(Fault(**{**vars(fault), "times": times}))
        refused: list[int] = []
        for number in range(10, 1000):
            failed = disk.failed.is_set()
            admission = spool.put(spool.pack(traced(number)), drop_oldest=True)
            assert not admission.dropped and not (failed and admission.kept)
            if admission.kept:
                kept.append(number)
            else:
                assert isinstance(admission.error, SpoolError)
                refused.append(number)
            if len(refused) == 5:
                break
        assert "accepts nothing more until it is opened again" in str(admission.error)
        kill_image(folder, tmp_path / "killed")
        disk.cut_power(folder, tmp_path / "unpowered")

        sent = []
        while (taken := spool.peek()) is not None:
            assert isinstance(taken[1], Episode)
            sent.append(taken[1].policy_version)
            spool.acknowledge(taken[0])
        assert sent == kept
        spool.close()
        disk.mend()
        for left in (tmp_path / "killed", tmp_path / "unpowered", folder):
            found = waiting(left)
            # The episode whose write had begun may be stored; it is the oldest that was not kept, and the actor still has it.
            assert found in (kept, [*kept, refused[0]]), left
    fault_tally.note(spool_failures=1, spool_refused=len(refused))


def test_failed_fsync_is_raised_to_the_actor_and_stored_episodes_are_sent(
    server: Server, client: ReplayClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with failing_disk() as disk:
        writer = EpisodeWriter(client, spool_dir=tmp_path / "spool")
        for number in range(5):
            play(writer, number)
        disk.fail(Fault("sync", "-wal", times=1))
        for _ in range(3):
            with pytest.raises(SpoolError):
                play_on = writer.end_episode if disk.failed.is_set() else lambda: play(writer, 5)
                play_on()
        server.away = False
        writer.flush(60)

        assert server.received == [0, 1, 2, 3, 4]
        assert sum("do not outlive this process" in line for line in caplog.messages) == 1
        with pytest.raises(SpoolError, match="accepts nothing more until it is opened again"):
            writer.close(5)


def test_disk_of_this_test_is_the_one_that_fails(tmp_path: Path) -> None:
    with failing_disk() as disk:
        assert isinstance(disk, FailingDisk)
        disk.fail(Fault("sync", "-wal"))
        with pytest.raises(SpoolError):
            Spool(tmp_path / "spool", limit_bytes=LIMIT)
