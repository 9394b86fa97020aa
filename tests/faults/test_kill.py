"""The server is killed repeatedly under load: no acknowledged episode is lost, and none is stored twice."""

from __future__ import annotations

import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from support.durable_cases import assert_whole, client_of, contents, durable_config, keyed_episode, stored_keys
from support.fault_tally import KILLS, note
from support.service_calls import DEADLINE_S, Caller, ServerProcess, eventually
from touchline_protos.codec import encode_add_episode
from touchline_server import ReplayBuffer
from touchline_server.durability import maintenance

ACTORS = 4
CAPACITY = 4_000
LONGEST = 50


class ActorPool:
    """Four actors that add without end, resend what was not acknowledged, and record every acknowledgement."""

    def __init__(self) -> None:
        self.acknowledged: dict[tuple[int, int], int] = {}
        """Episode id by (client, sequence)."""
        self.duplicates = 0
        self._next = [0] * ACTORS
        self._stopping = threading.Event()
        self._news = threading.Condition()

    def play(self, address: str) -> None:
        """Adds by all actors until each one's call fails or :meth:`stop` is called."""
        self._stopping.clear()
        with ThreadPoolExecutor(ACTORS) as pool:
            list(pool.map(lambda client: self._act(client, address), range(ACTORS)))

    def stop(self) -> None:
        self._stopping.set()

    def wait_for(self, more: int) -> None:
        """Waits for ``more`` further acknowledgements."""
        with self._news:
            wanted = len(self.acknowledged) + more
            assert self._news.wait_for(lambda: len(self.acknowledged) >= wanted, DEADLINE_S)

    def _act(self, client: int, address: str) -> None:
        with Caller(address) as caller:
            while not self._stopping.is_set():
                sequence = self._next[client]
                try:
                    answer = caller.add(encode_add_episode(keyed_episode(client, sequence)))
                except grpc.RpcError:
                    return
                self._next[client] += 1
                with self._news:
                    self.acknowledged[client, sequence] = answer.episode_id
                    self.duplicates += answer.duplicate
                    self._news.notify_all()


def serve(folder: Path, data_dir: Path, durability: str) -> ServerProcess:
    return ServerProcess(
        folder,
        TOUCHLINE_CONFIG__BUFFER_SIZE=str(CAPACITY),
        TOUCHLINE_STORAGE__DATA_DIR=str(data_dir),
        TOUCHLINE_STORAGE__DURABILITY=durability,
    )


def note_sampled(caller: Caller, seen: dict[int, tuple[int, int]]) -> None:
    """Draws batches and asserts that each id stands for the same episode as in all earlier batches."""
    for _ in range(5):
        batch = caller.sample(batch_size=64)
        for episode_id, actor, version in zip(batch.episode_id, batch.actor, batch.policy_version, strict=True):
            name = (client_of(batch.actor_names[int(actor)]), int(version))
            assert seen.setdefault(int(episode_id), name) == name, f"id {episode_id} was given to two episodes"


def check_store(snapshot_dir: Path, acknowledged: dict[tuple[int, int], int], *, lossless: bool) -> None:
    """Asserts that every acknowledged episode that was not evicted is stored once, bit for bit."""
    keys = stored_keys(snapshot_dir / "touchline.db")
    buffer = ReplayBuffer(durable_config(snapshot_dir, capacity=CAPACITY))
    found, counts = contents(buffer), buffer.counts()
    buffer.close()

    assert_whole(found)
    assert {episode_id: (key.client_id, key.sequence) for episode_id, key in keys.items() if key} == {
        episode_id: (f"client-{client_of(actor)}", sequence) for episode_id, (actor, sequence, _) in found.items()
    }
    if lossless:
        expected = {episode_id: name for name, episode_id in acknowledged.items() if episode_id >= min(found)}
        assert {episode_id: (client_of(found[episode_id][0]), found[episode_id][1]) for episode_id in expected} == expected
        # No more was evicted than necessary.
        assert counts.episodes_evicted == 0 or counts.steps_stored > CAPACITY - LONGEST
        assert counts.episodes_added >= len(acknowledged)


def check_newest_lost(snapshot_dir: Path, ids: set[int]) -> None:
    """Asserts that the lost ones of the episodes acknowledged before one kill are the newest."""
    stored = stored_keys(snapshot_dir / "touchline.db")
    kept = sorted(episode_id for episode_id in ids if episode_id in stored)
    lost = [episode_id for episode_id in ids if episode_id not in stored and episode_id >= min(stored)]

    assert not kept or not lost or kept[-1] < min(lost)


@pytest.mark.slow
@pytest.mark.timeout(600 + 30 * KILLS)
@pytest.mark.parametrize("durability", ["sync", "batch", "memory"])
def test_kill_under_four_actors_loses_and_doubles_nothing(durability: str, tmp_path: Path) -> None:
    rng, actors, seen, earlier = random.Random(durability), ActorPool(), dict[int, tuple[int, int]](), set[int]()
    data_dir, lossless = tmp_path / "data", durability != "memory"

    for round_number in range(KILLS + 1):
        with serve(tmp_path, data_dir, durability) as process, Caller(process.address) as caller, ThreadPoolExecutor(1) as pool:
            if round_number:
                maintenance.snapshot(data_dir, tmp_path / f"after-{round_number}")
                check_store(tmp_path / f"after-{round_number}", actors.acknowledged, lossless=lossless)
                if not lossless:
                    check_newest_lost(tmp_path / f"after-{round_number}", set(actors.acknowledged.values()) - earlier)
            earlier = set(actors.acknowledged.values())
            playing = pool.submit(actors.play, process.address)
            actors.wait_for(rng.randint(40, 160))
            note_sampled(caller, seen)
            if round_number < KILLS:
                actors.wait_for(rng.randint(1, 40))
                process.signal(signal.SIGKILL)
                process.wait()
            else:
                actors.stop()
            playing.result(DEADLINE_S)
            if round_number == KILLS:
                counts = caller.counts()
                process.signal(signal.SIGTERM)
                assert process.wait() == 0, process.log

    names = {episode_id: name for name, episode_id in actors.acknowledged.items()}
    assert len(names) == len(actors.acknowledged), "an id was given to two episodes"
    assert all(seen[episode_id] == name for episode_id, name in names.items() if episode_id in seen)
    if lossless:
        # Each actor continued until its last episode was acknowledged, so exactly the acknowledged episodes were added.
        assert counts.episodes_added == len(actors.acknowledged)
    check_store(data_dir, actors.acknowledged if lossless else {}, lossless=lossless)
    note(server_kills=KILLS)
    if lossless:
        note(episodes_acknowledged=len(actors.acknowledged), sent_again=actors.duplicates, lost=0, doubled=0)
    outcome = "0 lost" if lossless else "the newest of each kill lost"
    print(f"{durability}: {KILLS} kills, {len(actors.acknowledged)} acknowledged, {actors.duplicates} sent again, {outcome}, 0 doubled")


@pytest.mark.parametrize("durability", ["sync", "batch", "memory"])
def test_sigterm_under_load_keeps_everything_acknowledged(durability: str, tmp_path: Path) -> None:
    actors, data_dir = ActorPool(), tmp_path / "data"

    with serve(tmp_path, data_dir, durability) as process, ThreadPoolExecutor(1) as pool:
        playing = pool.submit(actors.play, process.address)
        actors.wait_for(200)
        process.signal(signal.SIGTERM)
        playing.result(DEADLINE_S)
        assert process.wait() == 0, process.log

    check_store(data_dir, actors.acknowledged, lossless=True)
    note(episodes_acknowledged=len(actors.acknowledged), lost=0, doubled=0)


def test_second_server_on_the_same_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    data_dir, other = tmp_path / "data", tmp_path / "other"
    other.mkdir()

    with serve(tmp_path, data_dir, "sync") as first, Caller(first.address) as caller:
        caller.add(keyed_episode(0, 0))
        with serve(other, data_dir, "sync") as second:
            assert second.wait() == 1
            assert f"{data_dir} is in use by another touchline-server; stop it or choose another folder" in second.log
            assert "Traceback" not in second.log
        caller.add(keyed_episode(0, 1))
        eventually(lambda: caller.counts().episodes_stored == 2, "the first server goes on")
