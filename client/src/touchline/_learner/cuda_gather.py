"""Batches that the learner's own CUDA device gathers from the server's columns, ahead of their use.

For each batch one copy brings its row numbers and its provenance to the device, and one launch copies its rows; both go to a queue beside
the learner's work. A batch is handed out once its event has completed, so the learner's stream has nothing to wait for. All that calls
CUDA itself is in :mod:`~touchline._learner.cuda_device`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from touchline._learner.cuda_columns import DeviceColumns, table_columns
from touchline._learner.cuda_device import CudaDevice
from touchline._learner.fixed_bodies import FixedBodies
from touchline._learner.host_gather import HostGatherer
from touchline._learner.row_offer import Gathering, RowOffer, SlotRows
from touchline._rpc.dropping import when_dropped
from touchline_protos import Batch
from touchline_protos.gather import OutputSpec, PartSpec
from touchline_protos.log_lines import get_logger
from touchline_protos.shm.ring_control import RingError
from touchline_protos.types.batch import BatchOrigin
from touchline_protos.types.dtypes import BFLOAT16
from touchline_protos.v1 import replay_pb2 as pb

AHEAD = 2
"""Gathers that are queued before the batch that is waited for is handed out."""

MAX_GATHERS = 8
"""Gathers that are kept ready, one for each way in which a mix divides its slices."""

PROVENANCE_PREFIX = "provenance."

_ALIGNMENT = 16

logger = get_logger(__name__)


class CudaMethod:
    """Gathering by a CUDA device. See :class:`~touchline._learner.row_offer.GatherMethod`.

    Args:
        torch: the torch module.
        place: ``torch.device`` of type ``cuda``.
        host_fields: fields of provenance that stay in host memory.
        bodies: memory that batches are gathered into in turn; None gives each batch memory of its own.
        calls: class of the device's calls.
    """

    def __init__(
        self,
        torch: Any,
        place: Any,
        host_fields: tuple[str, ...] = (),
        *,
        bodies: FixedBodies | None = None,
        calls: Callable[[Any, Any], Any] = CudaDevice,
    ) -> None:
        self._torch = torch
        self._host_fields = host_fields
        self._bodies = bodies
        # CUDA starts with the first session, in the thread that takes batches: not before, since a process with CUDA cannot fork any more.
        self._make_device = partial(calls, torch, place)
        self._device: Any = None

    @property
    def name(self) -> str:
        """What gathers, for the log."""
        return str(self._device.device)

    def request(self) -> pb.RowsRequest:
        """Returns that columns in host memory can be gathered, and those of the device and its peers."""
        if self._device is None:
            self._device = self._make_device()
        return pb.RowsRequest(host_columns=True, cuda_devices=self._device.readable())

    def gatherer(self, offer: RowOffer) -> CudaGatherer:
        """Returns a gatherer.

        Raises:
            RingError: the device cannot read the columns, or cannot compile the kernel.
        """
        return CudaGatherer(self._torch, self._device, offer, host_fields=self._host_fields, bodies=self._bodies)


class CudaGatherer:
    """Gathers batches on a CUDA device. See :class:`~touchline._learner.row_offer.Gatherer`.

    While the server's host memory is not registered yet, the processor gathers, into batches in host memory.

    Row numbers are clipped to the columns by the kernel, and were checked before.
    """

    def __init__(
        self, torch: Any, device: Any, offer: RowOffer, *, host_fields: tuple[str, ...] = (), bodies: FixedBodies | None = None
    ) -> None:
        # Of two bodies the learner has one.
        self.ahead = AHEAD if bodies is None else 1
        self._bodies = bodies
        self._torch = torch
        self._device = device
        self._offer = offer.without_memory()
        self._body = _Body(torch, offer, host_fields)
        self._specs = [OutputSpec(o.name, o.row_bytes, o.first_step, o.steps, o.offset_bytes) for o in offer.outputs]
        self._gathers: dict[tuple[tuple[int, int, int], ...], Any] = {}
        self._staging = deque(self._body.staging(device.pinned(self._body.staged_bytes)) for _ in range(AHEAD + 1))
        self._check_kernel()
        self._columns = DeviceColumns(device, offer.tables)
        when_dropped(self, self._columns.close)
        self._host: HostGatherer | None = None
        if not self._columns.ready.is_set() and not any(table.cuda_handle for table in offer.tables):
            self._host = HostGatherer(offer)

    def start(self, rows: SlotRows, actor_names: dict[int, str]) -> Gathering:
        """Starts a gather."""
        if not self._columns.ready.is_set():
            if self._host is not None:
                return self._host.start(rows, actor_names)
            self._columns.wait()  # some columns are on a device, which the processor cannot read
        staged = self._staging.popleft()  # there is one for each gather that may be queued
        staged.provenance[:] = rows.provenance
        staged.rows[...] = rows.rows
        device, body = self._device, self._body
        block, index = self._fixed_block()
        with device.queue():
            if block is None:
                block = self._torch.empty(body.size_bytes, dtype=self._torch.uint8, device=device.device)
            body.staged_part(block).copy_(staged.memory, non_blocking=True)
            self._gather(rows.parts).run(body.rows(block), block)
            done = device.record()
        kept = bytes(rows.provenance) if body.host_fields else b""
        return _Queued(self, block, staged, done, kept, actor_names, rows.origin, index)

    def close(self) -> None:
        """Waits for the gathers that were started, and releases the columns."""
        self._columns.close()
        if self._bodies is not None:
            self._bodies.release()  # gathers that were started and are not taken any more
        self._gathers.clear()
        self._host = None

    def finish(self, queued: _Queued) -> Batch:
        """Waits for a gather, and returns its batch."""
        queued.done.synchronize()
        self._staging.append(queued.staged)
        self._device.hand_over(queued.block)
        if self._bodies is not None and queued.body is not None:
            self._bodies.release(queued.body)
        return self._body.batch(queued.block, queued.provenance, queued.actor_names, queued.origin)

    def _fixed_block(self) -> tuple[Any, int | None]:
        """Returns memory that the learner reuses and its number, with the queue behind the learner's work on it; or None for both."""
        index = self._bodies.claim() if self._bodies is not None and self._fits else None
        if index is None:
            return None, None
        assert self._bodies is not None
        block = self._bodies.blocks[index]
        self._device.follow(block)
        return block[: self._body.size_bytes], index

    def _gather(self, parts: tuple[tuple[int, int, int], ...]) -> Any:
        """Returns what gathers batches whose slices are divided so among the tables."""
        found = self._gathers.get(parts)
        if found is None:
            if len(self._gathers) >= MAX_GATHERS:
                del self._gathers[next(iter(self._gathers))]
            tables = self._offer.tables
            columns = [
                table_columns(table, address, self._offer.outputs, self._device)
                for table, address in zip(tables, self._columns.addresses, strict=True)
            ]
            found = self._make([PartSpec(columns[table], tables[table].rows, begin, end) for table, begin, end in parts])
            self._gathers[parts] = found
        return found

    def _make(self, parts: list[PartSpec]) -> Any:
        from touchline_protos.gather.row_gather import RowGather

        device = self._device
        return RowGather(self._specs, parts, batch_size=self._offer.batch_size, device=device.device, kernel=device.kernel)

    def _check_kernel(self) -> None:
        """Compiles and runs the kernel on one row of zeros, so that a machine that cannot do it is found out before anything is promised.

        Raises:
            RingError: it cannot.
        """
        torch, device, body = self._torch, self._device, self._body
        try:
            with device.queue():
                zeros = torch.zeros(max((spec.row_bytes for spec in self._specs), default=0) or 1, dtype=torch.uint8, device=device.device)
                columns = {spec.name: device.column(zeros.data_ptr(), 1, spec.row_bytes) for spec in self._specs if spec.row_bytes}
                block = torch.zeros(body.size_bytes, dtype=torch.uint8, device=device.device)
                gather = self._make([PartSpec(columns, 1, 0, self._offer.batch_size)])
                gather.run(body.rows(block), block)
            device.wait_for_all()
            self._fits = self._bodies is not None and self._bodies.fits(body.batch(block, b"", {}, None), block)
        except (RuntimeError, ValueError, ImportError) as error:
            raise RingError(f"the device cannot gather: {error}") from error


@dataclass(frozen=True, slots=True)
class _Queued:
    """A gather in the queue."""

    gatherer: CudaGatherer
    block: Any
    """Memory of the batch on the device."""
    staged: _Staged
    """Memory that the device reads until the gather is complete."""
    done: Any
    """Event that completes with the gather."""
    provenance: bytes
    """Copy of the provenance, if fields of it stay in host memory."""
    actor_names: dict[int, str]
    origin: BatchOrigin | None
    body: int | None
    """Number of the reused body that it writes; None if the block is the batch's own."""

    def finish(self) -> Batch:
        """Waits until the last row is read, and returns the batch."""
        return self.gatherer.finish(self)


class _Staged(NamedTuple):
    """Pinned memory for what a gather needs from the host."""

    memory: Any
    """The whole as a tensor, [n] uint8."""
    provenance: memoryview
    rows: np.ndarray
    """[2, B] int64."""


class _Body:
    """Where a batch's tensors, and the row numbers that they are gathered by, lie in one block of memory on the device.

    The provenance is the end of a body. The row numbers follow it, so that one copy brings both.

    Args:
        torch: the torch module.
        offer: the server's offer.
        host_fields: fields of provenance that stay in host memory.
    """

    def __init__(self, torch: Any, offer: RowOffer, host_fields: tuple[str, ...]) -> None:
        self._torch = torch
        self._layout = offer.layout
        self._begin = offer.provenance_offset
        self._provenance_bytes = offer.layout.size_bytes - self._begin
        self._rows_begin = _padded(offer.layout.size_bytes)
        self._batch_size = offer.batch_size
        self.size_bytes = _padded(self._rows_begin + 2 * 8 * self._batch_size)
        """Size of the block."""
        self.staged_bytes = self.size_bytes - self._begin
        """Size of what comes from the host."""
        names = {f"{PROVENANCE_PREFIX}{name}" for name in host_fields}
        self.host_fields = [tensor for tensor in offer.layout.tensors if tensor[0] in names]
        """Tensors that stay in host memory."""
        self._views = [_view(torch, *tensor) for tensor in offer.layout.tensors if tensor[0] not in names]
        self._dtypes = {dtype for _, dtype, *_ in self._views}

    def staging(self, memory: Any) -> _Staged:
        """Returns the parts of pinned memory of :attr:`staged_bytes`."""
        array = memory.numpy()
        rows = array[self._rows_begin - self._begin :][: 2 * 8 * self._batch_size].view(np.int64)
        return _Staged(memory, memoryview(array)[: self._provenance_bytes], rows.reshape(2, self._batch_size))

    def staged_part(self, block: Any) -> Any:
        """Returns the part of a block that comes from the host."""
        return block[self._begin :]

    def rows(self, block: Any) -> Any:
        """Returns the row numbers in a block, [2, B] int64."""
        return block[self._rows_begin : self._rows_begin + 16 * self._batch_size].view(self._torch.int64).view(2, self._batch_size)

    def batch(self, block: Any, provenance: bytes, actor_names: dict[int, str], origin: BatchOrigin | None) -> Batch:
        """Returns the batch in a block."""
        as_strided = self._torch.as_strided
        typed = {dtype: block.view(dtype) for dtype in self._dtypes}
        arrays = {name: as_strided(typed[dtype], shape, strides, at) for name, dtype, shape, strides, at in self._views}
        for name, shape, host_dtype, at in self.host_fields:
            arrays[name] = np.frombuffer(provenance, host_dtype, prod(shape), at - self._begin).reshape(shape).copy()
        return self._layout.assemble(arrays, actor_names, origin)


_View = tuple[str, Any, tuple[int, ...], tuple[int, ...], int]


def _view(torch: Any, name: str, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> _View:
    """Returns name, torch's dtype, shape, strides and first element of a tensor of a body."""
    strides = [1] * len(shape)
    # Row-major: a stride counts elements, and is the product of the extents behind its axis.
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * shape[axis]
    torch_dtype = torch.bfloat16 if dtype == BFLOAT16 else getattr(torch, dtype.name)
    return name, torch_dtype, shape, tuple(strides), offset // dtype.itemsize


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
