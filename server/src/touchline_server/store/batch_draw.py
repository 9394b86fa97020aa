"""Batches that are drawn and pinned, together with how they are gathered: what a stream, a ring or a call makes its batches of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from touchline_protos.codec import BatchLayout, Piece
from touchline_server.store.gather import Body, GatherPlan, SpacedBodies
from touchline_server.store.joined_rows import JoinedTables
from touchline_server.store.pinned_draw import DrawnPart, PinnedDraw

if TYPE_CHECKING:
    import torch


class ReturningDraw:
    """Batches whose priorities may come back, after their rows were released. From any thread.

    Args:
        parts: what each table provides of them, with the lock of its store.
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[tuple[threading.Lock, DrawnPart]]) -> None:
        # Without what only a gather needs: the columns, which a clear should free.
        self._parts = [(lock, part.draw.drawn, part.begin, part.end) for lock, part in parts if part.draw.drawn is not None]

    def update(self, first: int, priorities: np.ndarray) -> int:
        """Sets the priorities of batches that follow each other, and returns the number of slices that are still stored.

        Args:
            first: number of the first batch among those that were drawn together.
            priorities: [batches, H, B] float32: finite, at least 0.
        """
        updated = 0
        for lock, drawn, begin, end in self._parts:
            size = end - begin
            # Slice by slice, in one copy.
            values = priorities[:, :, begin:end].swapaxes(1, 2).reshape(-1, priorities.shape[1])
            with lock:
                updated += drawn.update(drawn, first * size, first * size + len(values), values)
        return updated


class BatchDraw:
    """Batches of one table or of several, drawn together and pinned until the end of a ``with`` block, or longer if they are held.

    Code that fills messages, slots and tensors uses this class only, and neither the store nor the plan.

    Args:
        pinned: what pins the rows of each table.
        parts: what each table provides of the batches, in the order of the slices: together all of them.
        plan: how they are gathered. The columns of the tables fit each other, so it is that of any of them.
        layout: how each batch looks on the wire and in a body.
        joined: the tables as one, if they are several and can be gathered together.
    """

    __slots__ = ("_held", "_joined", "_pinned", "_plan", "layout", "parts")

    def __init__(
        self,
        pinned: Sequence[PinnedDraw],
        parts: Sequence[DrawnPart],
        plan: GatherPlan,
        layout: BatchLayout,
        joined: JoinedTables | None = None,
    ) -> None:
        self._joined = joined
        self._pinned = pinned
        self.parts = parts
        """Part of the batches from each table, in the order of the slices."""
        self._plan = plan
        self._held = False
        self.layout = layout
        """How each batch looks on the wire and in a body."""

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def on_cuda(self) -> bool:
        """Whether any table's slices are gathered on a CUDA device."""
        return any(part.columns.on_cuda for part in self.parts)

    def actors(self) -> set[int]:
        """Returns the numbers of the actors of all slices."""
        return set().union(*(np.unique(part.draw.actor).tolist() for part in self.parts))

    def gather_into(self, bodies: Sequence[Body]) -> None:
        """Gathers each batch into a body on the host. A CUDA device is waited for once for all batches."""
        self._plan.gather_into(self.parts, bodies, self._joined)

    def gather_each_into(self, bodies: SpacedBodies, chosen: Sequence[int]) -> Iterator[None]:
        """Gathers each batch into a body on the host and yields after each, so that it can be handed over before the next is gathered.

        No table may be on a CUDA device. ``chosen`` are the bodies of the batches.
        """
        return self._plan.gather_each_into(self.parts, bodies, chosen, self._joined)

    def gather_into_pinned(self, bodies: Sequence[torch.Tensor]) -> None:
        """Gathers each batch into pinned memory, [layout.body_bytes] uint8: from a table on a CUDA device in one transfer a batch.

        The slices of one of several tables take the way through other pinned memory: one transfer cannot leave the other tables' gaps.
        """
        if len(self.parts) == 1:
            self._plan.gather_into_pinned(self.parts[0], bodies)
        else:
            self.gather_into([self.layout.body_views(body.numpy()) for body in bodies])

    def gather_tensors(self, out: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Gathers the first batch into tensors: on the device of the tables if they share one, otherwise on the host.

        Args:
            out: tensors by name of an earlier batch, which are overwritten; None takes fresh memory.

        Raises:
            InvalidArgumentError: ``out`` has other tensors than this batch.
        """
        if self.on_cuda and len({part.columns.device for part in self.parts}) == 1:
            return self._plan.gather_tensors(self.parts, self.layout, out)
        from touchline_server.store.tensors import as_tensor, host_arrays

        if out is not None:
            self.gather_into((host_arrays(out, self.layout.specs),))
            return dict(out)
        body = self.layout.body_views(np.empty(self.layout.body_bytes, np.uint8))
        self.gather_into((body,))
        return {name: as_tensor(array) for name, array in body.items()}

    def piece_gatherer(self) -> Callable[[Piece, Sequence[np.ndarray]], None]:
        """Returns what gathers the pieces of the first batch, into an array for each segment."""
        return self._plan.piece_gatherer(self.parts, self.layout)

    def run_all(self, jobs: Sequence[Callable[[], object]]) -> None:
        """Runs what gathers the pieces of the first batch, in as many threads as pay. Raises what a job raises."""
        self._plan.run_all(jobs, self.layout.body_bytes)

    def hold(self, on_revoke: Callable[[], None]) -> None:
        """Keeps the rows of every table beyond the end of the ``with`` block: see :meth:`PinnedDraw.hold`.

        Each table may revoke its own rows, so ``on_revoke`` may be called more than once, by different threads at the same time. It may be
        called before this returns.
        """
        self._held = True
        for pinned in self._pinned:
            pinned.hold(on_revoke)

    def returning(self) -> ReturningDraw:
        """Returns what sets the priorities of these slices later, each by a law that has them. It keeps no pin."""
        return ReturningDraw(tuple(zip((pinned.lock for pinned in self._pinned), self.parts, strict=True)))

    def release(self) -> None:
        """Unpins the rows of every table, which may be overwritten from now on. Must be called once, unless the batches are held."""
        for pinned in self._pinned:
            pinned.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._held:
            self.release()
