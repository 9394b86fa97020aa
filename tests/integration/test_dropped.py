"""Objects that are dropped without being closed clean up on both sides: threads, sockets, rings, streams, and a writer's episodes."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.service_calls import collected, eventually, make_config, make_episode
from touchline import EpisodeWriter, ReplayClient
from touchline_protos.shm.ring import SHARED_MEMORY_DIR, shared_memory_id
from touchline_server.service.app import ServerThread

TIMES = 30
rings_only = pytest.mark.skipif(not shared_memory_id(), reason="rings need Linux on x86-64")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of shared memory for only this test's rings."""
    with tempfile.TemporaryDirectory(prefix="rings-", dir=SHARED_MEMORY_DIR) as name:
        monkeypatch.setattr("touchline_protos.shm.ring.SHARED_MEMORY_DIR", Path(name))
        yield Path(name)


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread(make_config()) as server:
        for number in range(5):
            server.buffer.add(make_episode(50, seed=number).columns)
        yield server


def our_threads() -> list[str]:
    """Returns the threads of the client, of gRPC for its calls, and of the server's rings; not its pools, which grow with use."""
    parts = ("touchline-ring", "touchline-watchdog", "touchline-writer", "touchline-dropped", "_consume_request", "channel_spin")
    return [thread.name for thread in threading.enumerate() if any(part in thread.name for part in parts)]


def sockets() -> int:
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(link) and os.readlink(link).startswith("socket:") for link in links)


def no_writer_is_sending() -> bool:
    """Whether every writer that was dropped is done with its episodes."""
    return "touchline-dropped" not in {thread.name for thread in threading.enumerate()}


def streams_of(server: ServerThread) -> int:
    return int(server._server.parts.calls.streams.now)


def rings_of(server: ServerThread) -> int:
    return int(server._server.parts.rings._rings)


def maps() -> int:
    """Returns the mapped rings; other tests of this process may have left some."""
    return Path("/proc/self/maps").read_text().count("touchline-ring")


@dataclass(frozen=True)
class Held:
    """Resources of the client and the server that this process holds."""

    threads: list[str] = field(default_factory=our_threads)
    sockets: int = field(default_factory=sockets)
    maps: int = field(default_factory=maps)


def settled(condition: Callable[[], bool], what: str | Callable[[], str]) -> None:
    """Waits for a condition that holds once what was dropped is collected."""
    eventually(collected(condition), what, every_s=0.02)


def nothing_is_left(server: ServerThread, folder: Path, before: Held) -> None:
    settled(lambda: streams_of(server) == 0, lambda: f"{streams_of(server)} streams of the server")
    settled(lambda: rings_of(server) == 0, lambda: f"{rings_of(server)} rings of the server")
    settled(lambda: len(our_threads()) <= len(before.threads), lambda: f"threads {our_threads()}; {before.threads} before")
    settled(lambda: sockets() <= before.sockets, lambda: f"{sockets()} sockets; {before.sockets} before")
    settled(lambda: maps() <= before.maps, lambda: f"{maps()} mapped rings; {before.maps} before")
    assert list(folder.iterdir()) == []


def dropping_batches(client: ReplayClient, **options: Any) -> Callable[[], None]:
    def drop() -> None:
        for _, batch in zip(range(3), client.batches(as_numpy=True, **options), strict=False):
            assert batch.obs.shape[-1] == 4

    return drop


def dropping_in_a_cycle(client: ReplayClient) -> Callable[[], None]:
    def drop() -> None:
        batches = client.batches(as_numpy=True)
        holder = {"batches": batches, "last": next(batches)}
        holder["self"] = holder

    return drop


def dropping_episodes(client: ReplayClient) -> Callable[[], None]:
    def drop() -> None:
        assert next(client.episodes()).columns["obs"].shape == (50, 4)

    return drop


DROPS: dict[str, Callable[[ReplayClient], Callable[[], None]]] = {
    "ring": dropping_batches,
    "stream": lambda client: dropping_batches(client, ring=False),
    "timeout": lambda client: dropping_batches(client, timeout_s=60.0),
    "cycle": dropping_in_a_cycle,
    "episodes": dropping_episodes,
}


@pytest.mark.parametrize("what", DROPS)
def test_streams_dropped_thirty_times_leave_nothing(server: ServerThread, folder: Path, what: str) -> None:
    with ReplayClient(server.address) as client:
        client.info()
        before = Held()

        drop = DROPS[what](client)
        for _ in range(TIMES):
            drop()

        nothing_is_left(server, folder, before)
        if what != "stream" and shared_memory_id():
            with client.batches() as batches:
                next(batches)
                assert batches.transport == "ring"


def test_clients_dropped_fifty_times_leave_no_socket(server: ServerThread, folder: Path) -> None:
    gc.collect()
    before = Held()

    for _ in range(50):
        client = ReplayClient(server.address)
        assert client.num_eps == 5
        del client

    nothing_is_left(server, folder, before)


def test_clients_dropped_with_their_streams_leave_nothing(server: ServerThread, folder: Path) -> None:
    gc.collect()
    before = Held()

    for _ in range(20):
        client = ReplayClient(server.address)
        batches = client.batches(as_numpy=True)
        held = next(batches)
        del client, batches
        assert held.obs.shape == (4, 8, 4)
    del held

    nothing_is_left(server, folder, before)


def test_stream_lives_on_where_only_its_client_is_dropped(server: ServerThread) -> None:
    batches = ReplayClient(server.address).batches(as_numpy=True)
    episodes = ReplayClient(server.address).episodes()

    for _ in range(50):
        gc.collect(0)
        next(batches)

    assert len(list(episodes)) == 5
    batches.close()


def test_batch_outlives_the_stream_that_was_dropped(server: ServerThread) -> None:
    with ReplayClient(server.address) as client:
        batches = client.batches(as_numpy=True)
        held = [next(batches) for _ in range(3)]
        copies = [batch.obs.copy() for batch in held]
        del batches
        settled(lambda: streams_of(server) == 0, "the stream ends")

        assert all((batch.obs == copy).all() for batch, copy in zip(held, copies, strict=True))


# Writers


def step(number: float, *, first: bool = False) -> dict[str, Any]:
    row: dict[str, Any] = {"obs": np.full(4, number, np.float32)}
    return row if first else {**row, "action": np.zeros(2, np.float32), "reward": 0.0}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING and "writer" in record.getMessage()]


def test_writer_dropped_warns_of_its_rows_and_sends_what_ended(
    server: ServerThread, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gc.collect()
    before = Held()

    def play() -> None:
        writer = EpisodeWriter(ReplayClient(server.address), actor="ada")
        for number in range(3):
            writer.append(step(number, first=not number))
        writer.end_episode()
        writer.append(step(0.0, first=True))
        writer.append(step(1.0))

    play()

    settled(lambda: server.buffer.counts().episodes_stored == 6, "the ended one is stored")
    eventually(lambda: any("discarded 2 rows" in text for text in warnings_of(caplog)), "the warning")
    assert any("'ada' was not closed: " in text and "nothing refers to it any more" in text for text in warnings_of(caplog))
    nothing_is_left(server, folder, before)


def test_writer_dropped_with_nothing_to_lose_says_nothing(server: ServerThread, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    gc.collect()
    before = Held()
    with ReplayClient(server.address) as client:
        for closed in (False, True):
            for _ in range(5):
                writer = EpisodeWriter(client)
                writer.append(step(0.0, first=True))
                writer.append(step(1.0))
                writer.end_episode()
                writer.flush(60)
                if closed:
                    writer.close()
                del writer

    nothing_is_left(server, folder, before)
    assert server.buffer.counts().episodes_stored == 15
    assert warnings_of(caplog) == []


def test_writer_dropped_frees_its_spool_for_the_next(server: ServerThread, tmp_path: Path) -> None:
    with ReplayClient(server.address) as client:
        for _ in range(5):
            writer = EpisodeWriter(client, spool_dir=tmp_path / "spool")
            writer.append(step(0.0, first=True))
            writer.append(step(1.0))
            writer.end_episode()
            del writer
            settled(no_writer_is_sending, "it ends")
        with EpisodeWriter(client, spool_dir=tmp_path / "spool") as last:
            assert last.counters.resumed == 0

    assert server.buffer.counts().episodes_stored == 10


def test_writer_dropped_while_the_server_is_away_leaves_its_spool_to_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = ReplayClient("127.0.0.1:1", timeout_s=0.2)
    writer = EpisodeWriter(client, spool_dir=tmp_path)
    writer.append(step(0.0, first=True))
    writer.append(step(1.0))
    writer.end_episode()
    del writer
    settled(no_writer_is_sending, "it ends")

    with ServerThread(make_config()) as server, ReplayClient(server.address) as other, EpisodeWriter(other, spool_dir=tmp_path) as last:
        assert last.counters.resumed == 1
        last.flush(60)
        assert server.buffer.counts().episodes_stored == 1
    assert any("1 episodes wait in" in text for text in warnings_of(caplog))
    client.close()


FORKING = """
    import gc, os, sys
    from touchline import EpisodeWriter, ReplayClient
    import numpy as np
    client = ReplayClient(sys.argv[1])
    batches = client.batches(as_numpy=True)
    episodes = client.episodes()
    next(batches), next(episodes)
    writer = EpisodeWriter(client)
    writer.append({"obs": np.zeros(4, np.float32)})
    child = os.fork()
    if child == 0:
        del client, batches, episodes, writer  # the parent's go on
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for _ in range(50):
        next(batches)
    assert len(list(episodes)) == 4
    writer.append({"obs": np.ones(4, np.float32), "action": np.zeros(2, np.float32), "reward": 0.0})
    writer.close()
    print(batches.transport, client.num_eps, flush=True)
"""


def test_what_a_forked_child_drops_goes_on_in_its_parent(server: ServerThread) -> None:
    command = [sys.executable, "-c", textwrap.dedent(FORKING), server.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert done.stdout.split()[1:] == ["6"], done.stderr
    assert "interrupted" not in done.stderr


def test_remote_buffer_dropped_warns_of_its_trajectories(server: ServerThread, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch = pytest.importorskip("torch")
    from tensordict import TensorDict

    from touchline.torchrl import RemoteReplayBuffer

    gc.collect()
    before = Held()
    data = TensorDict(
        {
            "observation": torch.arange(12.0).reshape(3, 4),
            "action": torch.zeros(3, 2),
            "next": {
                "observation": torch.arange(4.0, 16.0).reshape(3, 4),
                "reward": torch.zeros(3, 1),
                "done": torch.zeros(3, 1, dtype=torch.bool),
            },
        },
        batch_size=[3],
    )

    buffer = RemoteReplayBuffer(server.address, batch_size=8)
    buffer.extend(data)
    assert len(buffer) == 245
    del buffer

    settled(lambda: any("1 unfinished trajectories are lost" in record.getMessage() for record in caplog.records), "the warning")
    nothing_is_left(server, folder, before)
