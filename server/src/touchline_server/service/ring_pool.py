"""Rings in shared memory for learners on this host: how many there are, how large they are, and how they are offered.

There are at most ``ring.max_rings`` of them; learners beyond that get frames.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict

from touchline_protos.log_lines import get_logger
from touchline_protos.shm.ring import MAX_SLOTS, RingError, RingGeometry, RingWriter, shared_memory_id
from touchline_protos.shm.ring_returns import ReturnGeometry
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.config.sections import RingConfig
from touchline_server.service.slot_fillers import SlotContent
from touchline_server.store.memory import available_host_bytes

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


class RingPool:
    """Makes the rings of a server, as many and as large as its configuration allows. Lives in the event loop."""

    def __init__(self, config: RingConfig) -> None:
        self._config = config
        self.offers_rows = config.device
        """Whether learners may get row numbers instead of batches."""
        self._identity = shared_memory_id()
        self._rings = 0
        self.size_bytes = 0
        """Shared memory of the rings in use."""
        self._logged: set[str] = set()

    def open(self, learner_id: str, content: SlotContent, batches: int, *, transitions: int = 0) -> RingWriter:
        """Returns a ring for a learner.

        Args:
            learner_id: the ``shared_memory_id`` that the learner sent.
            content: what its slots hold.
            batches: the number of batches that it wants ready.
            transitions: H, if its batches have priorities, which may come back through the ring; otherwise 0.

        Raises:
            RingError: the learner gets frames instead; the text says why.
        """
        if not self._identity:
            raise RingError("the server is not on Linux on x86-64, or has no /dev/shm")
        if learner_id != self._identity:
            # Not logged: most learners are on hosts of their own.
            raise RingError("the server is on another host, or in a container with another /dev/shm")
        try:
            return self._make(content, batches, transitions)
        except RingError as error:
            self.log_once(str(error))
            raise

    def log_once(self, reason: str, *, rows: bool = False) -> None:
        """Logs why a learner on this host has no ring, or no ring of rows: the first time, and for debugging after that."""
        kind = _NUMBER.sub("#", reason)
        new = kind not in self._logged and len(self._logged) < MAX_REASONS
        level, what = (logging.INFO, "a ring of batches instead of their rows") if rows else (logging.WARNING, "messages instead of a ring")
        logger.log(level if new else logging.DEBUG, "%s: %s", what, reason)
        if new:
            self._logged.add(kind)

    def close(self, ring: RingWriter) -> None:
        """Closes a ring."""
        self._rings -= 1
        self.size_bytes -= ring.geometry.size_bytes
        ring.close()

    def _make(self, content: SlotContent, batches: int, transitions: int) -> RingWriter:
        config = self._config
        if not config.max_rings:
            raise RingError("ring.max_rings is 0: rings are turned off")
        if self._rings >= config.max_rings:
            raise RingError(f"all {config.max_rings} rings are in use (ring.max_rings)")
        body_bytes = max(content.content_bytes, 1)
        fitting = config.max_ring_bytes // body_bytes
        ahead = max(batches, min(MIN_AHEAD, MIN_AHEAD_BYTES // body_bytes))
        slots = min(ahead + SPARE_SLOTS, fitting, MAX_SLOTS)
        if slots < MIN_SLOTS:
            raise RingError(f"{MIN_SLOTS} batches of {body_bytes} bytes do not fit into ring.max_ring_bytes, {config.max_ring_bytes}")
        returns = None
        if transitions:
            returns = ReturnGeometry.behind(content.content_bytes, transitions=transitions, batch_size=content.layout.batch_size)
        geometry = RingGeometry.of(slots, content.content_bytes if returns is None else returns.end)
        available = available_host_bytes()
        # Checked in advance: the kernel does not refuse the memory but kills a process once it is used.
        if geometry.size_bytes > available * MEMORY_SHARE:
            raise RingError(f"a ring of {geometry.size_bytes} bytes: only {available} bytes of memory are available")
        ring = RingWriter(geometry, returns, others=content.files)
        self._rings += 1
        self.size_bytes += geometry.size_bytes
        return ring


def ring_offer(ring: RingWriter, content: SlotContent, *, rows_refused: str = "") -> bytes:
    """Returns the message that offers a ring.

    Args:
        ring: the ring.
        content: what its slots hold.
        rows_refused: why that is not row numbers, if the learner asked for them.
    """
    geometry = ring.geometry
    setup = pb.RingSetup(
        path=str(ring.path),
        size_bytes=geometry.size_bytes,
        slots=geometry.slots,
        slot_size_bytes=geometry.slot_size_bytes,
        layout=pb.Batch.FromString(content.layout.header()),
        token=ring.token,
        rows=content.setup(),
        rows_refused=rows_refused,
        returns=None if ring.returns is None else pb.ReturnSetup(**asdict(ring.returns)),
    )
    return pb.SampleStreamResponse(ring=setup).SerializeToString()
