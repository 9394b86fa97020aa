"""What a peer can make the server hold by messages that it never finishes, by silent calls, and by compression."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest

from support.raw_http2 import RawConnection
from support.service_calls import DEADLINE_S, SERVICE, Caller, ServerProcess, eventually, make_episode, refused, serving
from touchline import ReplayClient
from touchline_protos import MAX_REQUEST_BYTES
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.service.access import ROLES_OF
from touchline_server.service.admission import MAX_STANDARD_BYTES
from touchline_server.service.call_counters import MAX_HEALTH_CALLS, STANDARD_SHARE

MIB = 1 << 20
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
METHODS = (CHECK, WATCH, REFLECT, "/no.such/Method", *(SERVICE + name for name in ROLES_OF))

CALLS = 60
GROWTH_BYTES = 96 * MIB
"""Maximum growth of the server's memory: before the limits, each of these floods took from 200 MiB to everything that was sent."""


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    limits = {"MAX_RECEIVE_BYTES": str(32 * MIB), "MAX_MESSAGE_BYTES": str(16 * MIB), "MAX_EPISODE_BYTES": str(16 * MIB)}
    variables = {f"TOUCHLINE_LIMITS__{name}": value for name, value in limits.items()}
    with ServerProcess(tmp_path_factory.mktemp("flooded"), **variables) as process:
        yield process


def still_answers(process: ServerProcess) -> None:
    with Caller(process.address) as caller:
        assert caller.channel.unary_unary(CHECK)(b"", timeout=DEADLINE_S) == b"\x08\x01"
        assert caller.counts().episodes_stored == 0


@pytest.mark.parametrize("announced", [MAX_REQUEST_BYTES, (1 << 32) - 1])
@pytest.mark.parametrize("method", METHODS)
def test_messages_whose_last_byte_is_kept_back_take_bounded_memory(process: ServerProcess, method: str, announced: int) -> None:
    address, before = process.address, process.private_bytes

    with RawConnection(address) as connection:
        calls = [connection.call(method, announced=announced) for _ in range(CALLS)]
        connection.pump(quiet_s=0.2, most_bytes=4 * GROWTH_BYTES)

        assert process.private_bytes - before < GROWTH_BYTES
        assert sum(call.sent for call in calls) < GROWTH_BYTES
        still_answers(process)


def test_messages_behind_an_open_sampling_stream_take_one_request_each(process: ServerProcess) -> None:
    opening = pb.SampleStreamRequest(open=pb.SampleStreamOpen(sample=pb.SampleRequest(), credits=1)).SerializeToString()
    address, before = process.address, process.private_bytes

    with RawConnection(address) as connection:
        calls = [connection.call(SERVICE + "SampleStream", message=opening) for _ in range(20)]
        connection.pump(quiet_s=0.2)
        for call in calls:
            connection.begin(call, announced=MAX_REQUEST_BYTES)
        connection.pump(quiet_s=0.2)

        assert not any(call.ended for call in calls)
        assert process.private_bytes - before < 20 * MAX_REQUEST_BYTES + 16 * MIB


@pytest.mark.parametrize("method", [CHECK, REFLECT, SERVICE + "AddEpisode", SERVICE + "LoadEpisodes"])
def test_gzip_bomb_is_not_inflated(process: ServerProcess, method: str) -> None:
    address = process.address
    still_answers(process)
    before = process.peak_bytes
    with grpc.insecure_channel(address, compression=grpc.Compression.Gzip, options=(("grpc.max_send_message_length", -1),)) as channel:
        # 80 MiB, compressed to 80 KiB. More takes a busy machine longer than the health service waits for a message.
        refusal = refused(channel.stream_unary(method), iter([bytes(80 * MIB)]), timeout=DEADLINE_S)

    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert process.peak_bytes - before < 64 * MIB
    still_answers(process)


@pytest.mark.parametrize("method", [CHECK, WATCH, REFLECT])
def test_question_to_a_standard_service_has_a_few_kilobytes(method: str) -> None:
    with serving() as (_, caller):
        refusal = refused(list, caller.channel.stream_stream(method)(iter([bytes(MAX_STANDARD_BYTES + 1)]), timeout=DEADLINE_S))

        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too-large")
        assert f"{MAX_STANDARD_BYTES + 1} bytes, expected at most {MAX_STANDARD_BYTES}" in refusal.details


@pytest.mark.parametrize("method", [CHECK, WATCH, REFLECT])
def test_connection_whose_questions_never_come_leaves_the_service_to_the_others(method: str) -> None:
    with serving() as (server, _), Caller(server.address) as other, RawConnection(server.address) as connection:
        silent = [connection.call(method) for _ in range(MAX_HEALTH_CALLS)]
        share = MAX_HEALTH_CALLS // STANDARD_SHARE

        # Calls over its share are refused immediately, before they wait for anything.
        assert connection.wait_ended(silent[share:], limit_s=DEADLINE_S)
        for _ in range(30):
            assert other.channel.unary_unary(CHECK)(b"", timeout=DEADLINE_S) == b"\x08\x01"
        assert next(other.channel.unary_stream(WATCH)(b"", timeout=DEADLINE_S)) == b"\x08\x01"
        names = next(other.channel.stream_stream(REFLECT)(iter([b"\x3a\x01*"]), timeout=DEADLINE_S))
        assert b"touchline.v1.Replay" in names


@pytest.mark.parametrize("method", [CHECK, WATCH, REFLECT, *(SERVICE + name for name in ROLES_OF)])
def test_call_that_sends_no_message_is_ended_and_its_place_is_free(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    for name in ("admission.STANDARD_MESSAGE_S", "admission.FIRST_MESSAGE_S", "receiver.FIRST_MESSAGE_S"):
        monkeypatch.setattr(f"touchline_server.service.{name}", 0.2)
    never: queue.SimpleQueue[None] = queue.SimpleQueue()
    with serving() as (server, caller):
        call = caller.channel.stream_stream(method)(iter(never.get, None), timeout=DEADLINE_S)

        refusal = refused(list, call)

        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid-argument")
        assert refusal.details == "no message within 0.2 s, expected one"
        calls = server._server.parts.calls
        counters = (calls.replay, calls.health, calls.health_watches, calls.reflection)
        eventually(lambda: not any(counter.now for counter in counters), "its place is free")
        never.put(None)


def test_calls_without_a_token_are_refused_whatever_they_send(tmp_path: Path) -> None:
    tokens = {"TOUCHLINE_SERVER_TOKENS": "admin:ops:a-token-of-many-characters"}
    with ServerProcess(tmp_path, **tokens) as process, RawConnection(process.address) as connection:
        before = process.private_bytes
        calls = [
            connection.call(method, announced=12 * MIB) for method in METHODS if not method.startswith("/grpc.health") for _ in range(8)
        ]
        connection.pump(quiet_s=0.2)

        assert connection.wait_ended(calls, limit_s=DEADLINE_S)
        assert process.private_bytes - before < 16 * MIB


def test_episode_over_the_limit_of_a_request_goes_in_chunks_of_any_client() -> None:
    rng = np.random.default_rng(0)
    large = make_episode(rows=400, obs=2000)
    columns = dict(large.columns)
    assert large.size_bytes > MAX_REQUEST_BYTES
    with ExitStack() as stack:
        server, _ = stack.enter_context(serving())
        client = stack.enter_context(ReplayClient(server.address))
        # A client from before this limit is refused, asks for the limits, and continues in chunks.
        older = stack.enter_context(ReplayClient(server.address))
        older._uploader._max_message_bytes = 64 * MIB

        client.add(columns)
        older.add(columns | {"reward": rng.standard_normal(400).astype(np.float32)})

        first, second = client.episodes()
        assert first.columns["obs"].tobytes() == second.columns["obs"].tobytes() == columns["obs"].tobytes()
