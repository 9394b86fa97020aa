"""Priorities that come back through a ring: taken, checked and applied by the thread that fills it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from touchline_protos.log_lines import get_logger
from touchline_protos.shm.ring import RingWriter
from touchline_protos.shm.ring_returns import REMEMBERED_RINGS, ReturnEntries, ReturnGeometry, are_priorities
from touchline_server.store.batch_draw import BatchDraw, ReturningDraw

logger = get_logger(__name__)


class RingReturns:
    """Takes what a learner writes into the queue of its ring, and sets the priorities of the slices that were drawn for it. One thread.

    Nothing that the learner writes is trusted: an entry is copied before it is checked, and names a batch of this ring or is refused. Of
    what the learner could do by a call, it cannot do more: to set priorities of slices.

    Args:
        ring: the ring.
        geometry: position and size of the entries.
    """

    def __init__(self, ring: RingWriter, geometry: ReturnGeometry) -> None:
        self._control = ring.control
        self._entries = ReturnEntries(ring.slots, ring.geometry, geometry)
        self._batch_size = geometry.batch_size
        self._taken = 0
        """Own count, since the learner can overwrite the shared one."""
        self._updated = self._evicted = self._refused = 0
        """Slices."""
        self._drawn: dict[int, tuple[ReturningDraw, int]] = {}
        """Draw of each batch, and its number among those drawn together, by the number of its publication; oldest first."""
        self._remembered = REMEMBERED_RINGS * ring.geometry.slots
        self._broken = False

    def remember(self, drawn: BatchDraw, batches: int) -> None:
        """Remembers the slices of batches that are published next."""
        returning, first = drawn.returning(), self._control.published
        for number in range(batches):
            self._drawn[first + number] = returning, number
            self._drawn.pop(first + number - self._remembered, None)

    def apply(self) -> None:
        """Applies what the learner has sent since the last time, in its order."""
        new = self._control.count_returns() - self._taken
        if not new or self._broken:
            return
        if not 0 < new <= len(self._entries):
            self._broken = True
            logger.warning(
                "a learner sent %d entries of priorities back together, expected up to %d: no more are taken", new, len(self._entries)
            )
            return
        publications, priorities = self._copy(new)
        for begin, end in self._runs(publications, priorities):
            returning, first = self._drawn[publications[begin]]
            updated = returning.update(first, priorities[begin:end])
            self._updated += updated
            self._evicted += (end - begin) * self._batch_size - updated
        self._taken += new
        self._control.report_returns(self._taken, self._updated, self._evicted, self._refused)

    def end(self) -> None:
        """Applies what is left, and reports to the learner that nothing more will be."""
        self.apply()
        self._control.end_returns()

    def _copy(self, count: int) -> tuple[list[int], np.ndarray]:
        """Returns private copies of the next entries: the numbers of their publications, and their priorities, [count, H, B]."""
        entries, size = self._entries, len(self._entries)
        places = [(self._taken + number) % size for number in range(count)]
        publications = [entries.publications[at].item() for at in places]
        return publications, np.stack([entries.priorities[at] for at in places])

    def _runs(self, publications: list[int], priorities: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yields begin and end of entries whose batches were drawn together and follow each other; counts entries that are refused."""
        drawn = self._drawn.get
        if not are_priorities(priorities):
            good = [bool(((entry >= 0) & (entry <= np.finfo(np.float32).max)).all()) for entry in priorities]
            publications = [publication if is_good else -1 for publication, is_good in zip(publications, good, strict=True)]
        begin, count = 0, len(publications)
        while begin < count:
            found = drawn(publications[begin])
            end = begin + 1
            if found is None:
                self._refused += self._batch_size
            else:
                while end < count and drawn(publications[end]) == (found[0], found[1] + end - begin):
                    end += 1
                yield begin, end
            begin = end
