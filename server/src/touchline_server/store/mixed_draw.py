"""Batches that are mixed from several tables: each table's slices fill a range of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from touchline_protos.codec import BatchLayout, Piece
from touchline_server.store.batch_draw import BatchDraw
from touchline_server.store.gather import Body

if TYPE_CHECKING:
    import torch


class MixedDraw:
    """Batches of several tables, drawn together and pinned until the end of a ``with`` block: :class:`BatchDraw` for a mix.

    The slices of a batch stand table by table, in the order of the mix.

    Args:
        parts: the draw of each table that provides slices, in the order of the mix. All have the same number of batches.
        layout: the layout of a whole batch.
    """

    __slots__ = ("_firsts", "_parts", "layout")

    def __init__(self, parts: Sequence[BatchDraw], layout: BatchLayout) -> None:
        self._parts = parts
        self.layout = layout
        """How each batch looks on the wire and in a body."""
        firsts, first = [], 0
        for part in parts:
            firsts.append(first)
            first += part.layout.batch_size
        self._firsts = firsts
        """First slice of each part in a batch."""

    def __len__(self) -> int:
        return len(self._parts[0])

    @property
    def on_cuda(self) -> bool:
        """Whether any table's slices are gathered on a CUDA device."""
        return any(part.on_cuda for part in self._parts)

    def actors(self) -> set[int]:
        """Returns the numbers of the actors of all slices."""
        return set().union(*(part.actors() for part in self._parts))

    def gather_into(self, bodies: Sequence[Body]) -> None:
        """Gathers each batch into a body on the host. A CUDA device is waited for once for all batches."""
        for part, first in zip(self._parts, self._firsts, strict=True):
            part.plan.gather_into(part.batches, bodies, first=first)

    def gather_one_into(self, batch: int, body: Body) -> None:
        """Gathers one batch into a body on the host, so that it can be handed over before the next one is gathered."""
        for part, first in zip(self._parts, self._firsts, strict=True):
            part.plan.gather_into(part.batches[batch : batch + 1], (body,), first=first)

    def gather_into_pinned(self, bodies: Sequence[torch.Tensor]) -> None:
        """Gathers each batch into pinned memory, [layout.body_bytes] uint8.

        The slices of a table on a CUDA device take the way through other pinned memory: one transfer cannot leave the other tables' gaps.
        """
        self.gather_into([self.layout.body_views(body.numpy()) for body in bodies])

    def gather_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the first batch as fresh tensors: on the tables' CUDA device if they share one, otherwise on the host."""
        import torch

        from touchline_server.store.tensors import as_tensor

        columns = [part.batches[0].columns for part in self._parts]
        device = columns[0].device
        body = self.layout.body_views(np.empty(self.layout.body_bytes, np.uint8))
        if device.type != "cuda" or any(other.device != device for other in columns):
            self.gather_into((body,))
            return {name: as_tensor(array) for name, array in body.items()}
        stored = columns[0].tensors
        tensors = {}
        for spec in self.layout.columns:
            dtype = stored[spec.name].dtype if spec.name in stored else torch.float32
            tensors[spec.name] = torch.empty(spec.shape, dtype=dtype, device=device)
        for part, first in zip(self._parts, self._firsts, strict=True):
            part.plan.gather_into_tensors(part.batches[0], tensors, first=first)
            part.plan.write_provenance(part.batches[0], body, first=first)
        provenance = self.layout.specs[len(self.layout.columns) :]
        return {**tensors, **{spec.name: as_tensor(body[spec.name]) for spec in provenance}}

    def piece_gatherer(self) -> Callable[[Piece, Sequence[np.ndarray]], None]:
        """Returns what gathers the pieces of the first batch, into an array for each segment."""
        if self.on_cuda:
            body = self.layout.body_views(np.empty(self.layout.body_bytes, np.uint8))
            self.gather_one_into(0, body)

            def copy(piece: Piece, targets: Sequence[np.ndarray]) -> None:
                for (name, begin, end, _), target in zip(piece.segments, targets, strict=True):
                    target[...] = body[name].reshape(-1, *target.shape[1:])[begin:end]

            return copy

        def gather(piece: Piece, targets: Sequence[np.ndarray]) -> None:
            for part, first in zip(self._parts, self._firsts, strict=True):
                part.plan.gather_piece_into(part.batches[0], piece, targets, batch_size=self.layout.batch_size, first=first)

        return gather

    def release(self) -> None:
        """Unpins the rows of every table, which may be overwritten from now on. Must be called once."""
        for part in self._parts:
            part.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


DrawnBatches = BatchDraw | MixedDraw
"""Drawn batches, of one table or of several."""
