"""Gathers batches on a device: by the kernel in one launch, or tensor by tensor without Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from touchline_protos.gather.specs import BODY_ALIGNMENT, OutputSpec, PartSpec, Tables, body_bytes, check_specs, make_tables, word_of
from touchline_protos.log_lines import get_logger

logger = get_logger(__name__)

WORD_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Element types by which ``index_select`` copies rows, whatever they hold: the wider, the faster."""


@cache
def why_no_kernel(device_type: str) -> str:
    """Returns why a device of this type (``cuda``, ``cpu``) has no kernel; empty if it has one."""
    if device_type != "cuda":
        return f"the batches are on a device of type {device_type}, and the kernel is for CUDA"
    return "" if find_spec("triton") is not None else "Triton is not installed"


def rows_to_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns row numbers, int64 of any shape, as a tensor on a device, in the order of the current stream.

    They go through pinned memory in one copy, so the host does not wait. A copy from pageable memory waits for everything that the stream
    was given.
    """
    staging = torch.empty(rows.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    staging.numpy()[...] = rows
    return staging.to(device, non_blocking=True)


class RowGather:
    """Gathers batches of one shape from the same columns, each into a body. Thread-safe.

    Args:
        outputs: the tensors of a batch.
        parts: what each table provides of a batch: ranges of its slices, which do not overlap. Slices of no part are not written.
        batch_size: B, slices of a batch.
        device: the device that gathers, and that bodies and rows are on.
        kernel: whether Triton's kernel copies, instead of ``index_select``. None: if the device is CUDA, and Triton is installed and can
            compile it. On the CPU it runs in Triton's interpreter, if ``TRITON_INTERPRET=1`` was set when Triton was imported.

    Raises:
        ValueError: a spec is out of range, a column is not contiguous, or one without a kernel is a bare address.
    """

    def __init__(
        self, outputs: Sequence[OutputSpec], parts: Sequence[PartSpec], *, batch_size: int, device: torch.device, kernel: bool | None = None
    ) -> None:
        check_specs(outputs, parts, batch_size)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.batch_size = batch_size
        self.body_bytes = body_bytes(outputs, batch_size)
        """Bytes of a body that may be written: up to the end of its last tensor."""
        self._outputs = tuple(outputs)
        self._parts = tuple(parts)
        self.why_no_kernel = why_no_kernel(device.type) if kernel is None else "" if kernel else "it is turned off"
        """Why the kernel is not used; empty if it is."""
        self._must = kernel is True
        self._cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self._launch: Launcher | None = None
        if self.why_no_kernel:
            self._check_has_tensors()
        else:
            tables = self._tables()
            self._entries, self._tiles = torch.from_numpy(tables.entries).to(device), torch.from_numpy(tables.tiles).to(device)
            self._shapes = tables.shape_codes, len(tables.shapes)
            self._launch = Launcher(find_gather_kernel, len(tables.tiles), device)
        if device.type == "cuda":
            # Gathers may run on any stream, and the tables must be there.
            torch.cuda.current_stream(device).synchronize()

    def run(self, rows: torch.Tensor, body: torch.Tensor, *, cursor: torch.Tensor | None = None) -> None:
        """Gathers a batch in the order of the current stream.

        With the kernel it allocates nothing, waits for nothing, and reads everything that changes from the device: so it can be captured
        in a CUDA graph, if it ran once before. A replay then reads the rows that are in ``rows`` by then.

        Step t of slice b is the row ``first + min(first_step + t, last)``, wrapped once at the part's capacity. Rows outside of the columns
        are clipped, so wrong row numbers give a wrong batch and nothing worse.

        Args:
            rows: [2, B] int64, contiguous, on the device: ``first``, the row of each slice's step 0, below 2 x capacity; and ``last``, the
                largest number that is added to it. With ``cursor`` [batches, 2, B].
            body: [body_bytes or more] uint8, contiguous, on the device, aligned to 16 bytes. Filled, except between the tensors.
            cursor: [1] int64, on the device: the batch of ``rows`` that is gathered.
        """
        if len(body) < self.body_bytes or body.data_ptr() % BODY_ALIGNMENT:
            raise ValueError(f"body: {len(body)} bytes at {body.data_ptr():#x}, expected {self.body_bytes} or more, aligned to 16 bytes")
        if rows.shape[-2:] != (2, self.batch_size) or not rows.is_contiguous():
            raise ValueError(f"rows: shape {tuple(rows.shape)}, expected (2, {self.batch_size}) after the number of batches, contiguous")
        if self._launch is not None:
            if not len(self._tiles):
                return
            try:
                self._launch(self._entries, self._tiles, rows, self._cursor if cursor is None else cursor, body, *self._shapes)
                return
            except Exception as error:
                if self._launch.launched or self._must:
                    raise
                # Compiling may need more than Triton itself: a C compiler, a newer driver.
                self._fall_back(error)
        self._select(rows if cursor is None else rows.index_select(0, cursor)[0], body)

    def _fall_back(self, error: Exception) -> None:
        self.why_no_kernel = f"Triton cannot compile it here: {type(error).__name__}: {error}"
        self._check_has_tensors()
        self._launch = None
        logger.warning("gather: one launch a tensor instead of one a batch, because %s", self.why_no_kernel)

    def _tables(self) -> Tables:
        addresses = [{name: _address(name, column) for name, column in part.columns.items()} for part in self._parts]
        return make_tables(self._outputs, self._parts, batch_size=self.batch_size, addresses=addresses)

    def _check_has_tensors(self) -> None:
        for part in self._parts:
            for name, column in part.columns.items():
                if not isinstance(column, torch.Tensor):
                    raise ValueError(f"{name}: an address, expected a tensor without the kernel ({self.why_no_kernel})")

    def _select(self, rows: torch.Tensor, body: torch.Tensor) -> None:
        """Gathers without the kernel, tensor by tensor. It waits for the device if columns are on the host."""
        for part in self._parts:
            first, last = rows[:, part.begin : part.end]
            for output in self._outputs:
                if not output.row_bytes or part.begin == part.end:
                    continue
                size = output.steps * self.batch_size * output.row_bytes
                target = body[output.offset : output.offset + size].view(output.steps, self.batch_size, output.row_bytes)
                target = target[:, part.begin : part.end]
                column = part.columns.get(output.name)
                if column is None:
                    target.zero_()
                else:
                    steps = torch.arange(output.first_step, output.first_step + output.steps, device=rows.device)
                    _select_rows(column, _wrap(first, last, steps, part.capacity), target)


class Launcher:
    """Launches one kernel on one device, with arguments of the same types and alignments each time. The first launch compiles it.

    Args:
        find: function that returns the kernel, called once: before the first launch, which is when Triton is imported.
        programs: number of programs.
        device: the device; on the CPU the kernel must be interpreted.
    """

    def __init__(self, find: Callable[[], Any], programs: int, device: torch.device) -> None:
        self._find = find
        self._grid = (programs, 1, 1)
        self._device = device
        self._compiled: Callable[..., object] | None = None
        self.launched = False
        """Whether a launch has succeeded."""

    def __call__(self, *arguments: Any) -> None:
        """Launches the kernel on the current stream."""
        if self._device.type == "cuda" and torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):  # Triton launches on the current device
                self._start(arguments)
        else:
            self._start(arguments)

    def _start(self, arguments: tuple[Any, ...]) -> None:
        if self._compiled is not None:
            self._compiled(*arguments)
            return
        compiled = self._find()[self._grid](*arguments)
        self.launched = True
        if compiled is not None:  # not in the interpreter
            self._compiled = precompiled(compiled, self._grid)


def find_gather_kernel() -> Any:
    """Returns the kernel that gathers."""
    from touchline_protos.gather.kernel import gather_rows

    return gather_rows


def precompiled(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., object] | None:
    """Returns what launches a compiled kernel again without looking at its arguments, which takes Triton longer than launching it.

    None for a Triton whose compiled kernels take other arguments than the function. The arguments must be of the same types, and addresses
    as aligned as those it was compiled for.
    """
    import triton

    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    return compiled[grid] if version >= (3, 3) else None


def _address(name: str, column: torch.Tensor | int) -> int:
    if isinstance(column, int):
        return column
    if not column.is_contiguous():
        raise ValueError(f"{name}: strides {column.stride()}, expected a contiguous column")
    return column.data_ptr()


def _wrap(first: torch.Tensor, last: torch.Tensor, steps: torch.Tensor, capacity: int) -> torch.Tensor:
    """Returns the physical rows [T, slices] of these steps, as the kernel computes them."""
    rows = first + torch.minimum(steps[:, None], last)
    return torch.where(rows >= capacity, rows - capacity, rows).clamp_(0, capacity - 1)


def _select_rows(column: torch.Tensor, rows: torch.Tensor, target: torch.Tensor) -> None:
    """Copies a column's rows [T, slices] into ``target``, [T, slices, row_bytes] uint8, which need not be contiguous."""
    word = min(word_of(column.data_ptr(), target.data_ptr(), target.shape[2], target.stride(0), target.stride(1)), 8)
    words = column.view(len(column), -1).view(torch.uint8).view(WORD_TYPES[word])
    flat = rows.reshape(-1).to(column.device)
    found = words.index_select(0, flat).view(*rows.shape, -1)
    target.view(WORD_TYPES[word]).copy_(found)
