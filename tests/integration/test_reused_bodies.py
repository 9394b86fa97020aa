"""Batches of a real server in two bodies of memory in turn, for a learner whose stream reads them late. The processor plays the device."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from support.store_cases import as_bits, check_traced, make_config, many_dtypes, traced_columns
from touchline import Batch, InvalidArgumentError, ReplayClient, TouchlineError
from touchline._learner.cuda import CudaSource
from touchline._learner.cuda_gather import CudaMethod
from touchline._learner.fixed_bodies import BODIES, FixedBodies
from touchline._learner.stream import StreamSource
from touchline._learner.torch_batch import map_batch
from touchline._rpc.convert import sample_request
from touchline_server.service.app import ServerThread

torch = pytest.importorskip("torch")

from support.host_device import HostDevice  # noqa: E402
from support.late_torch import LateTorch  # noqa: E402

SLICES = {"batch_size": 8, "horizon": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    """A server that shares its columns, with episodes of every dtype."""
    config = make_config(200, storage={"device": "cpu", "share_columns": "on", "allow_non_finite": True}, seed=1, server={"port": 0})
    with ServerThread(config) as server:
        with ReplayClient(server.address) as client:
            for number in range(6):
                client.add(many_dtypes(30, seed=number), policy_version=number)
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address, as_numpy=True) as client:
        yield client


class Learner:
    """Takes batches into reused bodies, and works on each of them later: when its stream must have come to that.

    Args:
        transport: the first way to try.
    """

    def __init__(self, client: ReplayClient, monkeypatch: pytest.MonkeyPatch, *, transport: str = "device", **request: Any) -> None:
        self.device = HostDevice()
        self.device.learners_work = self.work
        self.bodies = FixedBodies()
        self.late = LateTorch()
        # What the stream itself does comes after what it was given before: waiting for a copy, and the copy into a body behind that.
        self.late.current.wait_event = lambda event: (self.work(), event.synchronize())
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.work(), raising=False)
        self._queued: list[Batch] = []
        self.seen: list[Any] = []
        """Content of each batch, as the work read it."""
        method = CudaMethod(torch, torch.device("cpu"), bodies=self.bodies, calls=lambda module, place: self.device)
        self.host = StreamSource(
            client._rpc,
            sample_request(table="", **request),
            prefetch=4,
            timeout_s=30.0,
            reconnect_s=30.0,
            ring=transport != "stream",
            method=method if transport == "device" else None,
        )
        self.source = CudaSource(self.host, self.late, "device", bodies=self.bodies)

    def take(self) -> Batch:
        batch = self.source.take()
        self._queued.append(batch)
        return batch

    def work(self) -> None:
        queued, self._queued = self._queued, []
        self.seen += [bits_of(batch) for batch in queued]

    def close(self) -> None:
        self.work()
        self.source.close()


def bits_of(batch: Batch) -> list[Any]:
    found: list[Any] = []
    map_batch(batch, lambda value: found.append(as_bits(value)))
    return found


def addresses_of(batch: Batch) -> tuple[int, ...]:
    found: list[int] = []
    map_batch(batch, lambda value: found.append(value.data_ptr()))
    return tuple(found)


def expected_bits(client: ReplayClient, count: int, **request: Any) -> list[Any]:
    with client.batches(transport="ring", **request) as ring:
        return [bits_of(next(ring)) for _ in range(count)]


@pytest.mark.parametrize("transport", ["device", "ring", "stream"])
def test_batches_come_in_two_bodies_in_turn_and_are_read_whole(
    client: ReplayClient, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    expected = expected_bits(client, 12, seed=7, **SLICES)

    with closing(Learner(client, monkeypatch, transport=transport, seed=7, **SLICES)) as learner:
        batches = [learner.take() for _ in range(12)]
        assert learner.source.transport == transport, learner.source.transport_reason

    assert len({addresses_of(batch) for batch in batches}) == BODIES
    assert len({id(batch.action) for batch in batches}) == BODIES  # what a compiler marked is marked in later batches too
    assert learner.seen == expected


def test_gathers_write_the_bodies_themselves(client: ReplayClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Learner(client, monkeypatch, **SLICES)) as learner:
        while not learner.device.followed:
            learner.take()
        monkeypatch.setattr(FixedBodies, "_copy", lambda *_: pytest.fail("a batch was copied"))
        for _ in range(8 - learner.device.followed):
            learner.take()

        assert learner.device.followed >= 8


def test_addresses_stay_when_the_memory_is_registered(client: ReplayClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._learner.cuda_columns.PIECE_BYTES", 1 << 12)
    expected = expected_bits(client, 60, seed=7, **SLICES)

    with closing(Learner(client, monkeypatch, seed=7, **SLICES)) as learner:
        learner.device.gate.clear()
        batches = [learner.take() for _ in range(6)]
        assert not learner.device.followed
        learner.device.gate.set()
        while learner.device.followed < 6:
            batches.append(learner.take())

    assert len({addresses_of(batch) for batch in batches}) == BODIES
    assert learner.seen[:60] == expected[: len(batches)]


def test_batches_that_are_discarded_give_their_bodies_back(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(100, storage={"device": "cpu", "share_columns": "on"}, seed=1, server={"port": 0})
    with ServerThread(config.override(ring={"max_hold_s": 0.05})) as server, ReplayClient(server.address) as client:
        client.add(traced_columns(0, 50), policy_version=0)
        with closing(Learner(client, monkeypatch, **SLICES)) as learner:
            while not learner.device.followed:
                learner.take()
            numbers, ring = itertools.count(1), learner.host._session.ring  # type: ignore[union-attr]

            def add() -> None:
                if ring.discarded < 3:  # type: ignore[union-attr]
                    for number in itertools.islice(numbers, 6):
                        client.add(traced_columns(number, 50), policy_version=number)

            # Between the gather and the look at its mark: enough rows for every place, so that those that were gathered are overwritten.
            learner.device.on_wait = add
            batches = [learner.take() for _ in range(6)]
            for batch in batches[-BODIES:]:
                check_traced(batch, horizon=2)

    assert ring.discarded >= 3 and len({addresses_of(batch) for batch in batches}) == BODIES  # type: ignore[union-attr]


@pytest.mark.parametrize("wider", [False, True], ids=["same", "other"])
def test_addresses_stay_with_another_server_unless_its_batches_are_others(monkeypatch: pytest.MonkeyPatch, wider: bool) -> None:
    config = make_config(200, storage={"device": "cpu", "share_columns": "on"}, seed=1, server={"port": 0})
    with ServerThread(config) as first:
        port = int(first.address.rpartition(":")[2])
        client = ReplayClient(first.address)
        client.add(traced_columns(1, 30), policy_version=1)
        learner = Learner(client, monkeypatch, **SLICES)
        before = {addresses_of(learner.take()) for _ in range(8)}
    with ServerThread(config.override(server={"port": port})), client, closing(learner):
        columns = traced_columns(2, 30)
        client.add({**columns, "more": columns["reward"]} if wider else columns, policy_version=2)
        if wider:
            with pytest.raises(TouchlineError, match=r"^reuse: the server's batches have changed from .* to .*: open another stream$"):
                for _ in range(8):
                    learner.take()
        else:
            batches = iter(learner.take, None)
            batch = next(batch for batch in batches if (batch.obs["state"][..., 0] == 2).all())
            check_traced(batch, horizon=2)
            assert {addresses_of(batch), addresses_of(next(batches))} == before


def test_reused_batch_of_priorities_goes_back_to_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"device": "cpu", "share_columns": "on"}
    config = make_config(200, storage=shared, seed=1, law="prioritized", server={"port": 0})
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        client.add(traced_columns(1, 50), policy_version=1)
        with closing(Learner(client, monkeypatch, **SLICES)) as learner:
            for _ in range(4):
                batch = learner.take()
                client.update_priorities(batch, torch.full((2, 8), 2.0))
            counters = client.priorities.flush()

    assert batch.origin is not None and batch.origin.is_of(batch)
    assert counters.updated == 32


def test_only_the_learners_thread_gets_a_body_to_write_and_never_one_whose_batch_is_to_come() -> None:
    bodies = FixedBodies()
    assert bodies.claim() is None  # no batch was asked for yet

    bodies.begin_take()
    claimed = [bodies.claim() for _ in range(BODIES + 1)]
    bodies.release(1)
    elsewhere: list[int | None] = []
    thread = threading.Thread(target=lambda: elsewhere.append(bodies.claim()))
    thread.start()
    thread.join()

    assert claimed == [0, 1, None]
    assert elsewhere == [None] and bodies.claim() == 1


def test_reuse_with_jax_is_refused(client: ReplayClient) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^reuse: True and as_jax=True, expected one of them: JAX's arrays must never change$"):
        client.batches(device="cuda", as_jax=True, reuse=True)
