"""From drawn rows to a batch: which rows of which column go where, by the row convention, and the one gather.

Row conventions (a slice has rows 0..H):
    incoming (TD-MPC2): row t holds the observation that the action in row t led to, so action, reward and done are those of rows 1..H.
    outgoing: row t holds the observation and the action taken from it, so they are those of rows 0..H-1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from touchline_protos.codec import BatchLayout, Piece, TensorSpec
from touchline_protos.types.batch import PROVENANCE
from touchline_server.selectors.draw import Draw
from touchline_server.store.columns import Columns
from touchline_server.store.episode_store import Selection
from touchline_server.store.output_tensor import OutputTensor
from touchline_server.store.schema import Schema

if TYPE_CHECKING:
    import torch

    from touchline_server.store.transfer import DeviceToHostGather

TRANSITION_COLUMNS = ("action", "reward", "done")
"""Columns of a transition: [H, B, ...] in a batch, where those of a step are [H+1, B, ...]."""

MAX_AT_ONCE_BYTES = 1 << 21
MAX_AT_ONCE_ROWS = 1 << 14
"""Batches of together so many bytes and rows are gathered in an event loop: a millisecond or two. A thread's hand-over to the loop
costs as much as a small batch, and the two then share the interpreter lock."""

MAX_IDLE_TRANSFERS = 4
"""Ways to host memory that are kept for the next batches of a CUDA store; each has a batch of device memory."""


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """How batches of one schema, batch size and horizon are gathered, and how they look on the wire. Immutable, so thread-safe."""

    parts: tuple[OutputTensor, ...]
    layout: BatchLayout
    steps: int
    """Of a slice: horizon + 1."""
    _idle: WeakKeyDictionary[Columns, deque[DeviceToHostGather]] = field(default_factory=WeakKeyDictionary, repr=False, compare=False)
    """Kept as long as the columns are: they hold on to their memory."""

    @classmethod
    def of(cls, schema: Schema, *, batch_size: int, horizon: int, incoming: bool) -> GatherPlan:
        """Plans batches of ``batch_size`` slices of ``horizon`` + 1 rows."""
        transition = slice(1, None) if incoming else slice(None, -1)
        parts, specs = [], []
        stored = {spec.name: spec for spec in schema.columns}
        # Within a group in the schema's order, which is that of episodes and of TorchRL's samples too.
        for name in sorted(dict.fromkeys((*stored, "done")), key=_group_order):
            inner = stored[name].shape if name in stored else ()
            dtype = stored[name].dtype if name in stored else np.dtype("<f4")
            if name == "task":
                rows, shape = slice(0, 1), _shape(batch_size)
            elif name in TRANSITION_COLUMNS:
                rows, shape = transition, _shape(horizon, batch_size, *(inner if name == "action" else (1,)))
            else:
                rows, shape = slice(None), _shape(horizon + 1, batch_size, *inner)
            gathered = (len(range(horizon + 1)[rows]), batch_size, *inner)
            parts.append(OutputTensor(name, rows, inner, gathered, shape, name in stored))
            specs.append(TensorSpec(name, dtype, shape))
        return cls(tuple(parts), BatchLayout(specs, batch_size), horizon + 1)

    def fits_inline(self, columns: Columns, *, batches: int = 1) -> bool:
        """Returns whether an event loop may gather so many batches by itself: they are small, and neither on a disk nor on a device."""
        rows = batches * self.layout.batch_size * self.steps
        return columns.in_host_memory and rows <= MAX_AT_ONCE_ROWS and batches * self.layout.body_bytes <= MAX_AT_ONCE_BYTES

    def fill(self, selection: Selection, out: Mapping[str, np.ndarray]) -> None:
        """Gathers a whole batch into host arrays, by the names and shapes of ``layout.specs``. Every element is written."""
        self.fill_all([selection], [out])

    def fill_all(self, selections: Sequence[Selection], outs: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Does what :meth:`fill` does for batches that were selected together; a CUDA device is waited for once."""
        if selections[0].columns.on_cuda:
            for body, out in zip(self.host_bodies(selections), outs, strict=True):
                for name, array in self.layout.body_views(body).items():
                    out[name][...] = array
            return
        for selection, out in zip(selections, outs, strict=True):
            self._fill_from_host(selection, out)

    def _fill_from_host(self, selection: Selection, out: Mapping[str, np.ndarray]) -> None:
        columns, rows = selection.columns, selection.rows
        for part in self.parts:
            target = out[part.name]
            if part.stored:
                columns.gather(part.name, rows[part.rows], target.reshape(part.gathered_shape))
            else:
                target.fill(0)
        fill_provenance(selection.draw, out)

    def fill_piece(self, selection: Selection, piece: Piece, out: Sequence[np.ndarray]) -> None:
        """Gathers one piece of a big batch, segment by segment, into host arrays of shape [rows, *inner]."""
        parts = {part.name: part for part in self.parts}
        for (name, first, last, _), target in zip(piece.segments, out, strict=True):
            part = parts.get(name)
            if part is None:
                field = name.removeprefix("provenance.")
                target[...] = getattr(selection.draw, field)[first:last]
            elif part.stored:
                rows = np.ascontiguousarray(selection.rows[part.rows]).reshape(-1)[first:last]
                selection.columns.gather(name, rows, target.reshape(len(rows), *part.inner_shape))
            else:
                target.fill(0)

    def piece_filler(self, selection: Selection) -> Callable[[Piece, Sequence[np.ndarray]], None]:
        """Returns what fills the pieces of one batch, as :meth:`fill_piece` does; from a CUDA device it all comes in one transfer."""
        if not selection.columns.on_cuda:
            return partial(self.fill_piece, selection)
        body = self.layout.body_views(self.host_bodies([selection])[0])

        def copy(piece: Piece, out: Sequence[np.ndarray]) -> None:
            for (name, first, last, _), target in zip(piece.segments, out, strict=True):
                target[...] = body[name].reshape(-1, *target.shape[1:])[first:last]

        return copy

    def host_bodies(self, selections: Sequence[Selection]) -> list[np.ndarray]:
        """Gathers batches on the columns' device and moves each to the host in one transfer.

        Returns:
            Their bodies, [layout.body_bytes] uint8: fresh, pinned where the columns are on a CUDA device.
        """
        import torch

        pinned = selections[0].columns.on_cuda
        memory = torch.empty((len(selections), self.layout.body_bytes), dtype=torch.uint8, pin_memory=pinned)
        bodies = list(memory)
        self.fill_pinned(selections, bodies)
        return [body.numpy() for body in bodies]

    def fill_pinned(self, selections: Sequence[Selection], bodies: Sequence[torch.Tensor]) -> None:
        """Gathers batches, selected together, on the columns' device and straight into host memory.

        Args:
            selections: one or more.
            bodies: [layout.body_bytes] uint8 each: pinned where the columns are on a CUDA device. Filled.
        """
        with self._transfer(selections[0]) as transfer:
            transfer.run(selections, bodies)
        for selection, body in zip(selections, bodies, strict=True):
            fill_provenance(selection.draw, self.layout.body_views(body.numpy()))

    def gather_tensors(self, selection: Selection) -> dict[str, torch.Tensor]:
        """Returns a batch as fresh tensors on the columns' device, in the order of the current stream; provenance on the host."""
        import torch

        from touchline_server.store.transfer import rows_on_device

        columns = selection.columns
        steps, size = selection.rows.shape
        rows = rows_on_device(selection.rows, columns.device)
        indices: dict[tuple[int, int], torch.Tensor] = {}
        stored, tensors = columns.tensors, {}
        for part in self.parts:
            if part.stored:
                first, last, _ = part.rows.indices(steps)
                index = indices.get((first, last))
                if index is None:
                    index = indices[first, last] = rows[first * size : last * size]
                tensors[part.name] = stored[part.name].index_select(0, index).view(part.out_shape)
            else:
                tensors[part.name] = torch.zeros(part.out_shape, device=columns.device)
        columns.note_reads()
        for name, _ in PROVENANCE:
            tensors[f"provenance.{name}"] = torch.from_numpy(getattr(selection.draw, name))
        return tensors

    @contextmanager
    def _transfer(self, selection: Selection) -> Iterator[DeviceToHostGather]:
        """Lends a way to host memory, for one thread at a time."""
        idle = self._idle.setdefault(selection.columns, deque(maxlen=MAX_IDLE_TRANSFERS))
        try:
            transfer = idle.pop()
        except IndexError:
            from touchline_server.store.transfer import DeviceToHostGather

            transfer = DeviceToHostGather(self.parts, self.layout, selection.columns, selection.rows.shape)
        yield transfer
        # Not after an error, which may have left work under way in it.
        idle.append(transfer)


def fill_provenance(draw: Draw, out: Mapping[str, np.ndarray]) -> None:
    """Copies where each slice came from into host arrays, [B] each."""
    for name, _ in PROVENANCE:
        out[f"provenance.{name}"][...] = getattr(draw, name)


def _group_order(name: str) -> int:
    group = name.partition(".")[0]
    named = ("obs", "action", "reward", "done", "task")
    return named.index(group) if group in named else len(named)


def _shape(*sizes: int) -> tuple[int, ...]:
    return sizes
