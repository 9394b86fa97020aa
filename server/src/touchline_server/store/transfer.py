"""Moves batches of a CUDA store to host memory: the rows go to the device, and the batch comes back in one copy."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakKeyDictionary

import numpy as np
import torch

from touchline_protos.codec import BatchLayout
from touchline_server.store.columns import Columns
from touchline_server.store.output_tensor import OutputTensor
from touchline_server.store.pinned_draw import DrawnSlices

MAX_IDLE = 4
"""Idle gathers kept for each batch size; each has a batch of device memory."""

MAX_SIZES = 64
"""Batch sizes for which idle gathers are kept; the one used longest ago gives way."""


def rows_on_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns rows, int64 of any shape, as a flat tensor on a device, in the order of the current stream.

    They go through pinned memory, so the host does not wait. A copy from pageable memory waits for everything that the stream was given.
    """
    staging = torch.empty(rows.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    staging.numpy()[...] = rows
    return staging.to(device, non_blocking=True).view(-1)


class DeviceToHostGather:
    """Gathers batches of one shape on their device and copies each to host memory. One thread at a time.

    It has a stream and a block of device memory of its own, which every batch uses again, so that no batch allocates any.

    Args:
        outputs: the tensors of a batch.
        layout: the layout of a batch's body.
        columns: what is read. On the CPU all of this is plain copies.
        rows_shape: [H+1, B]: shape of a batch's rows.
    """

    def __init__(self, outputs: Sequence[OutputTensor], layout: BatchLayout, columns: Columns, rows_shape: tuple[int, ...]) -> None:
        device = columns.device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with self._on_stream():
            self._rows = torch.empty(math.prod(rows_shape), dtype=torch.int64, device=device)
            self._block = torch.zeros(layout.body_bytes, dtype=torch.uint8, device=device)
        self._gathers = []
        tensors = columns.tensors
        # The layout's offsets go on after the columns, with those of the provenance.
        for output, spec, offset in zip(outputs, layout.specs, layout.offsets, strict=False):
            column = tensors.get(output.name)
            if column is None or not spec.size_bytes:
                continue  # the block is zero there already
            target = self._block[offset : offset + spec.size_bytes].view(column.dtype)
            rows = self._rows.view(rows_shape)[output.steps].view(-1)
            self._gathers.append((column, rows, target.view(len(rows), *output.inner_shape)))

    def run(self, batches: Sequence[DrawnSlices], bodies: Sequence[torch.Tensor]) -> None:
        """Gathers batches. When it returns they are on the host, and the columns are no longer read.

        Args:
            batches: pinned, drawn from these columns.
            bodies: [body_bytes] uint8 each, on the host, pinned. Filled except for the provenance.
        """
        pinned = torch.empty((len(batches), len(self._rows)), dtype=torch.int64, pin_memory=self._stream is not None)
        staging = pinned.numpy()
        try:
            with self._on_stream():
                batches[0].columns.follow_writes()
                for number, (slices, body) in enumerate(zip(batches, bodies, strict=True)):
                    staging[number] = slices.rows.reshape(-1)
                    # One stream does all of this in order: rows and block are not overwritten before the batch ahead has been copied.
                    self._rows.copy_(pinned[number], non_blocking=True)
                    for column, rows, target in self._gathers:
                        torch.index_select(column, 0, rows, out=target)
                    body.copy_(self._block, non_blocking=True)
        finally:
            if self._stream is not None:
                self._stream.synchronize()

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()


class DeviceGathers:
    """A pool of device-to-host gathers, which keeps idle ones for the next batches as long as their columns live. Thread-safe.

    Args:
        outputs: the tensors of a batch.
    """

    def __init__(self, outputs: Sequence[OutputTensor]) -> None:
        self._outputs = outputs
        self._idle: WeakKeyDictionary[Columns, OrderedDict[int, deque[DeviceToHostGather]]] = WeakKeyDictionary()

    @contextmanager
    def borrow(self, layout: BatchLayout, slices: DrawnSlices) -> Iterator[DeviceToHostGather]:
        """Returns a gather for batches like ``slices``, for the calling thread only."""
        sizes = self._idle.setdefault(slices.columns, OrderedDict())
        idle = sizes.setdefault(len(slices), deque(maxlen=MAX_IDLE))
        if len(sizes) > MAX_SIZES:
            sizes.popitem(last=False)
        try:
            gather = idle.pop()
        except IndexError:
            gather = DeviceToHostGather(self._outputs, layout, slices.columns, slices.rows.shape)
        yield gather
        # Not in a finally block: after an error, work may still be in progress in it.
        idle.append(gather)
