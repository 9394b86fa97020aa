"""The service on a durable store: it acknowledges after the commit, and does not serve before the store is read."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.durable_cases import MODES, assert_whole, contents, durable_config, keyed_episode
from support.service_calls import DEADLINE_S, Caller, eventually, refused
from touchline_protos.codec import encode_add_episode, encode_load
from touchline_protos.types.metadata import HEALTH_DETAIL_METADATA_KEY
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import ReplayBuffer
from touchline_server.durability import restore as restoring
from touchline_server.service.app import ReplayServer, ServerThread


@pytest.mark.parametrize("durability", MODES)
def test_load_and_add_are_durable_and_a_retry_is_a_duplicate(durability: str, tmp_path: Path) -> None:
    config = durable_config(tmp_path / "data", capacity=5_000, durability=durability)
    episodes = [keyed_episode(0, sequence) for sequence in range(40)]
    with ServerThread(config) as server, Caller(server.address) as caller:
        loaded = caller.load(message for episode in episodes for message in encode_load(episode, chunk_bytes=1_000))
        added = caller.add(keyed_episode(1, 0))

    with ServerThread(config) as server, Caller(server.address) as caller:
        again = caller.load(message for episode in episodes for message in encode_load(episode))
        counts = caller.counts()
        found = contents(server.buffer)

    assert [(result.outcome, result.episode_id) for result in loaded.results] == [
        (pb.EpisodeResult.OUTCOME_ACCEPTED, number) for number in range(40)
    ]
    assert added.episode_id == 40
    assert [(result.outcome, result.episode_id) for result in again.results] == [
        (pb.EpisodeResult.OUTCOME_DUPLICATE, number) for number in range(40)
    ]
    assert (counts.episodes_stored, counts.episodes_added, counts.episodes_duplicate) == (41, 41, 40)
    assert_whole(found)


def test_load_answers_each_episode_in_order_refused_ones_too(tmp_path: Path) -> None:
    with ServerThread(durable_config(tmp_path / "data", capacity=5_000)) as server, Caller(server.address) as caller:
        good, other = keyed_episode(0, 0), keyed_episode(0, 1)
        bad = type(good)({name: column[:5] for name, column in other.columns.items() if name != "action"}, key=other.key)
        answer = caller.load(message for episode in (good, bad, keyed_episode(0, 2)) for message in encode_load(episode))

    assert [result.outcome for result in answer.results] == [
        pb.EpisodeResult.OUTCOME_ACCEPTED,
        pb.EpisodeResult.OUTCOME_INVALID,
        pb.EpisodeResult.OUTCOME_ACCEPTED,
    ]


def test_many_waiting_adds_take_no_thread_each_and_share_commits(tmp_path: Path) -> None:
    with ServerThread(durable_config(tmp_path / "data", capacity=100_000, durability="sync")) as server, Caller(server.address) as caller:
        caller.add(keyed_episode(0, 0))
        committer = server.buffer.table._committer
        assert committer is not None
        before = committer._sqlite._database.commits
        with server.buffer.store.writes.lock:  # the disk takes its time
            calls = [
                caller.channel.unary_unary("/touchline.v1.Replay/AddEpisode").future(
                    encode_add_episode(keyed_episode(0, sequence)), timeout=DEADLINE_S
                )
                for sequence in range(1, 65)
            ]
            eventually(lambda: len(committer._queue) == 64, "all are queued, though two threads add")
        for call in calls:
            call.result()
        commits = committer._sqlite._database.commits - before

    assert commits <= 2


def test_server_that_restores_says_not_serving_and_refuses_every_call_with_the_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = durable_config(tmp_path / "data", capacity=5_000)
    with closing(ReplayBuffer(config)) as buffer:
        for sequence in range(20):
            buffer.add_episode(keyed_episode(0, sequence))
    reading, go_on = threading.Event(), threading.Event()
    restore = restoring.restore
    addresses: list[str] = []
    listen = ReplayServer._listen

    def note_address(server: ReplayServer) -> str:
        addresses.append(listen(server))
        return addresses[-1]

    def slow(store: Any, database: Any, progress: Any, **options: Any) -> None:
        progress(120, 480)
        reading.set()
        assert go_on.wait(DEADLINE_S)
        restore(store, database, progress, **options)

    monkeypatch.setattr(restoring, "restore", slow)
    monkeypatch.setattr(ReplayServer, "_listen", note_address)
    server = ServerThread(config)
    starting = threading.Thread(target=server.__enter__)
    starting.start()
    try:
        assert reading.wait(DEADLINE_S)
        with Caller(addresses[0]) as caller:
            health = health_pb2_grpc.HealthStub(caller.channel)
            answer, call = health.Check.with_call(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
            status, detail = answer.status, dict(call.trailing_metadata())[HEALTH_DETAIL_METADATA_KEY]
            refusals = [
                refused(caller.stub.Ready, pb.ReadyRequest(), timeout=DEADLINE_S),
                refused(caller.stub.Ready, pb.ReadyRequest(min_steps=1, wait_s=0.05), timeout=DEADLINE_S),
                refused(caller.stub.Info, pb.InfoRequest(), timeout=DEADLINE_S),
                refused(caller.stub.Clear, pb.ClearRequest(), timeout=DEADLINE_S),
                refused(lambda: list(caller.stub.GetEpisodes(pb.GetEpisodesRequest(), timeout=DEADLINE_S))),
                refused(lambda: caller.stream().open(credits=1).read(1)),
                refused(caller.load, encode_load(keyed_episode(0, 20))),
                refused(caller.add, keyed_episode(0, 20)),
                refused(caller.sample),
            ]
            go_on.set()
            starting.join()
            served = health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S).status
            ready_after = caller.stub.Ready(pb.ReadyRequest(min_steps=100), timeout=DEADLINE_S)
    finally:
        go_on.set()
        starting.join()
        server.__exit__(None, None, None)

    assert status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert {(refusal.code, refusal.reason) for refusal in refusals} == {(grpc.StatusCode.UNAVAILABLE, "restoring")}
    assert all("is being read (120 of 480 rows, 25 %)" in text for text in (detail, *(refusal.details for refusal in refusals)))
    assert served == health_pb2.HealthCheckResponse.SERVING
    assert (ready_after.can_sample, ready_after.min_steps_reached) == (True, True)
    assert server.buffer.counts().episodes_stored == 20
