"""Calls of every method that break off at any moment: afterwards a server holds nothing, counts nothing and works as before."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from support.service_calls import SERVICE, Caller, eventually, key, make_config, make_episode
from touchline_protos.codec import encode_add_episode, encode_load
from touchline_protos.shm.ring import shared_memory_id
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.service.app import ServerThread
from touchline_server.service.budgets import ByteBudget

CALLS = 400
AT_ONCE = 16
MIB = 1 << 20
SCARCE: dict[str, dict[str, Any]] = {
    "limits": {
        "max_message_bytes": 2 * MIB,
        "max_episode_bytes": 4 * MIB,
        "max_receive_bytes": 16 * MIB,
        "max_send_bytes": 8 * MIB,
        "max_streams": 12,
        "max_calls": 20,
    },
    "server": {"add_workers": 1, "sample_workers": 2},
    "ring": {"max_rings": 2},
}
"""Limits so small that calls wait for each other and some are refused."""

Messages = list[bytes]


class Requests:
    """Random requests for each method."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._sequence = random.randrange(1 << 40)
        self.methods: dict[str, tuple[str, Callable[[], Messages]]] = {
            "AddEpisode": ("stream_unary", self.add),
            "LoadEpisodes": ("stream_unary", self.load),
            "Sample": ("stream_unary", self.sample),
            "SampleStream": ("stream_stream", self.stream),
            "GetEpisodes": ("stream_stream", self.read),
            "Ready": ("stream_unary", self.ready),
            "Info": ("stream_unary", lambda: [b""]),
            "Clear": ("stream_unary", lambda: [b""]),
            "/grpc.health.v1.Health/Check": ("stream_unary", lambda: [b""]),
            "/grpc.health.v1.Health/Watch": ("stream_stream", lambda: [health_pb2.HealthCheckRequest(service="x").SerializeToString()]),
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": (
                "stream_stream",
                lambda: [reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()],
            ),
        }
        """Method and kind of call, which on the wire is the same for a single message and for a stream of one."""

    def _episode(self) -> Any:
        self._sequence += 1
        # Some are stored in the event loop, some on a thread, some exceed the limits.
        rows = self._random.choice([0, 1, 5, 20, 20, 200, 900])
        return make_episode(rows, obs=300, seed=self._sequence, actor=f"actor {self._sequence % 5}", key=key(self._sequence))

    def add(self) -> Messages:
        message = encode_add_episode(self._episode())
        return [message if self._random.random() < 0.9 else message[: self._random.randrange(len(message))]]

    def load(self) -> Messages:
        chunk_bytes = self._random.choice([1000, 100_000])
        return [message for _ in range(self._random.randrange(4)) for message in encode_load(self._episode(), chunk_bytes=chunk_bytes)]

    def _what(self) -> pb.SampleRequest:
        horizon, wait_s = self._random.choice([(3, 0), (3, 30), (899, 30), (5000, 0)])
        return pb.SampleRequest(batch_size=self._random.choice([1, 8, 300]), horizon=horizon, wait_s=wait_s)

    def sample(self) -> Messages:
        return [self._what().SerializeToString()]

    def stream(self) -> Messages:
        opening = pb.SampleStreamOpen(
            sample=self._what(),
            credits=self._random.choice([0, 1, 4, 1000]),
            shared_memory_id=self._random.choice(["", shared_memory_id()]),
        )
        answer = pb.SampleStreamRequest(ring=pb.RingAttachment(attached=self._random.random() < 0.8))
        grants = [pb.SampleStreamRequest(credit=pb.SampleStreamCredit(batches=self._random.randrange(5))) for _ in range(3)]
        sent = [pb.SampleStreamRequest(open=opening), answer, *grants]
        return [message.SerializeToString() for message in sent[: self._random.randrange(6)]]

    def read(self) -> Messages:
        return [pb.GetEpisodesRequest(max_frame_bytes=self._random.choice([0, 4096])).SerializeToString()]

    def ready(self) -> Messages:
        return [pb.ReadyRequest(min_steps=self._random.choice([1, 2_000, 1 << 40]), wait_s=30).SerializeToString()]


def break_off(caller: Caller, random: Random, requests: Requests) -> str:
    """Makes one call and abandons it before, between or after its messages and answers, or in the middle of one. Returns its method."""
    method = random.choice(list(requests.methods))
    kind, make = requests.methods[method]
    messages = make()
    sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    multi = getattr(caller.channel, kind)(method if method.startswith("/") else SERVICE + method)
    # Some end by their deadline instead of a cancellation.
    call = (multi if kind == "stream_stream" else multi.future)(iter(sent.get, None), timeout=random.choice([0.01, 0.1, 1.0]))
    try:
        for message in messages:
            ask(caller, random.choice([0, 0, 0, 1]))
            sent.put(message)
        if random.random() < 0.5:
            sent.put(None)
        if kind == "stream_stream":
            for _ in zip(range(random.choice([0, 0, 1, 3])), call, strict=False):
                pass
        elif random.random() < 0.2:
            call.result()
        ask(caller, random.choice([0, 0, 1, 2, 5]))
    except grpc.RpcError:
        pass  # refused, or past its deadline
    finally:
        call.cancel()
        sent.put(None)
    return method


def ask(caller: Caller, times: int) -> None:
    """Waits until the server has answered ``times`` calls, so that its event loop had as many turns."""
    for _ in range(times):
        with contextlib.suppress(grpc.RpcError):
            caller.counts()


def break_many_off(address: str, seed: int, calls: int) -> set[str]:
    random = Random(seed)
    requests = Requests(random)
    with Caller(address) as caller:
        return {break_off(caller, random, requests) for _ in range(calls)}


def budgets_of(parts: Any) -> list[tuple[str, ByteBudget]]:
    found = [(name, budget) for name, budget in vars(parts.budgets).items() if isinstance(budget, ByteBudget)]
    assert len(found) == 6
    return found


def held_by(server: ServerThread) -> dict[str, Any]:
    """Returns everything that a server holds at this moment, by name, without zeros."""
    parts: Any = server._server.parts  # type: ignore[attr-defined]
    found: dict[str, Any] = {f"budgets.{name}": (budget.used, budget.has_waiters) for name, budget in budgets_of(parts)}
    found |= {f"readers.{name}": getattr(parts.readers, name).evictions for name in ("messages", "control", "health", "reflection")}
    found |= {f"calls.{name}": counter.now for name, counter in vars(parts.calls).items()}
    found |= {
        "rings": parts.rings._rings,
        "blocks to cancel on drain": len(parts.drain._blocks),
        "waiters": len(parts.changes._waiters),
        "waiting samplers": len(parts.throttle._waiting_samplers),
        "turn": parts.throttle._turn.locked(),
        "pins": server.buffer.store._ring.epochs.active,
        "writing": not server.buffer.store.writes.lock.acquire(blocking=False) or server.buffer.store.writes.lock.release(),
        "work": parts.add_pools.of(None)._work_queue.qsize() + parts.sample_pool._work_queue.qsize(),
        "rings' threads": sum(thread.name == "touchline-ring" for thread in threading.enumerate()),
    }
    return {name: value for name, value in found.items() if value not in (None, 0, False, (0, False))}


@pytest.fixture
def no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Asserts that the server logged no error: no traceback, and no unhandled failure of a task or callback."""
    yield
    errors = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    # gRPC's own line for a caller that disconnected just before it heard of that: on a busy machine one in some thousand calls.
    errors = [record for record in errors if not record.getMessage().startswith("ExecuteBatchError raised in core by servicer method")]
    assert [record.getMessage() for record in errors if str(record.threadName).startswith("touchline-")] == []


@pytest.mark.slow
@pytest.mark.usefixtures("no_errors")
@pytest.mark.parametrize(("durability", "seed"), [("", 1), ("batch", 2), ("memory", 3)])
def test_calls_that_break_off_at_any_moment_leave_nothing_behind(durability: str, seed: int, tmp_path: Path) -> None:
    storage = {"device": "cpu"} | ({"data_dir": str(tmp_path / "data"), "durability": durability} if durability else {})
    before = set(threading.enumerate())
    config = make_config(config={"buffer_size": 2000, "batch_size": 8, "min_history": 0, "horizon": 3}, storage=storage, **SCARCE)
    with ServerThread(config) as server:
        with Caller(server.address) as caller:
            caller.add(make_episode(obs=300))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            seeds = range(AT_ONCE * seed, AT_ONCE * (seed + 1))
            methods = set().union(*pool.map(lambda own: break_many_off(server.address, own, CALLS // AT_ONCE), seeds))

        assert len(methods) == 11
        eventually(lambda: not held_by(server), "everything is released")
        with Caller(server.address) as caller:
            caller.stub.Clear(pb.ClearRequest())
            assert caller.add(make_episode(100, obs=300)).counts.episodes_stored == 1
            assert caller.sample().obs.shape == (4, 8, 300)
            stream = caller.stream().open(credits=20)
            stream.close()
            assert len(stream.rest()) == 20
            assert caller.load(encode_load(make_episode(obs=300))).counts.episodes_stored == 2
        eventually(lambda: not held_by(server), "everything is released")

    ours = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("touchline-")]
    assert ours == []
