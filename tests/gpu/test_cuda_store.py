"""The store in CUDA memory gives what the one in host memory gives."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from support.pinned import have_pinned_memory_ready
from support.store_cases import as_bits, check_traced, make_config, read_episode, sample_with, traced, traced_columns
from touchline import ReplayClient
from touchline_protos.types.dtypes import DType, to_numpy
from touchline_server import Batch, NotReadyError, ReplayBuffer
from touchline_server.service.app import ServerThread
from touchline_server.store import staging

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def pinned_memory() -> None:
    have_pinned_memory_ready()


def pair(capacity: int = 60, **sampling: object) -> tuple[ReplayBuffer, ReplayBuffer]:
    """The same buffer in host memory and on CUDA, by the device rule."""
    host, cuda = (ReplayBuffer(make_config(capacity, storage={"device": device}, seed=1, **sampling)) for device in ("cpu", "auto"))
    return host, cuda


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    values = [*batch.extra.values(), batch.action, batch.reward, batch.done, batch.episode_id, batch.start, batch.probability]
    return [*values, *(batch.obs.values() if isinstance(batch.obs, dict) else [batch.obs])]


@pytest.mark.parametrize("law", ["episode", "step"])
@pytest.mark.parametrize("convention", ["incoming", "outgoing"])
def test_cuda_batches_are_those_of_the_cpu_for_the_same_seed(law: str, convention: str) -> None:
    host, cuda = pair(law=law, row_convention=convention)

    for number in range(20):
        for buffer in (host, cuda):
            buffer.add_episode(traced(number, 4 + number * 7 % 20))
        one, other = host.sample(), cuda.sample()
        assert other.action.is_cuda
        assert [as_bits(tensor) for tensor in tensors_of(one)] == [as_bits(tensor) for tensor in tensors_of(other)]


def test_cuda_columns_of_every_dtype_give_back_the_bits_over_the_seam() -> None:
    _, cuda = pair(capacity=16)
    random = np.random.default_rng(0)
    for number in range(3):
        columns = traced_columns(number, 9)
        for wire in DType:
            dtype = to_numpy(wire)
            raw = np.frombuffer(random.bytes(9 * 3 * dtype.itemsize), np.uint8)
            columns[wire.name.lower()] = np.frombuffer((raw & 1 if dtype == np.bool_ else raw).tobytes(), dtype).reshape(9, 3)
        cuda.add(columns)

    stored = read_episode(cuda.store, cuda.store.entries()[-1])

    assert cuda.store.columns is not None
    assert cuda.store.columns.where == f"cuda:{torch.cuda.current_device()}"
    assert all(stored[name].tobytes() == array.tobytes() for name, array in columns.items())


@pytest.mark.parametrize("piece_bytes", [100, 1 << 20])
def test_cuda_episodes_read_back_are_those_of_the_cpu(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_server.store.reader.PIECE_BYTES", piece_bytes)
    host, cuda = pair()
    for number in range(20):
        columns = traced_columns(number, 4 + number * 7 % 20) | {"nothing": np.empty((4 + number * 7 % 20, 0), np.float64)}
        for buffer in (host, cuda):
            buffer.add(columns, actor=f"actor-{number % 2}", policy_version=number)

    found, expected = (list(buffer.episodes()) for buffer in (cuda, host))

    assert cuda.store.columns is not None and cuda.store.columns.device.type == "cuda"
    assert len(found) == 3  # of 23, 10 and 17 rows: one more does not fit
    assert [(episode.id, episode.actor, episode.policy_version) for episode in found] == [
        (episode.id, episode.actor, episode.policy_version) for episode in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert {name: as_bits(column) for name, column in one.columns.items()} == {
            name: as_bits(column) for name, column in other.columns.items()
        }


def test_cuda_episodes_read_while_others_are_added_are_whole() -> None:
    _, cuda = pair(capacity=300)
    cuda.add_episode(traced(0, 20))
    done = threading.Event()

    def add() -> None:
        number = 0
        while not done.is_set():
            number += 1
            cuda.add_episode(traced(number, 5 + number % 40))

    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(add)
        try:
            for _ in range(40):
                for episode in cuda.episodes():
                    expected = traced_columns(episode.policy_version, episode.length)
                    assert {name: as_bits(column) for name, column in episode.columns.items()} == {
                        name: as_bits(column) for name, column in expected.items()
                    }
        finally:
            done.set()
        adding.result()


def test_cuda_host_gather_is_the_device_gather() -> None:
    _, cuda = pair()
    cuda.add_episode(traced(3, 30))

    with cuda.table.draw(cuda.spec(), np.random.default_rng(0)) as drawn:
        tensors = drawn.gather_tensors()
        arrays = {spec.name: np.empty(spec.shape, spec.dtype) for spec in drawn.layout.specs}
        drawn.gather_into((arrays,))

    assert {name: as_bits(tensor) for name, tensor in tensors.items()} == {name: as_bits(array) for name, array in arrays.items()}


def test_cuda_add_and_sample_from_many_threads_gives_no_torn_batch() -> None:
    _, cuda = pair(capacity=120)
    cuda.add_episode(traced(0, 20))
    together = threading.Barrier(4)

    def add(adder: int) -> None:
        together.wait()
        for number in range(1, 200):
            cuda.add_episode(traced(adder * 1000 + number, 4 + number % 40))

    def sample() -> None:
        stream = torch.cuda.Stream()
        together.wait()
        with torch.cuda.stream(stream):
            for _ in range(300):
                batch = cuda.sample()
                stream.synchronize()
                check_traced(on_host(batch), horizon=3)

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(add, 1), pool.submit(add, 2), pool.submit(sample), pool.submit(sample)]:
            job.result()


def on_host(batch: Batch) -> Batch:
    values = {name: getattr(batch, name) for name in ("action", "reward", "done", "episode_id", "start", "actor", "policy_version")}
    return Batch(
        obs={name: value.cpu() for name, value in batch.obs.items()},
        extra={name: value.cpu() for name, value in batch.extra.items()},
        task=None,
        probability=batch.probability,
        **{name: value.cpu() for name, value in values.items()},
    )


def test_cuda_add_and_sample_wait_for_nothing_else_on_the_device() -> None:
    _, cuda = pair()
    for _ in range(staging.BLOCKS):  # allocating pinned memory waits for the device
        cuda.add_episode(traced(0, 20))
    cuda.sample()
    training = torch.cuda.Stream()
    with torch.cuda.stream(training):
        torch.cuda._sleep(5_000_000_000)  # seconds, unless it is waited for
    done = training.record_event()

    cuda.add_episode(traced(1, 20))
    check_traced(on_host(cuda.sample()), horizon=3)
    busy = not done.query()
    training.synchronize()

    assert busy


def test_cuda_sample_does_not_wait_for_its_own_stream() -> None:
    _, cuda = pair()
    cuda.add_episode(traced(0, 20))
    stream = torch.cuda.Stream()

    with torch.cuda.stream(stream):
        cuda.sample()
        torch.cuda._sleep(5_000_000_000)
        done = stream.record_event()
        batch = cuda.sample()
        busy = not done.query()
        stream.synchronize()

    assert busy
    check_traced(on_host(batch), horizon=3)


def test_cuda_write_follows_gathers_that_were_only_queued() -> None:
    _, cuda = pair(capacity=40)
    cuda.add_episode(traced(0, 40))
    stream = torch.cuda.Stream()

    with torch.cuda.stream(stream):
        cuda.sample()
        torch.cuda._sleep(1_000_000_000)
        batch = cuda.sample()
        queued = not stream.query()
    cuda.add_episode(traced(1, 40))  # takes all the rows that the gathers read
    stream.synchronize()

    assert queued
    check_traced(on_host(batch), horizon=3)


@pytest.mark.parametrize("ring", [True, False], ids=["ring", "stream"])
@pytest.mark.parametrize("size", [1, 120], ids=["small", "big"])
@pytest.mark.parametrize("stored", ["cuda", "cpu"])
def test_cuda_batches_from_a_server_are_those_of_a_local_buffer(stored: str, size: int, ring: bool) -> None:
    config = make_config(200, storage={"device": stored}, seed=1, server={"port": 0})
    expected = ReplayBuffer(make_config(200, seed=1))
    rng = expected.seeds.stream(5)
    with ServerThread(config) as server, ReplayClient(server.address) as client:
        for number in range(8):
            columns = traced_columns(number, 20)
            columns["obs.wide"] = np.repeat(columns["stamp"][:, None], size * 64, axis=1)
            client.add(columns, policy_version=number)
            expected.add(columns, policy_version=number)
        with client.batches(device="cuda", seed=5, transport="ring" if ring else "stream") as batches:
            found = [next(batches) for _ in range(30)]
            transport = batches.transport

    assert transport == ("ring" if ring else "stream")
    for batch in found:
        one = sample_with(expected, rng)
        assert batch.action.is_cuda and batch.obs["wide"].is_cuda
        assert [as_bits(tensor) for tensor in tensors_of(batch)] == [as_bits(tensor) for tensor in tensors_of(one)]


def test_cuda_torchrl_adapter_samples_on_the_device() -> None:
    _, cuda = pair()
    face = cuda.as_torchrl()
    cuda.add_episode(traced(3, 30))

    sample = face.sample()

    assert sample["stamp"].is_cuda
    assert (sample["stamp"].reshape(-1, 4).diff(dim=1) == 1).all()


def test_cuda_clear_frees_the_memory_and_another_schema_works() -> None:
    before = torch.cuda.memory_allocated()
    _, cuda = pair(capacity=1_000_000)
    cuda.add_episode(traced(0, 10))
    assert torch.cuda.memory_allocated() - before >= 30_000_000

    cuda.clear()

    assert torch.cuda.memory_allocated() - before < 1_000_000
    with pytest.raises(NotReadyError):
        cuda.sample()
    cuda.add({"obs": np.ones((9, 2)), "action": np.ones((9, 2)), "reward": np.ones(9)})
    assert cuda.sample().obs.shape == (4, 8, 2)


def test_cuda_without_memory_falls_back_to_the_cpu_with_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        buffer = ReplayBuffer(make_config(50_000_000, storage={"device": "cuda"}))
        with caplog.at_level(logging.WARNING, "touchline_server"):
            buffer.add_episode(traced(0, 10))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert buffer.store.columns is not None
    assert buffer.store.columns.where == "cpu"
    assert "is too small for" in caplog.text
    check_traced(buffer.sample(), horizon=3)
