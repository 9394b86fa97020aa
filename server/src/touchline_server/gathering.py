"""From drawn rows to a batch: which rows of which column go where, by the row convention, and the one gather.

Row conventions (a slice has rows 0..H):
    incoming (TD-MPC2): row t holds the observation that the action in row t led to, so action, reward and done are those of rows 1..H.
    outgoing: row t holds the observation and the action taken from it, so they are those of rows 0..H-1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from touchline_protos.batch import PROVENANCE
from touchline_protos.codec import BatchLayout, Piece, TensorSpec
from touchline_server.columns import Columns
from touchline_server.sampling import Draw
from touchline_server.schema import Schema
from touchline_server.store import Selection

TRANSITION_COLUMNS = ("action", "reward", "done")
"""Columns of a transition: [H, B, ...] in a batch, where those of a step are [H+1, B, ...]."""


class Part(NamedTuple):
    """One tensor of a batch and the rows of the slice that it takes."""

    name: str
    rows: slice
    inner_shape: tuple[int, ...]
    """Of one row as stored."""
    out_shape: tuple[int, ...]
    """In the batch."""
    stored: bool
    """False: no such column, the batch has zeros."""


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """How batches of one schema, batch size and horizon are gathered, and how they look on the wire. Immutable, so thread-safe."""

    parts: tuple[Part, ...]
    layout: BatchLayout

    @classmethod
    def of(cls, schema: Schema, *, batch_size: int, horizon: int, incoming: bool) -> GatherPlan:
        """Plans batches of ``batch_size`` slices of ``horizon`` + 1 rows."""
        transition = slice(1, None) if incoming else slice(None, -1)
        parts, specs = [], []
        stored = {spec.name: spec for spec in schema.columns}
        for name in sorted(stored.keys() | {"done"}, key=_batch_order):
            inner = stored[name].shape if name in stored else ()
            dtype = stored[name].dtype if name in stored else np.dtype("<f4")
            if name == "task":
                rows, shape = slice(0, 1), _shape(batch_size)
            elif name in TRANSITION_COLUMNS:
                rows, shape = transition, _shape(horizon, batch_size, *(inner if name == "action" else (1,)))
            else:
                rows, shape = slice(None), _shape(horizon + 1, batch_size, *inner)
            parts.append(Part(name, rows, inner, shape, name in stored))
            specs.append(TensorSpec(name, dtype, shape))
        return cls(tuple(parts), BatchLayout(specs, batch_size))

    def fill(self, selection: Selection, out: Mapping[str, np.ndarray]) -> None:
        """Gathers a whole batch into host arrays, by the names and shapes of ``layout.specs``. Every element is written."""
        if selection.columns.device.type == "cuda":
            for name, array in self.layout.body_views(self.host_body(selection)).items():
                out[name][...] = array
            return
        for part in self.parts:
            target = out[part.name]
            if part.stored:
                rows = selection.rows[part.rows]
                selection.columns.gather(part.name, rows, target.reshape(*rows.shape, *part.inner_shape))
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
        if selection.columns.device.type != "cuda":
            return partial(self.fill_piece, selection)
        body = self.layout.body_views(self.host_body(selection))

        def copy(piece: Piece, out: Sequence[np.ndarray]) -> None:
            for (name, first, last, _), target in zip(piece.segments, out, strict=True):
                target[...] = body[name].reshape(-1, *target.shape[1:])[first:last]

        return copy

    def host_body(self, selection: Selection) -> np.ndarray:
        """Gathers a batch on the columns' device and moves it to the host in one transfer.

        Returns:
            The batch's body, [layout.body_bytes] uint8: fresh, pinned where the columns are on a CUDA device.
        """
        device = selection.columns.device
        block = torch.empty(self.layout.body_bytes, dtype=torch.uint8, device=device)
        rows = torch.from_numpy(selection.rows).to(device)
        for part, offset in zip(self.parts, self.layout.offsets, strict=False):
            size = math.prod(part.out_shape)
            column = selection.columns.tensors.get(part.name)
            if column is None:
                block[offset : offset + 4 * size].zero_()
            elif size:
                target = block[offset : offset + size * column.element_size()].view(column.dtype)
                index = rows[part.rows].reshape(-1)
                torch.index_select(column, 0, index, out=target.view(len(index), *part.inner_shape))
        host = torch.empty(self.layout.body_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        body = host.copy_(block).numpy()
        fill_provenance(selection.draw, self.layout.body_views(body))
        return body

    def gather_tensors(self, selection: Selection) -> dict[str, torch.Tensor]:
        """Returns a batch as fresh tensors on the columns' device, provenance on the host."""
        columns: Columns = selection.columns
        rows = torch.from_numpy(selection.rows).to(columns.device)
        tensors = {}
        for part in self.parts:
            if part.stored:
                tensors[part.name] = columns.gather_tensor(part.name, rows[part.rows]).view(part.out_shape)
            else:
                tensors[part.name] = torch.zeros(part.out_shape, device=columns.device)
        for name, _ in PROVENANCE:
            tensors[f"provenance.{name}"] = torch.from_numpy(getattr(selection.draw, name))
        return tensors


def fill_provenance(draw: Draw, out: Mapping[str, np.ndarray]) -> None:
    """Copies where each slice came from into host arrays, [B] each."""
    for name, _ in PROVENANCE:
        out[f"provenance.{name}"][...] = getattr(draw, name)


def _batch_order(name: str) -> tuple[int, str]:
    group = name.partition(".")[0]
    named = ("obs", "action", "reward", "done", "task")
    return (named.index(group) if group in named else len(named)), name


def _shape(*sizes: int) -> tuple[int, ...]:
    return sizes
