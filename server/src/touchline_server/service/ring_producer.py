"""Feeding a learner on this host through a ring in shared memory: batches are gathered straight into its slots.

Each ring has a thread of its own, which sleeps while the ring is full; there are at most ``ring.max_rings`` of them. Learners beyond
that get frames.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from contextlib import suppress

from touchline_protos.log_lines import get_logger
from touchline_protos.shm.ring import MAX_SLOTS, RingError, RingGeometry, RingWriter, shared_memory_id
from touchline_protos.shm.ring_slots import PinnedRegion
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.buffer import ReplayBuffer
from touchline_server.errors import NotReadyError, SchemaChangedError
from touchline_server.service.batch_framer import BatchSource
from touchline_server.service.throttle import AddThrottle
from touchline_server.store.episode_store import Selection
from touchline_server.store.gather import GatherPlan
from touchline_server.store.memory import available_host_bytes

logger = get_logger(__name__)

SPARE_SLOTS = 2
"""Slots beyond the batches that are to be under way: one that the learner holds and one that is being filled."""
MIN_SLOTS = 3

SMALL_AHEAD = 14
SMALL_AHEAD_BYTES = 1 << 23
"""Small batches are kept under way up to this many and this size, also where fewer are asked for: each sleep costs as much as a batch."""

MEMORY_SHARE = 0.5
"""Of the memory that is available, a new ring takes no more."""

MAX_TOLD = 64
"""Reasons that are told, each once."""
_NUMBER = re.compile(r"[0-9a-f]*[0-9][0-9a-f]*")
"""Also a name of hexadecimal digits: what differs in the same reason from one time to the next."""

AT_ONCE_BYTES = 1 << 22
"""Batches are drawn together up to this size."""


class RingPool:
    """Makes the rings of a server, as many and as large as its configuration allows. Lives in the event loop."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self._config = buffer.config.ring
        self._identity = shared_memory_id()
        self._rings = 0
        self._told: set[str] = set()

    def open(self, learner_id: str, plan: GatherPlan, batches: int) -> RingWriter:
        """Returns a ring for a learner.

        Args:
            learner_id: the ``shared_memory_id`` that it sent.
            plan: of its batches.
            batches: how many it wants under way.

        Raises:
            RingError: frames have to do; the text says why.
        """
        if not self._identity:
            raise RingError("the server is not on Linux on x86-64, or has no /dev/shm")
        if learner_id != self._identity:
            # Nothing to put right: most learners are on hosts of their own.
            raise RingError("the server is on another host, or in a container with another /dev/shm")
        try:
            return self._make(plan, batches)
        except RingError as error:
            self.tell_once(str(error))
            raise

    def tell_once(self, reason: str) -> None:
        """Says in the log why a learner on this host has no ring; each reason the first time only."""
        kind = _NUMBER.sub("#", reason)
        new = kind not in self._told and len(self._told) < MAX_TOLD
        logger.log(logging.WARNING if new else logging.DEBUG, "messages instead of a ring: %s", reason)
        if new:
            self._told.add(kind)

    def _make(self, plan: GatherPlan, batches: int) -> RingWriter:
        config = self._config
        if not config.max_rings:
            raise RingError("ring.max_rings is 0: rings are turned off")
        if self._rings >= config.max_rings:
            raise RingError(f"all {config.max_rings} rings are in use (ring.max_rings)")
        body_bytes = max(plan.layout.body_bytes, 1)
        fitting = config.max_ring_bytes // body_bytes
        ahead = max(batches, min(SMALL_AHEAD, SMALL_AHEAD_BYTES // body_bytes))
        slots = min(ahead + SPARE_SLOTS, fitting, MAX_SLOTS)
        if slots < MIN_SLOTS:
            raise RingError(f"{MIN_SLOTS} batches of {body_bytes} bytes do not fit into ring.max_ring_bytes, {config.max_ring_bytes}")
        geometry = RingGeometry.of(slots, plan.layout.body_bytes)
        available = available_host_bytes()
        # The kernel would rather end a process than refuse it the memory.
        if geometry.size_bytes > available * MEMORY_SHARE:
            raise RingError(f"a ring of {geometry.size_bytes} bytes: only {available} bytes of memory are available")
        ring = RingWriter(geometry)
        self._rings += 1
        return ring

    def close(self, ring: RingWriter) -> None:
        """Takes a ring down."""
        self._rings -= 1
        ring.close()


def ring_offer(ring: RingWriter, plan: GatherPlan) -> bytes:
    """Returns the message that offers a ring."""
    geometry = ring.geometry
    setup = pb.RingSetup(
        path=str(ring.path),
        size_bytes=geometry.size_bytes,
        slots=geometry.slots,
        slot_size_bytes=geometry.slot_size_bytes,
        layout=pb.Batch.FromString(plan.layout.header()),
        token=ring.token,
    )
    return pb.SampleStreamResponse(ring=setup).SerializeToString()


class RingProducer:
    """Keeps one ring full, in a thread of its own.

    Args:
        source: of the learner's batches.
        ring: to fill.
        plan: that the ring was made for; once batches look otherwise the feeder ends with SchemaChangedError.
        gate: holds adds back while the ring has free slots.
        tell: sends a message to the learner; called from the feeder's thread, must not block.
        ended: called from the feeder's thread as its last act, with what ended it, None where :meth:`stop` did.
    """

    def __init__(
        self,
        source: BatchSource,
        ring: RingWriter,
        plan: GatherPlan,
        gate: AddThrottle,
        *,
        tell: Callable[[bytes], None],
        ended: Callable[[Exception | None], None],
    ) -> None:
        self._source = source
        self._ring = ring
        self._plan = plan
        self._gate = gate
        self._tell = tell
        self._ended = ended
        self._stopping = False
        slots = range(ring.geometry.slots)
        self._views = [plan.layout.body_views(ring.slots.array(slot)) for slot in slots]
        # Batches that are drawn together cost less; big ones would keep their rows pinned for long.
        self._at_once = max(AT_ONCE_BYTES // plan.layout.body_bytes, 1)
        self._actors_told = 0
        self._pinned: PinnedRegion | None = None
        self._thread = threading.Thread(target=self._work, name="touchline-ring", daemon=True)

    def start(self) -> None:
        """Begins to fill."""
        self._thread.start()

    def stop(self) -> None:
        """Has the thread end, within one batch or one nap."""
        self._stopping = True
        with suppress(ValueError):
            self._ring.control.interrupt()

    def _work(self) -> None:
        fault: Exception | None = None
        try:
            while not self._stopping:
                slots = self._ring.control.free_slots()
                if slots:
                    with self._gate.sampler_waiting():
                        self._fill(slots[: self._at_once])
        except NotReadyError:
            fault = SchemaChangedError("the table was cleared; open the stream again")
        except Exception as error:
            fault = error
        finally:
            try:
                if self._pinned is not None:
                    self._pinned.close()
            finally:
                self._ended(fault)

    def _fill(self, slots: list[int]) -> None:
        with self._source.select(len(slots)) as (selections, plan):
            if plan.layout is not self._plan.layout and plan.layout.specs != self._plan.layout.specs:
                raise SchemaChangedError("the table has another schema now; open the stream again")
            names = self._source.new_actors(selections)
            if names:
                self._actors_told += len(names)
                actors = pb.ActorNames(actors=[pb.ActorName(index=index, name=name) for index, name in names.items()])
                self._tell(pb.SampleStreamResponse(actors=actors).SerializeToString())
            if selections[0].columns.on_cuda:
                self._fill_from_device(slots, selections, plan)
                return
            for slot, selection in zip(slots, selections, strict=True):
                plan.fill(selection, self._views[slot])
                self._ring.control.publish(slot, self._actors_told)

    def _fill_from_device(self, slots: list[int], selections: list[Selection], plan: GatherPlan) -> None:
        """The device copies into the slots by itself, where their memory can be pinned; all of them are waited for at once."""
        if self._pinned is None:
            import torch

            self._pinned = PinnedRegion(torch, self._ring.slots.whole_array())
        if self._pinned.pinned:
            begins = [self._ring.geometry.offset(slot) for slot in slots]
            plan.fill_pinned(selections, [self._pinned.tensor[begin : begin + plan.layout.body_bytes] for begin in begins])
        else:
            plan.fill_all(selections, [self._views[slot] for slot in slots])
        for slot in slots:
            self._ring.control.publish(slot, self._actors_told)
