"""Columns that a learner's process reads: where they lie, who may write them, and how long they live."""

from __future__ import annotations

import errno
import gc
import logging
import mmap
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from support.store_cases import make_config, many_dtypes, traced_columns
from touchline_protos.shm import sealed_memory
from touchline_server import Config, ReplayBuffer, TooLargeError
from touchline_server.store import allocation, cuda_device
from touchline_server.store.allocation import allocate_columns, with_sharing_decided
from touchline_server.store.columns import Columns
from touchline_server.store.schema import Schema
from touchline_server.store.shared_columns import SharedColumns, place_columns


def shared(rows: int, episode: Mapping[str, np.ndarray], **options: str) -> Columns:
    return allocate_columns(Schema.of(episode), capacity=rows, configured_device=options.pop("device", "cpu"), share=True, **options)


def mapped(offer: SharedColumns) -> np.ndarray:
    return np.frombuffer(mmap.mmap(offer.descriptor, offer.size_bytes, prot=mmap.PROT_READ), np.uint8)


def test_shared_columns_are_read_by_another_process_bit_by_bit_over_the_seam() -> None:
    episode = many_dtypes(7, seed=1)
    columns = shared(10, episode)
    columns.write(6, episode)
    offer = columns.shared
    assert offer is not None
    program = (
        "import sys, mmap\nfile, size, offset, length = map(int, sys.argv[1:])\n"
        "sys.stdout.buffer.write(mmap.mmap(file, size, prot=mmap.PROT_READ)[offset : offset + length])"
    )

    for name, place in offer.columns.items():
        command = [sys.executable, "-c", program, *map(str, (offer.descriptor, offer.size_bytes, place.offset_bytes, place.size_bytes))]
        seen = subprocess.run(command, pass_fds=[offer.descriptor], check=True, capture_output=True).stdout
        rows = [seen[at * place.row_bytes : (at + 1) * place.row_bytes] for at in range(10)]
        assert b"".join(rows[(6 + step) % 10] for step in range(7)) == episode[name].tobytes(), name


def test_shared_columns_have_disjoint_aligned_places_and_none_for_a_column_without_bytes() -> None:
    episode = {**many_dtypes(3, seed=2), "large": np.zeros((3, 4096), np.uint8)}

    places, size = place_columns(Schema.of(episode), 1000)

    assert set(places) == set(episode) - {"nothing"}
    spans = sorted((place.offset_bytes, place.offset_bytes + place.size_bytes) for place in places.values())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert spans[-1][1] == size
    assert places["large"].offset_bytes % (1 << 21) == 0
    for name, place in places.items():
        assert place.offset_bytes % 4096 == 0
        assert place.size_bytes == 1000 * place.row_bytes == 1000 * episode[name][0].nbytes


def test_shared_columns_are_writable_for_the_server_only() -> None:
    columns = shared(10, traced_columns(0, 4))
    assert columns.shared is not None

    with pytest.raises(PermissionError):
        mmap.mmap(columns.shared.descriptor, columns.shared.size_bytes)


def test_shared_columns_live_as_long_as_the_offer_and_no_longer() -> None:
    episode = traced_columns(3, 4)
    columns = shared(10, episode)
    columns.write(0, episode)
    offer = columns.shared
    assert offer is not None
    descriptor, place = offer.descriptor, offer.columns["reward"]
    inode = f" {os.fstat(descriptor).st_ino} "
    assert inode in Path("/proc/self/maps").read_text("utf-8")

    columns.release()
    assert columns.shared is None
    del columns
    gc.collect()
    memory = mapped(offer)
    assert memory[place.offset_bytes :][: 4 * place.row_bytes].tobytes() == episode["reward"].tobytes()

    del offer
    gc.collect()
    assert memory[place.offset_bytes :][: 4 * place.row_bytes].tobytes() == episode["reward"].tobytes()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)

    del memory
    gc.collect()
    assert inode not in Path("/proc/self/maps").read_text("utf-8")


def test_cleared_table_allocates_other_memory_than_what_a_learner_has_mapped() -> None:
    buffer = ReplayBuffer(make_config(20, storage={"device": "cpu", "share_columns": "on"}))
    buffer.add(traced_columns(1, 5))
    columns = buffer.store.columns
    assert columns is not None and columns.shared is not None
    offer, before = columns.shared, mapped(columns.shared).tobytes()

    buffer.clear()
    buffer.add(traced_columns(2, 5))

    again = buffer.store.columns
    assert again is not None and again.shared is not None
    assert os.fstat(again.shared.descriptor).st_ino != os.fstat(offer.descriptor).st_ino
    assert mapped(offer).tobytes() == before
    assert mapped(again.shared).tobytes() != before


def test_columns_are_shared_only_if_the_key_says_so() -> None:
    for share, expected in (("off", False), ("auto", False), ("on", True), ("writable", True)):
        buffer = ReplayBuffer(make_config(20, storage={"device": "cpu", "share_columns": share}))
        buffer.add(traced_columns(1, 5))
        assert buffer.store.columns is not None
        assert (buffer.store.columns.shared is not None) is expected, share


def test_columns_that_learners_may_write_are_writable_for_them_and_have_spare_rows_too() -> None:
    read_only, writable = (ReplayBuffer(make_config(20, storage={"device": "cpu", "share_columns": share})) for share in ("on", "writable"))
    for buffer in (read_only, writable):
        buffer.add(traced_columns(1, 5))
    assert writable.store.columns is not None and writable.store.columns.shared is not None
    offer = writable.store.columns.shared

    memory = np.frombuffer(mmap.mmap(offer.descriptor, offer.size_bytes), np.uint8)

    place = offer.columns["reward"]
    memory[place.offset_bytes :][: 5 * place.row_bytes] = 0
    assert not next(iter(writable.episodes())).columns["reward"].any()
    assert writable.store.physical_rows == read_only.store.physical_rows > 20


def test_columns_in_files_are_not_shared(tmp_path: object) -> None:
    columns = shared(10, traced_columns(0, 4), device="disk", scratch_dir=str(tmp_path))

    assert columns.files
    assert columns.shared is None


@pytest.mark.parametrize(("possible", "expected"), [(True, "on"), (False, "auto")])
def test_server_shares_by_itself_where_a_cuda_device_is_possible(monkeypatch: pytest.MonkeyPatch, possible: bool, expected: str) -> None:
    monkeypatch.setattr(cuda_device, "is_possible", lambda: possible)
    tables = {"own": {"share_columns": "auto", "horizon": 5}, "none": {"share_columns": "off"}, "plain": {"horizon": 2}}

    decided = with_sharing_decided(Config(tables=tables))
    refused = with_sharing_decided(Config(storage={"share_columns": "off"}, tables=tables))

    assert decided.storage.share_columns == expected
    assert [decided.for_table(name).storage.share_columns for name in tables] == [expected, "off", expected]
    assert [refused.for_table(name).storage.share_columns for name in tables] == [expected, "off", "off"]
    assert [decided.for_table(name).config.horizon for name in tables] == [5, 3, 2]


def test_columns_that_cannot_be_shared_are_private_with_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str, size_bytes: int) -> object:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(sealed_memory, "make_read_only", refuse)
    with caplog.at_level(logging.WARNING, "touchline_server"):
        columns = shared(10, traced_columns(0, 4))

    assert columns.shared is None
    assert "the columns cannot be shared with learners: Function not implemented" in caplog.text


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.ENOMEM])
def test_shared_columns_without_memory_for_them_are_too_large(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(name: str, size_bytes: int) -> object:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(sealed_memory, "make_read_only", refuse)

    with pytest.raises(TooLargeError, match="GiB of host memory"):
        shared(10, traced_columns(0, 4))


def test_shared_columns_are_refused_before_they_are_reserved_if_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "available_host_bytes", lambda: 1000)

    with pytest.raises(TooLargeError, match="GiB of host memory"):
        shared(10_000, traced_columns(0, 4))
