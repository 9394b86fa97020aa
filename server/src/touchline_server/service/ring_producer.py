"""Keeps a ring in shared memory full for a learner on this host.

Each ring has a thread of its own, which sleeps while the ring is full.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress

from touchline_protos.codec import BatchLayout
from touchline_protos.shm.ring import RingWriter
from touchline_protos.shm.ring_control import ProducerControl
from touchline_protos.types.status import WaitCause
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.errors import NotReadyError, SchemaChangedError
from touchline_server.metrics.learners import Ahead, Learner, Measured
from touchline_server.service.batch_framer import BatchFramer
from touchline_server.service.ring_returns import RingReturns
from touchline_server.service.slot_fillers import SlotFiller
from touchline_server.service.throttle import AddThrottle
from touchline_server.store.batch_draw import BatchDraw
from touchline_server.store.subscriptions import subscribe_all
from touchline_server.tables.sampler import Reserved, Split


class RingProducer:
    """Keeps one ring full, in a thread of its own.

    Args:
        framer: the source of the learner's batches.
        ring: the ring to fill.
        filler: what fills its slots.
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
        filler: SlotFiller,
        layout: BatchLayout,
        throttle: AddThrottle,
        learner: Learner,
        *,
        send: Callable[[bytes], None],
        on_end: Callable[[Exception | None], None],
    ) -> None:
        self._framer = framer
        self._ring = ring
        self._filler = filler
        self._layout = layout
        self._throttle = throttle
        self._learner = learner
        learner.ahead = self._ahead
        self._send = send
        self._on_end = on_end
        self._stopping = False
        self._actors_sent = 0
        self._used: deque[Split] = deque()
        """The splits of the batches that were published and not seen taken, oldest first."""
        self._delivered = 0
        """Batches that were reported as delivered to the rate limit."""
        self._returns = RingReturns(ring, ring.returns) if ring.returns is not None else None
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
                self._filler.freed(slots)
                self._report_taken(self._ring.geometry.slots - len(slots))
                if self._returns is not None:
                    self._returns.apply()
                if not slots:
                    continue
                if not self._used:
                    self._learner.clock.want()
                # A learner that has not taken everything yet does not wait before others.
                reserved = framer.sampler.reserve(min(len(slots), self._filler.group), waits=not self._used)
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
            with ExitStack() as last:  # from the last one to the first, also after an error
                last.callback(self._on_end, error)
                last.callback(setattr, self._learner, "counting", False)
                last.callback(self._filler.close)
                framer.sampler.leave()
                if self._returns is not None:
                    self._returns.end()
                # Batches that the learner did not take are not delivered.
                self._report_taken(control.count_used())
                for split in self._used:
                    framer.sampler.cancel(1, split)

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
                if self._returns is not None:
                    self._returns.remember(drawn, reserved.batches)
                for slot, _ in zip(slots, self._filler.fill(slots, drawn), strict=True):
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


def _measured(control: ProducerControl) -> Measured | None:
    """Returns the waits that the learner wrote into the ring; None if it does not measure them."""
    waits = control.consumer_waits()
    if waits is None:
        return None
    taken, sum_s, buckets = waits
    # Batches that were ready are not in a bucket: they have waited for no time.
    return Measured((buckets[0] + max(taken - sum(buckets), 0), *buckets[1:]), sum_s)
