"""What peers can make the server hold at a time: calls, messages, episodes in chunks, batches; and that it is released when they go."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from support.service_calls import DEADLINE_S, SERVICE, Caller, eventually, make_episode, refused, serving
from support.tcp_proxy import TcpProxy
from touchline import EpisodeKey, EpisodeWriter, OverLimitError, ReplayClient
from touchline_protos import MAX_REQUEST_BYTES
from touchline_protos.codec import Episode, encode_add_episode, encode_load
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import errors as server_errors
from touchline_server.service.batch_framer import BatchFramer, NextFrames
from touchline_server.service.budgets import HEALTH_MESSAGES, ByteBudget
from touchline_server.service.call_counters import MAX_HEALTH_WATCHES, STANDARD_SHARE

OVER_LIMIT = (grpc.StatusCode.RESOURCE_EXHAUSTED, "over-limit", "1000")
MIB = 1 << 20
ONE_MESSAGE = {"max_message_bytes": MIB, "max_episode_bytes": MIB, "max_receive_bytes": 2 * MIB, "max_send_bytes": 2 * MIB}
"""Budgets for one message with an episode, one episode in chunks, and two MiB of batches."""


class OpenCall:
    """A call of any method, including unary ones, whose messages the test sends one by one."""

    def __init__(self, caller: Caller, method: str) -> None:
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.call = caller.channel.stream_unary(SERVICE + method).future(iter(self._messages.get, None), timeout=DEADLINE_S)

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self._messages.put(message)

    def end(self) -> None:
        self._messages.put(None)

    def cancel(self) -> None:
        self.call.cancel()
        self.end()


def budgets(server: Any) -> Any:
    return server._server.parts.budgets


def all_budgets(server: Any) -> list[ByteBudget]:
    return [budget for budget in vars(budgets(server)).values() if isinstance(budget, ByteBudget)]


def in_use(server: Any) -> int:
    return sum(budget.used for budget in all_budgets(server))


def impatient(server: Any) -> None:
    """Makes every budget refuse immediately instead of waiting."""
    for budget in all_budgets(server):
        budget._wait_s = 0.0


def patient(server: Any) -> None:
    """Makes every budget wait indefinitely instead of refusing."""
    for budget in all_budgets(server):
        budget._wait_s = DEADLINE_S


def refusal_of(call: OpenCall) -> tuple[grpc.StatusCode, str, str]:
    refusal = refused(call.call.result)
    return refusal.code, refusal.reason, refusal.retry_after_ms


def big_episode() -> Episode:
    """Returns an episode of 1 MiB, sent in chunks."""
    rows = 64
    columns = {name: np.zeros((rows, width), np.float32) for name, width in (("obs", MIB // 4 // rows - 2), ("action", 1))}
    return Episode(columns | {"reward": np.zeros(rows, np.float32)})


# Calls


def test_calls_over_the_limit_are_refused_with_a_delay_and_health_still_answers() -> None:
    with serving(limits={"max_calls": 2}) as (server, caller), Caller(server.address) as other:
        waiting = [caller.stub.Ready.future(pb.ReadyRequest(min_steps=1, wait_s=600)) for _ in range(2)]
        count = server._server.parts.calls.replay
        eventually(lambda: count.now == 2, "two calls wait")

        refusal = refused(other.counts)
        health = other.channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=DEADLINE_S)

        assert (refusal.code, refusal.reason, refusal.retry_after_ms) == OVER_LIMIT
        assert "limits.max_calls" in refusal.details
        assert health == b"\x08\x01"
        for call in waiting:
            call.cancel()
        eventually(lambda: count.now == 0, "the calls are forgotten")
        other.add(make_episode())


def test_calls_on_one_connection_wait_at_the_client_and_others_do_not() -> None:
    with serving(limits={"max_connection_calls": 2}) as (server, caller), Caller(server.address) as other:
        caller.counts()  # the client knows the limit from here on
        waiting = [caller.stub.Ready.future(pb.ReadyRequest(min_steps=1, wait_s=600)) for _ in range(2)]
        third = caller.stub.Info.future(pb.InfoRequest(), timeout=DEADLINE_S)

        other.counts()

        assert not third.done()
        waiting[0].cancel()
        assert third.result().counts.episodes_stored == 0
        waiting[1].cancel()


def test_one_connection_that_watches_the_health_does_not_keep_others_from_watching() -> None:
    health = "/grpc.health.v1.Health/"
    with serving() as (server, caller), Caller(server.address) as other:
        watches = [caller.channel.unary_stream(health + "Watch")(b"") for _ in range(MAX_HEALTH_WATCHES // STANDARD_SHARE)]
        for watch in watches:
            assert next(watch) == b"\x08\x01"

        refusal = refused(caller.channel.unary_stream(health + "Watch")(b"").__next__)

        assert (refusal.code, refusal.reason, refusal.retry_after_ms) == OVER_LIMIT
        assert next(other.channel.unary_stream(health + "Watch")(b"")) == b"\x08\x01"
        assert caller.channel.unary_unary(health + "Check")(b"", timeout=DEADLINE_S) == b"\x08\x01"
        for watch in watches:
            watch.cancel()


# Incoming messages


@pytest.mark.parametrize("method", ["AddEpisode", "LoadEpisodes"])
def test_message_is_not_read_before_its_bytes_are_reserved(method: str) -> None:
    with serving(limits=ONE_MESSAGE) as (server, caller):
        impatient(server)
        holder = OpenCall(caller, method)
        eventually(lambda: in_use(server) == MIB, "the first call holds the budget")

        refusals = [refusal_of(OpenCall(caller, one)) for one in ("AddEpisode", "LoadEpisodes")]

        assert refusals == [OVER_LIMIT] * 2
        assert in_use(server) == MIB
        holder.send(encode_add_episode(make_episode()))
        holder.end()
        holder.call.result()
        assert in_use(server) == 0
        assert caller.add(make_episode()).counts.episodes_stored == 2


def test_call_that_waits_for_bytes_gets_them_when_another_ends() -> None:
    with serving(limits=ONE_MESSAGE) as (server, caller):
        holder = OpenCall(caller, "AddEpisode")
        eventually(lambda: in_use(server) == MIB, "the first call holds the budget")
        second = OpenCall(caller, "AddEpisode")
        second.send(encode_add_episode(make_episode()))
        eventually(lambda: len(budgets(server).messages._waiters) == 1, "the second waits")

        holder.cancel()

        assert pb.AddEpisodeResponse.FromString(second.call.result()).counts.episodes_stored == 1
        assert in_use(server) == 0


@pytest.mark.parametrize("method", ["AddEpisode", "LoadEpisodes"])
def test_bytes_of_a_cancelled_call_stay_reserved_while_a_thread_has_its_message(method: str) -> None:
    message = encode_add_episode(make_episode(100, obs=400))
    with serving(server={"port": 0, "add_workers": 1}) as (server, caller), ThreadPoolExecutor(1) as keeper:
        caller.add(make_episode(obs=400))
        # Another add takes a long time: one of these waits for it on the only thread, the others for the thread.
        keeper.submit(server.buffer.store.writes.lock.acquire).result()
        try:
            left = [OpenCall(caller, method) for _ in range(4)]
            for call in left:
                call.send(message)
            eventually(lambda: in_use(server) == 4 * len(message), "four messages are in the server")
            waiting = server._server.parts.add_pools.of(None)._work_queue
            eventually(lambda: waiting.qsize() == 3, "the thread has begun with one")
            for call in left:
                call.cancel()
            eventually(lambda: in_use(server) <= len(message), "those that no thread had begun with are gone")
            for _ in range(10):
                caller.counts()  # after the cancellations, on their connection
            held = in_use(server)
        finally:
            keeper.submit(server.buffer.store.writes.lock.release).result()

        assert held == len(message)
        eventually(lambda: in_use(server) == 0, "its reservation is released")
        assert caller.counts().episodes_stored == 2


def test_client_and_writer_retry_after_the_delay_and_lose_nothing() -> None:
    with serving(limits=ONE_MESSAGE) as (server, caller):
        impatient(server)
        holder = OpenCall(caller, "AddEpisode")
        eventually(lambda: in_use(server) == MIB, "the first call holds the budget")
        sleeps: list[float] = []

        with ReplayClient(server.address, timeout_s=20.0) as client:

            def sleep(delay_s: float) -> None:
                sleeps.append(delay_s)
                holder.cancel()
                eventually(lambda: in_use(server) == 0, "the reservation is released")

            client._rpc._sleep = sleep
            with EpisodeWriter(client) as writer:
                for number in range(3):
                    writer.append({"obs": np.float32(number), "action": np.float32(0), "reward": 0.0})
            client.add({name: np.zeros(4, np.float32) for name in ("obs", "action", "reward")})

        assert len(sleeps) == 1
        assert 1.0 < sleeps[0] <= 1.05
        assert caller.counts().episodes_stored == 2


def test_budgets_of_adds_and_of_sampling_are_separate() -> None:
    with serving(limits=ONE_MESSAGE) as (server, caller):
        caller.add(make_episode())
        impatient(server)
        holder = OpenCall(caller, "AddEpisode")
        eventually(lambda: in_use(server) == MIB, "the adds' budget is used up")

        assert caller.sample().episode_id.shape == (8,)
        assert len(caller.stream().open(credits=2).read(2)) == 2
        assert caller.counts().episodes_stored == 1
        holder.cancel()
        eventually(lambda: budgets(server).messages.used == 0, "the holder is gone")
        assert budgets(server).sending.try_reserve(budgets(server).sending.total)

        refusal = refused(caller.sample)

        assert (refusal.code, refusal.reason, refusal.retry_after_ms) == OVER_LIMIT
        assert "limits.max_send_bytes" in refusal.details
        assert caller.add(make_episode()).counts.episodes_stored == 2


@pytest.mark.parametrize("method", ["AddEpisode", "LoadEpisodes", "Sample", "Ready", "Info", "Clear"])
def test_call_that_breaks_off_releases_its_bytes(method: str) -> None:
    with serving() as (server, caller):
        call = OpenCall(caller, method)
        eventually(lambda: in_use(server) == MAX_REQUEST_BYTES, "it has reserved bytes for its message")

        call.cancel()

        eventually(lambda: in_use(server) == 0, "its reservation is released")


def test_unary_call_without_a_message_is_an_invalid_argument() -> None:
    with serving() as (server, caller):
        call = OpenCall(caller, "Info")
        call.end()

        refusal = refused(call.call.result)

        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid-argument")
        eventually(lambda: in_use(server) == 0, "its reservation is released")


def test_health_check_whose_message_does_not_come_is_ended_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_server.service.admission.STANDARD_MESSAGE_S", 0.2)
    check = "/grpc.health.v1.Health/Check"
    never: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        server, other = stack.enter_context(serving())
        callers = [stack.enter_context(Caller(server.address)) for _ in range(HEALTH_MESSAGES)]
        asked = other.channel.unary_unary(check).future
        health = budgets(server).health
        # All of them have asked, in this order, before the first gets its bytes: so they hold them together, however slow the machine.
        health._wait_s = DEADLINE_S
        assert health.try_reserve(health.total)
        calls = [caller.channel.stream_unary(check).future(iter(never.get, None), timeout=DEADLINE_S) for caller in callers]
        eventually(lambda: len(health._waiters) == HEALTH_MESSAGES, "all of them wait for bytes")
        answer = asked(b"", timeout=DEADLINE_S)
        eventually(lambda: len(health._waiters) == HEALTH_MESSAGES + 1, "who asks waits behind them")

        server._loop.call_soon_threadsafe(health.release, health.total)

        assert answer.result() == b"\x08\x01"
        refusals = [refused(call.result) for call in calls]
        assert {(refusal.code, refusal.details) for refusal in refusals} == {
            (grpc.StatusCode.INVALID_ARGUMENT, "no message within 0.2 s, expected one")
        }
        eventually(lambda: in_use(server) == 0, "its reservation is released")
        for _ in calls:
            never.put(None)


FOUR_MESSAGES = ONE_MESSAGE | {"max_receive_bytes": 8 * MIB}
"""Budgets for four messages with episodes and four episodes in chunks; a connection gets one of each."""


@pytest.mark.parametrize("method", ["AddEpisode", "LoadEpisodes", "Sample", "Info"])
def test_connection_whose_calls_are_silent_gets_only_its_share_of_bytes(method: str) -> None:
    with serving(limits=FOUR_MESSAGES) as (server, caller), Caller(server.address) as other:
        budget = budgets(server).messages if method in ("AddEpisode", "LoadEpisodes") else budgets(server).control
        idle = [OpenCall(caller, method) for _ in range(8)]
        eventually(lambda: budget.used >= budget.total // 4, "the connection has its share")

        other.add(make_episode())
        other.counts()

        assert budget.used == budget.total // 4
        for call in idle:
            call.cancel()
        eventually(lambda: in_use(server) == 0, "all is free")


@pytest.mark.parametrize("method", ["AddEpisode", "LoadEpisodes"])
def test_silent_calls_are_ended_if_others_need_their_bytes(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr("touchline_server.service.receiver.RECEIVE_TIMEOUT_S", 0.2)
    monkeypatch.setattr("touchline_server.service.receiver.POLL_INTERVAL_S", 0.05)
    with contextlib.ExitStack() as stack:
        server, other = stack.enter_context(serving(limits=FOUR_MESSAGES))
        patient(server)
        callers = [stack.enter_context(Caller(server.address)) for _ in range(4)]
        idle = [OpenCall(caller, method) for caller in callers]
        eventually(lambda: in_use(server) == 4 * MIB, "the whole budget is used up")

        assert other.add(make_episode()).counts.episodes_stored == 1

        # What blocked no other call goes on.
        eventually(lambda: any(call.call.done() for call in idle), "one is ended")
        (ended,) = [call for call in idle if call.call.done()]
        assert refusal_of(ended) == OVER_LIMIT
        for call in idle:
            if call is not ended:
                call.send(encode_add_episode(make_episode()))
                call.end()
                call.call.result()
        assert other.counts().episodes_stored == 4
        eventually(lambda: in_use(server) == 0, "all is free")


def test_announced_episodes_that_do_not_arrive_are_ended_if_others_need_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_server.service.receiver.RECEIVE_TIMEOUT_S", 0.2)
    monkeypatch.setattr("touchline_server.service.receiver.POLL_INTERVAL_S", 0.05)
    monkeypatch.setattr("touchline_server.service.receiver.SLOWEST_UPLOAD_BYTES_PER_S", 1 << 40)
    header, *chunks = encode_load(big_episode(), chunk_bytes=MIB // 8)
    with contextlib.ExitStack() as stack:
        server, other = stack.enter_context(serving(limits=FOUR_MESSAGES | {"max_message_bytes": MIB // 4}))
        patient(server)
        idle = [OpenCall(stack.enter_context(Caller(server.address)), "LoadEpisodes") for _ in range(4)]
        for call in idle:
            call.send(header)
        eventually(lambda: budgets(server).uploads.used == 4 * big_episode().size_bytes, "announced episodes use up the budget")

        honest = OpenCall(other, "LoadEpisodes")
        honest.send(header, *chunks)
        honest.end()

        assert pb.LoadEpisodesResponse.FromString(honest.call.result()).counts.episodes_stored == 1
        eventually(lambda: any(call.call.done() for call in idle), "one is ended")
        assert sum(call.call.done() for call in idle) == 1
        for call in idle:
            call.cancel()
        eventually(lambda: in_use(server) == 0, "all is free")


# Episodes in chunks


def test_announced_episode_reserves_its_bytes_before_its_first_chunk_and_releases_them() -> None:
    with serving(limits=ONE_MESSAGE) as (server, caller):
        impatient(server)
        header, *chunks = encode_load(big_episode(), chunk_bytes=MIB // 4)
        first = OpenCall(caller, "LoadEpisodes")
        first.send(header)
        announced = big_episode().size_bytes
        eventually(lambda: budgets(server).uploads.used == announced, "the announced episode has its reservation")
        # The stream that waits for chunks also holds bytes for their messages until they arrive.
        first.send(*chunks)
        eventually(lambda: budgets(server).uploads.used == 0, "the whole episode is stored")
        first.end()
        assert pb.LoadEpisodesResponse.FromString(first.call.result()).counts.episodes_stored == 1
        assert in_use(server) == 0


def test_second_announced_episode_over_the_budget_is_refused_and_the_call_releases_all() -> None:
    with contextlib.ExitStack() as stack:
        limits = ONE_MESSAGE | {"max_receive_bytes": 5 * MIB, "max_message_bytes": MIB // 2}
        server, caller = stack.enter_context(serving(limits=limits))
        impatient(server)
        header, *_ = encode_load(big_episode(), chunk_bytes=MIB // 4)
        holders = [OpenCall(stack.enter_context(Caller(server.address)), "LoadEpisodes") for _ in range(2)]
        for holder in holders:
            holder.send(header)
        announced = big_episode().size_bytes
        eventually(lambda: budgets(server).uploads.used == 2 * announced, "two are announced")
        third = OpenCall(caller, "LoadEpisodes")
        third.send(header)

        assert refusal_of(third) == OVER_LIMIT
        assert caller.add(make_episode()).counts.episodes_stored == 1
        for holder in holders:
            holder.cancel()
        eventually(lambda: in_use(server) == 0, "their reservations are released")


# Outgoing batches


def test_learners_that_do_not_read_cost_only_the_budget_for_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[int] = Counter()

    def counting(source: BatchFramer, ahead: NextFrames) -> list[bytes]:
        made[id(source)] += 1
        return frames(source, ahead)

    frames = BatchFramer.frames
    monkeypatch.setattr(BatchFramer, "frames", counting)
    with contextlib.ExitStack() as stack:
        server, caller = stack.enter_context(serving(limits={"max_send_bytes": 128 * MIB}))
        caller.add(make_episode(100, obs=2000))
        size = 4 * 2000 * 4 * 125
        slow = [stack.enter_context(Caller(server.address)).stream().open(credits=1 << 20, batch_size=125) for _ in range(3)]
        for stream in slow:
            next(stream.call)

        eventually(lambda: in_use(server) > 0, "batches wait for their learners")
        quick = caller.stream().open(credits=300, batch_size=125)
        for _ in range(300):
            quick.read(1)

        # Each has the batch being written and the next one; earlier, as much went out as fits into gRPC's window, regardless of credits.
        assert in_use(server) <= 4 * 2 * 1.01 * size
        *slow_ones, quick_one = sorted(made.values())
        assert quick_one == 300
        assert max(slow_ones) <= 64
        assert caller.add(make_episode(obs=2000)).counts.episodes_stored == 2
        for stream in (*slow, quick):
            stream.cancel()
        eventually(lambda: in_use(server) == 0, "their reservations are released")


def test_stream_over_the_budget_is_asked_to_retry_and_continues_later() -> None:
    with serving(limits=ONE_MESSAGE) as (server, caller):
        impatient(server)
        caller.add(make_episode())
        assert budgets(server).sending.try_reserve(2 * MIB)
        taken = threading.Event()

        with ReplayClient(server.address, as_numpy=True) as client, client.batches(ring=False) as batches:
            waits: list[float] = []

            def wait(delay_s: float) -> bool:
                waits.append(delay_s)
                if not taken.is_set():
                    taken.set()
                    server._loop.call_soon_threadsafe(budgets(server).sending.release, 2 * MIB)
                return False

            batches._source._closed.wait = wait  # type: ignore[attr-defined, method-assign]
            assert next(batches).obs.shape == (4, 8, 4)

        assert waits[0] > 1.0


def test_batch_larger_than_the_budget_is_too_large() -> None:
    with serving(limits=ONE_MESSAGE) as (_, caller):
        caller.add(make_episode(100, obs=1000))

        refusal = refused(caller.stream().open(credits=1, batch_size=500).rest)

        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too-large")
        assert "limits.max_send_bytes" in refusal.details


def test_sampled_batch_releases_its_bytes_even_if_its_caller_has_gone() -> None:
    with serving() as (server, caller):
        caller.add(make_episode(100, obs=2000))
        caller.sample(batch_size=500)
        eventually(lambda: in_use(server) == 0, "the batch was taken")

        for _ in range(20):
            call = caller.stub.Sample.future(pb.SampleRequest(batch_size=500))
            call.cancel()

        eventually(lambda: in_use(server) == 0, "all is free")
        assert caller.sample(batch_size=500).episode_id.shape == (500,)


# Adding and sampling side by side


def test_adds_get_through_while_learners_sample_flat_out() -> None:
    stop = threading.Event()

    def learn(address: str) -> None:
        with ReplayClient(address, as_numpy=True) as client, client.batches(ring=False) as batches:
            while not stop.is_set():
                next(batches)

    with serving(server={"port": 0, "sample_share": 0.9}) as (server, caller):
        caller.add(make_episode())
        learners = [threading.Thread(target=learn, args=(server.address,)) for _ in range(3)]
        for learner in learners:
            learner.start()
        try:
            for number in range(50):
                caller.add(make_episode(seed=number))
        finally:
            stop.set()
            for learner in learners:
                learner.join()

        assert caller.counts().episodes_stored == 51


# Peers that vanish


def test_peers_that_vanish_silently_leave_nothing() -> None:
    with serving(server={"port": 0, "keepalive_s": 3.0}) as (server, caller), TcpProxy(server.address) as proxy:
        caller.add(make_episode(100, obs=2000))
        header, *_ = encode_load(Episode({**big_episode().columns}, key=EpisodeKey("gone", 1, 1)), chunk_bytes=MIB // 4)
        # Two connections: one with data in flight, and a silent one, which only a ping can detect.
        with Caller(proxy.address) as gone, Caller(proxy.address) as silent:
            learner = gone.stream().open(credits=1000, batch_size=500)
            next(learner.call)
            actor = OpenCall(silent, "LoadEpisodes")
            actor.send(header)
            waiting = silent.stub.Ready.future(pb.ReadyRequest(min_steps=2_000, wait_s=600))
            calls = server._server.parts.calls
            eventually(lambda: calls.streams.now == 2 and calls.replay.now == 3, "three calls are in progress")
            eventually(lambda: budgets(server).uploads.used > 0 and budgets(server).sending.used > 0, "they hold reservations")

            proxy.pause()

            eventually(lambda: calls.streams.now == 0 and calls.replay.now == 0, "the calls are given up")
            eventually(lambda: in_use(server) == 0, "what they held is free")
            learner.cancel()
            actor.cancel()
            waiting.cancel()
        assert caller.add(make_episode(obs=2000)).counts.episodes_stored == 2


def test_client_that_stays_over_a_limit_raises_it_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_errors.OverLimitError, "retry_after_s", 60.0)  # longer than the client retries
    with serving(limits={"max_calls": 1}) as (server, caller):
        waiting = caller.stub.Ready.future(pb.ReadyRequest(min_steps=1, wait_s=600))
        eventually(lambda: server._server.parts.calls.replay.now == 1, "one call waits")

        with ReplayClient(server.address, timeout_s=30.0) as client, pytest.raises(OverLimitError, match=r"limits\.max_calls") as caught:
            client.info()

        assert caught.value.retry_after_s == 60.0
        waiting.cancel()
