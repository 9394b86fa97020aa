"""The client's iterator over stored episodes, against a server whose answers the test decides."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import grpc
import numpy as np
import pytest

from support.client_faults import Handler, ScriptedServer, fail, in_turn
from support.service_calls import collected, eventually
from touchline import DeadlineError, InvalidArgumentError, OverLimitError, ReplayClient, ServerError, UnavailableError
from touchline._learner import episodes as module
from touchline._rpc.calls import Backoff
from touchline_protos.codec import Episode, EpisodeDecoder, EpisodeSelection, StoredEpisode, TensorSpec
from touchline_protos.codec.chunks import chunk_message
from touchline_protos.codec.download import EpisodeOutline, encode_evicted, encode_selection, encode_stored_header, group_message
from touchline_protos.v1 import replay_pb2 as pb

ALL = EpisodeSelection(0, 9, 10, 20, 77)


def outline(number: int) -> EpisodeOutline:
    return EpisodeOutline(number, Episode({}, None, "arm", number), [TensorSpec("obs", np.dtype("<i8"), (2,))])


def whole(*numbers: int) -> bytes:
    message, outs = group_message([outline(number) for number in numbers])
    for number, (out,) in zip(numbers, outs, strict=True):
        out[:] = np.full(2, number, "<i8").view(np.uint8)
    return message


def in_chunks(number: int) -> list[bytes]:
    messages = [encode_stored_header(outline(number), 2)]
    for offset in (0, 8):
        message, out = chunk_message(0, offset, 8)
        out[:] = np.full(1, number, "<i8").view(np.uint8)
        messages.append(message)
    return messages


class Answers:
    """A handler that sends messages, then fails or ends; keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[pb.GetEpisodesRequest] = []

    def __call__(self, *messages: bytes, then: grpc.StatusCode | None = None, reason: str = "") -> Handler:
        def handle(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            self.requests.append(pb.GetEpisodesRequest.FromString(request))
            yield from messages
            if then is not None:
                fail(context, then, reason)

        return handle


@pytest.fixture
def answers() -> Answers:
    return Answers()


def numbers(episodes: Any) -> list[int]:
    found = list(episodes)
    assert all(episode.columns["obs"].tolist() == [episode.id] * 2 and episode.policy_version == episode.id for episode in found)
    return [episode.id for episode in found]


BROKEN = grpc.StatusCode.UNAVAILABLE


def test_reading_that_breaks_off_goes_on_behind_the_last_whole_episode(answers: Answers) -> None:
    handler = in_turn(
        answers(then=BROKEN),
        answers(encode_selection(ALL), whole(0, 1), *in_chunks(3)[:2], then=BROKEN),
        answers(encode_selection(ALL), then=BROKEN),
        answers(encode_selection(ALL._replace(first_episode_id=3)), *in_chunks(3), whole(9), then=BROKEN),
    )
    with ScriptedServer(GetEpisodes=handler) as server, ReplayClient(server.address) as client:
        episodes = client.episodes(actor="arm", newest=10, columns=["obs"])

        assert (episodes.total, episodes.total_steps) == (10, 20)
        assert numbers(episodes) == [0, 1, 3, 9]
        assert server.count("GetEpisodes") == 4

    first, _, third, fourth = answers.requests
    assert (first.newest, first.HasField("first_episode_id"), first.max_frame_bytes) == (10, False, 64 << 20)
    for later in (third, fourth):
        assert (later.first_episode_id, later.last_episode_id, later.actor, list(later.columns)) == (2, 9, "arm", ["obs"])
        assert not later.HasField("newest")


def test_reading_of_ids_goes_on_with_those_that_are_left(answers: Answers) -> None:
    handler = in_turn(
        answers(encode_selection(ALL), whole(1), *in_chunks(4)[:2], encode_evicted(4), then=BROKEN),
        answers(encode_selection(ALL), whole(9)),
    )
    with ScriptedServer(GetEpisodes=handler) as server, ReplayClient(server.address) as client:
        assert numbers(client.episodes(ids=[9, 4, 1, 6])) == [1, 9]

    first, second = answers.requests
    assert (list(first.episode_ids), first.skip_missing) == ([9, 4, 1, 6], False)
    assert (list(second.episode_ids), second.skip_missing) == ([9, 6], True)


class Clock:
    """The source's clock, an hour ahead so that no watchdog ends a session. It advances by ``seconds_a_call`` with each answered call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds_a_call: float) -> None:
        self._server: ScriptedServer | None = None
        self._begun = time.monotonic() + 3600
        self._seconds_a_call = seconds_a_call
        monkeypatch.setattr("touchline._learner.episodes.time", self)

    @contextmanager
    def client(self, handler: Handler) -> Iterator[tuple[ScriptedServer, ReplayClient]]:
        """A server and its client, which does not wait between attempts."""
        with ScriptedServer(GetEpisodes=handler) as self._server, ReplayClient(self._server.address) as client:
            client._rpc.backoff = Backoff(first_s=0.0)
            yield self._server, client

    def monotonic(self) -> float:
        calls = 0 if self._server is None else self._server.count("GetEpisodes")
        return self._begun + calls * self._seconds_a_call


@pytest.mark.parametrize(("seconds_a_call", "calls"), [(10, 5), (60, 5), (1, 31)], ids=["tries", "long tries", "time"])
def test_connection_that_never_holds_for_an_episode_is_given_up(
    answers: Answers, monkeypatch: pytest.MonkeyPatch, seconds_a_call: float, calls: int
) -> None:
    broken = answers(encode_selection(ALL._replace(first_episode_id=2)), *in_chunks(2)[:2], then=BROKEN)
    first = answers(encode_selection(ALL), whole(0, 1), then=BROKEN)
    with Clock(monkeypatch, seconds_a_call).client(in_turn(first, *[broken] * calls, answers(encode_selection(ALL), whole(9)))) as at:
        server, client = at
        episodes = client.episodes(timeout_s=30)
        assert [next(episodes).id, next(episodes).id] == [0, 1]

        with pytest.raises(UnavailableError, match=rf"broke off within an episode {calls} times in .* MB .*steadier network.*columns="):
            next(episodes)

        assert server.count("GetEpisodes") == 1 + calls
        assert numbers(episodes) == [9]  # a caller that goes on after the error has all attempts again


def test_connection_that_holds_for_an_episode_now_and_then_is_not_given_up(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = encode_selection(ALL)
    broken = [answers(selection, *in_chunks(number)[:2], then=BROKEN) for number in (0, 1, 4, 9)]
    handler = in_turn(
        *[broken[0]] * 4,
        answers(selection, whole(0), *in_chunks(1)[:2], then=BROKEN),
        *[broken[1]] * 4,
        answers(selection, *in_chunks(1)[:2], encode_evicted(1), *in_chunks(4)[:2], then=BROKEN),
        *[broken[2]] * 4,
        answers(selection, *in_chunks(4), then=BROKEN),
        *[broken[3]] * 4,
        answers(selection, *in_chunks(9)),
    )
    with Clock(monkeypatch, 1000).client(handler) as (_, client):
        assert numbers(client.episodes()) == [0, 4, 9]


def test_server_that_came_back_without_the_episodes_is_unavailable(answers: Answers) -> None:
    handler = in_turn(
        answers(encode_selection(ALL), whole(0), then=BROKEN),
        answers(encode_selection(ALL._replace(store_generation=78)), whole(5)),
    )
    with ScriptedServer(GetEpisodes=handler) as server, ReplayClient(server.address) as client:
        episodes = client.episodes()
        assert next(episodes).id == 0

        with pytest.raises(UnavailableError, match="came back without the episodes"):
            next(episodes)


def test_refusal_is_raised_without_a_retry(answers: Answers) -> None:
    refusing = answers(then=grpc.StatusCode.NOT_FOUND, reason="unknown-episode")
    with ScriptedServer(GetEpisodes=refusing) as server, ReplayClient(server.address) as client:
        with pytest.raises(InvalidArgumentError):
            next(client.episodes(ids=[3]))
        assert server.count("GetEpisodes") == 1


def test_server_over_a_limit_is_asked_again_until_the_time_is_over(answers: Answers) -> None:
    busy = answers(then=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="over-limit")
    handler = in_turn(busy, answers(encode_selection(ALL), whole(9)), busy)
    with ScriptedServer(GetEpisodes=handler) as server, ReplayClient(server.address) as client:
        assert numbers(client.episodes()) == [9]
        with pytest.raises(OverLimitError):
            next(client.episodes(timeout_s=1.0))
        assert server.count("GetEpisodes") > 3


def silent(context_ended: threading.Event, *messages: bytes) -> Handler:
    """Sends messages, and then nothing until the call ends."""

    def handle(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(context_ended.set)
        yield from messages
        context_ended.wait(60)

    return handle


def test_silence_is_a_deadline_error_and_ends_the_call() -> None:
    ended = threading.Event()
    with ScriptedServer(GetEpisodes=silent(ended, encode_selection(ALL), whole(0))) as server, ReplayClient(server.address) as client:
        episodes = client.episodes()
        next(episodes)
        episodes._source._timeout_s = 0.3

        with pytest.raises(DeadlineError, match=r"no message within 0\.3 s"):
            next(episodes)
        assert ended.wait(60)


def test_reading_goes_on_after_a_deadline_was_missed(answers: Answers) -> None:
    handler = in_turn(silent(threading.Event(), encode_selection(ALL), whole(0)), answers(encode_selection(ALL), whole(9)))
    with ScriptedServer(GetEpisodes=handler) as server, ReplayClient(server.address) as client:
        episodes = client.episodes()
        next(episodes)
        episodes._source._timeout_s = 0.3
        with pytest.raises(DeadlineError):
            next(episodes)
        episodes._source._timeout_s = 60.0

        assert numbers(episodes) == [9]


def test_reading_that_was_interrupted_within_a_message_goes_on_without_a_gap(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    feed, left = EpisodeDecoder.feed, [None, None, KeyboardInterrupt()]

    def feed_unless_interrupted(decoder: EpisodeDecoder, message: bytes) -> list[StoredEpisode]:
        if left and (error := left.pop(0)) is not None:
            raise error
        return feed(decoder, message)

    monkeypatch.setattr(EpisodeDecoder, "feed", feed_unless_interrupted)
    handler = in_turn(
        answers(encode_selection(ALL), whole(0), whole(1), whole(9)),
        answers(encode_selection(ALL._replace(first_episode_id=1)), whole(1), whole(9)),
    )
    with ScriptedServer(GetEpisodes=handler) as server, ReplayClient(server.address) as client:
        episodes = client.episodes()
        assert next(episodes).id == 0
        with pytest.raises(KeyboardInterrupt):
            next(episodes)

        assert numbers(episodes) == [1, 9]
    assert answers.requests[1].first_episode_id == 1


def test_reading_that_was_interrupted_at_any_line_goes_on_without_a_gap_or_a_repetition() -> None:
    def handle(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        first = pb.GetEpisodesRequest.FromString(request).first_episode_id
        yield encode_selection(ALL._replace(first_episode_id=first))
        yield from (whole(number) for number in range(first, 10))

    def interrupt_at(count: int) -> Iterator[None]:
        """Raises KeyboardInterrupt at the ``count``-th line that the source of episodes runs."""
        lines = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal lines
            if (
                frame.f_code.co_name not in ("take", "_advance", "_advance_within", "_take_over")
                or frame.f_code.co_filename != module.__file__
            ):
                return None
            if event == "line":
                lines += 1
                if lines == count:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(None)
            reached.append(lines >= count)

    reached: list[bool] = []
    with ScriptedServer(GetEpisodes=handle) as server, ReplayClient(server.address) as client:
        for count in range(1, 1000):
            episodes, found = client.episodes(), list[int]()
            with suppress(KeyboardInterrupt), contextmanager(interrupt_at)(count):
                for episode in episodes:
                    found.append(episode.id)
            assert found + numbers(episodes) == list(range(10)), count
            if not reached[-1]:
                break

    assert sum(reached) > 50
    assert not reached[-1]


def test_absent_server_is_unavailable_within_the_time_limit() -> None:
    with ScriptedServer() as server:
        address = server.address

    with ReplayClient(address) as client, pytest.raises(UnavailableError):
        next(client.episodes(timeout_s=1.0))


@pytest.mark.parametrize(
    "messages",
    [
        [b"\xff\xff"],
        [whole(1)],
        [],
        [encode_selection(ALL), *in_chunks(1)[:2]],
        [encode_selection(ALL), encode_evicted(1)],
    ],
    ids=["no message", "no selection", "nothing", "half an episode", "an eviction of nothing"],
)
def test_malformed_answer_is_a_server_error(messages: list[bytes], answers: Answers) -> None:
    with ScriptedServer(GetEpisodes=answers(*messages)) as server, ReplayClient(server.address) as client:
        with pytest.raises(ServerError):
            list(client.episodes())
        assert server.count("GetEpisodes") == 1


@pytest.mark.parametrize("how", ["with", "close", "drop"])
def test_stopping_before_the_end_ends_the_call(how: str) -> None:
    ended = threading.Event()
    with ScriptedServer(GetEpisodes=silent(ended, encode_selection(ALL), whole(0, 1))) as server, ReplayClient(server.address) as client:
        if how == "with":
            with client.episodes() as episodes:
                next(episodes)
        else:
            episodes = client.episodes()
            next(episodes)
            assert not ended.is_set()
            if how == "close":
                episodes.close()
                episodes.close()
        if how != "drop":
            assert list(episodes) == []
        del episodes

        eventually(collected(ended.is_set), "the call ends", every_s=0.02)


def test_close_by_another_thread_ends_the_iteration() -> None:
    ended, third = threading.Event(), threading.Event()
    handler = silent(ended, encode_selection(ALL), whole(0, 1, 2))
    with ScriptedServer(GetEpisodes=handler) as server, ReplayClient(server.address) as client:
        episodes, found = client.episodes(), []

        def iterate() -> None:
            for episode in episodes:
                found.append(episode.id)
                if episode.id == 2:
                    third.set()

        thread = threading.Thread(target=iterate)
        thread.start()
        assert third.wait(60)
        episodes.close()
        thread.join(60)

        assert not thread.is_alive() and ended.wait(60)
        assert found == [0, 1, 2]


def test_empty_ids_make_no_call() -> None:
    with ScriptedServer() as server, ReplayClient(server.address) as client:
        episodes = client.episodes(ids=[])

        assert (list(episodes), episodes.total) == ([], 0)
        assert server.calls == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ids": [1], "actor": "arm"}, "^ids and actor: "),
        ({"ids": ["a"]}, r"^ids\[0\]: "),
        ({"ids": [2**63]}, r"^ids\[0\]: "),
        ({"skip_missing": True}, "^skip_missing: "),
        ({"first": 1.5}, "^first: "),
        ({"newest": 0}, "^newest: "),
        ({"actor": "x" * 129}, "^actor: "),
        ({"columns": "obs"}, "^columns: 'obs', expected a sequence"),
        ({"timeout_s": 0}, "^timeout_s: "),
    ],
)
def test_bad_arguments_are_refused_without_a_call(arguments: dict[str, Any], words: str) -> None:
    with ScriptedServer() as server, ReplayClient(server.address) as client:
        with pytest.raises(InvalidArgumentError, match=words):
            client.episodes(**arguments)
        assert server.calls == []
