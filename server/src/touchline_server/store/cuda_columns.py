"""Columns in CUDA memory, and the order of their reads and writes on the device."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch

from touchline_server.store.columns import Columns
from touchline_server.store.cuda_ipc import export, tensors_in
from touchline_server.store.schema import Schema
from touchline_server.store.shared_columns import place_columns
from touchline_server.store.tensors import as_array, as_tensor, torch_dtype

OutOfMemoryError = torch.cuda.OutOfMemoryError
"""Error of an allocation for which the device has no memory left."""


class CudaColumns(Columns):
    """The columns as tensors on a CUDA device."""

    on_cuda = True

    def __init__(self, schema: Schema, capacity: int, device: str, *, share: bool = False) -> None:
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
        self._order = _DeviceOrder(self._device)
        self.settle()

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Column by dotted name."""
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

    def write(self, first_row: int, episode: Mapping[str, np.ndarray]) -> None:
        """Writes as :meth:`Columns.write` does, after the recorded gathers, and waits until it is done."""
        with self._order.writing():
            super().write(first_row, episode)

    def note_reads(self) -> None:
        """See :meth:`Columns.note_reads`."""
        self._order.note_reads()

    def note_foreign_reads(self) -> None:
        """See :meth:`Columns.note_foreign_reads`."""
        self._order.note_foreign_reads()

    def settle(self) -> None:
        """See :meth:`Columns.settle`."""
        torch.cuda.synchronize(self._device)

    def gather(self, name: str, rows: np.ndarray, out: np.ndarray) -> None:
        """See :meth:`Columns.gather`."""
        column, index = self._tensors[name], torch.from_numpy(rows).to(self._device)
        as_tensor(out).copy_(column.index_select(0, index.reshape(-1)).view(*index.shape, *column.shape[1:]))

    def _write_rows(self, name: str, first_row: int, source: np.ndarray) -> None:
        staging = torch.empty(source.shape, dtype=torch_dtype(source.dtype), pin_memory=True)
        as_array(staging)[...] = source
        self._tensors[name][first_row : first_row + len(source)].copy_(staging, non_blocking=True)

    def _column_bytes(self, name: str) -> int:
        return self._tensors[name].nbytes

    def _copy_run(self, name: str, begin: int, out: np.ndarray) -> None:
        with self._order.copying():
            # The target is pageable memory, so the host waits for the copy: nothing is read once this returns.
            torch.from_numpy(out).copy_(self._tensors[name].reshape(-1).view(torch.uint8)[begin : begin + len(out)])


class _DeviceOrder:
    """Orders writes to columns on a CUDA device after earlier gathers and before later ones.

    Writes have a stream of their own. On the device it waits for the recorded gathers, and the writer waits only for that stream, not for
    other work on the device, such as a learner's training step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._reads: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._foreign = False

    def note_reads(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        with self._lock:
            event = self._reads.get(stream)
            if event is None:
                event = self._reads[stream] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)

    def note_foreign_reads(self) -> None:
        self._foreign = True

    def copying(self) -> AbstractContextManager[object]:
        """Makes copies to the host within the block wait only for each other, not for callers' work on the device."""
        return torch.cuda.stream(self._copies)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Queues the block's work after the recorded gathers, and waits for it."""
        with self._lock:
            reads, self._reads = self._reads, {}
            foreign, self._foreign = self._foreign, False
        if foreign:
            torch.cuda.synchronize(self._device)
        try:
            with torch.cuda.stream(self._stream):
                for event in reads.values():
                    self._stream.wait_event(event)
                yield
        finally:
            # Gathers on any stream may follow as soon as the episode is published, and the memory may be freed if it is not.
            self._stream.synchronize()
