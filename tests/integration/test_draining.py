"""A stopping server does not wait for clients that keep their streams open and send nothing."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import pytest

from support.durable_cases import durable_config, keyed_episode
from support.service_calls import DEADLINE_S, SERVICE, Caller, Refusal, eventually, key, make_config, make_episode, refused
from touchline import EpisodeWriter, ReplayClient
from touchline_protos.codec import encode_load
from touchline_protos.shm.ring import shared_memory_id
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import Config
from touchline_server.service import add_calls
from touchline_server.service.app import ServerThread

FOR_EVER_S = 3600.0
"""A drain timeout that outlasts the test's limit."""
DRAINING = (grpc.StatusCode.UNAVAILABLE, "draining")


class Load:
    """A call whose messages the test sends; the client keeps it open. Loads episodes unless another method is given."""

    def __init__(self, caller: Caller, method: str = "LoadEpisodes") -> None:
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.call = caller.channel.stream_unary(SERVICE + method).future(iter(self._messages.get, None), timeout=DEADLINE_S)

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self._messages.put(message)

    def end(self) -> None:
        self._messages.put(None)


class Served:
    """A server, a client's channel to it, and :meth:`stop`, which the end of the block calls where the test did not."""

    def __init__(self, config: Config) -> None:
        self.server = ServerThread(config)
        self._stops = threading.Lock()

    def __enter__(self) -> Self:
        self.server.__enter__()
        self.parts: Any = self.server._server.parts
        self.caller = Caller(self.server.address)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self.caller.__exit__(None, None, None)

    def stop(self) -> None:
        """Returns once the server has stopped."""
        if self._stops.acquire(blocking=False):
            self.server.__exit__(None, None, None)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Stops the server while the block runs."""
        thread = threading.Thread(target=self.stop)
        thread.start()
        eventually(lambda: self.parts.drain.begun, "it drains")
        yield
        thread.join()


def serving(**tables: Any) -> Served:
    server = {"port": 0, "drain_timeout_s": FOR_EVER_S} | tables.pop("server", {})
    return Served(make_config(server=server, **tables))


def end_of(refusal: Refusal) -> tuple[grpc.StatusCode, str]:
    return refusal.code, refusal.reason


@pytest.mark.parametrize("episodes", [0, 1, 3])
def test_silent_load_is_asked_to_retry_when_the_server_stops(episodes: int) -> None:
    with serving() as served:
        load = Load(served.caller)
        for number in range(episodes):
            load.send(*encode_load(make_episode(20, key=key(number)), chunk_bytes=200))
        store = served.server.buffer.store
        eventually(lambda: store.counts().episodes_stored == episodes and served.parts.calls.streams.now == 1, "it is in progress")

        served.stop()

        assert end_of(refused(load.call.result)) == DRAINING
        load.end()


def test_load_in_the_middle_of_an_episode_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(add_calls, "LOAD_GRACE_S", 0.0)
    with serving() as served:
        load, (header, first, *others) = Load(served.caller), encode_load(make_episode(20, key=key(0)), chunk_bytes=100)
        load.send(header, first)
        eventually(lambda: served.parts.budgets.uploads.used > 0, "an episode is announced")

        with served.stopping():
            assert end_of(refused(served.caller.add, make_episode())) == DRAINING
            assert not load.call.done()
            monkeypatch.setattr(add_calls, "LOAD_GRACE_S", FOR_EVER_S)  # waits for the end of the stream, which follows the episode
            load.send(*others)
            load.end()

            answer = pb.LoadEpisodesResponse.FromString(load.call.result())

    assert [result.outcome for result in answer.results] == [pb.EpisodeResult.OUTCOME_ACCEPTED]


@pytest.mark.parametrize("durability", ["sync", "memory"])
def test_episodes_of_a_broken_load_are_duplicates_when_sent_again(durability: str, tmp_path: Path) -> None:
    config = durable_config(tmp_path / "data", capacity=5_000, durability=durability)
    stopped = config.model_copy(update={"server": config.server.model_copy(update={"drain_timeout_s": FOR_EVER_S})})
    messages = [message for number in range(3) for message in encode_load(keyed_episode(0, number))]
    with Served(stopped) as served:
        load = Load(served.caller)
        load.send(*messages)
        eventually(lambda: served.server.buffer.counts().episodes_stored == 3, "they are stored")
        served.stop()
        assert end_of(refused(load.call.result)) == DRAINING
        load.end()

    with ServerThread(config) as server, Caller(server.address) as caller:
        again = caller.load([*messages, *encode_load(keyed_episode(0, 3))])

    outcomes = [result.outcome for result in again.results]
    assert outcomes == [pb.EpisodeResult.OUTCOME_DUPLICATE] * 3 + [pb.EpisodeResult.OUTCOME_ACCEPTED]
    assert again.counts.episodes_stored == 4


@pytest.mark.parametrize("method", ["AddEpisode", "Sample", "Info"])
def test_call_whose_message_has_not_arrived_is_refused_and_not_waited_for(method: str) -> None:
    with serving() as served:
        call = Load(served.caller, method)
        eventually(lambda: served.parts.calls.replay.now == 1, "it is in progress")

        served.stop()

        assert end_of(refused(call.call.result)) == DRAINING
        call.end()


def test_call_that_waits_is_answered_before_the_server_stops() -> None:
    with serving() as served:
        ready = served.caller.stub.Ready.future(pb.ReadyRequest(min_steps=1_000, wait_s=FOR_EVER_S), timeout=DEADLINE_S)
        eventually(lambda: len(served.parts.changes._waiters) == 1, "it waits")

        served.stop()

        assert not ready.result().min_steps_reached


def _silent(caller: Caller) -> Any:
    return caller.stream()


def _idle(caller: Caller) -> Any:
    return caller.stream().open(credits=0)


def _unready(caller: Caller) -> Any:
    return caller.stream().open(credits=5, horizon=500)


def _on_a_ring(caller: Caller) -> Any:
    stream = caller.stream()
    opening = pb.SampleStreamOpen(credits=4, shared_memory_id=shared_memory_id())
    stream.send(pb.SampleStreamRequest(open=opening).SerializeToString())
    assert pb.SampleStreamResponse.FromString(next(stream.call)).HasField("ring")
    stream.send(pb.SampleStreamRequest(ring=pb.RingAttachment(attached=True)).SerializeToString())
    return stream


@pytest.mark.parametrize("open_stream", [_silent, _idle, _unready, _on_a_ring])
def test_sampling_stream_that_waits_for_its_learner_is_asked_to_retry(open_stream: Callable[[Caller], Any]) -> None:
    if open_stream is _on_a_ring and not shared_memory_id():
        pytest.skip("rings need Linux on x86-64")
    with serving() as served:
        served.caller.add(make_episode())
        stream = open_stream(served.caller)
        eventually(lambda: served.parts.calls.streams.now == 1, "the stream is in progress")

        served.stop()

        assert end_of(refused(stream.rest)) == DRAINING
        stream.cancel()


def test_peers_that_do_not_read_do_not_delay_the_stop() -> None:
    with serving(config={"buffer_size": 20_000}, limits={"max_request_bytes": 8 << 20}) as served, Caller(served.server.address) as reader:
        for number in range(10):
            served.caller.add(make_episode(1000, obs=1000, seed=number))
        stream = served.caller.stream().open(credits=10_000, batch_size=500)
        next(stream.call)
        episodes = reader.channel.unary_stream(SERVICE + "GetEpisodes")(b"", timeout=DEADLINE_S)
        next(episodes)
        sending = served.parts.budgets.sending
        eventually(lambda: sending.used > 0 and served.parts.calls.streams.now == 2, "both are written to")

        served.stop()

        assert (served.parts.calls.streams.now, sending.used) == (0, 0)
        assert stream.call.time_remaining() > 0, "it was the learner's deadline that ended its call"
        stream.cancel()
        episodes.cancel()


def test_writer_of_a_server_that_stops_loses_nothing(tmp_path: Path) -> None:
    """Calls with many episodes are never idle; whatever answers they get, each episode is stored once."""
    config = durable_config(tmp_path / "data", capacity=100_000)
    with ServerThread(config) as server:
        client = ReplayClient(server.address, actor="keeper")
        writer = EpisodeWriter(client, max_pending=1000)
        for number in range(200):
            for row in range(3):
                writer.append({"obs": float(number), "action": 0.0, "reward": float(row)})
            writer.end_episode()
        eventually(lambda: writer.counters.acknowledged > 0, "some are acknowledged")
    port = int(server.address.rpartition(":")[2])

    again = config.model_copy(update={"server": config.server.model_copy(update={"port": port})})
    with ServerThread(again) as server, client:
        writer.close(60)
        counts = client.counts()

    assert writer.counters.acknowledged == writer.counters.appended == 200
    assert counts.episodes_stored == counts.episodes_added == 200
