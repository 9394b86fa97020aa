"""Rings between real processes: what is left when one of them is killed, and when frames have to do."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from touchline import ReplayClient
from touchline_protos.ring import SHARED_MEMORY_DIR, RingGeometry, RingWriter, shared_memory_id
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import Config
from touchline_server.app import ServerThread

pytestmark = pytest.mark.skipif(not shared_memory_id(), reason="rings need Linux on x86-64")


def rings() -> set[str]:
    return {path.name for path in SHARED_MEMORY_DIR.iterdir() if path.name.startswith("touchline-")}


def config(**server: object) -> Config:
    return Config(config={"buffer_size": 1_000, "batch_size": 8, "min_history": 10}, server={"port": 0, **server})


def add_episodes(client: ReplayClient, count: int = 5) -> None:
    for number in range(count):
        obs = np.full((20, 3), number, np.float32)
        client.add({"obs": obs, "action": np.zeros((20, 2), np.float32), "reward": np.zeros(20, np.float32)}, actor=f"actor {number}")


@contextmanager
def running(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


LEARNER = """
    import sys
    from touchline import ReplayClient
    batches = ReplayClient(sys.argv[1]).batches(as_numpy=True)
    held = [next(batches) for _ in range(3)]
    print(batches.transport, flush=True)
    while True:
        next(batches)
"""


def test_learner_killed_leaves_no_file_and_frees_its_ring() -> None:
    before = rings()
    with ServerThread(config(max_rings=1)) as server, ReplayClient(server.address) as client:
        add_episodes(client)
        with running(LEARNER, server.address) as learner:
            assert learner.stdout is not None and learner.stdout.readline() == "ring\n"
            assert rings() == before  # attached: the file has no name any more
            learner.kill()
            learner.wait()

        # The one ring that the server allows is free again: the stream of a dead learner ends.
        for _ in range(200):
            with client.batches() as batches:
                next(batches)
                transport = batches.transport
            if transport == "ring":
                break

    assert transport == "ring"
    assert rings() == before


def test_killed_server_leaves_nothing_after_its_next_start() -> None:
    code = """
        from touchline_protos.ring import RingGeometry, RingWriter
        ring = RingWriter(RingGeometry.of(4, 1000))
        print(ring.path.name, flush=True)
        input()
    """
    with running(code) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert name in rings()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert name in rings()

    with ServerThread(config()):
        assert name not in rings()


def test_server_killed_with_a_learner_attached_leaves_nothing(tmp_path: Path) -> None:
    before = rings()
    serve = [sys.executable, "-m", "touchline_server", "serve", "--port", "0"]
    environment = os.environ | {"TOUCHLINE_CONFIG__BATCH_SIZE": "8", "TOUCHLINE_CONFIG__MIN_HISTORY": "0"}
    process = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    try:
        assert process.stdout is not None
        with ReplayClient(process.stdout.readline().split()[-1]) as client:
            add_episodes(client)
            batches = client.batches(timeout_s=2.0)
            held = next(batches)
            kept = held.obs.clone()
            process.kill()
            process.wait()

            with pytest.raises(Exception, match="no batch"):
                for _ in range(100):
                    next(batches)

            assert (held.obs == kept).all()
            batches.close()
    finally:
        process.kill()
        process.wait()
    assert rings() == before


def test_learner_elsewhere_gets_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline.stream.shared_memory_id", lambda: "another host:1")
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_episodes(client)
        with client.batches() as batches:
            assert next(batches).obs.shape == (4, 8, 3)
            assert batches.transport == "stream"


def test_learner_that_cannot_map_the_ring_gets_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_protos.ring.os.getuid", lambda: 4_000_000)  # as in a container with another user
    before = rings()
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_episodes(client)
        with client.batches() as batches:
            for _ in range(50):
                assert next(batches).obs.shape == (4, 8, 3)
            assert batches.transport == "stream"
    assert rings() == before


@pytest.mark.parametrize("limits", [{"max_rings": 0}, {"max_ring_bytes": 1_000}])
def test_server_without_rings_sends_frames(limits: dict[str, int]) -> None:
    with ServerThread(config(**limits)) as server, ReplayClient(server.address) as client:
        add_episodes(client)
        with client.batches() as batches:
            assert next(batches).obs.shape == (4, 8, 3)
            assert batches.transport == "stream"


def test_shared_memory_without_room_means_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.statvfs(SHARED_MEMORY_DIR)
    huge = status.f_blocks * status.f_frsize
    monkeypatch.setattr(RingGeometry, "of", classmethod(lambda cls, slots, body_bytes: cls(2, huge)))
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_episodes(client)
        with client.batches() as batches:
            assert next(batches).obs.shape == (4, 8, 3)
            assert batches.transport == "stream"


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
        # The obs tells the episode it is from, so a batch that was overwritten would contradict its provenance.
        assert (batch.obs[0, :, 0] == batch.episode_id).all()


def test_offer_of_a_stranger_is_refused() -> None:
    from touchline.ring import attach
    from touchline_protos.ring import RingError

    writer = RingWriter(RingGeometry.of(4, 1000))
    try:
        offer = pb.RingSetup(path="/dev/shm/passwd", slots=4, slot_size_bytes=4096, size_bytes=5 * 4096, layout=batch_header())
        with pytest.raises(RingError, match="no ring's name"):
            attach(pb.SampleStreamResponse(ring=offer).SerializeToString(), iter(()))
        offer.path, offer.token = str(writer.path), bytes(16)
        with pytest.raises(RingError, match="not the ring"):
            attach(pb.SampleStreamResponse(ring=offer).SerializeToString(), iter(()))
        offer.token, offer.slot_size_bytes = writer.token, 1 << 40
        with pytest.raises(RingError):
            attach(pb.SampleStreamResponse(ring=offer).SerializeToString(), iter(()))
    finally:
        writer.close()


def batch_header() -> pb.Batch:
    from touchline_protos.codec import BatchLayout, TensorSpec

    float32 = np.dtype("<f4")
    specs = [TensorSpec("obs", float32, (4, 2, 3)), TensorSpec("action", float32, (3, 2, 1))]
    specs += [TensorSpec(name, float32, (3, 2, 1)) for name in ("reward", "done")]
    return pb.Batch.FromString(BatchLayout(specs, 2).header())


def mapped_rings() -> int:
    return Path("/proc/self/maps").read_text().count(f"{SHARED_MEMORY_DIR}/touchline-")


def test_closed_stream_unmaps_its_ring_without_a_collection() -> None:
    with ServerThread(config()) as server, ReplayClient(server.address) as client:
        add_episodes(client)
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                with client.batches() as batches:
                    next(batches)
                    assert batches.transport == "ring"
                del batches
            for thread in threading.enumerate():
                if thread.name == "touchline-ring":
                    thread.join(10)
            assert mapped_rings() == 0
        finally:
            gc.enable()
