"""A server's offer of row numbers: which columns there are to gather from, and which tensors that makes. Nothing in it is trusted."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple, Protocol

import numpy as np

from touchline_protos import Batch
from touchline_protos.codec import BodyLayout
from touchline_protos.shm.ring_control import RingError
from touchline_protos.shm.row_slots import RowSlots
from touchline_protos.types.batch import BatchOrigin
from touchline_protos.v1 import replay_pb2 as pb

MAX_TABLES = 32
"""Most tables of a mix whose rows a learner gathers."""

MAX_BATCH_BYTES = 4 << 30
"""Largest batch, as in messages."""

CUDA_HANDLE_BYTES = 64
"""Size of a CUDA IPC handle."""

MAX_ROWS = 1 << 48
"""Most rows of a table: with columns without bytes, its memory does not bound them."""

CUDA_HANDLE_BYTES = 64
"""Size of a handle of CUDA IPC."""

_PROVENANCE = "provenance."


class RowOutput(NamedTuple):
    """A tensor of a batch: rows of a column, [steps, B] in order."""

    name: str
    shape: tuple[int, ...]
    """Shape in the batch: [steps, B, ...], or [B] for one step."""
    dtype: np.dtype
    offset_bytes: int
    """Position in a body."""
    first_step: int
    """Step of each slice that is its first row."""
    steps: int
    """Number of steps."""
    row_bytes: int
    """Bytes of a row."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row, as the batch has it."""
        return self.shape[2:]


class OfferedTable(NamedTuple):
    """The columns of one table, in one memory."""

    rows: int
    """Number of rows, at which they wrap; 0 for a table without any, of which no slices come."""
    offsets: tuple[int, ...]
    """Position of each output's column in the memory; -1 if there is none, and the tensor is zeros."""
    size_bytes: int
    """Size of the memory."""
    cuda_device: str
    """UUID of the CUDA device that the memory is on; empty for host memory."""
    cuda_handle: bytes
    """CUDA IPC handle of the memory on that device."""
    memory: mmap.mmap | None = None
    """Host memory, mapped to be read only. Views of it keep it mapped."""

    @property
    def on_host(self) -> bool:
        """Whether it has columns in host memory."""
        return self.rows > 0 and not self.cuda_handle


@dataclass(frozen=True)
class RowOffer:
    """What a slot's row numbers mean. Checked: no row of a table lies outside its memory, and no output outside a body."""

    layout: BodyLayout
    outputs: tuple[RowOutput, ...]
    """The tensors that are gathered, in the order of a body."""
    tables: tuple[OfferedTable, ...]
    steps: int
    """H + 1: steps of a slice."""
    batch_size: int
    provenance_offset: int
    """Position of the provenance in a body, which ends with it."""
    slots: RowSlots

    @classmethod
    def of(cls, setup: pb.RingSetup, layout: BodyLayout) -> RowOffer:
        """Returns an offer whose memory is not mapped yet.

        Raises:
            RingError: it contradicts itself.
        """
        steps = setup.rows.steps
        columns = [tensor for tensor in layout.tensors if not tensor[0].startswith(_PROVENANCE)]
        starts = [tensor for tensor in layout.tensors if tensor[0] == f"{_PROVENANCE}start"]
        _expect(len(columns) == len(setup.rows.tensors) and len(starts) == 1, "it does not say how each column is gathered")
        _expect(layout.size_bytes <= MAX_BATCH_BYTES, f"a batch of {layout.size_bytes} bytes, expected at most {MAX_BATCH_BYTES}")
        (batch_size,) = starts[0][1] if len(starts[0][1]) == 1 else (0,)
        _expect(batch_size > 0, "batches without slices")
        index_bytes = 8 * steps * batch_size
        _expect(index_bytes <= MAX_BATCH_BYTES, f"row numbers of {index_bytes} bytes a batch, expected at most {MAX_BATCH_BYTES}")
        outputs = tuple(_output(*found, steps, batch_size) for found in zip(columns, setup.rows.tensors, strict=True))
        _expect(1 <= len(setup.rows.tables) <= MAX_TABLES, f"{len(setup.rows.tables)} tables, expected 1 to {MAX_TABLES}")
        tables = tuple(_table(table, outputs, steps) for table in setup.rows.tables)
        provenance = [tensor[3] for tensor in layout.tensors if tensor[0].startswith(_PROVENANCE)]
        at = min(provenance)
        _expect(all(tensor[3] <= at for tensor in columns), "its provenance does not follow the columns")
        slots = RowSlots(batch_size, len(tables), layout.size_bytes - at)
        return cls(layout, outputs, tables, steps, batch_size, at, slots)

    @property
    def host_sizes(self) -> list[int]:
        """Sizes of the memory on the host, in the order of the tables."""
        return [table.size_bytes for table in self.tables if table.on_host]

    def with_memory(self, memory: Sequence[mmap.mmap]) -> RowOffer:
        """Returns the offer with the memory of each table on the host."""
        left = iter(memory)
        return replace(self, tables=tuple(table._replace(memory=next(left)) if table.on_host else table for table in self.tables))

    def without_memory(self) -> RowOffer:
        """Returns the offer as it was before its memory was mapped."""
        return replace(self, tables=tuple(table._replace(memory=None) for table in self.tables))


class SlotRows(NamedTuple):
    """The rows of a batch. Checked: they are rows of their tables."""

    rows: np.ndarray
    """[2, B] int64, a copy: step t of a slice is row ``rows[0] + min(t, rows[1])``, less its table's number of rows if it is not less."""
    parts: tuple[tuple[int, int, int], ...]
    """Table, begin and end of each range of slices."""
    provenance: memoryview
    """The bytes of a body from ``provenance_offset`` on: a view of the slot, which the server may overwrite after the gather's end."""
    origin: BatchOrigin | None = None
    """Destination of the batch's priorities, for :meth:`BodyLayout.assemble`; None if they go by calls."""


class Gathering(Protocol):
    """A gather that was started."""

    def finish(self) -> Batch:
        """Waits until it has read the last row, and returns the batch."""


class Gatherer(Protocol):
    """Gathers batches from the columns of one offer. One thread at a time."""

    ahead: int
    """Gathers that are started beyond the one that is waited for."""

    def start(self, rows: SlotRows, actor_names: dict[int, str]) -> Gathering:
        """Starts a gather."""

    def close(self) -> None:
        """Waits for the gathers that were started, and releases the columns: memory that no one else uses is unmapped, also while this
        object lives on.
        """


class GatherMethod(Protocol):
    """A way to gather: what a learner says of itself, and what it makes of an offer."""

    @property
    def name(self) -> str:
        """What gathers, for the log."""

    def request(self) -> pb.RowsRequest:
        """Returns which columns can be gathered this way."""

    def gatherer(self, offer: RowOffer) -> Gatherer:
        """Returns what gathers from an offer's columns.

        Raises:
            RingError: that is not possible here; the text says why.
        """


def read_slot(offer: RowOffer, memory: memoryview) -> SlotRows:
    """Returns the rows in a slot, which the server may change at any time: what is returned was copied before it was checked.

    Raises:
        RingError: they are not rows of the tables.
    """
    rows = offer.slots.rows(memory).copy()
    counts = [offer.batch_size] if len(offer.tables) == 1 else offer.slots.slices(memory).tolist()
    _expect(min(counts) >= 0 and sum(counts) == offer.batch_size, f"{counts} slices of the tables, expected {offer.batch_size} in all")
    parts = tuple(_parts(counts))
    # As unsigned numbers, negative ones are too large.
    first, last = rows.view(np.uint64)
    for table, begin, end in parts:
        _expect(int(first[begin:end].max()) < offer.tables[table].rows, f"a row beyond the {offer.tables[table].rows} of its table")
    _expect(int(last.max()) < offer.steps, f"a slice of more than {offer.steps} steps")
    begin = offer.slots.provenance_offset
    return SlotRows(rows, parts, memory[begin : begin + offer.slots.provenance_bytes])


def _parts(slices: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    begin = 0
    for table, count in enumerate(slices):
        if count:
            yield table, begin, begin + count
            begin += count


def _output(tensor: tuple[str, tuple[int, ...], np.dtype, int], gathered: pb.GatheredTensor, steps: int, batch_size: int) -> RowOutput:
    name, shape, dtype, offset = tensor
    first, count = gathered.first_step, gathered.steps
    _expect(0 <= first < first + count <= steps, f"{name}: steps {first} to {first + count - 1}, expected some of 0 to {steps - 1}")
    expected = (count, batch_size) if len(shape) > 1 else (batch_size,)
    _expect(shape[:2] == expected and (len(shape) > 1 or count == 1), f"{name}: shape {shape}, expected {expected}")
    return RowOutput(name, shape, dtype, offset, first, count, prod(shape[2:]) * dtype.itemsize)


def _table(table: pb.SharedTable, outputs: Sequence[RowOutput], steps: int) -> OfferedTable:
    if table.memory == pb.COLUMN_MEMORY_UNSPECIFIED:
        return OfferedTable(0, (-1,) * len(outputs), 0, "", b"")
    on_cuda = table.memory == pb.COLUMN_MEMORY_CUDA
    _expect(on_cuda or table.memory == pb.COLUMN_MEMORY_HOST, f"memory {table.memory}, which this version does not know")
    handle_bytes = CUDA_HANDLE_BYTES if on_cuda else 0
    _expect(len(table.cuda_handle) == handle_bytes, f"a CUDA handle of {len(table.cuda_handle)} bytes, expected {handle_bytes}")
    _expect(steps <= table.rows <= MAX_ROWS and len(table.offset_bytes) == len(outputs), "it does not say where each column is")
    _expect(table.size_bytes > 0, "a table without memory")
    for output, offset in zip(outputs, table.offset_bytes, strict=True):
        within = offset >= 0 and offset + table.rows * output.row_bytes <= table.size_bytes
        _expect(offset == -1 or within, f"{output.name}: {table.rows} rows at byte {offset} of {table.size_bytes}")
        # Of a column that is not aligned, numpy would copy all rows to take some.
        _expect(offset == -1 or offset % output.dtype.itemsize == 0, f"{output.name}: byte {offset} is no multiple of an element's bytes")
    return OfferedTable(table.rows, tuple(table.offset_bytes), table.size_bytes, table.cuda_device, table.cuda_handle)


def _expect(condition: bool, fault: str) -> None:
    if not condition:
        raise RingError(f"the server's offer of rows is malformed: {fault}")
