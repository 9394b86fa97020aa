"""How the slots of a ring are filled with drawn batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from touchline_protos.codec import BatchLayout
from touchline_protos.shm.ring import RingWriter
from touchline_protos.shm.ring_slots import PinnedRegion
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.store.batch_draw import BatchDraw
from touchline_server.store.gather import SpacedBodies

GROUP_BYTES = 1 << 22
"""Largest group of batches that are drawn together."""


class SlotContent(Protocol):
    """What the slots of a ring hold."""

    layout: BatchLayout
    """Layout of the batches."""
    files: Sequence[int]
    """Descriptors of other memory that the learner needs."""

    @property
    def content_bytes(self) -> int:
        """Bytes of a slot that are in use."""
        ...

    def setup(self) -> pb.RowsSetup | None:
        """Returns the part of the offer that says how to gather; None if slots hold bodies."""
        ...

    def filler(self, ring: RingWriter) -> SlotFiller:
        """Returns what fills the slots of a ring."""
        ...


class SlotFiller(Protocol):
    """Fills the slots of one ring. One thread at a time."""

    group: int
    """Most batches that are drawn together."""

    def fill(self, slots: Sequence[int], drawn: BatchDraw) -> Iterator[None]:
        """Fills a slot with each of the drawn batches, and yields after each, so that it can be handed over before the next is filled."""
        ...

    def freed(self, slots: Sequence[int]) -> None:
        """Takes note of all slots that are free at this moment."""
        ...

    def close(self) -> None:
        """Releases what was needed to fill slots. What the learner may still take afterwards is valid, or marked as revoked."""
        ...


class BodyContent:
    """Slots that hold bodies, see :class:`SlotContent`."""

    def __init__(self, layout: BatchLayout) -> None:
        self.layout = layout
        self.files: Sequence[int] = ()

    @property
    def content_bytes(self) -> int:
        """See :class:`SlotContent`."""
        return self.layout.body_bytes

    def setup(self) -> None:
        """See :class:`SlotContent`."""
        return

    def filler(self, ring: RingWriter) -> BodyFiller:
        """See :class:`SlotContent`."""
        return BodyFiller(ring, self.layout)


class BodyFiller:
    """Gathers each batch into its slot, as a body.

    Args:
        ring: the ring.
        layout: the layout of the batches.
    """

    def __init__(self, ring: RingWriter, layout: BatchLayout) -> None:
        self._ring = ring
        geometry = ring.geometry
        self._bodies = SpacedBodies(
            layout,
            ring.slots.whole_array(),
            offset_bytes=geometry.offset(0),
            spacing_bytes=geometry.slot_size_bytes,
            count=geometry.slots,
        )
        # Drawing batches together costs less, but the rows of large ones would stay pinned for long.
        self.group = max(GROUP_BYTES // max(layout.body_bytes, 1), 1)
        self._pinned: PinnedRegion | None = None

    def fill(self, slots: Sequence[int], drawn: BatchDraw) -> Iterator[None]:
        """See :class:`SlotFiller`."""
        if not drawn.on_cuda:
            return drawn.gather_each_into(self._bodies, slots)
        self._gather_from_device(slots, drawn)
        return iter([None] * len(slots))

    def freed(self, slots: Sequence[int]) -> None:
        """See :class:`SlotFiller`. A body needs nothing that would have to be released."""

    def close(self) -> None:
        """See :class:`SlotFiller`."""
        if self._pinned is not None:
            self._pinned.close()

    def _gather_from_device(self, slots: Sequence[int], drawn: BatchDraw) -> None:
        """Gathers on the device, which copies straight into the slots if their memory can be pinned; waits for it once."""
        if self._pinned is None:
            import torch

            self._pinned = PinnedRegion(torch, self._ring.slots.whole_array())
        if self._pinned.pinned:
            memory, size = self._pinned.tensor, drawn.layout.body_bytes
            begins = [self._ring.geometry.offset(slot) for slot in slots]
            drawn.gather_into_pinned([memory[begin : begin + size] for begin in begins])
        else:
            drawn.gather_into([self._bodies.each[slot] for slot in slots])
