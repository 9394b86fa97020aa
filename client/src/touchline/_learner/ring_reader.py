"""Batches from a ring in shared memory that a server on the same host keeps full."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from touchline._learner.ring_returns import ReturnQueue
from touchline_protos import Batch
from touchline_protos.codec import BodyLayout
from touchline_protos.codec.buffer_pool import BufferPool
from touchline_protos.shm.ring import RingError, RingGeometry, RingReader
from touchline_protos.shm.ring_control import ConsumerControl
from touchline_protos.shm.ring_returns import ReturnGeometry
from touchline_protos.types.batch import BatchOrigin
from touchline_protos.v1 import replay_pb2 as pb

MAX_IDLE_BYTES = 256 << 20
"""Size limit of the idle memory of copied batches that is kept for later ones."""


class RingEndedError(Exception):
    """The stream over which the ring was offered has ended."""

    def __init__(self, reason: BaseException) -> None:
        self.reason = reason
        """Exception that ended the stream; StopIteration if the server closed it without an error."""


class RingBatches:
    """Takes batches out of a ring. One thread takes; any thread may interrupt it or drop a batch.

    A batch is a view of its slot, and the slot returns to the server when the last view dies. While the caller holds all slots but one,
    batches are copies, so that the server can always go on.

    The stream over which the ring was offered stays open: a thread reads the names of actors from it, and its end.

    Args:
        setup: the server's offer.
        messages: the messages that follow on the stream.
        owner: see :class:`ReturnQueue`.

    Raises:
        RingError: the ring cannot be mapped by this process.
        CodecError: the offer is malformed.
    """

    transport = "ring"
    """How its batches come."""

    def __init__(self, setup: pb.RingSetup, messages: Iterator[bytes], owner: object = None) -> None:
        self._layout = BodyLayout(setup.layout.SerializeToString())
        content_bytes, others = self._content()
        geometry = RingGeometry(setup.slots, setup.slot_size_bytes)
        if content_bytes > geometry.slot_size_bytes:
            raise RingError(f"slots of {geometry.slot_size_bytes} bytes, expected at least {content_bytes} for a batch")
        self._ring = RingReader(setup.path, setup.token, geometry, setup.size_bytes, others)
        self._control = self._ring.control
        self._returns: ReturnQueue | None = None
        if setup.HasField("returns"):
            returns = ReturnGeometry(setup.returns.offset, setup.returns.transitions, setup.returns.batch_size)
            returns.check(content_bytes, geometry)
            self._returns = ReturnQueue(self._ring, returns, owner)
        self._pool = BufferPool(MAX_IDLE_BYTES)
        self._leases: dict[int, weakref.ref[Any]] = {}
        self._messages = messages
        self._changed = threading.Condition()
        self._actor_names: dict[int, str] = {}
        self._names_received = 0
        """Names that have come, forgotten ones included."""
        self._forgettable: deque[tuple[int, frozenset[int]]] = deque()
        """Names to forget, each time with how many names had come before: batches that need no more than these may still use them."""
        self._end: BaseException | None = None
        self._reader = threading.Thread(target=self._read, name="touchline-ring", daemon=True)

    def start(self) -> None:
        """Starts the thread that reads the stream."""
        self._reader.start()

    def take(self) -> Batch | None:
        """Returns the next batch, or None if none came within a short sleep.

        Raises:
            RingEndedError: the stream ended.
            RingError: the server wrote an impossible slot number.
        """
        slot = self._take_slot()
        return None if slot is None else self._batch(slot)

    def _content(self) -> tuple[int, Sequence[int]]:
        """Returns the bytes that the server writes into a slot, and the sizes of other memory that comes with the ring."""
        return self._layout.size_bytes, ()

    def _origin(self) -> BatchOrigin | None:
        """Returns where the priorities of the batch that was taken last go."""
        return BatchOrigin(self._returns, self._control.last_taken) if self._returns is not None else None

    def _take_slot(self) -> int | None:
        """Takes the next slot, and waits for the names of its actors; returns None if none came within a short sleep."""
        if self._end is not None:
            raise RingEndedError(self._end)
        taken = self._control.take()
        if taken is None:
            return None
        slot, actors_needed = taken
        if actors_needed > self._names_received:
            self._wait_for_names(actors_needed)
        if self._forgettable and actors_needed > self._forgettable[0][0]:
            self._forget_names(actors_needed)
        return slot

    def _batch(self, slot: int) -> Batch:
        memory = self._ring.slots.array(slot)
        origin = self._origin()
        # `held` counts this slot. A view is handed out only if another slot stays free for the server.
        if self._control.held > self._ring.geometry.slots - 2:
            copy = self._pool.lease(self._layout.size_bytes)
            size = self._layout.size_bytes
            memoryview(copy).cast("B")[:size] = memoryview(memory).cast("B")[:size]
            self._control.free(slot)
            return self._layout.batch(copy, self._actor_names, origin)
        self._leases[slot] = weakref.ref(memory, partial(_free, self._control, slot))
        return self._layout.batch(memory, self._actor_names, origin)

    def whole_array(self) -> Any:
        """Returns the memory that all batches except copies are views of, as a ctypes array that keeps it mapped."""
        return self._ring.slots.whole_array()

    def close(self) -> None:
        """Releases what was needed to take batches. Those that were taken stay as they are."""

    def interrupt(self) -> None:
        """Makes a :meth:`take` in progress return."""
        self._control.interrupt()

    def _wait_for_names(self, needed: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._end is not None or self._names_received >= needed)
        if self._end is not None:
            raise RingEndedError(self._end)

    def _forget_names(self, actors_needed: int) -> None:
        """Drops the names that no batch uses that needs `actors_needed` names or more."""
        forgotten: set[int] = set()
        with self._changed:
            while self._forgettable and actors_needed > self._forgettable[0][0]:
                forgotten |= self._forgettable.popleft()[1]
            # A new mapping, as earlier batches keep the one that they were given.
            self._actor_names = {index: name for index, name in self._actor_names.items() if index not in forgotten}

    def _read(self) -> None:
        end: BaseException = StopIteration()
        try:
            for message in self._messages:
                frame = pb.SampleStreamResponse.FromString(message)
                names = {actor.index: actor.name for actor in frame.actors.actors}
                with self._changed:
                    if frame.actors.forgotten:
                        self._forgettable.append((self._names_received, frozenset(frame.actors.forgotten)))
                    self._names_received += len(names)
                    if names:
                        self._actor_names = {**self._actor_names, **names}
                    self._changed.notify_all()
        except BaseException as error:
            # Without its traceback, which would keep this object, and with it the ring's memory, alive until the next collection of cycles.
            end = error.with_traceback(None)
        if self._returns is not None:
            self._returns.close()
        with self._changed:
            self._end = end
            self._changed.notify_all()
        self._control.interrupt()


def _free(control: ConsumerControl, slot: int, _: weakref.ref[Any]) -> None:
    control.free(slot)
