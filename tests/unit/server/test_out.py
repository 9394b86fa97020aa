"""Batches that overwrite an earlier one, in host memory and as on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from support.store_cases import as_bits, make_config, traced
from touchline_protos.types.batch import batch_arrays
from touchline_server import InvalidArgumentError, ReplayBuffer
from touchline_server.store.batch_draw import BatchDraw


@pytest.fixture(params=["host", "device"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether batches are gathered as on a CUDA device, here on the CPU."""
    if request.param == "device":
        monkeypatch.setattr(BatchDraw, "on_cuda", True)
    return str(request.param)


@pytest.fixture
def make_buffer() -> Callable[[], ReplayBuffer]:
    def make() -> ReplayBuffer:
        buffer = ReplayBuffer(make_config(150, seed=2))
        for number in range(20):
            buffer.add_episode(traced(number, 2 + number * 7 % 29))
        return buffer

    return make


@pytest.mark.parametrize("request_of", [{}, {"pad": "end"}, {"law": "prioritized"}, {"mix": {"": 0.5, "other": 0.5}}], ids=str)
def test_sample_into_an_earlier_batch_gives_what_a_fresh_one_holds_at_the_same_addresses(
    way: str, make_buffer: Callable[[], ReplayBuffer], request_of: dict[str, object]
) -> None:
    buffers = [make_buffer(), make_buffer()]
    for buffer in buffers:
        other = buffer.create_table("other")
        for number in range(20, 25):
            other.add_episode(traced(number, 10))
    first = buffers[0].sample(**request_of)  # type: ignore[arg-type]
    buffers[1].sample(**request_of)  # type: ignore[arg-type]

    again = buffers[0].sample(**request_of, out=first)  # type: ignore[arg-type]
    expected = buffers[1].sample(**request_of)  # type: ignore[arg-type]

    found, earlier = batch_arrays(again), batch_arrays(first)
    assert {name: as_bits(tensor) for name, tensor in found.items()} == {
        name: as_bits(tensor) for name, tensor in batch_arrays(expected).items()
    }
    assert {name: tensor.data_ptr() for name, tensor in found.items()} == {name: tensor.data_ptr() for name, tensor in earlier.items()}


def test_sample_into_a_batch_of_another_request_is_refused(way: str, make_buffer: Callable[[], ReplayBuffer]) -> None:
    buffer = make_buffer()
    batch = buffer.sample()

    for request, message in [
        ({"batch_size": 4}, r"expected .*\b4\b.* on cpu, contiguous"),
        ({"horizon": 2}, r"expected .*\[3, 8, "),
        ({"pad": "end"}, "out: has no provenance.valid"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            buffer.sample(**request, out=batch)  # type: ignore[arg-type]


def test_sample_into_tensors_that_are_not_those_of_a_batch_is_refused(
    make_buffer: Callable[[], ReplayBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = make_buffer()
    monkeypatch.setattr(BatchDraw, "on_cuda", True)
    batch = buffer.sample()
    object.__setattr__(batch, "reward", batch.reward.clone())

    with pytest.raises(InvalidArgumentError, match="reward does not lie in one memory with the others"):
        buffer.sample(out=batch)


def test_batch_arrays_names_nested_observations_as_they_were_added() -> None:
    buffer = ReplayBuffer(make_config(50))
    buffer.add({"obs": {"a": {"b": np.ones(9)}, "c": np.ones(9)}, "action": np.ones((9, 1)), "reward": np.ones(9), "task": np.ones(9, int)})

    names = set(batch_arrays(buffer.sample()))

    assert {"obs.a.b", "obs.c", "action", "reward", "done", "task", "provenance.start"} <= names
    assert isinstance(batch_arrays(buffer.sample())["obs.c"], torch.Tensor)
