"""Where the columns go, what does not fit, and what files there are."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from support.store_cases import make_config, many_dtypes, plain_columns, read_episode, traced, traced_columns
from touchline_protos.codec import Episode
from touchline_protos.types.dtypes import BFLOAT16
from touchline_server import ConfigError, ReplayBuffer, StorageFailedError, StoreInUseError, TooLargeError
from touchline_server.store import allocation, columns
from touchline_server.store.allocation import allocate_columns, choose_device
from touchline_server.store.schema import Schema
from touchline_server.store.tensors import as_array, as_tensor

GIB = 2**30


def allocated(capacity: int, episode: Mapping[str, np.ndarray]) -> columns.Columns:
    return allocate_columns(Schema.of(episode), capacity=capacity, configured_device="cpu")


def test_columns_of_every_dtype_give_back_the_bits_over_the_seam() -> None:
    episode = many_dtypes(7, seed=1)
    ring = allocated(10, episode)

    ring.write(6, episode)

    rows = np.arange(6, 13).reshape(7, 1) % 10
    for name, array in episode.items():
        out = np.empty((7, 1, *array.shape[1:]), array.dtype)
        ring.gather(name, rows, out)
        assert out[:, 0].tobytes() == array.tobytes(), name


def test_columns_as_tensors_are_aligned_contiguous_and_share_the_memory() -> None:
    episode = many_dtypes(4, seed=2)
    ring = allocated(10, episode)

    tensors = ring.tensors
    ring.write(6, episode)

    for spec in ring.schema.columns:
        tensor = tensors[spec.name]
        assert tensor.is_contiguous()
        assert tensor.shape == (10, *spec.shape)
        assert tensor.data_ptr() % 64 == 0
        assert as_array(tensor)[6:].tobytes() == episode[spec.name].tobytes()
    assert ring.size_bytes == 10 * ring.schema.row_bytes == sum(tensor.nbytes for tensor in ring.tensors.values())


def test_tensor_and_array_share_memory_both_ways() -> None:
    bits = np.arange(6, dtype=np.uint16).view(BFLOAT16).reshape(2, 3)

    tensor = as_tensor(bits)
    as_array(tensor).view(np.uint16)[1, 2] = 0x3F80

    assert tensor.dtype == torch.bfloat16
    assert float(tensor[1, 2]) == 1.0
    assert bits.view(np.uint16)[1, 2] == 0x3F80


def test_device_auto_without_cuda_is_the_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")

    assert choose_device("auto", 1000) == "cpu"


@pytest.mark.parametrize(
    ("required", "expected"),
    [(4 * GIB - 1, "cuda:0"), (4 * GIB, "cpu"), (40 * GIB, "cpu")],
    ids=["a bit less than the free memory by 2.5", "the free memory by 2.5", "much more"],
)
def test_device_auto_is_cuda_only_with_memory_for_more_than_the_columns(
    monkeypatch: pytest.MonkeyPatch, required: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    monkeypatch.setattr(allocation, "available_host_bytes", lambda: 100 * GIB)

    assert choose_device("auto", required) == expected


def test_device_cuda_by_name_is_taken_without_checking_its_memory() -> None:
    assert choose_device("cuda:1", 10**15) == "cuda:1"


def test_device_cuda_without_cuda_is_refused_immediately() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"

    with pytest.raises(ConfigError, match=f"storage.device: '{missing}', expected a device that torch finds"):
        ReplayBuffer(make_config(storage={"device": missing}))


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_allocation_that_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(allocation, "available_host_bytes", lambda: 4 * GIB)
    monkeypatch.setattr(allocation, "Columns", lambda *_: pytest.fail("allocated"))
    buffer = ReplayBuffer(make_config(10**9, storage={"device": device}))

    with pytest.raises(TooLargeError, match=r"needs 14\.9 GiB of host memory, 4\.0 GiB are available; lower config\.buffer_size"):
        buffer.add(plain_columns(5))

    assert buffer.store.schema is None
    assert (buffer.num_eps, buffer.counts().episodes_refused) == (0, 1)


def test_allocation_that_did_not_fit_works_once_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = ReplayBuffer(make_config(1000))
    with monkeypatch.context() as patch:
        patch.setattr(allocation, "available_host_bytes", lambda: 1000)
        with pytest.raises(TooLargeError):
            buffer.add(plain_columns(5))

    assert buffer.add(plain_columns(5)) == 1


def test_allocation_out_of_cuda_memory_goes_to_the_cpu_with_a_log_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **options: object) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr("touchline_server.store.cuda_columns.CudaColumns", full)
    episode = traced_columns(0, 5)

    with caplog.at_level(logging.WARNING, "touchline_server"):
        ring = allocate_columns(Schema.of(episode), capacity=10, configured_device="cuda")

    assert ring.where == "cpu"
    assert "cuda is too small for 0.0 GiB of columns: they go to host memory" in caplog.text
    ring.write(0, episode)
    assert np.array_equal(as_array(ring.tensors["stamp"])[:5], episode["stamp"])


def test_allocation_that_the_system_refuses_is_too_large_and_leaves_the_schema_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the check before does not see it coming: an address space limit, no overcommit."""
    monkeypatch.setattr(allocation, "available_host_bytes", lambda: 2**62)
    buffer = ReplayBuffer(make_config(2**48))

    with pytest.raises(TooLargeError, match=r"needs 4194304\.0 GiB of host memory"):
        buffer.add(plain_columns(5))

    assert buffer.store.schema is None


def on_disk(folder: Path, capacity: int = 1000) -> ReplayBuffer:
    return ReplayBuffer(make_config(capacity, storage={"device": "disk", "scratch_dir": str(folder)}))


def test_disk_columns_hold_the_values_in_preallocated_files(tmp_path: Path) -> None:
    buffer = on_disk(tmp_path)

    buffer.add(many_dtypes(9, seed=3) | {"obs.deep.state": np.ones((9, 1, 4)), "action": np.ones((9, 2)), "reward": np.ones(9)})

    ring = buffer.store.columns
    assert ring is not None
    assert ring.where == "disk"
    for spec in ring.schema.columns:
        if spec.row_bytes:
            status = ring.files[spec.name].stat()
            assert status.st_size == 1000 * spec.row_bytes
            assert status.st_blocks * 512 >= status.st_size
    episode = read_episode(buffer.store, buffer.store.entries()[0])
    assert episode["int64"].tobytes() == many_dtypes(9, seed=3)["int64"].tobytes()


def test_disk_batches_are_those_of_memory(tmp_path: Path) -> None:
    memory, disk = ReplayBuffer(make_config(50)), on_disk(tmp_path, 50)
    for number in range(9):
        for buffer in (memory, disk):
            buffer.add_episode(traced(number, 5 + number))

    one, other = (buffer.sample(seed=1) for buffer in (memory, disk))

    assert torch.equal(one.extra["stamp"], other.extra["stamp"])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(list(one)[1:], list(other)[1:], strict=True))
    assert torch.equal(one.obs["image"], other.obs["image"])


def test_disk_clear_frees_the_files_and_leaves_older_views_as_they_were(tmp_path: Path) -> None:
    buffer = on_disk(tmp_path)
    buffer.add_episode(traced(1, 10))
    view = buffer.as_torchrl()[:]["stamp"]

    buffer.clear()

    assert list(tmp_path.rglob("*.memmap")) == []
    buffer.add_episode(traced(2, 10))
    assert view.tolist() == traced_columns(1, 10)["stamp"].tolist()


def test_disk_folder_that_cannot_be_created_is_refused_immediately(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageFailedError, match=r"storage\.scratch_dir: .*/file/folder: Not a directory; choose a writable folder"):
        on_disk(tmp_path / "file" / "folder")


def test_disk_folder_of_another_buffer_is_refused_until_it_is_released(tmp_path: Path) -> None:
    first = on_disk(tmp_path)
    first.add_episode(traced(1, 10))

    with pytest.raises(StoreInUseError, match=r"storage\.scratch_dir: .* is in use by another buffer"):
        on_disk(tmp_path)

    assert np.array_equal(next(first.episodes()).columns["stamp"], traced_columns(1, 10)["stamp"])
    first.close()
    second = on_disk(tmp_path)
    second.add_episode(traced(2, 10))
    assert np.array_equal(next(first.episodes()).columns["stamp"], traced_columns(1, 10)["stamp"])  # it has files of its own
    del second
    gc.collect()  # a buffer that is garbage releases its folder, too
    assert on_disk(tmp_path).counts().episodes_stored == 0


def test_full_disk_is_an_error_and_a_smaller_schema_works_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = on_disk(tmp_path)

    reserve = os.posix_fallocate

    def full(descriptor: int, offset: int, size: int) -> None:
        if size >= 8000:
            raise OSError(28, "No space left on device")
        reserve(descriptor, offset, size)

    monkeypatch.setattr(columns.os, "posix_fallocate", full)

    with pytest.raises(TooLargeError, match="no space for obs, 8000 bytes: No space left on device"):
        buffer.add(plain_columns(5))

    assert buffer.store.schema is None
    assert list(tmp_path.rglob("*.memmap")) == []
    assert buffer.add(plain_columns(5, obs=np.ones((5, 1), np.float16))) == 1
    assert buffer.sample().obs.dtype == torch.float16


def test_disk_name_with_slashes_stays_in_the_folder(tmp_path: Path) -> None:
    buffer = on_disk(tmp_path / "inner")
    outside = str(tmp_path / "outside")

    buffer.add(plain_columns(5, **{outside: np.zeros(5), "a/b": np.zeros(5)}))

    assert [path for path in tmp_path.rglob("*.memmap") if (tmp_path / "inner") not in path.parents] == []
    assert set(buffer.sample().extra) == {outside, "a/b"}


def test_write_that_fails_on_the_first_episode_leaves_the_schema_open(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = ReplayBuffer(make_config())
    with monkeypatch.context() as patch:
        patch.setattr(columns.Columns, "write", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            buffer.add(plain_columns(5))

    buffer.add_episode(Episode(traced_columns(0, 6)))

    assert set(buffer.sample().obs) == {"image", "state"}
