"""Deadlines, retries and the meaning of failures, against a server that fails on demand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import Any

import grpc
import numpy as np
import pytest

from support.client_faults import ScriptedServer, answering, fail, failing, in_turn, over_limit, trying_once
from touchline import (
    AccessDeniedError,
    ClosedError,
    DeadlineError,
    EpisodeKey,
    IncompatibleVersionError,
    InvalidArgumentError,
    InvalidEpisodeError,
    KeyConflictError,
    LoadError,
    NotReadyError,
    OverLimitError,
    ReplayClient,
    ServerError,
    TooLargeError,
    TouchlineError,
    UnauthenticatedError,
    UnavailableError,
)
from touchline._rpc.calls import Backoff, RpcClient
from touchline._rpc.channel import ServerChannel
from touchline_protos.codec import Episode, LoadDecoder, encode_add_episode
from touchline_protos.v1 import replay_pb2 as pb

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
READY = answering(pb.ReadyResponse(can_sample=True, counts=pb.Counts(steps_stored=7)).SerializeToString())
EPISODE = {"obs": np.zeros((5, 2), np.float32), "action": np.zeros((5, 1), np.float32), "reward": np.zeros(5, np.float32)}


def _calls(server: ScriptedServer, sleeps: list[float], *, timeout_s: float = 20.0) -> RpcClient:
    return RpcClient(ServerChannel(server.address, max_message_bytes=1 << 20), timeout_s=timeout_s, sleep=sleeps.append)


class Clock:
    """Stands in for the time of calls; sleeping moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, delay_s: float) -> None:
        self.now += delay_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("touchline._rpc.calls.time", clock)
    return clock


def test_unavailable_three_times_is_retried_with_growing_waits() -> None:
    sleeps: list[float] = []
    with ScriptedServer(Ready=in_turn(*[failing(UNAVAILABLE)] * 3, READY)) as server:
        answer = _calls(server, sleeps).unary("Ready", b"")

        assert pb.ReadyResponse.FromString(answer).can_sample
        assert server.count("Ready") == 4
    assert len(sleeps) == 3
    assert all(0.5 * full <= slept <= full for slept, full in zip(sleeps, (0.05, 0.1, 0.2), strict=True))


def test_draining_is_retried_whatever_its_status_code() -> None:
    with ScriptedServer(Ready=in_turn(failing(grpc.StatusCode.ABORTED, "draining"), READY)) as server:
        answer = _calls(server, []).unary("Ready", b"")

    assert pb.ReadyResponse.FromString(answer).can_sample


def test_cancelled_by_a_stopping_server_is_retried() -> None:
    with ScriptedServer(Ready=in_turn(failing(grpc.StatusCode.CANCELLED), READY)) as server:
        answer = _calls(server, []).unary("Ready", b"")

    assert pb.ReadyResponse.FromString(answer).can_sample


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code not in (UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.OK)]
)
def test_other_failures_are_not_retried(code: grpc.StatusCode) -> None:
    with ScriptedServer(Ready=failing(code)) as server:
        with pytest.raises(TouchlineError):
            _calls(server, []).unary("Ready", b"")

        assert server.count("Ready") == 1


def test_over_limit_is_retried_after_the_delay_that_the_server_asks_for() -> None:
    sleeps: list[float] = []
    with ScriptedServer(Ready=in_turn(over_limit("1500"), over_limit("250"), READY)) as server:
        answer = _calls(server, sleeps).unary("Ready", b"")

    assert pb.ReadyResponse.FromString(answer).can_sample
    assert len(sleeps) == 2
    assert 1.5 + 0.025 <= sleeps[0] <= 1.5 + 0.05
    assert 0.25 + 0.05 <= sleeps[1] <= 0.25 + 0.1


@pytest.mark.parametrize("value", ["", "-1", "soon", "1.5"])
def test_over_limit_without_a_delay_that_can_be_read_is_retried_with_growing_waits(value: str) -> None:
    sleeps: list[float] = []
    with ScriptedServer(Ready=in_turn(*[over_limit(value)] * 2, READY)) as server:
        _calls(server, sleeps).unary("Ready", b"")

    assert all(0.5 * full <= slept <= full for slept, full in zip(sleeps, (0.05, 0.1), strict=True))


def test_over_limit_beyond_the_deadline_is_raised_immediately_with_the_delay() -> None:
    sleeps: list[float] = []
    with (
        ScriptedServer(Ready=over_limit("60000")) as server,
        pytest.raises(OverLimitError, match="as the test wants") as caught,
    ):
        _calls(server, sleeps).unary("Ready", b"")

    assert (caught.value.retry_after_s, sleeps, server.count("Ready")) == (60.0, [], 1)


def test_over_limit_upload_is_sent_again_whole_after_the_delay() -> None:
    sleeps: list[float] = []
    keys: list[list[int]] = []
    with ScriptedServer(LoadEpisodes=in_turn(over_limit("700"), _loader(keys))) as server:
        message = encode_add_episode(Episode(EPISODE, EpisodeKey("me", 1, 2)))
        _calls(server, sleeps).upload("LoadEpisodes", lambda: iter([message]), timeout_s=20.0)

    assert keys == [[2]]
    assert 0.7 <= sleeps[0] <= 0.75


def test_clear_that_is_over_a_limit_is_not_retried() -> None:
    with ScriptedServer(Clear=over_limit("10")) as server, ReplayClient(server.address) as client:
        with pytest.raises(OverLimitError):
            client.clear()

        assert server.count("Clear") == 1


def test_unavailable_until_the_deadline_raises_unavailable(clock: Clock) -> None:
    with ScriptedServer(Ready=failing(UNAVAILABLE, details="gone for lunch")) as server:
        with pytest.raises(UnavailableError, match="gone for lunch"):
            RpcClient(ServerChannel(server.address, max_message_bytes=1 << 20), timeout_s=20.0, sleep=clock.sleep).unary("Ready", b"")

        assert 100.0 + 20.0 - 2.0 <= clock.now < 100.0 + 20.0
        assert server.count("Ready") > 10


def test_no_server_at_all_is_unavailable() -> None:
    with ScriptedServer() as server:
        address = server.address

    with ReplayClient(address) as client, pytest.raises(UnavailableError, match=address):
        trying_once(client).ready()


def test_clear_is_not_retried() -> None:
    with ScriptedServer(Clear=failing(UNAVAILABLE)) as server, ReplayClient(server.address) as client:
        with pytest.raises(UnavailableError):
            client.clear()

        assert server.count("Clear") == 1


def test_answer_after_the_deadline_is_a_deadline_error() -> None:
    released = threading.Event()

    def wait(request: bytes, context: grpc.ServicerContext) -> bytes:
        released.wait(60)
        return b""

    with ScriptedServer(Ready=wait) as server, ReplayClient(server.address, timeout_s=0.2) as client:
        try:
            with pytest.raises(DeadlineError):
                client.ready()
        finally:
            released.set()


def test_deadline_covers_all_attempts_together(clock: Clock) -> None:
    left: list[float] = []

    def note(request: bytes, context: grpc.ServicerContext) -> bytes:
        left.append(context.time_remaining())
        fail(context, UNAVAILABLE)

    with ScriptedServer(Ready=note) as server, pytest.raises(UnavailableError):
        RpcClient(ServerChannel(server.address, max_message_bytes=1 << 20), timeout_s=60.0, sleep=clock.sleep).unary("Ready", b"")

    assert 30.0 < left[0] < 61.0  # gRPC rounds
    assert left[-1] < 4.0


def test_every_call_carries_the_protocol_version() -> None:
    with ScriptedServer(Ready=READY) as server, ReplayClient(server.address) as client:
        client.ready()

        assert server.calls[0][1]["touchline-protocol"] == "1.3"


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "invalid-episode", InvalidEpisodeError),
        (grpc.StatusCode.INVALID_ARGUMENT, "invalid-argument", InvalidArgumentError),
        (grpc.StatusCode.INVALID_ARGUMENT, "", InvalidArgumentError),
        (grpc.StatusCode.NOT_FOUND, "", InvalidArgumentError),
        (grpc.StatusCode.ALREADY_EXISTS, "key-conflict", KeyConflictError),
        (grpc.StatusCode.FAILED_PRECONDITION, "not-ready", NotReadyError),
        (grpc.StatusCode.FAILED_PRECONDITION, "incompatible-version", IncompatibleVersionError),
        (grpc.StatusCode.UNIMPLEMENTED, "", IncompatibleVersionError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "too-large", TooLargeError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "over-limit", OverLimitError),
        (grpc.StatusCode.UNAUTHENTICATED, "", UnauthenticatedError),
        (grpc.StatusCode.PERMISSION_DENIED, "", AccessDeniedError),
        (grpc.StatusCode.INTERNAL, "internal", ServerError),
        (grpc.StatusCode.DATA_LOSS, "a-reason-of-tomorrow", ServerError),
    ],
)
def test_failure_means_what_code_and_reason_say(code: grpc.StatusCode, reason: str, kind: type[TouchlineError]) -> None:
    # The words of the message are those of another error on purpose.
    with (
        ScriptedServer(Info=failing(code, reason, "not ready, too large, draining")) as server,
        ReplayClient(server.address) as client,
        pytest.raises(TouchlineError) as caught,
    ):
        trying_once(client).info()

    assert type(caught.value) is kind
    assert "not ready, too large, draining" in str(caught.value)


def test_sample_that_is_not_ready_carries_the_counts() -> None:
    not_ready = failing(grpc.StatusCode.FAILED_PRECONDITION, "not-ready")
    with (
        ScriptedServer(Sample=not_ready, Ready=READY) as server,
        ReplayClient(server.address) as client,
        pytest.raises(NotReadyError) as caught,
    ):
        client.sample()

    assert caught.value.counts is not None
    assert caught.value.counts.steps_stored == 7


def test_closed_client_raises_closed_error() -> None:
    client = ReplayClient("127.0.0.1:1")
    client.close()
    client.close()

    with pytest.raises(ClosedError):
        client.ready()


def test_close_ends_a_call_of_another_thread() -> None:
    entered, released = threading.Event(), threading.Event()
    caught: list[BaseException] = []

    def wait(request: bytes, context: grpc.ServicerContext) -> bytes:
        entered.set()
        released.wait(60)
        return b""

    with ScriptedServer(Ready=wait) as server:
        client = ReplayClient(server.address)

        def ask() -> None:
            try:
                client.wait_until_ready(timeout_s=30)
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            assert entered.wait(60)
            client.close()
            thread.join(60)
        finally:
            released.set()

    assert [type(error) for error in caught] == [ClosedError]


def test_wait_until_ready_survives_an_absent_server_and_gives_up_with_the_counts() -> None:
    not_yet = answering(pb.ReadyResponse(can_sample=True, counts=pb.Counts(steps_stored=3, episodes_stored=1)).SerializeToString())
    with (
        ScriptedServer(Ready=in_turn(failing(UNAVAILABLE), failing(UNAVAILABLE), not_yet)) as server,
        ReplayClient(server.address, timeout_s=0.05) as client,
        pytest.raises(NotReadyError, match=r"3 steps in 1 episodes, some of them long enough; expected 10 steps") as caught,
    ):
        client.wait_until_ready(10, timeout_s=1.0)

    assert caught.value.counts is not None
    assert caught.value.counts.steps_stored == 3


def test_wait_until_ready_without_any_server_is_unavailable() -> None:
    with ScriptedServer() as server:
        address = server.address

    with ReplayClient(address, timeout_s=0.05) as client, pytest.raises(UnavailableError):
        client.wait_until_ready(timeout_s=0.3)


def test_wait_until_ready_asks_for_steps_and_short_waits() -> None:
    asked: list[pb.ReadyRequest] = []

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        asked.append(pb.ReadyRequest.FromString(request))
        return pb.ReadyResponse(can_sample=True, min_steps_reached=len(asked) == 2).SerializeToString()

    with ScriptedServer(Ready=answer) as server, ReplayClient(server.address, table="pitch") as client:
        state = client.wait_until_ready(50)

    assert state.can_sample and state.min_steps_reached
    assert [(request.table, request.min_steps) for request in asked] == [("pitch", 50)] * 2
    assert all(0 < request.wait_s <= 5 for request in asked)


def test_add_retried_keeps_its_key() -> None:
    keys: list[tuple[str, int, int]] = []

    def store(request: bytes, context: grpc.ServicerContext) -> bytes:
        key = pb.AddEpisodeRequest.FromString(request).episode.key
        keys.append((key.client_id, key.incarnation, key.sequence))
        if len(keys) < 3:
            fail(context, UNAVAILABLE)
        return pb.AddEpisodeResponse(counts=pb.Counts(episodes_stored=4)).SerializeToString()

    with ScriptedServer(AddEpisode=store) as server, ReplayClient(server.address) as client:
        assert client.add(EPISODE) == 4
        assert client.add(EPISODE, key=EpisodeKey("me", 5, 6)) == 4

    assert keys[0] == keys[1] == keys[2]
    assert keys[3] == ("me", 5, 6)


def test_add_over_the_servers_limit_goes_in_chunks() -> None:
    received: list[Any] = []

    def load(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        received.extend(pb.LoadEpisodesRequest.FromString(message) for message in requests)
        result = pb.EpisodeResult(outcome=pb.EpisodeResult.OUTCOME_ACCEPTED, episode_id=0)
        return pb.LoadEpisodesResponse(results=[result], counts=pb.Counts(episodes_stored=1)).SerializeToString()

    too_large = failing(grpc.StatusCode.RESOURCE_EXHAUSTED)
    info = answering(pb.InfoResponse(max_message_bytes=1 << 20).SerializeToString())
    with ScriptedServer(AddEpisode=too_large, LoadEpisodes=load, Info=info) as server, ReplayClient(server.address) as client:
        assert client.add(EPISODE, actor="keeper", policy_version=3) == 1

    assert (received[0].episode.actor, received[0].episode.policy_version) == ("keeper", 3)


def _loader(keys: list[list[int]], breaks: int = 0) -> Any:
    """Stores what it is sent, notes the sequence numbers of each call, and breaks the first calls after they were read."""

    def load(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        decoder = LoadDecoder()
        episodes = [episode for message in requests for episode in decoder.feed(message) if isinstance(episode, Episode)]
        keys.append([episode.key.sequence for episode in episodes if episode.key is not None])
        if len(keys) <= breaks:
            fail(context, UNAVAILABLE)
        results = [pb.EpisodeResult(outcome=pb.EpisodeResult.OUTCOME_ACCEPTED, episode_id=number) for number in range(len(episodes))]
        return pb.LoadEpisodesResponse(results=results, counts=pb.Counts(episodes_stored=len(episodes))).SerializeToString()

    return load


def test_load_that_breaks_is_sent_again_with_the_same_keys() -> None:
    keys: list[list[int]] = []
    with ScriptedServer(LoadEpisodes=_loader(keys, breaks=1)) as server, ReplayClient(server.address) as client:
        assert client.load([EPISODE] * 3) == 3

    assert keys == [[0, 1, 2], [0, 1, 2]]


def test_load_is_cut_into_calls_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._actor.upload.MAX_LOAD_EPISODES", 2)
    keys: list[list[int]] = []
    progress: list[int] = []
    with ScriptedServer(LoadEpisodes=_loader(keys)) as server, ReplayClient(server.address) as client:
        client.load((EPISODE for _ in range(5)), progress=progress.append)

    assert keys == [[0, 1], [2, 3], [4]]
    assert progress == [2, 4, 5]


def test_load_is_cut_by_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._actor.upload.MAX_LOAD_BYTES", 200)  # an episode has 80
    keys: list[list[int]] = []
    with ScriptedServer(LoadEpisodes=_loader(keys)) as server, ReplayClient(server.address) as client:
        client.load([EPISODE] * 5)

    assert keys == [[0, 1], [2, 3], [4]]


def test_load_with_an_episode_that_cannot_be_sent_stores_the_others() -> None:
    keys: list[list[int]] = []
    bad = EPISODE | {"reward": np.zeros(4, np.float32)}
    with (
        ScriptedServer(LoadEpisodes=_loader(keys)) as server,
        ReplayClient(server.address) as client,
        pytest.raises(LoadError, match=r"episode 1: reward: 4 rows, expected 5 to match obs") as caught,
    ):
        client.load([EPISODE, bad, EPISODE])

    assert keys == [[0, 2]]
    assert [type(result.error) for result in caught.value.results] == [type(None), InvalidEpisodeError, type(None)]
    assert [result.key.sequence for result in caught.value.results] == [0, 1, 2]


def test_load_that_stays_unavailable_notes_what_was_answered_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._actor.upload.MAX_LOAD_EPISODES", 2)
    handler = in_turn(_loader([]), failing(UNAVAILABLE))
    with (
        ScriptedServer(LoadEpisodes=handler) as server,
        ReplayClient(server.address) as client,
        pytest.raises(UnavailableError) as caught,
    ):
        trying_once(client).load([EPISODE] * 4)

    notes = getattr(caught.value, "__notes__", [str(caught.value)])  # Python 3.10 has none
    assert len(notes) == 1 and "load: 2 episodes were answered before" in notes[0]


def test_answer_for_another_number_of_episodes_is_a_server_error() -> None:
    short = answering(pb.LoadEpisodesResponse().SerializeToString())

    def load(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        for _ in requests:
            pass
        message: bytes = short(b"", context)
        return message

    with ScriptedServer(LoadEpisodes=load) as server, ReplayClient(server.address) as client, pytest.raises(ServerError, match="0 results"):
        client.load([EPISODE])


def test_upload_whose_messages_cannot_be_made_raises_what_went_wrong() -> None:
    def requests() -> Iterator[bytes]:
        yield b""
        raise KeyError("no such shelf")

    with (
        ScriptedServer(LoadEpisodes=lambda messages, context: b"".join(messages)) as server,
        pytest.raises(KeyError, match="no such shelf"),
    ):
        _calls(server, []).upload("LoadEpisodes", requests, timeout_s=10)


def test_backoff_doubles_up_to_its_longest_wait() -> None:
    delays = list(islice(Backoff(first_s=0.1, max_s=0.5).delays(Random(0)), 6))

    for delay, full in zip(delays, (0.1, 0.2, 0.4, 0.5, 0.5, 0.5), strict=True):
        assert full / 2 <= delay <= full
