"""Offers and slots of row numbers from a server that lies: refused, or read within the columns."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from touchline._learner.host_gather import HostGatherer
from touchline._learner.row_offer import MAX_BATCH_BYTES, RowOffer, read_slot
from touchline_protos.codec import BatchLayout, BodyLayout, TensorSpec
from touchline_protos.shm.ring_control import RingError
from touchline_protos.shm.row_slots import RowSlots
from touchline_protos.v1 import replay_pb2 as pb

H, B, ROWS = 2, 3, 8
FLOAT = np.dtype("<f4")
TENSORS = (("obs", (H + 1, B, 2), 0), ("action", (H, B, 1), 1), ("reward", (H, B, 1), 1), ("done", (H, B, 1), 1), ("task", (B,), 0))
SIZES = tuple(ROWS * 4 * (2 if name == "obs" else 1) for name, _, _ in TENSORS)


def make_setup() -> pb.RingSetup:
    """An honest offer of two tables, one of which has no column for ``done``."""
    layout = BatchLayout([TensorSpec(name, FLOAT, shape) for name, shape, _ in TENSORS], B, ("valid",))
    tensors = [pb.GatheredTensor(first_step=first, steps=shape[0] if len(shape) > 1 else 1) for _, shape, first in TENSORS]
    offsets = np.cumsum([0, *SIZES]).tolist()
    one = pb.SharedTable(memory=pb.COLUMN_MEMORY_HOST, size_bytes=offsets.pop(), rows=ROWS, offset_bytes=offsets)
    other = pb.SharedTable()
    other.CopyFrom(one)
    other.offset_bytes[3] = -1
    return pb.RingSetup(layout=pb.Batch.FromString(layout.header()), rows=pb.RowsSetup(tables=[one, other], tensors=tensors, steps=H + 1))


def offer_of(setup: pb.RingSetup) -> RowOffer:
    return RowOffer.of(setup, BodyLayout(setup.layout.SerializeToString()))


def mapped(offer: RowOffer) -> RowOffer:
    """The offer with memory in which each float is its own position."""
    memory = []
    for size in offer.host_sizes:
        memory.append(mmap.mmap(-1, size))
        np.frombuffer(memory[-1], FLOAT)[:] = np.arange(size // 4) + 1000 * len(memory)
    return offer.with_memory(memory)


def make_slot(offer: RowOffer, rows: Any, slices: Any) -> memoryview:
    memory = bytearray(offer.slots.size_bytes)
    offer.slots.rows(memory)[...] = rows
    offer.slots.slices(memory)[...] = slices
    memory[offer.slots.provenance_offset :] = np.arange(offer.slots.provenance_bytes).astype(np.uint8).tobytes()
    return memoryview(memory)


def test_batch_is_gathered_from_the_rows_wrapped_and_repeated() -> None:
    offer = mapped(offer_of(make_setup()))
    slot = make_slot(offer, [[0, 7, 5], [2, 2, 1]], [2, 1])

    batch = HostGatherer(offer).start(read_slot(offer, slot), {7: "seven"}).finish()

    rows = np.array([[0, 7, 5], [1, 0, 6], [2, 1, 6]])
    base = np.array([1000, 1000, 2000])
    assert np.array_equal(batch.obs[..., 0], base + 2 * rows)
    assert np.array_equal(batch.action[..., 0], base + 2 * ROWS + rows[1:])
    assert np.array_equal(batch.done[..., 0], np.where(base == 1000, base + 4 * ROWS + rows[1:], 0))
    assert np.array_equal(batch.task, base + 5 * ROWS + rows[0])
    assert batch.episode_id.tobytes() == bytes(slot[offer.slots.provenance_offset :][: 8 * B])
    assert batch.actor_names == {7: "seven"} and batch.valid is not None


NUMBERS = st.one_of(st.integers(-2, 12), st.sampled_from([2**31, 2**62, 2**63 - 1, -(2**63), 1 << 20]))


@given(
    rows=st.lists(st.lists(NUMBERS, min_size=B, max_size=B), min_size=2, max_size=2),
    slices=st.lists(NUMBERS, min_size=2, max_size=2),
)
def test_rows_that_do_not_exist_are_refused(rows: list[list[int]], slices: list[int]) -> None:
    offer = mapped(offer_of(make_setup()))
    exist = all(0 <= first < ROWS for first in rows[0]) and all(0 <= last <= H for last in rows[1])
    slot = make_slot(offer, rows, slices)

    if exist and min(slices) >= 0 and sum(slices) == B:
        HostGatherer(offer).start(read_slot(offer, slot), {})
    else:
        with pytest.raises(RingError, match="malformed"):
            read_slot(offer, slot)


def lie(setup: pb.RingSetup, where: str, value: int) -> None:
    table, tensor = setup.rows.tables[1], setup.rows.tensors[1]
    if where == "tables":
        del setup.rows.tables[max(value, 0) % 3 :]
    elif where == "tensors":
        del setup.rows.tensors[max(value, 0) % 6 :]
    elif where == "offset":
        table.offset_bytes[1] = value
    elif where == "offsets":
        table.offset_bytes.append(value)
    elif where == "memory":
        table.memory = value % 4  # type: ignore[assignment]
    elif where == "handle":
        table.cuda_handle = bytes(value % 65)
    elif where == "steps":
        setup.rows.steps = value
    elif where == "tensor steps":
        tensor.steps = value
    elif where == "first step":
        tensor.first_step = value
    else:
        setattr(table, where, value)


@pytest.mark.parametrize(("size", "fits"), [(0, False), (63, False), (64, True), (65, False)])
def test_handle_of_another_size_than_those_of_cuda_is_refused(size: int, fits: bool) -> None:
    setup = make_setup()
    setup.rows.tables[1].memory = pb.COLUMN_MEMORY_CUDA
    setup.rows.tables[1].cuda_handle = bytes(size)

    if fits:
        assert offer_of(setup).tables[1].cuda_handle == bytes(64)
    else:
        with pytest.raises(RingError, match=f"a CUDA handle of {size} bytes, expected 64"):
            offer_of(setup)


@given(
    where=st.sampled_from(
        ["tables", "tensors", "offset", "offsets", "memory", "handle", "steps", "tensor steps", "first step", "rows", "size_bytes"]
    ),
    value=NUMBERS,
)
def test_offer_that_lies_is_refused_or_stays_within_its_memory(where: str, value: int) -> None:
    setup = make_setup()
    lie(setup, where, value)
    try:
        offer = offer_of(setup)
    except RingError:
        return
    assert 8 * offer.steps * B <= MAX_BATCH_BYTES  # what the row numbers of a gather take
    for table in offer.tables:
        assert len(table.cuda_handle) in (0, 64)
        for output, offset in zip(offer.outputs, table.offsets, strict=True):
            assert offset == -1 or 0 <= offset <= table.size_bytes - table.rows * output.row_bytes
    for output in offer.outputs:
        assert 0 <= output.offset_bytes <= offer.provenance_offset - output.steps * B * output.row_bytes
        assert output.first_step + output.steps <= offer.steps
    assert offer.provenance_offset + offer.slots.provenance_bytes == offer.layout.size_bytes


def test_offer_of_batches_too_large_to_hold_is_refused() -> None:
    setup = make_setup()
    setup.layout.columns[0].tensor.shape[2] = 1 << 40
    with pytest.raises(RingError, match="expected at most"):
        offer_of(setup)


def test_slot_has_its_parts_one_after_another() -> None:
    slots = RowSlots(5, 3, 100)
    memory = bytearray(2 * slots.size_bytes)
    slots.rows(memory, slots.size_bytes)[...] = 1
    slots.slices(memory, slots.size_bytes)[...] = 2

    assert not any(memory[: slots.size_bytes])
    assert np.count_nonzero(np.frombuffer(memory, np.uint8)) == 13
    assert slots.provenance_offset % 64 == 0 and slots.size_bytes == slots.provenance_offset + 100


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"offset": 66}, "action: byte 66 is no multiple"),
        ({"rows": 2**62}, "where each column is"),
        ({"size_bytes": 0}, "a table without memory"),
        ({"rows": 2**40, "steps": 2**30}, "row numbers of 25769803776 bytes a batch"),
        ({"memory": pb.COLUMN_MEMORY_CUDA, "handle": 63}, "a CUDA handle of 63 bytes, expected 64"),
    ],
)
def test_columns_that_numpy_would_copy_or_cannot_make_are_refused(changes: dict[str, int], fault: str) -> None:
    setup = make_setup()
    if "offset" not in changes:
        setup.rows.tables[1].offset_bytes[:] = [-1] * len(TENSORS)  # as columns without bytes
    for where, value in changes.items():
        lie(setup, where, value)

    with pytest.raises(RingError, match=fault):
        offer_of(setup)
