"""Batches as JAX arrays: over the same memory, in the right dtypes, and the learner's until the last array dies."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from support.serving import Config, ServerThread
from touchline import Batch, InvalidArgumentError, ReplayClient
from touchline._learner.cuda import keep_on_host
from touchline._learner.jax_batch import jax_converter
from touchline._learner.torch_batch import as_tensor, map_batch, map_nested
from touchline.installing import install_command

HOST_FIELDS = ("episode_id", "start", "actor", "policy_version", "probability")
KEPT = ("obs.image", "obs.state", "action", "reward", "done", "small", "half", "brain", "flag", "count")
"""Columns whose dtypes JAX has: every one that is stored, except int64 and float64."""
DTYPES = {"obs.image": "uint8", "small": "int8", "half": "float16", "brain": "bfloat16", "flag": "bool", "count": "int32"}
BF16 = np.dtype(ml_dtypes.bfloat16)


def _episode(seed: int, steps: int = 30, **more: np.ndarray) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "obs": {"image": rng.integers(0, 256, (steps, 7, 3), dtype=np.uint8), "state": rng.normal(size=(steps, 5)).astype(np.float32)},
        "action": rng.normal(size=(steps, 3)).astype(np.float32),
        "reward": rng.normal(size=steps).astype(np.float32),
        "small": rng.integers(-128, 128, steps, dtype=np.int8),
        "half": rng.normal(size=(steps, 3)).astype(np.float16),
        "brain": rng.normal(size=(steps, 3)).astype(BF16),
        "flag": rng.integers(0, 2, (steps, 3)).astype(np.bool_),
        "count": rng.integers(-(2**31), 2**31, steps, dtype=np.int32),
        **more,
    }


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(
        Config(config={"buffer_size": 5_000, "batch_size": 9, "horizon": 3}, storage={"device": "cpu", "share_columns": "on"})
    ) as started:
        with ReplayClient(started.address) as client:
            client.load(_episode(seed) for seed in range(10))
            for name in ("wide", "huge"):
                client.create_table(name)
            wide = {"task": np.full(30, -3), "precise": np.linspace(0, 1, 30)}
            client.add({**_episode(0), **wide}, table="wide")
            client.add({**_episode(0), "task": np.full(30, 2**40)}, table="huge")
        yield started


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address) as client:
        yield client


def _columns(batch: Batch) -> dict[str, Any]:
    """Returns the columns of a batch by their dotted names."""
    columns = {"obs.image": batch.obs["image"], "obs.state": batch.obs["state"], **batch.extra}
    return columns | {name: getattr(batch, name) for name in ("action", "reward", "done")}


def _bytes(array: Any) -> bytes:
    return np.asarray(array).tobytes()


def _ring_addresses(stream: Any) -> range:
    memory = np.frombuffer(stream._source.ring.whole_array(), np.uint8)
    return range(memory.ctypes.data, memory.ctypes.data + memory.nbytes)


@pytest.mark.parametrize("ring", [True, False])
def test_batches_as_jax_hold_the_values_of_numpy_batches_with_their_dtypes(client: ReplayClient, ring: bool) -> None:
    with client.batches(as_jax=True, seed=3, ring=ring) as ours, client.batches(as_numpy=True, seed=3) as plain:
        for batch, expected in zip([next(ours) for _ in range(9)], plain, strict=False):
            columns, arrays = _columns(batch), _columns(expected)
            assert set(columns) == set(KEPT)
            for name, column in columns.items():
                assert isinstance(column, jax.Array)
                assert column.dtype.name == DTYPES.get(name, "float32")
                assert column.shape == arrays[name].shape
                assert _bytes(column) == _bytes(arrays[name]), name
            for name in HOST_FIELDS:
                assert isinstance(getattr(batch, name), np.ndarray)
                assert np.array_equal(getattr(batch, name), getattr(expected, name))
            assert batch.actor_names == expected.actor_names
        assert ours.transport == ("ring" if ring else "stream")


def test_batches_as_jax_through_a_ring_lie_in_the_ring(client: ReplayClient) -> None:
    with client.batches(as_jax=True) as stream:
        for _, batch in zip(range(40), stream, strict=False):
            addresses = _ring_addresses(stream)
            for name, column in _columns(batch).items():
                assert column.unsafe_buffer_pointer() in addresses, name
            del batch, column


@pytest.mark.parametrize("batch_size", [9, 4_000], ids=["grouped", "in chunks"])
def test_batches_as_jax_in_messages_share_the_memory_that_they_were_decoded_into(client: ReplayClient, batch_size: int) -> None:
    convert = jax_converter()
    with client.batches(as_jax=True, ring=False, batch_size=batch_size) as stream:
        for _ in range(9):
            decoded = stream._source.take()
            for name, column in _columns(convert(decoded)).items():
                assert column.unsafe_buffer_pointer() == _columns(decoded)[name].ctypes.data, name


def test_batches_as_jax_that_the_learner_gathers_share_the_memory_that_they_were_gathered_into(client: ReplayClient) -> None:
    convert = jax_converter()
    with client.batches(as_jax=True, transport="device", seed=4) as stream, client.batches(as_numpy=True, seed=4) as plain:
        for _, expected in zip(range(9), plain, strict=False):
            gathered = stream._source.take()
            for name, column in _columns(convert(gathered)).items():
                assert column.unsafe_buffer_pointer() == _columns(gathered)[name].ctypes.data, name
                assert _bytes(column) == _bytes(_columns(expected)[name]), name
        assert stream.transport == "device"


def test_sample_as_jax_shares_the_memory_of_the_decoded_answer(client: ReplayClient, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Batch] = []
    take = client._sampler.sample

    def noting(*arguments: Any, **options: Any) -> Batch:
        decoded.append(take(*arguments, **options))
        return decoded[-1]

    monkeypatch.setattr(client._sampler, "sample", noting)
    batch = client.sample(as_jax=True, seed=5)
    expected = client.sample(as_numpy=True, seed=5)

    for name, column in _columns(batch).items():
        assert column.unsafe_buffer_pointer() == _columns(decoded[0])[name].ctypes.data, name
        assert _bytes(column) == _bytes(_columns(expected)[name])


def test_slot_of_the_ring_is_free_only_after_the_last_array_and_view_of_it_died(client: ReplayClient) -> None:
    with client.batches(as_jax=True) as stream:
        held = next(stream).reward
        control, addresses = stream._source.ring._control, _ring_addresses(stream)
        gc.collect()
        assert control.held == 1  # one array of the batch is enough

        view = np.asarray(held)  # shares the buffer of JAX
        content = view.tobytes()
        del held
        gc.collect()
        for _ in range(60):
            assert next(stream).obs["state"].unsafe_buffer_pointer() in addresses
        assert view.ctypes.data in addresses
        assert view.tobytes() == content
        assert control.held == 1

        del view
        gc.collect()
        assert control.held == 0


def test_slot_is_held_while_a_jitted_computation_still_reads_it(client: ReplayClient) -> None:
    slow = jax.jit(lambda state: jax.lax.fori_loop(0, 200, lambda _, x: jnp.tanh(x @ (state.T @ state) * 1e-6) + state, state))
    with client.batches(as_jax=True, batch_size=200, seed=1) as stream, client.batches(as_numpy=True, batch_size=200, seed=1) as plain:
        pending = [slow(next(stream).obs["state"].reshape(-1, 5)) for _ in range(30)]  # dispatched, while the ring goes round
        for result, expected in zip(pending, plain, strict=False):
            copied = jnp.array(expected.obs["state"].reshape(-1, 5), copy=True)
            assert np.array_equal(np.asarray(result), np.asarray(slow(copied)))


def test_batches_held_beyond_the_ring_are_still_zero_copy_and_keep_their_values(client: ReplayClient) -> None:
    with client.batches(as_jax=True, seed=8) as stream, client.batches(as_numpy=True, seed=8) as plain:
        held = [next(stream) for _ in range(40)]
        for batch, expected in zip(held, plain, strict=False):
            assert _bytes(batch.obs["image"]) == _bytes(expected.obs["image"])
            assert _bytes(batch.extra["brain"]) == _bytes(expected.extra["brain"])


def test_wide_columns_are_narrowed_as_jax_does_and_logged_once(client: ReplayClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "touchline"), client.batches(as_jax=True, table="wide", seed=2) as stream:
        batch, _, _ = (next(stream) for _ in range(3))
        expected = client.sample(as_numpy=True, table="wide", seed=2)
    lines = [record.getMessage() for record in caplog.records if "x64" in record.getMessage()]
    assert batch.task is not None
    assert batch.task.dtype == jnp.int32 and set(batch.task.tolist()) == {-3}
    assert batch.extra["precise"].dtype == jnp.float32
    assert np.array_equal(np.asarray(batch.extra["precise"]), expected.extra["precise"].astype(np.float32))
    assert sorted(line.split(":")[0] for line in lines) == ["precise", "task"]


def test_wide_columns_with_x64_are_kept_without_a_copy(client: ReplayClient) -> None:
    with jax.experimental.enable_x64() if not hasattr(jax, "enable_x64") else jax.enable_x64(True):
        with client.batches(as_jax=True, table="wide") as stream:
            batch = next(stream)
            addresses = _ring_addresses(stream)
        assert batch.task is not None
        assert (batch.task.dtype.name, batch.extra["precise"].dtype.name) == ("int64", "float64")
        assert batch.task.unsafe_buffer_pointer() in addresses
        assert batch.extra["precise"].unsafe_buffer_pointer() in addresses


def test_integer_that_jax_cannot_hold_is_an_error_by_name_instead_of_another_number(client: ReplayClient) -> None:
    with pytest.raises(InvalidArgumentError, match=r"task: 1099511627776 does not fit int32.*jax_enable_x64"):
        client.sample(as_jax=True, table="huge")


def test_priorities_of_a_jax_batch_are_updated(client: ReplayClient) -> None:
    batch = client.sample(as_jax=True, law="prioritized", horizon=2)

    assert isinstance(batch.weight, jax.Array)
    client.update_priorities(batch, jnp.abs(batch.reward[..., 0]))
    assert client.priorities.flush(30)
    assert client.priorities.counters().updated == 9


def test_batch_of_tensors_is_converted_over_their_memory_with_the_origins_from_the_host(client: ReplayClient) -> None:
    """The way of batches on a CUDA device, with tensors in host memory."""
    torch = pytest.importorskip("torch")
    host = client.sample(as_numpy=True)
    tensors = map_batch(host, lambda array: as_tensor(torch, array.copy()))

    staged = keep_on_host(host, tensors, HOST_FIELDS)
    batch = jax_converter()(staged)

    for name, column in _columns(batch).items():
        tensor = _columns(tensors)[name]
        assert column.dtype.name == DTYPES.get(name, "float32")
        if tensor.data_ptr() % 64 == 0:
            assert column.unsafe_buffer_pointer() == tensor.data_ptr()
        assert _bytes(column) == _bytes(_columns(host)[name])
    for name in HOST_FIELDS:
        kept = getattr(batch, name)
        assert isinstance(kept, np.ndarray) and np.array_equal(kept, getattr(host, name))
        assert not np.shares_memory(kept, getattr(host, name))  # the host's batch may lie in a slot that is reused


def test_padded_batch_has_its_mask_as_a_jax_array(client: ReplayClient) -> None:
    batch = client.sample(as_jax=True, pad="end", horizon=20)

    assert isinstance(batch.valid, jax.Array) and batch.valid.dtype == jnp.bool_
    assert 0 < int(batch.valid.sum()) < batch.valid.size


def test_as_jax_with_as_numpy_or_an_unknown_device_is_refused(client: ReplayClient) -> None:
    with pytest.raises(InvalidArgumentError, match="as_jax: True and as_numpy=True, expected one of them"):
        client.batches(as_jax=True, as_numpy=True)
    with pytest.raises(InvalidArgumentError, match="as_jax: True and as_numpy=True"):
        client.sample(as_jax=True, as_numpy=True)
    with pytest.raises(InvalidArgumentError, match="'mps'"):
        client.batches(as_jax=True, device="mps")


def test_client_of_numpy_gives_jax_arrays_when_asked(server: ServerThread) -> None:
    with ReplayClient(server.address, as_numpy=True) as client:
        assert isinstance(client.sample(as_jax=True).reward, jax.Array)


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


BLOCKED = """
import sys
sys.modules[{name!r}] = None  # as if it were not installed
from touchline import InvalidArgumentError, ReplayClient
client = ReplayClient("127.0.0.1:1")
for call in (client.batches, client.sample):
    try:
        call(as_jax=True)
    except InvalidArgumentError as error:
        print(error)
"""


@pytest.mark.parametrize("name", ["jax", "jaxlib"])
def test_as_jax_without_jax_says_what_to_install(name: str) -> None:
    output = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(name=name)], capture_output=True, text=True, check=True, timeout=60
    ).stdout

    for line in output.splitlines():
        assert line.startswith(f"as_jax: True needs JAX, which is not installed: {install_command('jax')} (") and name in line
    assert len(output.splitlines()) == 2


def test_client_imports_no_jax_before_it_is_asked_for() -> None:
    output = _run("import sys, touchline, touchline._learner.outputs, touchline._learner.jax_batch; print('jax' in sys.modules)")

    assert output.strip() == "False"


def test_map_nested_keeps_the_order_of_keys() -> None:
    assert list(map_nested({"b": {"d": 1, "c": 2}, "a": 3}, str).items()) == [("b", {"d": "1", "c": "2"}), ("a", "3")]
