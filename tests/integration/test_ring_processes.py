"""Rings between real processes: cleanup when one of them is killed, and the fallback to frames."""

from __future__ import annotations

import gc
import logging
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.service_calls import Caller, eventually
from touchline import ReplayClient
from touchline_protos.shm.ring import SHARED_MEMORY_DIR, RingGeometry, RingWriter, shared_memory_id
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import Config
from touchline_server.service.app import ServerThread

pytestmark = pytest.mark.skipif(not shared_memory_id(), reason="rings need Linux on x86-64")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of shared memory for only this test's rings: other servers on this machine neither see nor sweep it."""
    with tempfile.TemporaryDirectory(prefix="rings-", dir=SHARED_MEMORY_DIR) as name:
        monkeypatch.setattr("touchline_protos.shm.ring.SHARED_MEMORY_DIR", Path(name))
        monkeypatch.setenv("RINGS", name)
        yield Path(name)


def rings(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def config(**ring: object) -> Config:
    return Config(config={"buffer_size": 1_000, "batch_size": 8, "min_history": 10}, server={"port": 0}, ring=ring)


def add_episodes(client: ReplayClient, count: int = 5) -> None:
    for number in range(count):
        obs = np.full((20, 3), number, np.float32)
        client.add({"obs": obs, "action": np.zeros((20, 2), np.float32), "reward": np.zeros(20, np.float32)}, actor=f"actor {number}")


IN_THE_FOLDER = """
import os, pathlib
import touchline_protos.shm.ring
touchline_protos.shm.ring.SHARED_MEMORY_DIR = pathlib.Path(os.environ["RINGS"])
"""
"""Common beginning of the programs of other processes."""


@contextmanager
def running(code: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", IN_THE_FOLDER + textwrap.dedent(code), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


LEARNER = """
    import sys
    from touchline import ReplayClient
    batches = ReplayClient(sys.argv[1]).batches(as_numpy=True)
    held = [next(batches) for _ in range(3)]
    print(batches.transport, flush=True)
    while True:
        next(batches)
"""


def test_learner_killed_leaves_no_file_and_frees_its_ring(folder: Path) -> None:
    with ServerThread(config(max_rings=1)) as server, ReplayClient(server.address) as client:
        add_episodes(client)
        with running(LEARNER, server.address) as learner:
            assert learner.stdout is not None and learner.stdout.readline() == "ring\n"
            assert rings(folder) == []  # attached: the file no longer has a name
            learner.kill()
            learner.wait()

        def gets_a_ring() -> bool:
            with client.batches() as batches:
                next(batches)
                return batches.transport == "ring"

        # The one ring that the server allows is free again: the stream of a dead learner ends.
        eventually(gets_a_ring, "another learner gets it")

    assert rings(folder) == []


def test_killed_server_leaves_nothing_after_its_next_start(folder: Path) -> None:
    code = """
        from touchline_protos.shm.ring import RingGeometry, RingWriter
        ring = RingWriter(RingGeometry.of(4, 1000))
        print(ring.path.name, flush=True)
        input()
    """
    with running(code) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert rings(folder) == [name]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert rings(folder) == [name]

    with ServerThread(config()):
        assert rings(folder) == []


SERVER = """
    from touchline_server.cli.main import app
    app(["serve", "--port", "0"])
"""


def test_server_killed_with_a_learner_attached_leaves_nothing(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._learner.outputs.RECONNECT_S", 0.5)
    environment = os.environ | {"TOUCHLINE_CONFIG__BATCH_SIZE": "8", "TOUCHLINE_CONFIG__MIN_HISTORY": "0"}
    with running(SERVER, env=environment, cwd=tmp_path) as process:
        assert process.stdout is not None
        with ReplayClient(process.stdout.readline().split()[-1]) as client:
            add_episodes(client)
            batches = client.batches()
            held = next(batches)
            assert batches.transport == "ring"
            kept = held.obs.clone()
            process.kill()
            process.wait()

            with pytest.raises(Exception, match="no batch"):
                for _ in range(100):
                    next(batches)

            assert (held.obs == kept).all()
            batches.close()
    assert rings(folder) == []


def reason_of(client: ReplayClient, caplog: pytest.LogCaptureFixture, **options: Any) -> tuple[str, list[str], list[str]]:
    """Takes batches as messages from three streams; returns the reason, and the log lines of client and server about it."""
    caplog.clear()
    reasons = set()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with client.batches(as_numpy=True, **options) as batches:
                assert (batches.transport, batches.transport_reason) == ("", "")
                for _ in range(30):
                    assert next(batches).obs.shape == (4, 8, 3)
                assert batches.transport == "stream"
                reasons.add(re.sub(r"touchline-[0-9a-f]{32}", "touchline-NAME", batches.transport_reason))
    assert len(reasons) == 1
    told = [
        (record.name, f"{record.levelname} {record.getMessage()}")
        for record in caplog.records
        if "instead of a ring" in record.getMessage()
    ]
    return (
        reasons.pop(),
        [text for name, text in told if name == "touchline._learner.stream"],
        [text for name, text in told if name != "touchline._learner.stream"],
    )


def test_learner_on_another_host_gets_messages_and_the_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("touchline._learner.stream_session.shared_memory_id", lambda: "another host:1")
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_episodes(client)

        reason, learner, log = reason_of(client, caplog)

    assert "another host" in reason
    assert len(learner) == 3 and log == []  # once a stream; the server's operator could not change it


def test_learner_without_the_rights_gets_frames_and_both_sides_say_why(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("touchline_protos.shm.sealed_memory.os.getuid", lambda: 4_000_000)  # as in a container with another user
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_episodes(client)

        reason, learner, log = reason_of(client, caplog)

    assert reason.startswith("the server's ring cannot be used here: ") and "not a socket of this user (4000000)" in reason
    assert [text.split()[0] for text in learner] == ["WARNING"] * 3
    assert len(log) == 1 and log[0].startswith("WARNING") and "not a socket of this user (4000000)" in log[0]
    assert rings(folder) == []


@pytest.mark.parametrize(
    ("ring", "why"),
    [
        ({"max_rings": 0}, "ring.max_rings is 0"),
        ({"max_ring_bytes": 1_000}, "do not fit into ring.max_ring_bytes, 1000"),
    ],
)
def test_server_that_makes_no_ring_says_why_on_both_sides(ring: dict[str, int], why: str, caplog: pytest.LogCaptureFixture) -> None:
    with ServerThread(config(**ring)) as server, ReplayClient(server.address) as client:
        add_episodes(client)

        reason, learner, log = reason_of(client, caplog)

    assert why in reason
    assert len(learner) == 3 and all(why in text and text.startswith("WARNING") for text in learner)
    assert len(log) == 1 and why in log[0] and log[0].startswith("WARNING")


def test_server_without_a_free_slot_is_reported_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    with ServerThread(config(max_rings=2)) as server, ReplayClient(server.address) as client:
        add_episodes(client)
        with client.batches() as one, client.batches() as other:
            for batches in (one, other):
                next(batches)
                assert (batches.transport, batches.transport_reason) == ("ring", "")

            reason, learner, log = reason_of(client, caplog)

    assert reason == "all 2 rings are in use (ring.max_rings)"
    assert len(learner) == 3 and len(log) == 1


def test_server_without_memory_for_a_ring_is_reported_on_both_sides(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("touchline_server.service.ring_pool.available_host_bytes", lambda: 100_000)
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_episodes(client)

        reason, learner, log = reason_of(client, caplog)

    assert "only 100000 bytes of memory are available" in reason
    assert len(learner) == 3 and len(log) == 1


def test_kernel_that_gives_no_memory_means_frames(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("touchline_protos.shm.sealed_memory.os.posix_fallocate", full)
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_episodes(client)

        reason, _, log = reason_of(client, caplog)

    assert "No space left on device" in reason
    assert len(log) == 1


def test_learner_that_wants_no_ring_gets_the_reason_and_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_episodes(client)

        assert reason_of(client, caplog, ring=False) == ('turned off by ring=False, or transport="stream"', [], [])


def test_older_learner_that_cannot_map_a_socket_gets_frames(caplog: pytest.LogCaptureFixture) -> None:
    """Behaves like clients that expected a file: they find none, and only report that they are not attached."""
    with ServerThread(config()) as server, ReplayClient(server.address) as client, Caller(server.address) as caller:
        add_episodes(client)
        stream = caller.stream()
        opening = pb.SampleStreamOpen(sample=pb.SampleRequest(), credits=5, shared_memory_id=shared_memory_id())
        stream.send(pb.SampleStreamRequest(open=opening).SerializeToString())
        offer = pb.SampleStreamResponse.FromString(next(stream.call)).ring
        with pytest.raises(OSError):
            os.open(offer.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        stream.send(pb.SampleStreamRequest(ring=pb.RingAttachment(attached=False)).SerializeToString())

        assert len(stream.read(5)) == 5


HARMING = """
    import os, sys
    from touchline_protos.shm import sealed_memory
    receive = sealed_memory.receive

    def kept(path, sizes):
        global file
        [file] = receive(path, sizes)
        return [os.dup(file)]

    sealed_memory.receive = kept
    from touchline import ReplayClient
    batches = ReplayClient(sys.argv[1]).batches(as_numpy=True)
    for _ in range(100):
        next(batches)
    print(batches.transport, flush=True)
    size = os.fstat(file).st_size
    refused = 0
    for length in (0, 4096, size - 1, size + 4096):
        for shorten in (lambda: os.ftruncate(file, length), lambda: os.truncate(f"/proc/self/fd/{file}", length)):
            try:
                shorten()
            except OSError:
                refused += 1
    print(refused, flush=True)
    rest = os.pread(file, size, 0)
    import ctypes, random
    libc = ctypes.CDLL(None)
    for _ in range(200):
        libc.fallocate(file, 3, ctypes.c_long(0), ctypes.c_long(size))  # holes everywhere
        os.pwrite(file, random.randbytes(size), 0)
        os.pwrite(file, bytes(4096), 0)  # all slots are free
    print("done", flush=True)
    input()
"""


def test_learner_that_truncates_punches_and_overwrites_its_ring_leaves_the_server_to_others(folder: Path) -> None:
    environment = os.environ | {"TOUCHLINE_CONFIG__BATCH_SIZE": "8", "TOUCHLINE_CONFIG__MIN_HISTORY": "0"}
    with running(SERVER, env=environment, cwd=folder) as process:
        assert process.stdout is not None
        with ReplayClient(process.stdout.readline().split()[-1]) as client:
            add_episodes(client)
            with client.batches(as_numpy=True) as other:
                next(other)
                with running(HARMING, client.address, stdin=subprocess.PIPE) as learner:
                    assert learner.stdout is not None
                    assert [learner.stdout.readline() for _ in range(3)] == ["ring\n", "8\n", "done\n"]
                    for _ in range(500):
                        assert next(other).obs.shape == (4, 8, 3)
                assert (other.transport, process.poll()) == ("ring", None)
                for _ in range(500):
                    batch = next(other)
                    assert (batch.obs[0, :, 0] == batch.episode_id).all()
            assert client.num_eps == 5


def test_names_of_actors_that_come_later_reach_a_ring() -> None:
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_episodes(client, 1)
        with client.batches(prefetch=4) as batches:
            assert set(next(batches).actor_names.values()) == {"actor 0"}
            add_episodes(client, 5)
            names: set[str] = set()
            for _ in range(2_000):
                batch = next(batches)
                names |= {batch.actor_names[int(number)] for number in batch.actor}
                if len(names) == 5:
                    break
            assert batches.transport == "ring"
    assert names == {f"actor {number}" for number in range(5)}


def test_caller_that_holds_every_batch_does_not_stall_the_ring() -> None:
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_episodes(client)
        with client.batches(prefetch=4) as batches:
            held = [next(batches) for _ in range(500)]
            assert batches.transport == "ring"
    for batch in held:
        # The obs identifies its episode, so a batch that was overwritten would contradict its provenance.
        assert (batch.obs[0, :, 0] == batch.episode_id).all()


def test_offer_of_a_stranger_is_refused() -> None:
    from touchline._learner.ring_reader import RingBatches
    from touchline_protos.shm.ring import RingError

    writer = RingWriter(RingGeometry.of(4, 1000))
    try:
        offer = pb.RingSetup(path="/dev/shm/passwd", slots=4, slot_size_bytes=4096, size_bytes=5 * 4096, layout=batch_header())
        with pytest.raises(RingError, match="is not the name of a ring"):
            RingBatches(offer, iter(()))
        threading.Thread(target=lambda: (select.select([writer.handover], [], []), writer.handover.serve())).start()
        offer.path, offer.token = str(writer.path), bytes(16)
        with pytest.raises(RingError, match="not the ring"):
            RingBatches(offer, iter(()))
        offer.token, offer.slot_size_bytes = writer.token, 1 << 40
        with pytest.raises(RingError):
            RingBatches(offer, iter(()))
    finally:
        writer.close()


def batch_header() -> pb.Batch:
    from touchline_protos.codec import BatchLayout, TensorSpec

    float32 = np.dtype("<f4")
    specs = [TensorSpec("obs", float32, (4, 2, 3)), TensorSpec("action", float32, (3, 2, 1))]
    specs += [TensorSpec(name, float32, (3, 2, 1)) for name in ("reward", "done")]
    return pb.Batch.FromString(BatchLayout(specs, 2).header())


def mapped_rings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:touchline-ring")


def test_closed_stream_unmaps_its_ring_without_a_collection() -> None:
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_episodes(client)
        gc.collect()
        before = mapped_rings()  # other tests of this process may have left some
        gc.disable()
        try:
            for _ in range(5):
                with client.batches() as batches:
                    next(batches)
                    assert batches.transport == "ring"
                    assert mapped_rings() > before
                del batches
            eventually(lambda: mapped_rings() <= before, "both sides have unmapped it")
        finally:
            gc.enable()
