"""Batches that are drawn and pinned, together with how they are gathered: what a stream, a ring or a call makes its batches of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from touchline_protos.codec import BatchLayout, Piece
from touchline_server.store.gather import Body, GatherPlan
from touchline_server.store.pinned_draw import DrawnSlices, PinnedDraw

if TYPE_CHECKING:
    import torch


class BatchDraw:
    """Batches of one table, drawn together and pinned until the end of a ``with`` block.

    Code that fills messages, slots and tensors uses this class only, and neither the store nor the plan. Batches that are mixed from
    several tables are a :class:`~touchline_server.store.mixed_draw.MixedDraw`, with the same methods.
    """

    __slots__ = ("_pinned", "batches", "layout", "plan")

    def __init__(self, pinned: PinnedDraw, plan: GatherPlan, layout: BatchLayout) -> None:
        self._pinned = pinned
        self.batches: list[DrawnSlices] = pinned.batches
        """The draw of each batch."""
        self.plan = plan
        self.layout = layout
        """How each batch looks on the wire and in a body."""

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def on_cuda(self) -> bool:
        """Whether the batches are gathered on a CUDA device."""
        return self._pinned.columns.on_cuda

    def actors(self) -> set[int]:
        """Returns the numbers of the actors of all slices."""
        actors = [slices.draw.actor for slices in self.batches]
        return set(np.unique(actors[0] if len(actors) == 1 else np.concatenate(actors)).tolist())

    def gather_into(self, bodies: Sequence[Body]) -> None:
        """Gathers each batch into a body on the host."""
        self.plan.gather_into(self.batches, bodies)

    def gather_one_into(self, batch: int, body: Body) -> None:
        """Gathers one batch into a body on the host, so that it can be handed over before the next one is gathered."""
        self.plan.gather_into(self.batches[batch : batch + 1], (body,))

    def gather_into_pinned(self, bodies: Sequence[torch.Tensor]) -> None:
        """Gathers each batch on its CUDA device and straight into pinned memory, [layout.body_bytes] uint8."""
        self.plan.gather_into_pinned(self.batches, bodies)

    def gather_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the first batch as fresh tensors on its device."""
        return self.plan.gather_tensors(self.batches[0])

    def piece_gatherer(self) -> Callable[[Piece, Sequence[np.ndarray]], None]:
        """Returns what gathers the pieces of the first batch, into an array for each segment."""
        return self.plan.piece_gatherer(self.batches[0])

    def release(self) -> None:
        """Unpins the rows, which may be overwritten from now on. Must be called once."""
        self._pinned.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
