"""The sampling stream's session: credits, interruptions, time limits, ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from support.client_faults import ScriptedServer, answering, fail, failing, in_turn, over_limit
from touchline import Batch, DeadlineError, InvalidArgumentError, NotReadyError, OverLimitError, ReplayClient, ServerError, UnavailableError
from touchline._learner.stream import StreamSource
from touchline_protos.codec import BatchDecoder, BatchLayout, TensorSpec
from touchline_protos.v1 import replay_pb2 as pb

F4 = np.dtype("<f4")
LAYOUT = BatchLayout(
    [
        TensorSpec("obs", F4, (2, 3)),
        TensorSpec("action", F4, (1, 3)),
        TensorSpec("reward", F4, (1, 3, 1)),
        TensorSpec("done", F4, (1, 3, 1)),
    ],
    3,
)
CAN_SAMPLE = answering(pb.ReadyResponse(can_sample=True).SerializeToString())
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def _frame(number: int) -> bytes:
    frame, (views,) = LAYOUT.group(1, {})
    for view in views.values():
        view[...] = 0
    views["obs"][...] = number
    return frame


def _number(batch: Any) -> int:
    return int(batch.obs[0, 0])


class Pusher:
    """A stream handler that pushes numbered batches for its credits, and notes what it was asked."""

    def __init__(self) -> None:
        self.opened: list[pb.SampleStreamOpen] = []
        self.grants: list[int] = []
        self.ended = threading.Event()
        self._next = 0

    def __call__(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(self.ended.set)
        for message in requests:
            request = pb.SampleStreamRequest.FromString(message)
            if request.HasField("open"):
                self.opened.append(request.open)
                credits = request.open.credits
            else:
                credits = request.credit.batches
                self.grants.append(credits)
            for _ in range(credits):
                yield _frame(self._next)
                self._next += 1


def _then(batches: int, code: grpc.StatusCode | None) -> Any:
    """Returns a stream handler that sends ``batches`` batches and then fails with ``code``; None ends the stream without an error."""

    def push(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for number in range(batches):
            yield _frame(number)
        if code is not None:
            fail(context, code)

    return push


def test_stream_opens_with_its_credits_and_grants_half_of_them_at_a_time() -> None:
    pusher = Pusher()
    with ScriptedServer(SampleStream=pusher) as server, ReplayClient(server.address, as_numpy=True, table="pitch") as client:
        with client.batches(prefetch=6, batch_size=3, horizon=1, law="step", seed=9) as stream:
            numbers = [_number(next(stream)) for _ in range(30)]
        assert pusher.ended.wait(60)

    assert numbers == list(range(30))
    (opened,) = pusher.opened
    assert opened.credits == 6
    sample = opened.sample
    assert (sample.table, sample.batch_size, sample.horizon, sample.law, sample.seed) == ("pitch", 3, 1, pb.LAW_STEP, 9)
    assert set(pusher.grants) == {3}


def test_stream_with_one_credit_goes_on() -> None:
    with (
        ScriptedServer(SampleStream=Pusher()) as server,
        ReplayClient(server.address, as_numpy=True) as client,
        client.batches(prefetch=1) as stream,
    ):
        assert [_number(next(stream)) for _ in range(5)] == list(range(5))


def test_batches_are_tensors_unless_numpy_is_asked_for() -> None:
    torch = pytest.importorskip("torch")
    with (
        ScriptedServer(SampleStream=Pusher()) as server,
        ReplayClient(server.address) as client,
        client.batches() as tensors,
        client.batches(as_numpy=True) as arrays,
    ):
        assert isinstance(next(tensors).obs, torch.Tensor)
        assert isinstance(next(arrays).obs, np.ndarray)


@pytest.mark.parametrize("end", [UNAVAILABLE, None])
def test_stream_that_ends_is_opened_anew(end: grpc.StatusCode | None, caplog: pytest.LogCaptureFixture) -> None:
    handler = in_turn(_then(2, end), Pusher())
    with (
        ScriptedServer(SampleStream=handler, Ready=CAN_SAMPLE) as server,
        ReplayClient(server.address, as_numpy=True) as client,
        caplog.at_level(logging.INFO, "touchline"),
        client.batches() as stream,
    ):
        numbers = [_number(next(stream)) for _ in range(5)]

    assert numbers == [0, 1, 0, 1, 2]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


class NoWait(threading.Event):
    """Records the durations of waits, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return self.is_set()


def test_stream_that_is_over_a_limit_is_opened_again_after_the_delay() -> None:
    closed = NoWait()
    handler = in_turn(over_limit("1500"), over_limit("1500"), Pusher())
    with ScriptedServer(SampleStream=handler, Ready=CAN_SAMPLE) as server, ReplayClient(server.address, as_numpy=True) as client:
        source = StreamSource(client._rpc, pb.SampleRequest(), prefetch=2, timeout_s=None, reconnect_s=60.0, ring=False)
        source._closed = closed

        batch = source.take()
        source.close()

        assert server.count("SampleStream") == 3
    assert _number(batch) == 0
    assert len(closed.waits) == 2
    assert all(1.5 < wait <= 1.5 + full for wait, full in zip(closed.waits, (0.05, 0.1), strict=True))


def test_stream_that_stays_over_a_limit_gives_up_with_what_the_server_said() -> None:
    with (
        ScriptedServer(SampleStream=over_limit("100"), Ready=CAN_SAMPLE) as server,
        ReplayClient(server.address, as_numpy=True) as client,
    ):
        source = StreamSource(client._rpc, pb.SampleRequest(), prefetch=2, timeout_s=None, reconnect_s=0.2, ring=False)

        with pytest.raises(OverLimitError, match="as the test wants") as caught:
            source.take()

    assert caught.value.retry_after_s == 0.1


def test_session_is_opened_only_after_the_server_answered() -> None:
    ready = in_turn(failing(UNAVAILABLE), failing(UNAVAILABLE), CAN_SAMPLE)
    handler = in_turn(_then(1, UNAVAILABLE), Pusher())
    with ScriptedServer(SampleStream=handler, Ready=ready) as server, ReplayClient(server.address, as_numpy=True) as client:
        with client.batches() as stream:
            next(stream)
            next(stream)

        assert [name for name, _ in server.calls] == ["SampleStream", "Ready", "Ready", "Ready", "SampleStream"]


def test_server_that_stays_away_is_unavailable_after_the_limit_and_each_next_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._learner.outputs.RECONNECT_S", 1.0)
    with ScriptedServer(SampleStream=failing_stream(UNAVAILABLE), Ready=failing(UNAVAILABLE)) as server:
        with ReplayClient(server.address, as_numpy=True) as client, client.batches() as stream:
            for _ in range(2):
                with pytest.raises(UnavailableError, match=r"no batch for \d+\.\d s"):
                    next(stream)

        assert server.count("Ready") >= 2


def failing_stream(code: grpc.StatusCode, reason: str = "") -> Any:
    def push(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        fail(context, code, reason)
        yield b""

    return push


def test_refused_request_is_raised_and_not_repeated() -> None:
    handler = failing_stream(grpc.StatusCode.INVALID_ARGUMENT, "invalid-argument")
    with ScriptedServer(SampleStream=handler) as server, ReplayClient(server.address) as client, client.batches() as stream:
        with pytest.raises(InvalidArgumentError):
            next(stream)

        assert server.count("SampleStream") == 1


def _silent(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for _ in requests:
        yield from ()


def test_nothing_to_sample_within_the_time_limit_is_not_ready_with_counts() -> None:
    not_ready = answering(pb.ReadyResponse(counts=pb.Counts(steps_stored=2, episodes_stored=1)).SerializeToString())
    with (
        ScriptedServer(SampleStream=_silent, Ready=not_ready) as server,
        ReplayClient(server.address, as_numpy=True) as client,
        client.batches(timeout_s=0.2) as stream,
        pytest.raises(NotReadyError) as caught,
    ):
        next(stream)

    assert caught.value.counts is not None
    assert caught.value.counts.steps_stored == 2


def test_silence_within_the_time_limit_is_a_deadline_error() -> None:
    with (
        ScriptedServer(SampleStream=_silent, Ready=CAN_SAMPLE) as server,
        ReplayClient(server.address, as_numpy=True) as client,
        client.batches(timeout_s=0.2) as stream,
        pytest.raises(DeadlineError, match=r"no batch within 0\.2 s"),
    ):
        next(stream)


def test_stream_goes_on_after_a_time_limit_was_missed() -> None:
    pushing, pusher = threading.Event(), Pusher()

    def push_later(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        return (pusher if pushing.is_set() else _silent)(requests, context)

    with (
        ScriptedServer(SampleStream=push_later, Ready=CAN_SAMPLE) as server,
        ReplayClient(server.address, as_numpy=True) as client,
        client.batches(timeout_s=0.5) as stream,
    ):
        with pytest.raises(DeadlineError):
            next(stream)
        pushing.set()
        stream._source._timeout_s = 60.0  # type: ignore[attr-defined]
        assert _number(next(stream)) == 0


def test_absent_server_is_unavailable_within_the_time_limit() -> None:
    with ScriptedServer() as server:
        address = server.address

    with ReplayClient(address, as_numpy=True) as client, client.batches(timeout_s=0.3) as stream, pytest.raises(UnavailableError):
        next(stream)


def test_close_by_another_thread_ends_the_iteration() -> None:
    pusher, numbers = Pusher(), []
    with ScriptedServer(SampleStream=in_turn(_then_silence(3, pusher))) as server, ReplayClient(server.address, as_numpy=True) as client:
        stream = client.batches()
        third = threading.Event()

        def iterate() -> None:
            for batch in stream:
                numbers.append(_number(batch))
                if len(numbers) == 3:
                    third.set()

        thread = threading.Thread(target=iterate)
        thread.start()
        assert third.wait(60)
        stream.close()
        thread.join(60)

        assert not thread.is_alive()
        assert pusher.ended.wait(60)
    assert numbers == [0, 1, 2]


def _then_silence(batches: int, pusher: Pusher) -> Any:
    def push(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(pusher.ended.set)
        for number in range(batches):
            yield _frame(number)
        for _ in requests:
            pass

    return push


def test_stream_whose_reading_failed_of_itself_is_opened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    feed, left = BatchDecoder.feed, [None, MemoryError()]

    def feed_where_there_is_memory(decoder: BatchDecoder, message: bytes) -> list[Batch]:
        if left and (error := left.pop(0)) is not None:
            raise error
        return feed(decoder, message)

    monkeypatch.setattr(BatchDecoder, "feed", feed_where_there_is_memory)
    pusher = Pusher()
    with (
        ScriptedServer(SampleStream=pusher) as server,
        ReplayClient(server.address, as_numpy=True) as client,
        client.batches(prefetch=1) as stream,
    ):
        first = _number(next(stream))
        with pytest.raises(MemoryError):
            next(stream)
        assert pusher.ended.wait(60)

        second = _number(next(stream))
        assert first < second and _number(next(stream)) == second + 1
    assert len(pusher.opened) == 2


def test_closed_stream_has_no_next() -> None:
    with ScriptedServer(SampleStream=Pusher()) as server, ReplayClient(server.address, as_numpy=True) as client:
        stream = client.batches()
        next(stream)
        stream.close()
        stream.close()

        assert list(stream) == []


def test_malformed_frame_is_a_server_error() -> None:
    def push(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield b"\x0a\xff"

    with (
        ScriptedServer(SampleStream=push) as server,
        ReplayClient(server.address, as_numpy=True) as client,
        client.batches() as stream,
        pytest.raises(ServerError, match="malformed frame"),
    ):
        next(stream)


def test_sample_over_the_message_limit_comes_over_a_stream() -> None:
    pusher = Pusher()
    too_large = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "too-large")
    with ScriptedServer(Sample=too_large, SampleStream=pusher) as server, ReplayClient(server.address, as_numpy=True) as client:
        batch = client.sample(batch_size=3, seed=4)
        assert pusher.ended.wait(60)

    assert _number(batch) == 0
    assert pusher.opened[0].credits == 1
    assert (pusher.opened[0].sample.batch_size, pusher.opened[0].sample.seed) == (3, 4)
