"""Sample, Ready, Info, Clear, health and reflection on a real server."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from support.service_calls import DEADLINE_S, SERVICE, Caller, Stream, assert_same_batch, key, make_config, make_episode, refused, serving
from touchline_protos import DEFAULT_MAX_MESSAGE_BYTES, PROTOCOL_METADATA_KEY, PROTOCOL_VERSION
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import __version__
from touchline_server.config.settings import Config
from touchline_server.service.app import ServerThread

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "invalid-argument")
NOT_READY = (grpc.StatusCode.FAILED_PRECONDITION, "not-ready")

Served = tuple[ServerThread, Caller]


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as pair:
        yield pair


@pytest.fixture
def filled(served: Served) -> Served:
    """A server with 10 episodes of 5 to 50 rows by 3 actors."""
    _, caller = served
    for number in range(10):
        caller.add(make_episode(5 * (number + 1), seed=number, actor=f"actor {number % 3}", policy_version=number))
    return served


def answer_at_once(caller: Caller, method: str) -> bytes:
    """Calls any method with an empty request, and ends its stream."""
    if method == "LoadEpisodes":
        return caller.load([]).SerializeToString()
    if method == "SampleStream":
        stream = caller.stream()
        stream.close()
        return b"".join(stream.call)
    if method in ("GetEpisodes", "Status"):
        return b"".join(caller.channel.unary_stream(SERVICE + method)(b"", timeout=DEADLINE_S))
    return caller.raw(method, b"")


# Sample


def test_sample_has_the_configured_shapes(filled: Served) -> None:
    _, caller = filled

    batch = caller.sample()

    assert [array.shape for array in batch] == [(4, 8, 4), (3, 8, 2), (3, 8, 1), (3, 8, 1)]
    assert {array.dtype for array in batch} == {np.dtype(np.float32)}
    assert not batch.done.any()
    assert batch.task is None


def test_sample_slices_are_rows_of_their_episode(filled: Served) -> None:
    _, caller = filled

    batch = caller.sample(batch_size=64)

    for b, (number, start) in enumerate(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True)):
        columns = make_episode(5 * (number + 1), seed=number).columns
        assert np.array_equal(batch.obs[:, b], columns["obs"][start : start + 4])
        assert np.array_equal(batch.action[:, b], columns["action"][start + 1 : start + 4])
        assert np.array_equal(batch.reward[:, b, 0], columns["reward"][start + 1 : start + 4])
        assert batch.actor_names[int(batch.actor[b])] == f"actor {number % 3}"
        assert batch.policy_version[b] == number


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({}, {}),
        ({"batch_size": 1}, {"batch_size": 1}),
        ({"batch_size": 300, "horizon": 7}, {"batch_size": 300, "horizon": 7}),
        ({"horizon": 49}, {"horizon": 49}),
        ({"law": pb.LAW_EPISODE}, {"law": "episode"}),
        ({"law": pb.LAW_STEP, "horizon": 1}, {"law": "step", "horizon": 1}),
    ],
)
def test_sample_equals_the_in_process_one_of_the_same_seed(filled: Served, fields: dict[str, Any], arguments: dict[str, Any]) -> None:
    server, caller = filled

    found = caller.sample(seed=11, **fields)

    assert_same_batch(found, server.buffer.sample(seed=11, **arguments))


def test_sample_same_seed_same_batch_and_another_seed_another(filled: Served) -> None:
    _, caller = filled

    one, other, third = caller.sample(seed=0), caller.sample(seed=0), caller.sample(seed=1)

    assert_same_batch(one, other)
    assert not np.array_equal(one.obs, third.obs)


def test_sample_without_a_seed_differs_from_call_to_call(filled: Served) -> None:
    _, caller = filled

    assert not np.array_equal(caller.sample(batch_size=64).start, caller.sample(batch_size=64).start)


def test_sample_under_a_configured_seed_repeats_after_a_restart() -> None:
    batches = []
    for _ in range(2):
        with serving(sampling={"seed": 3}) as (_, caller):
            caller.add(make_episode(50))
            batches.append([caller.sample(), caller.sample()])

    for one, other in zip(*batches, strict=True):
        assert_same_batch(one, other)
    assert not np.array_equal(batches[0][0].start, batches[0][1].start)


BAD_FIELDS = [
    ({"batch_size": 0}, "batch_size: 0, expected 1 to 65536"),
    ({"batch_size": -1}, "batch_size: -1, expected"),
    ({"batch_size": 65537}, "batch_size: 65537, expected 1 to 65536"),
    ({"horizon": 0}, "horizon: 0, expected 1 to 1024"),
    ({"horizon": -3}, "horizon: -3, expected"),
    ({"horizon": 1025}, "horizon: 1025, expected 1 to 1024"),
    ({"law": 7}, "law: number 7, expected one of [0, 1, 2"),
    ({"seed": -1}, "seed: -1, expected 0 or more"),
]
BAD_WAITS = [({"wait_s": wait_s}, "expected 0 to 3600 seconds") for wait_s in (-0.1, 3601.0, float("nan"), float("inf"))]


@pytest.mark.parametrize(("fields", "words"), [*BAD_FIELDS, *BAD_WAITS], ids=lambda value: str(value)[:30])
def test_sample_out_of_range_is_refused(filled: Served, fields: dict[str, Any], words: str) -> None:
    _, caller = filled

    refusal = refused(caller.sample, **fields)

    assert (refusal.code, refusal.reason) == INVALID
    assert words in refusal.details
    assert caller.sample().obs.shape == (4, 8, 4)


@pytest.mark.parametrize(("fields", "words"), BAD_FIELDS, ids=lambda value: str(value)[:30])
def test_sample_stream_out_of_range_is_refused(filled: Served, fields: dict[str, Any], words: str) -> None:
    _, caller = filled

    refusal = refused(caller.stream().open(credits=1, **fields).rest)

    assert (refusal.code, refusal.reason) == INVALID
    assert words in refusal.details


def test_sample_before_any_add_is_not_ready(served: Served) -> None:
    _, caller = served

    refusal = refused(caller.sample)

    assert (refusal.code, refusal.reason) == NOT_READY
    assert "0 steps in 0 episodes are stored" in refusal.details
    assert "4 steps that horizon 3 needs" in refusal.details


def test_sample_before_an_episode_is_long_enough_is_not_ready_and_gives_the_counts(served: Served) -> None:
    _, caller = served
    for seed in range(5):
        caller.add(make_episode(6, seed=seed))

    refusal = refused(caller.sample, horizon=6)

    assert (refusal.code, refusal.reason) == NOT_READY
    assert "30 steps in 5 episodes are stored" in refusal.details
    assert caller.sample(horizon=5).obs.shape == (6, 8, 4)


def test_sample_that_waits_is_answered_when_a_long_enough_episode_is_added(served: Served) -> None:
    _, caller = served
    request = pb.SampleRequest(wait_s=60, batch_size=5, horizon=9).SerializeToString()
    waiting = [caller.channel.unary_unary("/touchline.v1.Replay/Sample").future(request, timeout=DEADLINE_S) for _ in range(20)]
    caller.add(make_episode(9))  # too short
    caller.counts()
    assert not any(call.done() for call in waiting)

    caller.add(make_episode(10))

    batches = [pb.SampleResponse.FromString(call.result()).batch for call in waiting]
    assert {tuple(batch.provenance.episode_id.data) for batch in batches} == {tuple(np.ones(5, np.int64).tobytes())}


def test_sample_that_waits_in_vain_is_not_ready_after_that_time(served: Served) -> None:
    _, caller = served
    begin = time.monotonic()

    refusal = refused(caller.sample, wait_s=0.2)

    assert (refusal.code, refusal.reason) == NOT_READY
    assert "0 steps in 0 episodes are stored" in refusal.details
    assert 0.2 <= time.monotonic() - begin < 10


def test_sample_above_the_message_limit_names_the_stream_which_gives_it() -> None:
    with serving(limits={"max_message_bytes": 65536}) as (server, caller):
        caller.add(make_episode(100, obs=100))

        refusal = refused(caller.sample, batch_size=256)

        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too-large")
        assert "65536" in refusal.details
        assert "SampleStream" in refusal.details
        stream = caller.stream().open(credits=1, batch_size=256, seed=5)
        stream.close()
        (batch,) = stream.rest()
        assert_same_batch(batch, server.buffer.sample(batch_size=256, seed=5))
        assert len(stream.batch_counts) > 4


def test_sample_above_the_message_limit_is_not_ready_while_no_episode_is_long_enough() -> None:
    with serving(limits={"max_message_bytes": 65536}) as (_, caller):
        caller.add(make_episode(100, obs=100))

        refusal = refused(caller.sample, batch_size=256, horizon=100)

        assert (refusal.code, refusal.reason) == NOT_READY
        assert "none of the episodes has the 101 steps that horizon 100 needs" in refusal.details


def test_largest_batch_that_may_be_asked_for_is_refused_by_its_size(served: Served) -> None:
    _, caller = served
    caller.add(make_episode(1025, obs=64))
    largest = {"batch_size": 65536, "horizon": 1024}

    unary, streamed = refused(caller.sample, **largest), refused(caller.stream().open(credits=1, **largest).rest)

    for refusal in (unary, streamed):
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too-large")
    assert caller.sample().obs.shape == (4, 8, 64)


# Ready


def ready(caller: Caller, **fields: Any) -> pb.ReadyResponse:
    return caller.stub.Ready(pb.ReadyRequest(**fields), timeout=DEADLINE_S)


def test_ready_distinguishes_sampling_from_history(served: Served) -> None:
    _, caller = served
    answers = [ready(caller)]

    for rows in (3, 4, 92, 1):
        caller.add(make_episode(rows))
        answers.append(ready(caller))

    assert [(answer.can_sample, answer.min_steps_reached) for answer in answers] == [
        (False, False),
        (False, False),
        (True, False),
        (True, False),
        (True, True),
    ]
    assert [answer.counts.steps_stored for answer in answers] == [0, 3, 7, 99, 100]
    assert {answer.min_history for answer in answers} == {100}


def test_ready_min_steps_takes_the_place_of_min_history(served: Served) -> None:
    _, caller = served
    caller.add(make_episode(20))

    assert [ready(caller, min_steps=steps).min_steps_reached for steps in (1, 20, 21)] == [True, True, False]


def test_ready_speaks_of_the_horizon_that_was_asked_for(served: Served) -> None:
    _, caller = served
    for seed, rows in enumerate((20, 31, 5)):
        caller.add(make_episode(rows, seed=seed))

    answers = {horizon: caller.stub.Ready(pb.ReadyRequest(horizon=horizon), timeout=DEADLINE_S) for horizon in (4, 19, 30, 31)}

    assert {horizon: (answer.can_sample, answer.episodes_eligible) for horizon, answer in answers.items()} == {
        4: (True, 3),
        19: (True, 2),
        30: (True, 1),
        31: (False, 0),
    }
    assert {(answer.horizon == horizon, answer.longest_episode) for horizon, answer in answers.items()} == {(True, 31)}
    assert (ready(caller).horizon, ready(caller).episodes_eligible) == (3, 3)
    assert refused(ready, caller, horizon=0).reason == "invalid-argument"


def test_ready_that_waits_is_answered_once_both_conditions_hold(served: Served) -> None:
    _, caller = served
    waiting = [caller.stub.Ready.future(pb.ReadyRequest(min_steps=60, wait_s=60), timeout=DEADLINE_S) for _ in range(20)]
    for seed in range(2):
        caller.add(make_episode(20, seed=seed))
    caller.counts()
    assert not any(call.done() for call in waiting)

    caller.add(make_episode(20, seed=2))

    answers = [call.result() for call in waiting]
    assert {(answer.can_sample, answer.min_steps_reached, answer.counts.steps_stored) for answer in answers} == {(True, True, 60)}


def test_ready_that_waits_for_too_short_episodes_says_that_they_cannot_be_sampled(served: Served) -> None:
    _, caller = served
    for seed in range(5):
        caller.add(make_episode(3, seed=seed))
    begin = time.monotonic()

    answer = ready(caller, min_steps=10, wait_s=0.2)

    assert (answer.can_sample, answer.min_steps_reached) == (False, True)
    assert time.monotonic() - begin >= 0.2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_steps": -1}, "min_steps: -1, expected 0 or more"),
        ({"min_steps": 1_000_000_000}, "min_steps: 1000000000, expected at most the buffer's capacity of "),
        ({"wait_s": -1}, "wait_s: -1.0, expected 0 to 3600"),
    ],
)
def test_ready_out_of_range_is_refused(served: Served, fields: dict[str, Any], words: str) -> None:
    _, caller = served

    refusal = refused(ready, caller, **fields)

    assert (refusal.code, refusal.reason) == INVALID
    assert words in refusal.details


# Info and Clear


def info(caller: Caller) -> pb.InfoResponse:
    return caller.stub.Info(pb.InfoRequest(), timeout=DEADLINE_S)


def test_info_gives_version_limits_and_the_configuration_in_force() -> None:
    tables = {"sampling": {"law": "step", "seed": 9}, "limits": {"max_streams": 7}}
    with serving(**tables) as (server, caller):
        answer = info(caller)

        assert (answer.version, answer.protocol_version) == (__version__, PROTOCOL_VERSION)
        assert Config(**tomllib.loads(answer.config_toml)) == make_config(**tables) == server.buffer.config
        assert (answer.capacity, answer.max_message_bytes) == (2000, DEFAULT_MAX_MESSAGE_BYTES)
        assert (len(answer.columns), answer.device, answer.size_bytes) == (0, "", 0)


def test_info_gives_the_schema_that_the_first_episode_fixed(served: Served) -> None:
    _, caller = served
    caller.add(make_episode(20, actor="a", key=key(0)))

    answer = info(caller)

    assert [(spec.name, spec.dtype, list(spec.shape)) for spec in answer.columns] == [
        ("obs", pb.DTYPE_FLOAT32, [4]),
        ("action", pb.DTYPE_FLOAT32, [2]),
        ("reward", pb.DTYPE_FLOAT32, []),
    ]
    assert answer.device == "cpu"
    assert answer.size_bytes >= 2000 * 4 * (4 + 2 + 1)
    assert answer.counts == pb.Counts(steps_stored=20, episodes_stored=1, steps_added=20, episodes_added=1)


def test_clear_empties_the_table_and_its_schema_and_goes_on_counting(filled: Served) -> None:
    _, caller = filled

    cleared = caller.stub.Clear(pb.ClearRequest(), timeout=DEADLINE_S).counts

    assert (cleared.steps_stored, cleared.episodes_stored) == (0, 0)
    assert (cleared.steps_added, cleared.episodes_added, cleared.steps_evicted, cleared.episodes_evicted) == (275, 10, 275, 10)
    assert (len(info(caller).columns), info(caller).device) == (0, "")
    assert refused(caller.sample).reason == "not-ready"
    answer = caller.add(make_episode(20, obs=9))
    assert (answer.episode_id, answer.counts.episodes_stored, answer.counts.episodes_added) == (10, 1, 11)
    assert caller.sample().obs.shape == (4, 8, 9)


@pytest.mark.parametrize("method", ["Sample", "SampleStream", "Ready", "Info", "Clear"])
def test_another_table_is_not_found(filled: Served, method: str) -> None:
    _, caller = filled
    stream: Stream = caller.stream()

    if method == "SampleStream":
        refusal = refused(stream.open(credits=1, table="expert").rest)
    else:
        refusal = refused(caller.raw, method, pb.InfoRequest(table="expert").SerializeToString())

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "unknown-table")
    assert refusal.details == "table: 'expert' does not exist, expected the empty name of the default table"
    assert caller.counts().episodes_stored == 10


# Protocol versions, health, reflection

METHODS = [
    *("AddEpisode", "LoadEpisodes", "Sample", "SampleStream", "GetEpisodes", "UpdatePriorities", "Ready", "Info", "Clear"),
    *("CreateTable", "DropTable", "SetTable", "ListTables", "Status"),
]


class WithMetadata(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Interceptor that adds metadata to every call of a channel."""

    def __init__(self, *metadata: tuple[str, str]) -> None:
        self._metadata = metadata

    def _intercept(self, proceed: Any, details: Any, request: Any) -> Any:
        return proceed(details._replace(metadata=self._metadata), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = intercept_stream_stream = _intercept


@pytest.mark.parametrize("method", METHODS)
def test_client_of_another_major_version_is_refused_with_the_versions(filled: Served, method: str) -> None:
    _, caller = filled
    caller.channel = grpc.intercept_channel(caller.channel, WithMetadata((PROTOCOL_METADATA_KEY, "2.0")))

    refusal = refused(answer_at_once, caller, method)

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "incompatible-version")
    assert "the client speaks protocol 2.0, this server 1.3" in refusal.details


@pytest.mark.parametrize("version", ["", "x", "10.0", "-1.0"])
def test_client_of_a_malformed_version_is_refused(filled: Served, version: str) -> None:
    _, caller = filled

    assert refused(caller.raw, "Info", b"", metadata=((PROTOCOL_METADATA_KEY, version),)).reason == "incompatible-version"


@pytest.mark.parametrize("version", ["1.0", "1.7", "1"])
def test_client_of_the_same_major_version_is_served(filled: Served, version: str) -> None:
    _, caller = filled

    answer = caller.raw("Info", b"", metadata=((PROTOCOL_METADATA_KEY, version), ("other", "9")))

    assert pb.InfoResponse.FromString(answer).counts.episodes_stored == 10


@pytest.mark.parametrize("service", ["", "touchline.v1.Replay"])
def test_health_is_serving(served: Served, service: str) -> None:
    _, caller = served

    answer = health_pb2_grpc.HealthStub(caller.channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)

    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_describes_the_services(served: Served) -> None:
    _, caller = served
    database = ProtoReflectionDescriptorDatabase(caller.channel)

    services = database.get_services()

    assert {"touchline.v1.Replay", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= set(services)
    described = DescriptorPool(database).FindServiceByName("touchline.v1.Replay")
    assert [method.name for method in described.methods] == METHODS
    assert described.methods_by_name["Sample"].input_type.fields_by_name["batch_size"].number == 2
