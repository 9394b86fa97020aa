"""Batches that this process gathers by itself, from the rows that a ring in shared memory names."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from touchline._learner.ring_reader import RingBatches
from touchline._learner.row_offer import Gathering, GatherMethod, RowOffer, read_slot
from touchline_protos import Batch
from touchline_protos.codec import BodyLayout
from touchline_protos.log_lines import get_logger
from touchline_protos.v1 import replay_pb2 as pb

logger = get_logger(__name__)

LOG_INTERVAL_S = 10.0
"""Time between two log lines about discarded batches."""

FREED_SHARE = 4
"""One in this many slots is the number that is freed together."""


class RowBatches(RingBatches):
    """Gathers the batches that a ring names. One thread takes; any thread may interrupt it or drop a batch.

    A slot returns to the server soon after its rows are read. If the server has taken the rows back before that, because this process was
    stopped for long, the batch is discarded: nothing that was overwritten is handed out.

    Args:
        setup: the server's offer, with rows.
        messages: the messages that follow on the stream.
        method: how to gather.
        owner: see :class:`ReturnQueue`.

    Raises:
        RingError: the ring or the columns cannot be mapped by this process, or not be gathered from by this method.
        CodecError: the offer is malformed.
    """

    transport = "device"

    def __init__(self, setup: pb.RingSetup, messages: Iterator[bytes], method: GatherMethod, owner: object = None) -> None:
        self._offer = RowOffer.of(setup, BodyLayout(setup.layout.SerializeToString()))
        super().__init__(setup, messages, owner)
        self._gatherer = method.gatherer(self._offer.with_memory(self._ring.others))
        self._ring.others.clear()  # only the gatherer keeps them mapped, until its close
        self._started: deque[tuple[int, Gathering]] = deque()
        self._finished: list[int] = []
        """Slots that were gathered and are not free yet: the server draws for several together at little more than the cost of one."""
        self._free_together = max(self._ring.geometry.slots // FREED_SHARE, 1)
        self._taking = threading.Lock()
        self._closing = False
        self._next_line = 0.0
        self.discarded = 0
        """Batches whose rows the server took back before they were read."""

    def take(self) -> Batch | None:
        """Returns the next batch, or None if none came within a short sleep, or was discarded.

        Raises:
            RingEndedError: the stream ended.
            RingError: the server wrote numbers of slots or rows that do not exist.
        """
        with self._taking:
            batch = None if self._closing else self._take()
        if self._closing:
            self._close_if_idle()
        return batch

    def _take(self) -> Batch | None:
        while len(self._started) <= self._gatherer.ahead:
            if self._started and not self._control.has_published():
                break
            slot = self._take_slot()
            if slot is None:
                return None
            rows = read_slot(self._offer, memoryview(self._ring.slots.array(slot)).cast("B"))._replace(origin=self._origin())
            self._started.append((slot, self._gatherer.start(rows, self._actor_names)))
        slot, gathering = self._started.popleft()
        batch = gathering.finish()
        # After the last row was read, and before anyone sees the batch: the server marks the slot before it overwrites a row.
        revoked = self._control.is_revoked(slot)
        self._finished.append(slot)
        if len(self._finished) >= self._free_together or not self._control.has_published():
            self._free_finished()
        if revoked:
            self._count_discarded()
            return None
        return batch

    def close(self) -> None:
        """Waits for the gathers that were started and releases the columns, from any thread; at the end of a :meth:`take` in progress."""
        self._closing = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._taking.acquire(blocking=False):
            try:
                self._started.clear()
                self._gatherer.close()
            finally:
                self._taking.release()

    def _count_discarded(self) -> None:
        self.discarded += 1
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LOG_INTERVAL_S
            logger.warning(
                "%d batches were discarded so far: this process took them later than the server keeps their rows (ring.max_hold_s)",
                self.discarded,
            )

    def _free_finished(self) -> None:
        while self._finished:
            self._control.free(self._finished.pop())

    def _content(self) -> tuple[int, Sequence[int]]:
        return self._offer.slots.size_bytes, self._offer.host_sizes
