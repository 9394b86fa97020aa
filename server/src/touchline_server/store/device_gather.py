"""Batches gathered on the columns' device: one launch a batch, into fresh device memory or through it into host memory."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch

from touchline_protos.codec import BatchLayout
from touchline_protos.gather import OutputSpec, PartSpec
from touchline_protos.gather.row_gather import RowGather, rows_to_device
from touchline_protos.gather.specs import BODY_ALIGNMENT
from touchline_server.errors import InvalidArgumentError
from touchline_server.store.columns import Columns
from touchline_server.store.output_tensor import OutputTensor
from touchline_server.store.pinned_draw import DrawnPart
from touchline_server.store.tensors import check_out, torch_dtype

MAX_IDLE = 4
"""Idle gathers to the host kept for each batch size; each has a batch of device memory."""

MAX_SIZES = 64
"""Batch sizes and splits for which gathers are kept; the one used longest ago gives way."""


def make_gather(
    outputs: Sequence[OutputTensor], layout: BatchLayout, ranges: Sequence[tuple[Columns, int, int]], *, owns: bool = True
) -> RowGather:
    """Returns what gathers batches of a layout on the columns' one device.

    Args:
        outputs: the tensors of a batch.
        layout: the layout of a batch.
        ranges: columns of each table, and the slices that come from them: the first one, and the one after the last.
        owns: whether the gather keeps the columns' memory; without it there must be a kernel, and the columns must outlive every gather.
    """
    # The layout's offsets go on after the columns, with those of the provenance.
    specs = [
        OutputSpec(output.name, output.row_bytes, output.steps.start or 0, output.step_count, offset)
        for output, offset in zip(outputs, layout.offsets, strict=False)
    ]
    parts = []
    for columns, begin, end in ranges:
        tensors = columns.tensors
        found = tensors if owns else {name: tensor.data_ptr() for name, tensor in tensors.items()}
        parts.append(PartSpec(found, columns.capacity, begin, end))
    return RowGather(specs, parts, batch_size=layout.batch_size, device=ranges[0][0].device, kernel=None if owns else True)


def row_numbers(parts: Sequence[DrawnPart], batch_size: int, *, batches: int) -> np.ndarray:
    """Returns what :meth:`RowGather.run` takes of the first batches, [batches, 2, B] int64."""
    numbers = np.empty((batches, 2, batch_size), np.int64)
    for part in parts:
        numbers[:, 0, part.begin : part.end] = part.first[:batches]
        numbers[:, 1, part.begin : part.end] = part.steps - 1 if part.last is None else part.last[:batches]
    return numbers


class BodyViews:
    """The tensors of a batch's columns as views of its body, made with one call each: the host's share of a small batch.

    Args:
        layout: the layout of a batch.
    """

    def __init__(self, layout: BatchLayout) -> None:
        self._size_bytes = -(-layout.body_bytes // BODY_ALIGNMENT) * BODY_ALIGNMENT
        self._views = []
        for spec, offset in zip(layout.columns, layout.offsets, strict=False):
            strides = torch.empty(spec.shape, device="meta").stride()
            self._views.append((spec.name, torch_dtype(spec.dtype), spec.shape, strides, offset // spec.dtype.itemsize))

    def empty(self, device: torch.device) -> torch.Tensor:
        """Returns memory for a body, uint8, as large as every dtype allows it to be viewed."""
        return torch.empty(self._size_bytes, dtype=torch.uint8, device=device)

    def of(self, body: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the tensors by name, in memory from :meth:`empty`."""
        typed = {dtype: body.view(dtype) for dtype in {view[1] for view in self._views}}
        return {name: typed[dtype].as_strided(shape, strides, at) for name, dtype, shape, strides, at in self._views}


class DeviceToHostGather:
    """Gathers batches of one shape on their device and copies each to host memory. One thread at a time.

    It has a stream and a block of device memory of its own, which every batch uses again, so that no batch takes more than its row numbers.

    Args:
        gather: gathers the batches.
        layout: the layout of a batch's body.
    """

    def __init__(self, gather: RowGather, layout: BatchLayout) -> None:
        self._gather = gather
        self._device = gather.device
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with self._on_stream():
            self._block = torch.zeros(layout.body_bytes, dtype=torch.uint8, device=self._device)

    def run(self, part: DrawnPart, bodies: Sequence[torch.Tensor]) -> None:
        """Gathers batches. When it returns they are on the host, and the columns are no longer read.

        Args:
            part: all slices of the batches; pinned.
            bodies: [body_bytes] uint8 for each of the first batches, on the host, pinned. Filled except for the provenance.
        """
        numbers = row_numbers([part], part.end, batches=len(bodies))
        try:
            with self._on_stream():
                part.columns.follow_writes()
                rows = rows_to_device(numbers, self._device)
                for batch_rows, body in zip(rows, bodies, strict=True):
                    # One stream does all of this in order: the block is not overwritten before the batch ahead has been copied.
                    self._gather.run(batch_rows, self._block)
                    body.copy_(self._block, non_blocking=True)
        finally:
            if self._stream is not None:
                self._stream.synchronize()

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()


class DeviceGathers:
    """The gathers of batches of one schema and horizon, kept for the next batches as long as their columns live. Thread-safe.

    Args:
        outputs: the tensors of a batch.
    """

    def __init__(self, outputs: Sequence[OutputTensor]) -> None:
        self._outputs = outputs
        self._kept: WeakKeyDictionary[Columns, OrderedDict[Hashable, _Kept]] = WeakKeyDictionary()

    def tensors(
        self, parts: Sequence[DrawnPart], layout: BatchLayout, out: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Gathers the first batch in the order of the current stream: after the writes to the columns so far, and before the next one.

        Args:
            parts: what each table provides of it, all on one device.
            layout: the layout of the batch.
            out: tensors of an earlier batch, see :func:`body_of`, which are filled; None takes fresh memory.

        Returns:
            The tensors of the columns by name, which share one memory.

        Raises:
            InvalidArgumentError: ``out`` is not a batch of this layout on this device.
        """
        kept = self._find(parts, layout)
        gather = kept.gather
        body = kept.views.empty(gather.device) if out is None else body_of(out, layout, gather.device)
        tables = {id(part.columns): part.columns for part in parts}.values()
        for columns in tables:
            columns.follow_writes()
        gather.run(rows_to_device(row_numbers(parts, layout.batch_size, batches=1)[0], gather.device), body)
        for columns in tables:
            columns.note_reads()
        return kept.views.of(body) if out is None else {spec.name: out[spec.name] for spec in layout.columns}

    def to_host(self, part: DrawnPart, layout: BatchLayout, bodies: Sequence[torch.Tensor]) -> None:
        """Gathers batches of one table into host memory; see :meth:`DeviceToHostGather.run`."""
        kept = self._find([part], layout)
        try:
            to_host = kept.idle.pop()
        except IndexError:
            to_host = DeviceToHostGather(kept.gather, layout)
        to_host.run(part, bodies)
        # Not in a finally block: after an error, work may still be in progress in it.
        kept.idle.append(to_host)

    def _find(self, parts: Sequence[DrawnPart], layout: BatchLayout) -> _Kept:
        sizes = self._kept.setdefault(parts[0].columns, OrderedDict())
        key = layout.body_bytes, *((id(part.columns), part.begin, part.end) for part in parts)
        kept = sizes.get(key)
        if kept is None:
            if len(sizes) >= MAX_SIZES:
                parts[0].columns.settle()  # a gather in progress reads memory of the one that gives way
                sizes.popitem(last=False)
            kept = sizes[key] = _Kept(layout, make_gather(self._outputs, layout, [(part.columns, part.begin, part.end) for part in parts]))
            for part in parts[1:]:
                # It must not keep another table's columns from being freed, either.
                finalize(part.columns, sizes.pop, key, None)
        return kept


class _Kept:
    """A gather of one batch size and split, and the idle ones that copy its batches to the host."""

    def __init__(self, layout: BatchLayout, gather: RowGather) -> None:
        self.gather = gather
        self.views = BodyViews(layout)
        self.idle: deque[DeviceToHostGather] = deque(maxlen=MAX_IDLE)


def body_of(tensors: Mapping[str, torch.Tensor], layout: BatchLayout, device: torch.device) -> torch.Tensor:
    """Returns the body that the tensors of an earlier batch lie in, [body_bytes or more] uint8.

    Raises:
        InvalidArgumentError: they are not those of a batch of this layout on this device, gathered by :class:`DeviceGathers`.
    """
    memory = tensors[layout.columns[0].name].untyped_storage() if layout.columns[0].name in tensors else None
    body = torch.empty(0, dtype=torch.uint8, device=device)
    if memory is not None and memory.device == device and len(memory) >= layout.body_bytes:
        body.set_(memory)
    for spec, offset in zip(layout.columns, layout.offsets, strict=False):
        tensor = check_out(spec, tensors.get(spec.name), device)
        if spec.size_bytes and (not len(body) or tensor.data_ptr() != body.data_ptr() + offset):
            raise InvalidArgumentError(f"out: {spec.name} does not lie in one memory with the others, expected a batch of sample()")
    return body
