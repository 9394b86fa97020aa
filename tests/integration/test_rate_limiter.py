"""That a table's rate limiter is asked before and told after every insert and every batch, with exact counts, on each path."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.recording_limiter import RecordingLimiter
from support.service_calls import SERVICE, Caller, eventually, key, make_config, make_episode, refused
from support.serving import ServerThread
from touchline import ReplayClient
from touchline_protos.codec import encode_add_episode, encode_loads
from touchline_server import InvalidEpisodeError, NotReadyError, OverLimitError, ReplayBuffer
from touchline_server.tables.table import Table

STEPS = 20
SLICES = 8


def limited(limiter: RecordingLimiter, **tables: dict[str, Any]) -> ReplayBuffer:
    table = Table("", make_config(**tables), limiter=limiter)
    limiter.notify = table.subscriptions.notify
    return ReplayBuffer(table.config, table=table)


@contextmanager
def served(limiter: RecordingLimiter, **tables: dict[str, Any]) -> Iterator[tuple[ReplayBuffer, Caller]]:
    with ExitStack() as stack:
        buffer = limited(limiter, **tables)
        server = stack.enter_context(ServerThread(buffer.config, buffer))
        yield buffer, stack.enter_context(Caller(server.address))


def test_in_process_adds_and_batches_are_asked_for_and_told() -> None:
    limiter = RecordingLimiter()
    buffer = limited(limiter)
    for number in range(5):
        buffer.add_episode(make_episode(STEPS, key=key(number // 2)))  # two duplicates
    with pytest.raises(InvalidEpisodeError):
        buffer.add_episode(make_episode(STEPS, obs=5))
    for _ in range(7):
        buffer.sample()
    with pytest.raises(NotReadyError):
        buffer.sample(horizon=500)
    for _ in range(2):
        buffer.as_torchrl().sample()

    assert limiter.steps == {"reserved": 6 * STEPS, "inserted": 3 * STEPS, "cancelled": 3 * STEPS}
    assert limiter.slices == {"reserved": 10 * SLICES, "delivered": 9 * SLICES, "cancelled": SLICES}


def test_in_process_what_the_limit_refuses_fails_and_changes_nothing() -> None:
    limiter = RecordingLimiter(episodes=1, batches=1)
    buffer = limited(limiter)
    buffer.add_episode(make_episode(STEPS))
    buffer.sample()

    with pytest.raises(OverLimitError, match="the rate limit holds adds back: the allowance is used up"):
        buffer.add_episode(make_episode(STEPS))
    for sample in (buffer.sample, buffer.as_torchrl().sample):
        with pytest.raises(NotReadyError, match="the rate limit holds batches back: the allowance is used up"):
            sample()

    assert buffer.counts().steps_added == limiter.steps["inserted"] == STEPS
    limiter.allow(episodes=1, batches=1)
    buffer.add_episode(make_episode(STEPS))
    buffer.sample()


@pytest.mark.parametrize("durability", ["", "sync", "batch", "memory"])
def test_served_adds_are_asked_for_and_told(durability: str, tmp_path: Path) -> None:
    limiter = RecordingLimiter()
    storage = {"data_dir": str(tmp_path), "durability": durability} if durability else {}
    with served(limiter, storage={"device": "cpu"} | storage) as (_, caller):
        for number in range(4):
            caller.add(make_episode(STEPS, key=key(number // 2)))
        caller.load(encode_loads([make_episode(STEPS, key=key(number, client_id="other")) for number in [*range(30), 0, 1]]))
        caller.load(encode_loads([make_episode(1000, obs=400)]))  # in chunks: another schema

        # The answer to a durable add and its report are made by different threads.
        eventually(lambda: not limiter.open_steps, "every reservation is reported on")
        counts = caller.counts()
        assert counts.steps_added == limiter.steps["inserted"] == 32 * STEPS


def test_restored_steps_are_not_told(tmp_path: Path) -> None:
    for expected in (2, 0):
        limiter = RecordingLimiter()
        table = Table("", make_config(storage={"device": "cpu", "data_dir": str(tmp_path)}), limiter=limiter)
        table.restore()
        for number in range(expected):
            table.add(make_episode(STEPS, key=key(number)))
        assert limiter.steps["inserted"] == expected * STEPS
        assert table.counts().episodes_stored == 2
        table.close()


def test_served_samples_are_asked_for_and_told() -> None:
    limiter = RecordingLimiter()
    with served(limiter) as (_, caller):
        caller.add(make_episode(STEPS))
        for _ in range(6):
            caller.sample()
        refused(caller.sample, horizon=500)

        assert limiter.slices == {"reserved": 6 * SLICES, "delivered": 6 * SLICES}


@pytest.mark.parametrize(("obs", "batch_size"), [(4, 8), (2000, 100)], ids=["frames", "chunks"])
def test_batches_of_a_stream_are_told_once_their_frames_are_written(obs: int, batch_size: int) -> None:
    limiter = RecordingLimiter()
    with served(limiter) as (_, caller):
        caller.add(make_episode(STEPS, obs=obs))
        stream = caller.stream().open(credits=11, batch_size=batch_size)
        stream.read(11)

        eventually(lambda: limiter.slices["delivered"] == 11 * batch_size, "all that credits were given for is delivered")
        assert limiter.slices["reserved"] == 11 * batch_size
        stream.grant(5)
        stream.read(5)
        eventually(lambda: limiter.slices["delivered"] == 16 * batch_size, "later credits as well")
        assert not limiter.open_slices


def test_batches_of_a_ring_are_told_once_their_slots_are_freed() -> None:
    limiter = RecordingLimiter()
    with served(limiter) as (buffer, caller), ReplayClient(caller.address) as client:
        buffer.add_episode(make_episode(STEPS))
        with client.batches(ring=True) as batches:
            for _ in range(100):
                next(batches)
            assert batches.transport == "ring"
            eventually(lambda: limiter.slices["delivered"] == 100 * SLICES, "the slots of all batches that died are freed")
            ahead = limiter.open_slices
            held = next(batches)
            assert 0 < ahead <= 16 * SLICES
        eventually(lambda: not limiter.open_slices, "batches that were made ahead are cancelled")

        assert limiter.slices["delivered"] in (100 * SLICES, 101 * SLICES)
        assert held.obs.shape[1] == SLICES


@pytest.mark.parametrize("transport", ["messages", "ring"])
def test_learner_of_a_limited_table_gets_what_the_limit_allows_and_then_waits(transport: str) -> None:
    limiter = RecordingLimiter(batches=5)
    with served(limiter) as (buffer, caller), ReplayClient(caller.address) as client, ThreadPoolExecutor(1) as pool:
        buffer.add_episode(make_episode(STEPS))
        with client.batches(ring=transport == "ring") as batches:
            for _ in range(5):
                next(batches)
            waiting = pool.submit(next, batches)
            assert limiter.refused.wait(60)

            assert limiter.slices["reserved"] == 5 * SLICES
            assert not waiting.done()
            limiter.allow(batches=3)
            waiting.result(60)
            for _ in range(2):
                next(batches)
        eventually(lambda: not limiter.open_slices, "the stream has ended")
        assert limiter.slices["reserved"] == 8 * SLICES


def test_sample_waits_for_the_limit_as_long_as_it_may() -> None:
    limiter = RecordingLimiter(batches=0)
    with served(limiter) as (_, caller), ThreadPoolExecutor(1) as pool:
        caller.add(make_episode(STEPS))

        refusal = refused(caller.sample)
        limiter.refused.clear()
        waiting = pool.submit(caller.sample, wait_s=60.0)
        assert limiter.refused.wait(60)
        limiter.allow(batches=1)
        waiting.result(60)

    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "the rate limit holds batches back: the allowance is used up" in refusal.details
    assert limiter.slices == {"reserved": SLICES, "delivered": SLICES}


@pytest.mark.parametrize("verb", ["add", "load", "large"])
def test_adds_wait_for_the_limit_and_hold_nobody_else_up(verb: str) -> None:
    limiter = RecordingLimiter(episodes=1)
    with served(limiter) as (buffer, caller), ThreadPoolExecutor(3) as pool:
        rows = 1000 if verb == "large" else STEPS
        caller.add(make_episode(rows, obs=200))
        episodes = [make_episode(rows, obs=200, key=key(number)) for number in range(3)]
        if verb == "load":
            waiting = [pool.submit(caller.load, encode_loads(episodes))]
        else:
            waiting = [pool.submit(caller.add, episode) for episode in episodes]
        assert limiter.refused.wait(60)

        caller.sample()
        assert limiter.steps["inserted"] + limiter.open_steps == rows
        limiter.allow(episodes=1)
        eventually(lambda: buffer.counts().episodes_added == 2, "one more is stored")
        assert not all(call.done() for call in waiting)
        limiter.allow(episodes=2)
        for call in waiting:
            call.result(60)

    assert limiter.steps["inserted"] == 4 * rows and not limiter.open_steps


def test_add_that_is_cancelled_while_the_limit_holds_it_back_reserves_nothing() -> None:
    limiter = RecordingLimiter(episodes=0)
    buffer = limited(limiter)
    with ServerThread(buffer.config, buffer) as server, Caller(server.address) as caller:
        add = caller.channel.unary_unary(SERVICE + "AddEpisode")
        held = add.future(encode_add_episode(make_episode(STEPS)))
        assert limiter.refused.wait(60)
        held.cancel()
        eventually(lambda: not server._server.parts.calls.replay.now, "the server has ended the call as well")
        limiter.allow(episodes=2)
        caller.add(make_episode(STEPS))

        assert buffer.counts().episodes_added == 1
        assert limiter.steps["inserted"] == STEPS and not limiter.open_steps


def test_stopping_server_does_not_wait_for_the_limit() -> None:
    limiter = RecordingLimiter(episodes=0)
    buffer = limited(limiter, server={"port": 0, "drain_timeout_s": 3600.0})  # only the wait's own end is in time
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        server = stack.enter_context(ServerThread(buffer.config, buffer))
        caller = Caller(server.address)
        adding = pool.submit(refused, caller.add, make_episode(STEPS))
        assert limiter.refused.wait(60)
        ended = threading.Event()
        stack.callback(ended.set)
        stack.close()

        assert adding.result(60).code is grpc.StatusCode.UNAVAILABLE
        caller.channel.close()

    assert not limiter.open_steps
