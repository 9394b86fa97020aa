"""A learner that gathers on its device, from the columns of a real server. The device's own calls are played by the processor."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from support.protection import is_writable
from support.store_cases import as_bits, check_traced, make_config, many_dtypes, traced_columns
from touchline import Batch, ReplayClient
from touchline._learner.cuda_device import NOT_SUPPORTED, READ_ONLY, register_to_read
from touchline._learner.cuda_gather import CudaMethod
from touchline._learner.row_offer import RowOffer
from touchline._learner.stream import BatchSource, StreamSource
from touchline._learner.torch_batch import map_batch
from touchline._rpc.convert import sample_request
from touchline_server.service.app import ServerThread

torch = pytest.importorskip("torch")

from support.host_device import HostDevice, KernelDevice  # noqa: E402


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    """A server that shares its columns, with episodes of every dtype."""
    config = make_config(200, storage={"device": "cpu", "share_columns": "on", "allow_non_finite": True}, seed=1, server={"port": 0})
    with ServerThread(config.override(tables={"demos": {}, "empty": {}})) as server:
        for table, first in (("", 0), ("demos", 100)):
            with ReplayClient(server.address, table=table) as client:
                for number in range(6):
                    client.add(many_dtypes(30, seed=first + number), policy_version=number)
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address, as_numpy=True) as client:
        yield client


def source_of(client: ReplayClient, device: HostDevice, **request: Any) -> StreamSource:
    method = CudaMethod(torch, torch.device("cpu"), calls=lambda module, place: device)
    return StreamSource(
        client._rpc, sample_request(table="", **request), prefetch=4, timeout_s=30.0, reconnect_s=30.0, ring=True, method=method
    )


def take_gathered(source: BatchSource) -> Batch:
    """Returns the next batch that the device gathered."""
    return next(batch for batch in iter(source.take, None) if isinstance(batch.reward, torch.Tensor))


def bits_of(batch: Batch) -> list[Any]:
    found: list[Any] = []
    map_batch(batch, lambda value: found.append(as_bits(value)))
    return found


REQUESTS = {
    "slices": {"batch_size": 16, "horizon": 3},
    "padded": {"batch_size": 16, "horizon": 40, "pad": "end"},
    "mix": {"batch_size": 16, "horizon": 3, "mix": {"": 0.5, "demos": 0.5}},
}


@pytest.mark.parametrize("device_type", [HostDevice, KernelDevice], ids=["index_select", "kernel"])
@pytest.mark.parametrize("request_of", REQUESTS.values(), ids=REQUESTS)
def test_gathered_batches_are_those_of_a_ring(client: ReplayClient, request_of: dict[str, Any], device_type: type[HostDevice]) -> None:
    device = device_type()
    with client.batches(seed=7, transport="ring", **request_of) as ring:
        expected = [bits_of(next(ring)) for _ in range(6)]

    with closing(source_of(client, device, seed=7, **request_of)) as source:
        found = [source.take() for _ in range(6)]
        assert source.transport == "device" and source.transport_reason == ""

    assert any(isinstance(batch.reward, torch.Tensor) for batch in found)
    assert [bits_of(batch) for batch in found] == expected


def test_gathered_batches_are_of_their_own_memory_and_their_staging_is_not_reused_too_soon(client: ReplayClient) -> None:
    device = HostDevice()
    with closing(source_of(client, device, seed=3, batch_size=8, horizon=2)) as source:
        first = take_gathered(source)
        before = bits_of(first)
        addresses = {first.reward.data_ptr(), *(take_gathered(source).reward.data_ptr() for _ in range(8))}

    assert bits_of(first) == before
    assert len(addresses) > 1 and device.handed_over >= 9


def test_fields_that_stay_in_host_memory_are_arrays_of_the_same_values(client: ReplayClient) -> None:
    method = CudaMethod(torch, torch.device("cpu"), ("episode_id", "start"), calls=lambda module, place: HostDevice())
    request = sample_request(table="", seed=3, batch_size=8, horizon=2)
    with (
        closing(StreamSource(client._rpc, request, prefetch=4, timeout_s=30.0, reconnect_s=30.0, ring=True, method=method)) as source,
        client.batches(seed=3, batch_size=8, horizon=2, transport="ring") as ring,
    ):
        found, expected = [source.take() for _ in range(4)], [next(ring) for _ in range(4)]

    assert isinstance(found[-1].reward, torch.Tensor) and isinstance(found[-1].episode_id, np.ndarray)
    assert [bits_of(batch) for batch in found] == [bits_of(batch) for batch in expected]


def test_mix_of_which_one_table_is_empty_is_gathered_from_the_others(server: ServerThread, client: ReplayClient) -> None:
    device = HostDevice()
    request = {"batch_size": 8, "horizon": 2, "mix": {"": 0.5, "empty": 0.5}, "when_empty": "others"}
    with client.batches(seed=7, transport="ring", **request) as ring:
        expected = bits_of(next(ring))

    with closing(source_of(client, device, seed=7, **request)) as source:
        batch = source.take()
        assert source.transport == "device" and source.transport_reason == ""

    assert bits_of(batch) == expected


# Registering


def test_until_the_memory_is_registered_batches_are_gathered_on_the_host(client: ReplayClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._learner.cuda_columns.PIECE_BYTES", 1 << 12)
    device = HostDevice()
    device.gate.clear()
    with client.batches(seed=7, batch_size=8, horizon=2, transport="ring") as ring:
        expected = [bits_of(next(ring)) for _ in range(12)]

    with closing(source_of(client, device, seed=7, batch_size=8, horizon=2)) as source:
        found = [source.take() for _ in range(6)]
        assert all(isinstance(batch.reward, np.ndarray) for batch in found) and source.transport == "device"
        device.gate.set()
        while not isinstance(found[-1].reward, torch.Tensor):
            found.append(source.take())

    assert len(device.log) > 4 and device.log.count("register") == device.log.count("unregister")
    assert [bits_of(batch) for batch in found][:12] == expected[: len(found)]


def test_memory_that_cannot_be_registered_leaves_a_ring_and_its_reason(client: ReplayClient) -> None:
    with closing(source_of(client, HostDevice(errors={1: 801}), batch_size=8, horizon=2)) as source:
        batch = source.take()

        assert isinstance(batch.reward, np.ndarray) and source.transport == "ring"
        assert "cannot be registered with CUDA: error 801" in source.transport_reason


@pytest.mark.parametrize(("share", "transport"), [("on", "ring"), ("writable", "device")])
def test_device_that_reads_only_writable_memory_gathers_if_the_server_allows_it(share: str, transport: str) -> None:
    storage = {"device": "cpu", "share_columns": share}
    with ServerThread(make_config(200, storage=storage, seed=1, server={"port": 0})) as server, ReplayClient(server.address) as client:
        client.add(traced_columns(1, 50), policy_version=1)
        device = HostDevice()
        device.register = partial(register_to_read, partial(register_writable, device.register))  # type: ignore[method-assign]
        with closing(source_of(client, device, batch_size=8, horizon=2)) as source:
            batch = source.take() if transport == "ring" else take_gathered(source)

            assert source.transport == transport
            assert ('share_columns = "writable"' in source.transport_reason) is (transport == "ring")
            assert not any(is_writable(address) for address in device.registered)
            check_traced(map_batch(batch, torch.as_tensor), horizon=2)


def register_writable(register: Callable[[int, int], int], address: int, size_bytes: int, flags: int) -> int:
    """Plays ``cudaHostRegister`` of a card on PCIe: it takes no read-only memory."""
    if flags & READ_ONLY:
        return NOT_SUPPORTED
    return register(address, size_bytes) if is_writable(address) else 1


def test_memory_that_can_be_registered_in_part_is_gathered_on_the_host(
    client: ReplayClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("touchline._learner.cuda_columns.PIECE_BYTES", 1 << 12)
    device = HostDevice(errors={3: 2})

    with closing(source_of(client, device, batch_size=8, horizon=2)) as source:
        batches = [source.take() for _ in range(4)]

        assert all(isinstance(batch.reward, np.ndarray) for batch in batches) and source.transport == "device"
    assert "error 2, after 8192 bytes: the processor gathers instead" in caplog.text
    assert device.log == ["wait", "register", "register", "wait", "unregister", "unregister"]


def test_kernel_that_cannot_be_compiled_leaves_a_ring_and_its_reason(client: ReplayClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("touchline_protos.gather.row_gather.RowGather.run", refuse)
    device = HostDevice()

    with closing(source_of(client, device, batch_size=8, horizon=2)) as source:
        source.take()

        assert source.transport == "ring" and "Failed to find C compiler" in source.transport_reason
    assert not device.registered and not device.open_now


# Ends


def test_close_unregisters_after_the_last_gather_and_before_the_memory_is_unmapped(client: ReplayClient) -> None:
    device = HostDevice()
    source = source_of(client, device, batch_size=8, horizon=2)
    take_gathered(source)

    source.close()

    assert device.log[-2:] == ["wait", "unregister"] and not device.registered


def test_dropped_gatherer_unregisters(client: ReplayClient) -> None:
    device = HostDevice()
    source = source_of(client, device, batch_size=8, horizon=2)
    take_gathered(source)
    done = threading.Event()
    unregister = device.unregister
    device.unregister = lambda address: (unregister(address), done.set())  # type: ignore[assignment, method-assign, return-value]

    source._session.end()  # type: ignore[union-attr]
    del source
    gc.collect()

    assert done.wait(20)


def test_forked_child_leaves_the_registration_to_its_parent(client: ReplayClient, monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice()
    source = source_of(client, device, batch_size=8, horizon=2)
    take_gathered(source)
    columns = source._session.ring._gatherer._columns  # type: ignore[union-attr]

    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: 0)
        columns.close()
    registered_in_child = dict(device.registered)
    source.close()

    assert registered_in_child and not device.registered


def test_server_that_ends_gives_everything_back_and_another_one_is_gathered_from() -> None:
    device = HostDevice()
    config = make_config(200, storage={"device": "cpu", "share_columns": "on"}, seed=1, server={"port": 0})
    with ServerThread(config) as first:
        port = int(first.address.rpartition(":")[2])
        client = ReplayClient(first.address)
        client.add(traced_columns(1, 30), policy_version=1)
        source = source_of(client, device, batch_size=8, horizon=2)
        check_traced(on_host(take_gathered(source)), horizon=2)
    with ServerThread(config.override(server={"port": port})), client, closing(source):
        client.add(traced_columns(2, 30), policy_version=2)
        batch = next(batch for batch in map(on_host, iter(source.take, None)) if (batch.obs["state"][..., 0] == 2).all())
        check_traced(batch, horizon=2)
        registered = dict(device.registered)

    assert len(registered) == 1 and not device.registered


# Revocation


def test_batch_whose_rows_were_taken_back_is_discarded() -> None:
    config = make_config(100, storage={"device": "cpu", "share_columns": "on"}, seed=1, server={"port": 0})
    config = config.override(ring={"max_hold_s": 0.05})
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        device = HostDevice()
        client.add(traced_columns(0, 50), policy_version=0)
        with closing(source_of(client, device, batch_size=8, horizon=2)) as source:
            take_gathered(source)
            numbers = itertools.count(1, 6)

            def add(first: int, count: int) -> None:
                for number in range(first, first + count):
                    client.add(traced_columns(number, 50), policy_version=number)

            # Between the gather and the look at its mark: enough rows for every place, so that those that were gathered are overwritten.
            device.on_wait = lambda: add(next(numbers), 6)
            ring = source._session.ring  # type: ignore[union-attr]
            while not ring.discarded:  # type: ignore[union-attr]
                assert ring.take() is None  # type: ignore[union-attr]
            device.on_wait = lambda: None
            check_traced(on_host(take_gathered(source)), horizon=2)

    assert ring.discarded  # type: ignore[union-attr]


def on_host(batch: Batch) -> Batch:
    return map_batch(batch, lambda value: value if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value)))


# Handles


def test_columns_on_a_device_are_opened_by_their_handle_and_closed(client: ReplayClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's host memory, offered under a handle as memory of a device is."""
    device = HostDevice()
    handle = b"handle of the test".ljust(64)
    mapped = RowOffer.with_memory
    kept: list[mmap.mmap] = []  # while the handle can be opened

    def by_handle(offer: RowOffer, memory: Sequence[mmap.mmap]) -> RowOffer:
        kept.extend(memory)
        offer = mapped(offer, memory)
        (table,) = offer.tables
        device.opened[handle] = int(np.frombuffer(table.memory, np.uint8).__array_interface__["data"][0])
        return replace(offer, tables=(table._replace(memory=None, cuda_device="GPU-of-the-test", cuda_handle=handle),))

    monkeypatch.setattr(RowOffer, "with_memory", by_handle)
    with closing(source_of(client, device, seed=7, batch_size=8, horizon=2)) as source:
        batch = source.take()
        opened = list(device.open_now)

    assert isinstance(batch.reward, torch.Tensor) and len(opened) == 1
    assert device.log[-2:] == ["wait", "close"] and not device.open_now


def test_gathered_batch_of_priorities_goes_back_to_where_it_came_from() -> None:
    shared = {"device": "cpu", "share_columns": "on"}
    config = make_config(200, storage=shared, seed=1, law="prioritized", server={"port": 0})
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        client.add(traced_columns(1, 50), policy_version=1)
        with closing(source_of(client, HostDevice(), batch_size=8, horizon=2)) as source:
            batch = take_gathered(source)

            client.update_priorities(batch, torch.full((2, 8), 2.0))
            counters = client.priorities.flush()

    assert batch.origin is not None and batch.origin.is_of(batch)
    assert counters.updated == 8
