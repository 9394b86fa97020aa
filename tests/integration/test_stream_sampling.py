"""Sampling streams on a real server: credits, frames, actors' names, waiting and ending."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc._cython import cygrpc

from support.service_calls import DEADLINE_S, Caller, Stream, assert_same_batch, eventually, make_config, make_episode, refused, serving
from touchline import ReplayClient
from touchline_protos.codec import encode_load
from touchline_protos.codec.wire import len_field
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.service import batch_framer
from touchline_server.service import service as service_module
from touchline_server.service.app import ServerThread
from touchline_server.service.session import SampleSession
from touchline_server.tables.table import Table

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "invalid-argument")
OVER_LIMIT = (grpc.StatusCode.RESOURCE_EXHAUSTED, "over-limit")

Served = tuple[ServerThread, Caller]


def fill(caller: Caller, *, episodes: int = 10, obs: int = 4, actors: int = 3) -> None:
    for number in range(episodes):
        caller.add(make_episode(50, seed=number, obs=obs, actor=f"actor {number % actors}"))


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as pair:
        yield pair


@pytest.fixture
def filled(served: Served) -> Served:
    fill(served[1])
    return served


def has_ended(stream: Stream) -> bool:
    return not stream.call.is_active()


# Credits


@pytest.mark.parametrize("credits", [0, 1, 5, 23])
def test_stream_pushes_exactly_as_many_batches_as_were_granted(filled: Served, credits: int) -> None:
    _, caller = filled
    stream = caller.stream().open(credits=credits)
    stream.close()

    assert len(stream.rest()) == credits
    assert stream.call.code() == grpc.StatusCode.OK


def test_stream_pushes_more_with_each_grant_and_never_more_than_granted(filled: Served) -> None:
    _, caller = filled
    stream = caller.stream().open(credits=3)

    read = [len(stream.read(3))]
    for credits in (1, 0, 7, 2):
        stream.grant(credits)
        read.append(len(stream.read(credits)))
    stream.close()

    assert read == [3, 1, 0, 7, 2]
    assert stream.rest() == []


def test_streams_have_credits_of_their_own(filled: Served) -> None:
    _, caller = filled
    streams = [caller.stream().open(credits=number) for number in range(6)]

    for stream in streams:
        stream.close()

    assert [len(stream.rest()) for stream in streams] == list(range(6))


@pytest.mark.parametrize("credits", [-1, (1 << 20) + 1, (1 << 31) - 1, -(1 << 31)])
def test_stream_refuses_credits_out_of_range_at_its_opening(filled: Served, credits: int) -> None:
    _, caller = filled

    refusal = refused(caller.stream().open(credits=credits).rest)

    assert (refusal.code, refusal.reason) == INVALID
    assert f"credits: {credits} more on top of 0, expected 0 or more and at most 1048576 in total" in refusal.details


@pytest.mark.parametrize("credits", [-1, 1 << 20, (1 << 31) - 1])
def test_stream_refuses_credits_out_of_range_later(served: Served, credits: int) -> None:
    _, caller = served
    stream = caller.stream().open(credits=1)

    stream.grant(credits)

    refusal = refused(stream.rest)
    assert (refusal.code, refusal.reason) == INVALID
    assert f"credits: {credits} more on top of 1" in refusal.details


# Frames


def read_all(caller: Caller, batches: int, **opening: Any) -> tuple[list[Any], Stream]:
    stream = caller.stream().open(credits=batches, **opening)
    stream.close()
    return stream.rest(), stream


def test_stream_puts_several_small_batches_into_a_frame(filled: Served) -> None:
    _, caller = filled

    _, by_server = read_all(caller, 12)
    _, by_learner = read_all(caller, 12, max_batches_per_frame=5)
    _, single = read_all(caller, 12, max_batches_per_frame=1)

    assert by_server.batch_counts == [4, 4, 4]
    assert by_learner.batch_counts == [5, 5, 2]
    assert single.batch_counts == [1] * 12


@pytest.mark.parametrize("per_frame", [1, 3, 7, 1000])
def test_stream_grouping_does_not_change_the_batches_of_a_seed(filled: Served, per_frame: int) -> None:
    _, caller = filled
    expected, _ = read_all(caller, 12, seed=4)

    found, _ = read_all(caller, 12, seed=4, max_batches_per_frame=per_frame)

    for one, other in zip(found, expected, strict=True):
        assert_same_batch(one, other)


def test_stream_granting_one_by_one_does_not_change_the_batches_of_a_seed(filled: Served) -> None:
    _, caller = filled
    expected, _ = read_all(caller, 8, seed=4)
    stream = caller.stream().open(credits=0, seed=4)

    for batch in expected:
        stream.grant(1)
        assert_same_batch(stream.read(1)[0], batch)


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [({}, {}), ({"batch_size": 100, "horizon": 9, "law": pb.LAW_STEP}, {"batch_size": 100, "horizon": 9, "law": "step"})],
)
def test_stream_first_batch_equals_the_in_process_one_of_the_same_seed(
    filled: Served, fields: dict[str, Any], arguments: dict[str, Any]
) -> None:
    server, caller = filled

    batches, _ = read_all(caller, 2, seed=8, **fields)

    assert_same_batch(batches[0], server.buffer.sample(seed=8, **arguments))
    assert not np.array_equal(batches[0].start, batches[1].start)


def test_stream_big_batches_come_in_chunks_and_equal_the_in_process_ones(served: Served) -> None:
    server, caller = served
    fill(caller, obs=700)

    batches, stream = read_all(caller, 2, seed=6, batch_size=300)

    assert batches[0].obs.nbytes > 3 << 20
    assert_same_batch(batches[0], server.buffer.sample(seed=6, batch_size=300))
    half = stream.batch_counts.index(1) + 1
    assert half >= 4
    assert stream.batch_counts == ([0] * (half - 1) + [1]) * 2


@pytest.mark.parametrize("verb", ["Sample", "SampleStream"])
@pytest.mark.parametrize(
    ("device", "obs", "batch_size", "in_loop"),
    [("cpu", 4, 16, True), ("cpu", 4, 5000, False), ("cpu", 700, 300, False), ("disk", 4, 16, False)],
    ids=["small", "many rows", "many bytes", "on disk"],
)
def test_small_batches_are_gathered_in_the_event_loop_and_what_takes_long_on_threads(
    verb: str, device: str, obs: int, batch_size: int, in_loop: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[bool] = set()
    draw = Table.draw

    def noting(table: Table, *arguments: Any, **options: Any) -> Any:
        threads.add(threading.current_thread().name.startswith("touchline-sample"))
        return draw(table, *arguments, **options)

    with serving(storage={"device": device, "scratch_dir": str(tmp_path)}) as (server, caller):
        fill(caller, obs=obs)
        monkeypatch.setattr(Table, "draw", noting)

        if verb == "Sample":
            batch = caller.sample(batch_size=batch_size, seed=6)
        else:
            batch = caller.stream().open(credits=3, batch_size=batch_size, seed=6).read(3)[0]

        assert threads == {not in_loop}
        assert_same_batch(batch, server.buffer.sample(seed=6, batch_size=batch_size))


def test_streams_of_the_same_configured_seed_differ_from_each_other() -> None:
    with serving(sampling={"seed": 3}) as (_, caller):
        fill(caller)

        (one,), _ = read_all(caller, 1)
        (other,), _ = read_all(caller, 1)

    assert not np.array_equal(one.start, other.start)


def test_stream_of_rows_larger_than_a_message_is_refused() -> None:
    with serving(limits={"max_message_bytes": 4096}) as (_, caller):
        caller.load(encode_load(make_episode(10, obs=2000), chunk_bytes=2048))

        refusal = refused(caller.stream().open(credits=1).rest)

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too-large")
    assert "a step of obs has 8000 bytes, expected less than the message limit of 4096" in refusal.details


def test_stream_whose_actors_names_fill_a_message_is_refused() -> None:
    with serving(limits={"max_message_bytes": 4096}) as (_, caller):
        for number in range(200):
            caller.add(make_episode(5, actor=f"{number:0128d}"))

        refusal = refused(caller.stream().open(credits=1, batch_size=200).rest)

        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too-large")
        assert "expected at most 4096" in refusal.details
        assert len(read_all(caller, 3, batch_size=2)[0]) == 3


# Actors' names


def test_stream_tells_each_actors_name_once_and_no_later_than_its_first_batch(filled: Served) -> None:
    _, caller = filled
    stream = caller.stream().open(credits=20, batch_size=64)
    batches = stream.read(20)
    for number in range(10):
        caller.add(make_episode(40, seed=100 + number, actor=f"newcomer {number % 2}"))
    stream.grant(20)

    batches += stream.read(20)

    told = {actor.index: actor.name for actor in stream.told_actors}
    assert len(stream.told_actors) == len(told)
    assert sorted(told.values()) == ["actor 0", "actor 1", "actor 2", "newcomer 0", "newcomer 1"]
    for batch in batches:
        for episode, actor in zip(batch.episode_id.tolist(), batch.actor.tolist(), strict=True):
            expected = f"actor {episode % 3}" if episode < 10 else f"newcomer {episode % 2}"
            assert batch.actor_names[actor] == expected


@pytest.mark.parametrize("ring", [True, False])
def test_names_of_actors_that_are_gone_are_forgotten(ring: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each actor adds one episode, which shows by its values who that was, and which later ones evict."""
    monkeypatch.setattr(batch_framer, "MAX_STALE_ACTORS", 4)
    config = make_config(config={"buffer_size": 400, "min_history": 1, "batch_size": 32, "horizon": 3})
    longest = 0
    with ServerThread(config) as server, ReplayClient(server.address, as_numpy=True) as client:
        client.add(numbered(0), actor="actor-0")
        with client.batches(ring=ring) as batches:
            for number in range(1, 120):
                client.add(numbered(number), actor=f"actor-{number}")
                for batch in itertools.islice(batches, 2):
                    names = [batch.actor_names[index] for index in batch.actor.tolist()]
                    assert names == [f"actor-{int(value)}" for value in batch.obs[0, :, 0]]
                    longest = max(longest, len(batch.actor_names))
            assert batches.transport == ("ring" if ring else "stream")

    # 20 actors have episodes; the names of twice as many, and 4, may be kept before a draw brings others.
    assert 20 < longest <= 2 * 20 + 4 + 20


def numbered(number: int) -> dict[str, np.ndarray]:
    columns = {name: np.full((20, 2), number, np.float32) for name in ("obs", "action")}
    return columns | {"reward": np.ones(20, np.float32)}


def test_each_stream_receives_all_names(filled: Served) -> None:
    _, caller = filled

    told = [{actor.name for actor in read_all(caller, 5, batch_size=64)[1].told_actors} for _ in range(2)]

    assert told == [{"actor 0", "actor 1", "actor 2"}] * 2


# Waiting and ending


def test_stream_waits_while_nothing_is_stored_and_starts_when_an_episode_is_added(served: Served) -> None:
    _, caller = served
    stream = caller.stream().open(credits=2)
    caller.add(make_episode(3))  # too short
    assert caller.counts().episodes_too_short == 1
    assert not has_ended(stream)

    caller.add(make_episode(4))

    assert {number for batch in stream.read(2) for number in batch.episode_id.tolist()} == {1}


def test_stream_goes_on_after_the_table_was_cleared_with_another_schema(filled: Served) -> None:
    _, caller = filled
    stream = caller.stream().open(credits=2)
    stream.read(2)
    caller.stub.Clear(pb.ClearRequest())
    stream.grant(6)
    assert caller.counts().episodes_stored == 0
    assert not has_ended(stream)

    caller.add(make_episode(30, obs=9, actor="late"))

    batches = stream.read(6)
    assert {batch.obs.shape for batch in batches} == {(4, 8, 9)}
    assert {number for batch in batches for number in batch.episode_id.tolist()} == {10}


def test_stream_survives_a_table_that_is_cleared_all_the_time(filled: Served) -> None:
    _, caller = filled
    stream = caller.stream().open(credits=400)
    done = threading.Event()
    cleared: list[int] = []

    def clear_and_fill() -> None:
        while not done.is_set():
            caller.stub.Clear(pb.ClearRequest())
            caller.add(make_episode(10 + len(cleared) % 5, obs=1 + len(cleared) % 300))
            cleared.append(len(cleared))

    thread = threading.Thread(target=clear_and_fill)
    thread.start()
    try:
        batches = stream.read(400)
        while len(cleared) < 10 and thread.is_alive():  # whichever of the two is faster
            stream.grant(4)
            batches += stream.read(4)
    finally:
        done.set()
        thread.join()

    later = [batch for batch in batches if batch.episode_id[0] >= 10]
    assert len({batch.obs.shape for batch in later}) > 1
    for batch in later:
        (number,) = set(batch.episode_id.tolist())
        assert batch.obs.shape == (4, 8, 1 + (number - 10) % 300)


def test_stream_closed_by_the_learner_ends_with_ok(filled: Served) -> None:
    _, caller = filled
    stream = caller.stream().open(credits=3)
    stream.read(3)

    stream.close()

    assert stream.rest() == []
    assert stream.call.code() == grpc.StatusCode.OK


def test_learner_that_leaves_is_no_error_also_where_a_write_tells_it_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = threading.Event()

    async def write(session: SampleSession, *_: Any) -> None:
        failed.set()
        raise cygrpc.ExecuteBatchError("as gRPC does where the connection breaks under a write")

    monkeypatch.setattr(SampleSession, "_write", write)
    with serving() as (_, caller):
        fill(caller)
        stream = caller.stream().open(credits=3)
        assert failed.wait(DEADLINE_S)
        stream.cancel()

    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_failed_write_to_a_connected_learner_is_reported_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def write(session: SampleSession, *_: Any) -> None:
        raise cygrpc.ExecuteBatchError("for whatever reason")

    monkeypatch.setattr(SampleSession, "_write", write)
    monkeypatch.setattr(service_module, "DISCONNECT_S", 0.0)
    with serving() as (_, caller):
        fill(caller)
        refusal = refused(caller.stream().open(credits=3).rest)

    assert refusal.code == grpc.StatusCode.INTERNAL
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == ["a call failed"]


def test_stream_closed_before_it_was_opened_ends_with_ok(served: Served) -> None:
    _, caller = served
    stream = caller.stream()

    stream.close()

    assert stream.rest() == []
    assert stream.call.code() == grpc.StatusCode.OK


OPENING = pb.SampleStreamRequest(open=pb.SampleStreamOpen(credits=1)).SerializeToString()
PADDING = len_field(100, bytes(1 << 16))
"""An unknown field; a stream that kept its message would hold it for as long as it lasts."""


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (pb.SampleStreamRequest(credit=pb.SampleStreamCredit(batches=1)).SerializeToString(), "expected it to open the stream"),
        (b"", "expected it to open the stream"),
        (b"\xff" * 5, "5 bytes that are not a message, expected one of type SampleStreamRequest"),
        (OPENING + PADDING, "expected at most 65536"),
    ],
    ids=["credits", "empty", "garbage", "padded"],
)
def test_stream_with_a_bad_first_message_is_refused(filled: Served, first: bytes, words: str) -> None:
    _, caller = filled
    stream = caller.stream()

    stream.send(first)

    refusal = refused(stream.rest)
    assert (refusal.code, refusal.reason) == INVALID
    assert words in refusal.details


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (pb.SampleStreamRequest(open=pb.SampleStreamOpen(credits=1)).SerializeToString(), "opened twice"),
        (b"\xff" * 5, "5 bytes that are not a message"),
        (pb.SampleStreamRequest(credit=pb.SampleStreamCredit(batches=0)).SerializeToString() + PADDING, "expected at most 65536"),
    ],
    ids=["open", "garbage", "padded"],
)
@pytest.mark.parametrize("credits", [0, 2])
def test_stream_with_a_bad_later_message_ends_with_an_error(filled: Served, message: bytes, words: str, credits: int) -> None:
    _, caller = filled
    stream = caller.stream().open(credits=credits)
    stream.read(credits)

    stream.send(message)

    refusal = refused(stream.rest)
    assert (refusal.code, refusal.reason) == INVALID
    assert words in refusal.details


def test_stream_with_a_negative_group_is_refused(filled: Served) -> None:
    _, caller = filled

    refusal = refused(caller.stream().open(credits=1, max_batches_per_frame=-1).rest)

    assert (refusal.code, refusal.reason) == INVALID
    assert "max_batches_per_frame: -1, expected 0 or more" in refusal.details


def test_streams_above_max_streams_are_refused_until_one_ends() -> None:
    with serving(limits={"max_streams": 3}) as (_, caller):
        fill(caller)
        streams = [caller.stream().open(credits=1) for _ in range(3)]
        for stream in streams:
            stream.read(1)

        refusal = refused(caller.stream().open(credits=1).rest)
        streams[0].close()
        streams[0].rest()

        assert (refusal.code, refusal.reason) == OVER_LIMIT
        assert "3 streams are in progress, the limit of limits.max_streams" in refusal.details
        assert len(read_all(caller, 1)[0]) == 1


def worker_threads(before: set[threading.Thread]) -> list[str]:
    return [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("touchline-")]


@pytest.mark.parametrize("state", ["idle", "waiting for a reader", "waiting for an episode", "silent"])
def test_streams_that_learners_cancel_are_freed(state: str) -> None:
    streams = 20
    before = set(threading.enumerate())
    with serving(limits={"max_streams": streams}) as (_, caller):
        fill(caller, episodes=0 if state == "waiting for an episode" else 10, obs=200)
        openings = {"idle": {"credits": 0}, "waiting for a reader": {"credits": 10_000}, "waiting for an episode": {"credits": 3}}

        for _ in range(5):
            opened = [caller.stream() for _ in range(streams)]
            if state != "silent":
                for stream in opened:
                    stream.open(batch_size=100, **openings[state])
            for stream in opened:
                stream.cancel()

        def opens() -> bool:
            """Returns whether all of them can be open at the same time."""
            again = [caller.stream().open(credits=0) for _ in range(streams)]
            caller.counts()
            for stream in again:
                stream.close()
            try:
                return [stream.rest() for stream in again] == [[]] * streams
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                return False

        eventually(opens, "all streams freed")
        assert len(worker_threads(before)) <= 1 + 2 + 2
        assert caller.add(make_episode(obs=200)).counts.episodes_stored >= 1


def test_slow_learner_costs_its_credits_and_blocks_no_one(served: Served) -> None:
    _, caller = served
    fill(caller, obs=700)
    slow = caller.stream().open(credits=40, batch_size=100)
    read = slow.read(1)

    # The ring holds 40 of these, so every row is overwritten while the slow learner does not read.
    for number in range(80):
        caller.add(make_episode(50, seed=number, obs=700))
    quick, _ = read_all(caller, 5, batch_size=100)

    assert caller.counts().episodes_evicted == 50
    assert len(quick) == 5
    slow.close()
    read += slow.rest()
    assert len(read) == 40
    assert read[-1].episode_id.min() >= 50
