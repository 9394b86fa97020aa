"""The way back through a ring: priorities of batches, from the learner to the server, with no call and no ids.

It is a queue of entries of one size. Each names a batch by the number of its publication, and holds a priority for each of its
transitions, [H, B] float32; the server still knows which slices it drew for that batch. Entries lie behind what the server writes in the
slots, two to a slot: an older learner accepts slots of any size, but no memory behind them. An entry has nothing to do with the batch in
its slot: entry n lies in slot n modulo the number of slots, every other round as the slot's second entry.

The learner writes an entry and then raises its count (:mod:`.ring_control`), so a learner that is killed meanwhile leaves nothing half
written that counts. The server reports entries as taken once they are applied.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from touchline_protos.shm.ring_control import RingError
from touchline_protos.shm.ring_slots import RingGeometry, RingSlots

ENTRIES_PER_SLOT = 2
"""Entries in each slot. With one update for each batch the queue is never full: between two looks of the server a learner takes at most the
batches that were published at the first one, and as many as there are slots since."""

REMEMBERED_RINGS = 3
"""Publications whose slices the server remembers, in slots of the ring. A learner sends back those of the last two rings: the server may
publish up to one more before it looks."""

_HEADER_BYTES = 16
_ALIGNMENT = 64
_MAX_BITS = int(np.array(np.finfo(np.float32).max).view(np.uint32))


@dataclass(frozen=True, slots=True)
class ReturnGeometry:
    """Where the entries lie."""

    offset: int
    """Byte of each slot at which its entries begin."""
    transitions: int
    """H."""
    batch_size: int
    """B."""

    @classmethod
    def behind(cls, body_bytes: int, *, transitions: int, batch_size: int) -> ReturnGeometry:
        """Returns the geometry for slots in which the server writes ``body_bytes``."""
        return cls(-(-body_bytes // _ALIGNMENT) * _ALIGNMENT, transitions, batch_size)

    @property
    def entry_size_bytes(self) -> int:
        """Size of an entry: the number of its publication, int64, and from byte 16 on its priorities; then up to a multiple of 64."""
        return -(-(_HEADER_BYTES + 4 * self.transitions * self.batch_size) // _ALIGNMENT) * _ALIGNMENT

    @property
    def end(self) -> int:
        """Bytes of a slot, with its entries."""
        return self.offset + ENTRIES_PER_SLOT * self.entry_size_bytes

    def check(self, body_bytes: int, geometry: RingGeometry) -> None:
        """Raises RingError unless the entries lie behind ``body_bytes`` of a slot, and within it."""
        if (
            min(self.transitions, self.batch_size) < 1
            or self.offset < body_bytes
            or self.offset % _ALIGNMENT
            or self.end > geometry.slot_size_bytes
        ):
            raise RingError(
                f"entries of {self.entry_size_bytes} bytes at byte {self.offset} of slots, expected them behind {body_bytes} and within "
                f"{geometry.slot_size_bytes}"
            )


class ReturnEntries:
    """The entries as arrays: views of the ring's memory, which they keep mapped.

    Args:
        slots: the ring's slots.
        geometry: the ring's sizes.
        returns: position and size of the entries.
    """

    def __init__(self, slots: RingSlots, geometry: RingGeometry, returns: ReturnGeometry) -> None:
        memory = slots.whole_array()
        shape = returns.transitions, returns.batch_size
        begins = [
            geometry.offset(slot) + returns.offset + half * returns.entry_size_bytes
            for half in range(ENTRIES_PER_SLOT)
            for slot in range(geometry.slots)
        ]
        self.publications = [np.ndarray((1,), np.int64, memory, begin) for begin in begins]
        """Number of each entry's publication."""
        self.priorities = [np.ndarray(shape, np.float32, memory, begin + _HEADER_BYTES) for begin in begins]
        """Priorities of each entry, [H, B]."""

    def __len__(self) -> int:
        return len(self.priorities)


def are_priorities(values: np.ndarray) -> bool:
    """Returns whether float32 values are finite and at least 0, except that it may be False for a negative zero."""
    # The bits of floats from 0 to the largest one, as numbers, are in the same order; all others are above these. One pass, where
    # comparisons take three.
    return not values.size or int(values.view(np.uint32).max()) <= _MAX_BITS
