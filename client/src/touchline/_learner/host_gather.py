"""Gathers batches on the host, from columns that the server shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from touchline._learner.row_offer import OfferedTable, RowOffer, RowOutput, SlotRows
from touchline_protos import Batch
from touchline_protos.codec.buffer_pool import BufferPool
from touchline_protos.shm.ring_control import RingError
from touchline_protos.v1 import replay_pb2 as pb

MAX_IDLE_BYTES = 256 << 20
"""Size limit of the idle memory that is kept for later batches."""

MIN_STEP_BYTES = 1 << 12
"""Least size of one step of a part of a batch that is gathered straight into its place. Smaller ones are gathered together and copied."""


class HostMethod:
    """Gathering by this process's CPU. See :class:`~touchline._learner.row_offer.GatherMethod`."""

    name = "this process"

    def request(self) -> pb.RowsRequest:
        """Returns that columns in host memory can be gathered."""
        return pb.RowsRequest(host_columns=True)

    def gatherer(self, offer: RowOffer) -> HostGatherer:
        """Returns a gatherer.

        Raises:
            RingError: a table is on a CUDA device.
        """
        return HostGatherer(offer)


class HostGatherer:
    """Gathers batches into memory that is reused once no array of the batch is left. See :class:`~touchline._learner.row_offer.Gatherer`.

    Rows are clipped to the column, so no row number can make it read anything else.
    """

    ahead = 0
    """A gather is complete once it was started."""

    def __init__(self, offer: RowOffer) -> None:
        self._offer = offer.without_memory()
        self._pool = BufferPool(MAX_IDLE_BYTES)
        self._steps = np.arange(offer.steps, dtype=np.int64)[:, None]
        self._takes = [_takes(table, offer.outputs) for table in offer.tables]

    def start(self, rows: SlotRows, actor_names: dict[int, str]) -> _Gathered:
        """Gathers a batch."""
        offer = self._offer
        memory = self._pool.lease(offer.layout.size_bytes)
        arrays = offer.layout.arrays(memory)
        view = memoryview(memory).cast("B")
        view[offer.provenance_offset : offer.layout.size_bytes] = rows.provenance
        for table, begin, end in rows.parts:
            first, last = rows.rows[:, begin:end]
            index = first + np.minimum(self._steps, last)
            capacity = offer.tables[table].rows
            np.subtract(index, capacity, out=index, where=index >= capacity)
            for output, take in zip(offer.outputs, self._takes[table], strict=True):
                target = arrays[output.name]
                if output.steps == 1 and target.ndim == 1:
                    target = target[None]
                _gather(take, index[output.first_step : output.first_step + output.steps], target[:, begin:end])
        return _Gathered(offer.layout.assemble(arrays, actor_names, rows.origin))

    def close(self) -> None:
        """Releases the columns."""
        self._takes = []


class _Gathered:
    """A batch that is complete."""

    __slots__ = ("_batch",)

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def finish(self) -> Batch:
        """Returns the batch."""
        return self._batch


def _takes(table: OfferedTable, outputs: Sequence[RowOutput]) -> list[Any]:
    """Returns the ``take`` of each output's column; None for one without a column."""
    if table.cuda_handle:
        raise RingError("the columns are on a CUDA device, which the processor does not read")
    return [
        None if offset < 0 else np.ndarray((table.rows, *output.row_shape), output.dtype, table.memory, offset).take
        for output, offset in zip(outputs, table.offsets, strict=True)
    ]


def _gather(take: Any, rows: np.ndarray, target: np.ndarray) -> None:
    """Copies rows [T, n] of a column into ``target``, [T, n, ...], each of whose steps is contiguous."""
    if take is None:
        target[...] = 0
    elif target.flags.c_contiguous:
        take(rows, 0, target, "clip")
    elif target[0].nbytes < MIN_STEP_BYTES:
        target[...] = take(rows, 0, None, "clip")
    else:
        for step_rows, step_target in zip(rows, target, strict=True):
            take(step_rows, 0, step_target, "clip")
