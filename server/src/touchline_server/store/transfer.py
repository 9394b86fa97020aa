"""Batches of a CUDA store on their way to host memory: the rows go to the device, the batch comes back in one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from touchline_protos.codec import BatchLayout
from touchline_server.store.columns import Columns

if TYPE_CHECKING:
    from touchline_server.store.episode_store import Selection
    from touchline_server.store.output_tensor import OutputTensor


def rows_on_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns rows, int64 of any shape, as a flat tensor on a device, in the order of the current stream.

    The host does not wait, as it would for a copy from pageable memory: that one also waits for all that the stream was given before.
    """
    staging = torch.empty(rows.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    staging.numpy()[...] = rows
    return staging.to(device, non_blocking=True).view(-1)


class DeviceToHostGather:
    """Gathers batches of one shape on their device and copies each to host memory. One thread at a time.

    Has a stream and a block of device memory of its own, used again for each batch, so that nothing is allocated for one.

    Args:
        parts: the batches' tensors.
        layout: of a batch's body.
        columns: to read. They may be on the CPU, where all of this is plain copies.
        rows_shape: of a batch's rows.
    """

    def __init__(self, parts: Sequence[OutputTensor], layout: BatchLayout, columns: Columns, rows_shape: tuple[int, ...]) -> None:
        device = columns.device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with self._in_order():
            self._rows = torch.empty(math.prod(rows_shape), dtype=torch.int64, device=device)
            self._block = torch.zeros(layout.body_bytes, dtype=torch.uint8, device=device)
        self._gathers = []
        tensors = columns.tensors
        for part, offset in zip(parts, layout.offsets, strict=False):
            column = tensors.get(part.name)
            if column is None or not math.prod(part.out_shape):
                continue  # the block's zeros are what the batch has
            target = self._block[offset : offset + math.prod(part.out_shape) * column.element_size()].view(column.dtype)
            rows = self._rows.view(rows_shape)[part.rows].view(-1)
            self._gathers.append((column, rows, target.view(len(rows), *part.inner_shape)))

    def run(self, selections: Sequence[Selection], bodies: Sequence[torch.Tensor]) -> None:
        """Gathers batches; when it returns they are there, and the columns are no longer read.

        Args:
            selections: pinned, of these columns.
            bodies: [body_bytes] uint8 each on the host, pinned. Filled, but for the provenance.
        """
        pinned = torch.empty((len(selections), len(self._rows)), dtype=torch.int64, pin_memory=self._stream is not None)
        staging = pinned.numpy()
        try:
            with self._in_order():
                for number, (selection, body) in enumerate(zip(selections, bodies, strict=True)):
                    staging[number] = selection.rows.reshape(-1)
                    self._rows.copy_(pinned[number], non_blocking=True)
                    for column, rows, target in self._gathers:
                        torch.index_select(column, 0, rows, out=target)
                    body.copy_(self._block, non_blocking=True)
        finally:
            if self._stream is not None:
                self._stream.synchronize()

    def _in_order(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()
