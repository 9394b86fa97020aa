"""GetEpisodes on a real server: refusals, limits, draining, restarts, and what reading leaves to callers that sample and add."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.durable_cases import durable_config, keyed_episode
from support.service_calls import DEADLINE_S, SERVICE, Caller, eventually, make_config, make_episode, refused
from support.store_cases import as_bits
from touchline import ReplayClient, UnavailableError
from touchline_protos.codec import EpisodeDecoder, StoredEpisode
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.service.app import ServerThread
from touchline_server.service.episode_framer import EpisodeFramer


def get(caller: Caller, **fields: Any) -> Any:
    """Opens a call."""
    message = pb.GetEpisodesRequest(**fields).SerializeToString()
    return caller.channel.unary_stream(SERVICE + "GetEpisodes")(message, timeout=DEADLINE_S)


def read(call: Iterator[bytes]) -> list[StoredEpisode]:
    decoder = EpisodeDecoder()
    return [episode for message in call for episode in decoder.feed(message)]


def fill(server: ServerThread, episodes: int = 10) -> None:
    for number in range(episodes):
        server.buffer.add_episode(make_episode(20, seed=number, policy_version=number))


@pytest.mark.parametrize(
    ("fields", "code", "reason", "words"),
    [
        ({"episode_ids": [3, 12, 11]}, "NOT_FOUND", "unknown-episode", "ids: 11, 12 not stored"),
        ({"table": "expert"}, "NOT_FOUND", "unknown-table", "table: 'expert' does not exist"),
        ({"episode_ids": [3], "newest": 1}, "INVALID_ARGUMENT", "invalid-argument", "ids and newest"),
        ({"newest": 0}, "INVALID_ARGUMENT", "invalid-argument", "newest: 0, expected 1 or more"),
        ({"columns": ["pixels"]}, "INVALID_ARGUMENT", "invalid-argument", "columns: 'pixels', expected some of obs, action, reward"),
        ({"max_frame_bytes": 1}, "INVALID_ARGUMENT", "invalid-argument", "max_frame_bytes: 1, expected 0 or at least 4096"),
    ],
)
def test_request_that_cannot_be_is_refused_before_anything_is_sent(fields: dict[str, Any], code: str, reason: str, words: str) -> None:
    with ServerThread(make_config()) as server, Caller(server.address) as caller:
        fill(server)

        refusal = refused(next, get(caller, **fields))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode[code], reason)
    assert refusal.details.startswith(words)


def test_bytes_that_are_no_request_are_refused() -> None:
    with ServerThread(make_config()) as server, Caller(server.address) as caller:
        call = caller.channel.unary_stream(SERVICE + "GetEpisodes")(b"\xff\xff", timeout=DEADLINE_S)

        assert refused(next, call).reason == "invalid-argument"


def test_calls_count_as_streams_while_they_last() -> None:
    with ServerThread(make_config(limits={"max_streams": 2})) as server, Caller(server.address) as caller:
        fill(server)
        big = make_episode(1_900, obs=4)
        server.buffer.add_episode(big)
        one, two = get(caller, max_frame_bytes=4096), get(caller, max_frame_bytes=4096)
        next(one), next(two)

        refusal = refused(next, get(caller))
        one.cancel()

        def third() -> bool:
            try:
                return len(read(get(caller))) > 0
            except grpc.RpcError:
                return False

        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "over-limit")
        eventually(third, "a stream's place is free after it was cancelled")
        two.cancel()


def test_frames_are_made_only_as_the_reader_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    following = EpisodeFramer.next
    monkeypatch.setattr(EpisodeFramer, "next", lambda frames: made.append(1) or following(frames))
    config = make_config(config={"buffer_size": 1_000_000, "batch_size": 8, "min_history": 0, "horizon": 3})
    with ServerThread(config) as server, Caller(server.address) as caller:
        for number in range(100):
            server.buffer.add_episode(make_episode(9_000, seed=number, obs=32))  # 1.2 MB each
        call = get(caller)
        next(call)
        # While the server answers these calls it would have sent everything, if nothing held it back.
        for _ in range(200):
            caller.sample()
        before = len(made)
        headers = sum(pb.GetEpisodesResponse.FromString(message).WhichOneof("part") == "header" for message in call)
        total = len(made)

    assert before < total // 2
    assert headers == 100


def test_reading_never_takes_more_than_one_thread_from_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()
    following = EpisodeFramer.next

    def stuck(frames: EpisodeFramer) -> bytes | None:
        entered.set()
        assert leave.wait(DEADLINE_S)
        return following(frames)

    monkeypatch.setattr(EpisodeFramer, "next", stuck)
    with ServerThread(make_config()) as server, Caller(server.address) as caller:
        fill(server)
        calls = [get(caller) for _ in range(8)]
        assert entered.wait(DEADLINE_S)

        batch = caller.sample()
        leave.set()

        assert batch.obs.shape == (4, 8, 4)
        assert [len(read(call)) for call in calls] == [10] * 8


def test_stopping_server_ends_the_reading_with_draining() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(ServerThread(make_config()))
        caller = stack.enter_context(Caller(server.address))
        server.buffer.add_episode(make_episode(1_900))
        call = get(caller, max_frame_bytes=4096)
        next(call)
        server._loop.call_soon_threadsafe(server._server.parts.drain.begin)

        refusal = refused(lambda: list(call))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "draining")


def test_reading_goes_on_after_a_restart_of_a_durable_server(tmp_path: Path) -> None:
    config = durable_config(tmp_path / "data", capacity=20_000)
    expected = {}
    with ServerThread(config) as server:
        client = ReplayClient(server.address, max_message_bytes=1 << 16)
        port = int(server.address.rpartition(":")[2])
        for sequence in range(300):
            stored = server.buffer.add_episode(keyed_episode(0, sequence))
            expected[stored.episode_id] = keyed_episode(0, sequence)
        episodes = client.episodes()
        first = list(islice(episodes, 3))
    again = config.model_copy(update={"server": config.server.model_copy(update={"port": port})})
    with ServerThread(again), client:
        rest = list(episodes)

    assert [episode.id for episode in (*first, *rest)] == list(expected)
    for episode in (*first, *rest):
        wanted = expected[episode.id]
        assert (episode.key, episode.actor, episode.policy_version) == (wanted.key, wanted.actor, wanted.policy_version)
        assert {name: as_bits(column) for name, column in episode.columns.items()} == {
            name: as_bits(column) for name, column in wanted.columns.items()
        }


def test_reading_ends_with_an_error_after_a_restart_that_lost_the_episodes() -> None:
    config = make_config(config={"buffer_size": 200_000, "batch_size": 8, "min_history": 0, "horizon": 3})
    with ServerThread(config) as server:
        client = ReplayClient(server.address, max_message_bytes=1 << 16)
        port = int(server.address.rpartition(":")[2])
        fill(server, 5_000)
        episodes = client.episodes()
        next(episodes)
    again = make_config(config=config.config.model_dump(), server={"port": port})
    with ServerThread(again) as server, client:
        fill(server, 5_000)

        with pytest.raises(UnavailableError, match="came back without the episodes"):
            list(episodes)


def test_adds_and_evictions_during_a_read_leave_every_episode_whole(tmp_path: Path) -> None:
    with ServerThread(durable_config(tmp_path / "data", capacity=2_000, durability="memory")) as server:
        done = threading.Event()

        def add() -> None:
            with ReplayClient(server.address) as adding:
                for sequence in range(3_000):
                    if done.is_set():
                        return
                    episode = keyed_episode(0, sequence)
                    adding.add(episode.columns, actor=episode.actor, policy_version=sequence, key=episode.key)

        adder = threading.Thread(target=add)
        adder.start()
        try:
            with ReplayClient(server.address, max_message_bytes=1 << 16) as client:
                client.wait_until_ready(min_steps=500)
                read = 0
                for _ in range(15):
                    for episode in client.episodes():
                        wanted = keyed_episode(0, episode.policy_version)
                        assert episode.key == wanted.key
                        assert {name: as_bits(column) for name, column in episode.columns.items()} == {
                            name: as_bits(column) for name, column in wanted.columns.items()
                        }
                        read += 1
        finally:
            done.set()
            adder.join()

    assert read > 15
