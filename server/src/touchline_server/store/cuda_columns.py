"""Columns in CUDA memory, and the order of their reads and writes on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from touchline_server.store.columns import Columns
from touchline_server.store.cuda_ipc import export, tensors_in
from touchline_server.store.device_order import DeviceOrder
from touchline_server.store.gather_threads import GatherThreads
from touchline_server.store.schema import Schema
from touchline_server.store.shared_columns import place_columns
from touchline_server.store.staging import StagedWriter, runs_of
from touchline_server.store.tensors import as_tensor, torch_dtype

OutOfMemoryError = torch.cuda.OutOfMemoryError
"""Error of an allocation for which the device has no memory left."""


class CudaColumns(Columns):
    """The columns as tensors on a CUDA device."""

    on_cuda = True

    def __init__(self, schema: Schema, capacity: int, device: str, *, share: bool = False, threads: GatherThreads | None = None) -> None:
        """Allocates. Use :func:`~touchline_server.store.allocation.allocate_columns`."""
        self.schema = schema
        self.row_bytes = schema.row_bytes
        self.capacity = capacity
        self.files = {}
        self.shared = None
        if share:
            places, size_bytes = place_columns(schema, capacity)
            block = torch.empty(size_bytes, dtype=torch.uint8, device=device)
            self._tensors = tensors_in(block, schema, capacity)
            self.shared = export(block, places)
        else:
            self._tensors = {
                spec.name: torch.empty((capacity, *spec.shape), dtype=torch_dtype(spec.dtype), device=device) for spec in schema.columns
            }
        self._device = next(iter(self._tensors.values())).device
        self._bytes = {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in self._tensors.items()}
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._writes = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        for tensor in self._tensors.values():
            # If the columns go while a write is queued, their memory is not given to another tensor before it is done.
            tensor.record_stream(self._writes)
        self._order = DeviceOrder(_CudaDevice(self._device), self._writes)
        copies = _CudaCopies(self._bytes, {spec.name: spec.row_bytes for spec in schema.columns}, self._writes)
        self._writer = StagedWriter(copies, schema.columns, capacity, threads=threads)
        self.settle()

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Column by dotted name, for work on the current stream: that follows what was written so far."""
        self.follow_writes()
        return self._tensors

    @property
    def device(self) -> torch.device:
        """The device."""
        return self._device

    @property
    def where(self) -> str:
        """The device's name: ``cuda:N``."""
        return str(self._device)

    @property
    def in_host_memory(self) -> bool:
        """False."""
        return False

    def takes(self, device: torch.device | None) -> bool:
        """See :meth:`Columns.takes`: arrays, and tensors on the columns' own device."""
        return device is None or device == self._device

    def write(self, first_row: int, episode: Mapping[str, Any]) -> None:
        """Queues what :meth:`Columns.write` does, after the recorded gathers and before later ones.

        The host waits for it only if other processes read the columns, because their gathers cannot wait for an event of this one.
        Tensors on the device are copied after the work of the current stream so far and before its later work, so it may then overwrite
        them.
        """
        if isinstance(next(iter(episode.values())), torch.Tensor):
            with self._order.writing(with_current=True), torch.cuda.stream(self._writes):
                self._copy_tensors(first_row, episode)
        else:
            with self._order.writing():
                self._writer.write(first_row, episode)
        if self.shared is not None:
            self._order.wait_written()

    def note_reads(self) -> None:
        """See :meth:`Columns.note_reads`."""
        self._order.note_reads()

    def note_foreign_reads(self) -> None:
        """See :meth:`Columns.note_foreign_reads`."""
        self._order.note_foreign_reads()

    def follow_writes(self) -> None:
        """See :meth:`Columns.follow_writes`."""
        self._order.follow_writes()

    def wait_written(self) -> None:
        """See :meth:`Columns.wait_written`."""
        self._order.wait_written()

    def settle(self) -> None:
        """See :meth:`Columns.settle`."""
        torch.cuda.synchronize(self._device)

    def gather(self, name: str, rows: np.ndarray, out: np.ndarray) -> None:
        """See :meth:`Columns.gather`."""
        self.follow_writes()
        column, index = self._tensors[name], torch.from_numpy(rows).to(self._device)
        as_tensor(out).copy_(column.index_select(0, index.reshape(-1)).view(*index.shape, *column.shape[1:]))

    def _copy_tensors(self, first_row: int, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            for row, at, count in runs_of(first_row, len(tensor), self.capacity):
                self._tensors[name][row : row + count].copy_(tensor[at : at + count], non_blocking=True)
            tensor.record_stream(self._writes)

    def _column_bytes(self, name: str) -> int:
        return self._tensors[name].nbytes

    def _copy_run(self, name: str, begin: int, out: np.ndarray) -> None:
        # A stream of their own, so that copies to the host wait for writes and for each other, not for callers' work on the device.
        with torch.cuda.stream(self._copies):
            self.follow_writes()
            # The target is pageable memory, so the host waits for the copy: nothing is read once this returns.
            torch.from_numpy(out).copy_(self._bytes[name][begin : begin + len(out)])


class _CudaDevice:
    """A CUDA device, as :class:`DeviceOrder` needs it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        return stream.record_event()

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def is_done(self, event: torch.cuda.Event) -> bool:
        return event.query()  # type: ignore[no-untyped-call]

    def synchronize(self, event: torch.cuda.Event | None = None) -> None:
        if event is None:
            torch.cuda.synchronize(self._device)
        else:
            event.synchronize()


class _CudaCopies:
    """Copies from pinned memory to columns, as :class:`StagedWriter` needs them.

    Args:
        columns: bytes of each column, [capacity * row_bytes] uint8.
        row_bytes: bytes of a row of each column.
        stream: the stream of the copies.
    """

    def __init__(self, columns: Mapping[str, torch.Tensor], row_bytes: Mapping[str, int], stream: torch.cuda.Stream) -> None:
        self._columns = columns
        self._row_bytes = row_bytes
        self._stream = stream

    def allocate(self, size_bytes: int) -> tuple[torch.Tensor, np.ndarray]:
        memory = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        return memory, memory.numpy()

    def copy(self, name: str, first_row: int, memory: torch.Tensor, begin: int, end: int) -> None:
        at = first_row * self._row_bytes[name]
        with torch.cuda.stream(self._stream):
            self._columns[name][at : at + end - begin].copy_(memory[begin:end], non_blocking=True)

    def record(self) -> torch.cuda.Event:
        return self._stream.record_event()

    def synchronize(self, event: torch.cuda.Event) -> None:
        event.synchronize()
