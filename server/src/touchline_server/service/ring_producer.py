"""Rings in shared memory for learners on this host: batches are gathered straight into a ring's slots.

Each ring has a thread of its own, which sleeps while the ring is full. There are at most ``ring.max_rings`` of them; learners beyond
that get frames.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from touchline_protos.codec import BatchLayout
from touchline_protos.log_lines import get_logger
from touchline_protos.shm.ring import MAX_SLOTS, RingError, RingGeometry, RingWriter, shared_memory_id
from touchline_protos.shm.ring_control import ProducerControl
from touchline_protos.shm.ring_slots import PinnedRegion
from touchline_protos.types.status import WaitCause
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.config.sections import RingConfig
from touchline_server.errors import NotReadyError, SchemaChangedError
from touchline_server.metrics.learners import Ahead, Learner, Measured
from touchline_server.service.batch_framer import BatchFramer
from touchline_server.service.throttle import AddThrottle
from touchline_server.store.batch_draw import BatchDraw
from touchline_server.store.gather import SpacedBodies
from touchline_server.store.memory import available_host_bytes
from touchline_server.store.subscriptions import subscribe_all
from touchline_server.tables.sampler import Reserved, Split

logger = get_logger(__name__)

SPARE_SLOTS = 2
"""Slots beyond the batches that the learner wants ready: one that it holds and one that is being filled."""
MIN_SLOTS = 3

MIN_AHEAD = 14
MIN_AHEAD_BYTES = 1 << 23
"""Small batches kept ready, up to this number and size, even if the learner asks for fewer: each sleep costs as much as a batch."""

MEMORY_SHARE = 0.5
"""Largest share of the available memory that a new ring may take."""

MAX_REASONS = 64
"""Reasons that are logged as warnings, each once."""
_NUMBER = re.compile(r"[0-9a-f]*[0-9][0-9a-f]*")
"""Numbers, and names of hexadecimal digits: what differs in the same reason from one time to the next."""

GROUP_BYTES = 1 << 22
"""Largest group of batches that are drawn together."""


class RingPool:
    """Makes the rings of a server, as many and as large as its configuration allows. Lives in the event loop."""

    def __init__(self, config: RingConfig) -> None:
        self._config = config
        self._identity = shared_memory_id()
        self._rings = 0
        self.size_bytes = 0
        """Shared memory of the rings in use."""
        self._logged: set[str] = set()

    def open(self, learner_id: str, layout: BatchLayout, batches: int) -> RingWriter:
        """Returns a ring for a learner.

        Args:
            learner_id: the ``shared_memory_id`` that the learner sent.
            layout: the layout of its batches.
            batches: the number of batches that it wants ready.

        Raises:
            RingError: the learner gets frames instead; the text says why.
        """
        if not self._identity:
            raise RingError("the server is not on Linux on x86-64, or has no /dev/shm")
        if learner_id != self._identity:
            # Not logged: most learners are on hosts of their own.
            raise RingError("the server is on another host, or in a container with another /dev/shm")
        try:
            return self._make(layout, batches)
        except RingError as error:
            self.log_once(str(error))
            raise

    def log_once(self, reason: str) -> None:
        """Logs why a learner on this host has no ring: as a warning the first time, for debugging after that."""
        kind = _NUMBER.sub("#", reason)
        new = kind not in self._logged and len(self._logged) < MAX_REASONS
        logger.log(logging.WARNING if new else logging.DEBUG, "messages instead of a ring: %s", reason)
        if new:
            self._logged.add(kind)

    def close(self, ring: RingWriter) -> None:
        """Closes a ring."""
        self._rings -= 1
        self.size_bytes -= ring.geometry.size_bytes
        ring.close()

    def _make(self, layout: BatchLayout, batches: int) -> RingWriter:
        config = self._config
        if not config.max_rings:
            raise RingError("ring.max_rings is 0: rings are turned off")
        if self._rings >= config.max_rings:
            raise RingError(f"all {config.max_rings} rings are in use (ring.max_rings)")
        body_bytes = max(layout.body_bytes, 1)
        fitting = config.max_ring_bytes // body_bytes
        ahead = max(batches, min(MIN_AHEAD, MIN_AHEAD_BYTES // body_bytes))
        slots = min(ahead + SPARE_SLOTS, fitting, MAX_SLOTS)
        if slots < MIN_SLOTS:
            raise RingError(f"{MIN_SLOTS} batches of {body_bytes} bytes do not fit into ring.max_ring_bytes, {config.max_ring_bytes}")
        geometry = RingGeometry.of(slots, layout.body_bytes)
        available = available_host_bytes()
        # Checked in advance: the kernel does not refuse the memory but kills a process once it is used.
        if geometry.size_bytes > available * MEMORY_SHARE:
            raise RingError(f"a ring of {geometry.size_bytes} bytes: only {available} bytes of memory are available")
        ring = RingWriter(geometry)
        self._rings += 1
        self.size_bytes += geometry.size_bytes
        return ring


def ring_offer(ring: RingWriter, layout: BatchLayout) -> bytes:
    """Returns the message that offers a ring."""
    geometry = ring.geometry
    setup = pb.RingSetup(
        path=str(ring.path),
        size_bytes=geometry.size_bytes,
        slots=geometry.slots,
        slot_size_bytes=geometry.slot_size_bytes,
        layout=pb.Batch.FromString(layout.header()),
        token=ring.token,
    )
    return pb.SampleStreamResponse(ring=setup).SerializeToString()


class RingProducer:
    """Keeps one ring full, in a thread of its own.

    Args:
        framer: the source of the learner's batches.
        ring: the ring to fill.
        layout: the layout that the ring was made for. Once batches have another one, the producer ends with SchemaChangedError.
        throttle: holds adds back while the ring has free slots.
        learner: counts of the learner.
        send: callback that sends a message to the learner, from the producer's thread; must not block.
        on_end: callback that the producer's thread calls last, with the error that ended it, or None after :meth:`stop`.
    """

    def __init__(
        self,
        framer: BatchFramer,
        ring: RingWriter,
        layout: BatchLayout,
        throttle: AddThrottle,
        learner: Learner,
        *,
        send: Callable[[bytes], None],
        on_end: Callable[[Exception | None], None],
    ) -> None:
        self._framer = framer
        self._ring = ring
        self._layout = layout
        self._throttle = throttle
        self._learner = learner
        learner.ahead = self._ahead
        self._send = send
        self._on_end = on_end
        self._stopping = False
        geometry = ring.geometry
        self._bodies = SpacedBodies(
            layout,
            ring.slots.whole_array(),
            offset_bytes=geometry.offset(0),
            spacing_bytes=geometry.slot_size_bytes,
            count=geometry.slots,
        )
        # Drawing batches together costs less, but the rows of large ones would stay pinned for long.
        self._group = max(GROUP_BYTES // max(layout.body_bytes, 1), 1)
        self._actors_sent = 0
        self._used: deque[Split] = deque()
        """The splits of the batches that were published and not seen taken, oldest first."""
        self._delivered = 0
        """Batches that were reported as delivered to the rate limit."""
        self._pinned: PinnedRegion | None = None
        self._thread = threading.Thread(target=self._run, name="touchline-ring", daemon=True)

    def start(self) -> None:
        """Begins to fill the ring."""
        self._learner.counting = True
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, after the batches it is gathering at most."""
        self._stopping = True
        with suppress(ValueError):  # the ring is closed already
            self._ring.control.interrupt()

    def _run(self) -> None:
        error: Exception | None = None
        control, framer = self._ring.control, self._framer
        try:
            while not self._stopping:
                slots = control.free_slots()
                self._report_taken(self._ring.geometry.slots - len(slots))
                if not slots:
                    continue
                if not self._used:
                    self._learner.clock.want()
                # A learner that has not taken everything yet does not wait before others.
                reserved = framer.sampler.reserve(min(len(slots), self._group), waits=not self._used)
                if reserved is not None:
                    with self._throttle.sampler_waiting():
                        self._fill(slots[: reserved.batches], reserved)
                else:
                    self._wait_for_limiter()
        except NotReadyError:
            # A dropped table has nothing to draw either; the session says so.
            error = SchemaChangedError("the table was cleared; open the stream again")
        except Exception as raised:
            error = raised
        finally:
            try:
                framer.sampler.leave()
                # Batches that the learner did not take are not delivered.
                self._report_taken(control.count_used())
                for split in self._used:
                    framer.sampler.cancel(1, split)
                if self._pinned is not None:
                    self._pinned.close()
            finally:
                self._learner.counting = False
                self._on_end(error)

    def _report_taken(self, used: int) -> None:
        """Reports batches as delivered that were taken since the last look, given the number of used slots now.

        Taken and not freed: a learner usually holds one batch while it waits for the next, which the limit may allow only for the first.
        """
        taken = self._ring.control.count_taken(used)
        while taken > self._delivered:
            split, count = self._used.popleft(), 1
            while taken > self._delivered + count and self._used[0] == split:
                self._used.popleft()
                count += 1
            self._delivered += count
            self._framer.sampler.delivered(count, split)
            self._learner.delivered(count, split, self._layout.body_bytes)

    def _ahead(self) -> Ahead:
        """Returns what there is ahead of the learner's use, and how long it has waited; from any thread."""
        control, used = self._ring.control, len(self._used)
        return Ahead(self._ring.geometry.slots - used, used * self._layout.body_bytes, _measured(control))

    def _wait_for_limiter(self) -> None:
        """Waits until the rate limit may allow more, or a short time has passed, in which slots may have been taken."""
        unsubscribe = subscribe_all(self._framer.sampler.changes, self._ring.control.interrupt)
        self._learner.clock.blame(WaitCause.RATE)
        try:
            self._ring.control.wait_freed()
        finally:
            unsubscribe()
            self._learner.clock.blame(WaitCause.SAMPLING)

    def _fill(self, slots: list[int], reserved: Reserved) -> None:
        """Fills and publishes slots, one for each reserved batch."""
        published = 0
        try:
            with self._framer.sampler.draw(reserved) as drawn:
                if drawn.layout is not self._layout and drawn.layout.specs != self._layout.specs:
                    raise SchemaChangedError("the table has another schema now; open the stream again")
                self._send_names(drawn)
                if drawn.on_cuda:
                    self._gather_from_device(slots, drawn)
                    for slot in slots:
                        self._publish(slot, reserved.split)
                        published += 1
                else:
                    gathered = drawn.gather_each_into(self._bodies, slots)
                    for slot, _ in zip(slots, gathered, strict=True):
                        self._publish(slot, reserved.split)
                        published += 1
        except BaseException:
            self._framer.sampler.cancel(reserved.batches - published, reserved.split)
            raise

    def _publish(self, slot: int, split: Split) -> None:
        self._ring.control.publish(slot, self._actors_sent)
        self._used.append(split)
        self._learner.clock.end()

    def _send_names(self, drawn: BatchDraw) -> None:
        """Sends the names of actors that are new to the learner, which waits for them before it takes the batches."""
        forgotten, names = self._framer.new_actors(drawn)
        for message in forgotten:
            self._send(message)
        if names:
            self._actors_sent += len(names)
            actors = pb.ActorNames(actors=[pb.ActorName(index=index, name=name) for index, name in names.items()])
            self._send(pb.SampleStreamResponse(actors=actors).SerializeToString())

    def _gather_from_device(self, slots: list[int], drawn: BatchDraw) -> None:
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


def _measured(control: ProducerControl) -> Measured | None:
    """Returns the waits that the learner wrote into the ring; None if it does not measure them."""
    waits = control.consumer_waits()
    if waits is None:
        return None
    taken, sum_s, buckets = waits
    # Batches that were ready are not in a bucket: they have waited for no time.
    return Measured((buckets[0] + max(taken - sum(buckets), 0), *buckets[1:]), sum_s)
