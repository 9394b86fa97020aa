"""Batches as JAX arrays on a CUDA device: the memory of the copied batch, the values of numpy, and the origins on the host."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
import torch

from touchline import ReplayClient
from touchline_server import Config
from touchline_server.service.app import ServerThread

jax = pytest.importorskip("jax")


def _has_cuda() -> bool:
    try:
        return bool(torch.cuda.is_available() and jax.devices("cuda"))
    except RuntimeError:
        return False


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _has_cuda(), reason="needs a CUDA device, and torch and JAX for it")]


@pytest.fixture(scope="module")
def client() -> Iterator[ReplayClient]:
    rng = np.random.default_rng(0)
    with (
        ServerThread(Config(config={"buffer_size": 5_000, "batch_size": 64, "horizon": 3}, storage={"device": "cpu"})) as server,
        ReplayClient(server.address) as client,
    ):
        for _ in range(10):
            client.add(
                {
                    "obs": rng.normal(size=(50, 17)).astype(np.float32),
                    "action": rng.normal(size=(50, 3)).astype(np.float32),
                    "reward": rng.normal(size=50).astype(np.float32),
                    "flag": rng.integers(0, 2, (50, 3)).astype(np.bool_),
                    "brain": rng.normal(size=(50, 3)).astype(ml_dtypes.bfloat16),
                }
            )
        yield client


@pytest.mark.parametrize("ring", [True, False])
def test_jax_batches_on_the_device_hold_the_values_of_numpy_batches(client: ReplayClient, ring: bool) -> None:
    with (
        client.batches(as_jax=True, device="cuda", seed=1, ring=ring) as batches,
        client.batches(as_numpy=True, seed=1) as plain,
    ):
        held = [next(batches) for _ in range(30)]
        for batch, expected in zip(held, plain, strict=False):
            for name in ("obs", "action", "reward", "done"):
                column = getattr(batch, name)
                assert {device.platform for device in column.devices()} == {"gpu"}
                assert np.asarray(column).tobytes() == getattr(expected, name).tobytes()
            for name in ("flag", "brain"):
                assert np.asarray(batch.extra[name]).tobytes() == expected.extra[name].tobytes()
            assert isinstance(batch.episode_id, np.ndarray)
            assert np.array_equal(batch.episode_id, expected.episode_id)


def test_jitted_computation_reads_a_batch_whose_arrays_have_died(client: ReplayClient) -> None:
    total = jax.jit(lambda obs: (obs * obs).sum(axis=(0, 2)))
    with client.batches(as_jax=True, device="cuda", seed=2) as batches, client.batches(as_numpy=True, seed=2) as plain:
        results = [total(next(batches).obs) for _ in range(100)]
        for result, expected in zip(results, plain, strict=False):
            assert np.allclose(np.asarray(result), (expected.obs**2).sum(axis=(0, 2)), rtol=1e-4)
