"""Rings whose slots name the rows of batches, for learners that gather by themselves from columns that they map."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from touchline_protos.log_lines import get_logger
from touchline_protos.shm.ring import RingError, RingWriter
from touchline_protos.shm.row_slots import RowSlots
from touchline_protos.shm.sealed_memory import MAX_FILES
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.errors import SchemaChangedError
from touchline_server.selectors.draw import Draw
from touchline_server.store.batch_draw import BatchDraw
from touchline_server.store.columns import Columns
from touchline_server.store.shared_columns import SharedColumns
from touchline_server.tables.sampler import GatherSource

logger = get_logger(__name__)

LOG_INTERVAL_S = 60.0
"""Time between two log lines about rows that were taken back from one learner."""

MAX_GROUP = 8
"""Most batches that are drawn together: their rows stay pinned until the last of them is gathered."""


class RowContent:
    """Slots that name rows of the columns of one table, or of each table of a mix. See :class:`SlotContent`.

    Args:
        source: what the learner's batches are gathered from.
        request: what the learner can gather from.

    Raises:
        RingError: it cannot gather from these columns; the text says why.
    """

    def __init__(self, source: GatherSource, request: pb.RowsRequest) -> None:
        self._plan, self.layout, columns = source
        self.steps = self._plan.steps
        """H + 1: steps of a slice."""
        self.columns = columns
        """The columns of each table; None for a table that has none, so no slices either."""
        # The descriptors are those of these objects: a table that is cleared drops its own reference.
        self._shared = [None if one is None else _shared(one, request) for one in columns]
        if len(columns) >= MAX_FILES:
            raise RingError(f"a mix of {len(columns)} tables, expected fewer than {MAX_FILES} to gather from")
        at = self.layout.offsets[len(self.layout.columns)]
        self.provenance_offset = at
        """Position of the provenance in a body."""
        self.slots = RowSlots(self.layout.batch_size, len(columns), self.layout.body_bytes - at)
        """What stands where in a slot."""
        self.files: Sequence[int] = [one.descriptor for one in self._shared if one is not None and one.kind == "host"]
        """Descriptors of the memory that the learner maps."""

    @property
    def content_bytes(self) -> int:
        """Bytes of a slot that are in use."""
        return self.slots.size_bytes

    def setup(self) -> pb.RowsSetup:
        """Returns the part of the offer that says how to gather."""
        outputs = self._plan.outputs
        tensors = []
        for output in outputs:
            first, stop, _ = output.steps.indices(self._plan.steps)
            tensors.append(pb.GatheredTensor(first_step=first, steps=stop - first))
        tables = [self._table(*pair) for pair in zip(self.columns, self._shared, strict=True)]
        return pb.RowsSetup(tables=tables, tensors=tensors, steps=self._plan.steps)

    def _table(self, columns: Columns | None, shared: SharedColumns | None) -> pb.SharedTable:
        if columns is None or shared is None:
            return pb.SharedTable()
        places = [shared.columns.get(output.name) for output in self._plan.outputs]
        return pb.SharedTable(
            memory=pb.COLUMN_MEMORY_CUDA if shared.kind == "cuda" else pb.COLUMN_MEMORY_HOST,
            size_bytes=shared.size_bytes,
            cuda_device=shared.device_uuid,
            cuda_handle=shared.handle,
            rows=columns.capacity,
            offset_bytes=[-1 if place is None else place.offset_bytes for place in places],
        )

    def filler(self, ring: RingWriter) -> RowFiller:
        """Returns what fills the slots of a ring."""
        return RowFiller(ring, self)


class RowFiller:
    """Writes the rows of each batch into its slot and keeps them pinned until the learner has freed it, see :class:`SlotFiller`.

    If a writer has waited for rows for ``ring.max_hold_s``, it takes them back: the slot is marked before any of them is overwritten.

    Args:
        ring: the ring.
        rows: what its slots refer to.
    """

    group = MAX_GROUP

    def __init__(self, ring: RingWriter, rows: RowContent) -> None:
        self._control = ring.control
        self._columns = rows.columns
        self._steps = rows.steps
        memory, geometry = ring.slots.whole_array(), ring.geometry
        slots, begin = rows.slots, geometry.offset(0)

        def of_slots(first: np.ndarray, at: int) -> np.ndarray:
            """Returns an array of all slots, [slots, ...], like one that stands at a position of the first."""
            return np.ndarray((geometry.slots, *first.shape), first.dtype, memory, at, (geometry.slot_size_bytes, *first.strides))

        self._rows = of_slots(slots.rows(memory, begin), begin)
        self._slices = of_slots(slots.slices(memory, begin), begin + slots.slices_offset)
        # Provenance stands in a slot as in a body, further up.
        count, shift = len(rows.layout.columns), begin + slots.provenance_offset - rows.provenance_offset
        places = zip(rows.layout.specs[count:], rows.layout.offsets[count:], strict=True)
        self._provenance = {spec.name: of_slots(np.empty(spec.shape, spec.dtype), shift + at) for spec, at in places}
        self._lock = threading.Lock()
        """Guards which draw each slot is of, between this thread and writers that take rows back."""
        self._draws: dict[int, _HeldDraw] = {}
        """The draw of each slot that the learner was not seen to have freed."""
        self._revoked = 0
        """Batches whose rows were taken back."""
        self._next_line = 0.0

    def fill(self, slots: Sequence[int], drawn: BatchDraw) -> Iterator[None]:
        """See :class:`SlotFiller`."""
        tables = [self._table_of(part.columns) for part in drawn.parts]
        for part in drawn.parts:
            part.columns.wait_written()  # another process's kernels are not ordered after this one's copies
        held = _HeldDraw(drawn, len(slots))
        with self._lock:
            for slot in slots:
                self._control.renew(slot)
                self._draws[slot] = held
        drawn.hold(lambda: self._revoke(held))
        chosen = np.array(slots)
        self._slices[chosen] = 0
        for table, part in zip(tables, drawn.parts, strict=True):
            begin, end = part.begin, part.end
            self._slices[chosen, table] = end - begin
            first = part.draw.first_row.reshape(len(slots), -1)
            capacity = part.columns.capacity
            self._rows[chosen, 0, begin:end] = np.where(first >= capacity, first - capacity, first)
            self._rows[chosen, 1, begin:end] = self._last(part.draw).reshape(-1, end - begin)
            for name, values in part.provenance():
                target = self._provenance[name]
                if values.ndim == 2:
                    target[chosen, begin:end] = values
                else:
                    target[chosen, :, begin:end] = values
        return iter([None] * len(slots))

    def freed(self, slots: Sequence[int]) -> None:
        """See :class:`SlotFiller`."""
        done: list[BatchDraw] = []
        revoked = False
        with self._lock:
            for slot in slots:
                held = self._draws.pop(slot, None)
                if held is not None:
                    held.slots -= 1
                    if not held.slots:
                        done.append(held.drawn)
                        revoked = revoked or held.revoked
                        # The draw knows its callback, which knows this: a cycle would keep the columns until a collection.
                        del held.drawn
        if revoked and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LOG_INTERVAL_S
            logger.warning("took back the rows of %d batches so far, which a learner kept for ring.max_hold_s", self._revoked)
        # Not with the lock held: a release waits for the writer that takes the same rows back, which wants the lock.
        for drawn in done:
            drawn.release()

    def close(self) -> None:
        """See :class:`SlotFiller`. The learner may still take what was published, so that is marked before it is no longer pinned."""
        with self._lock:
            slots = list(self._draws)
            for slot in slots:
                self._control.revoke(slot)
        self.freed(slots)

    def _last(self, draw: Draw) -> np.ndarray:
        """Returns how many rows follow each slice's first one before its last row repeats: [slices] int64."""
        if draw.valid is None:
            return np.full(len(draw.start), self._steps - 1)
        assert draw.length is not None  # a selector's draw
        return np.minimum(draw.length - 1 - draw.start, self._steps - 1)

    def _revoke(self, held: _HeldDraw) -> None:
        """Marks the slots of a draw; in a writer's thread, which overwrites rows afterwards."""
        with self._lock:
            slots = [slot for slot, one in self._draws.items() if one is held]
            for slot in slots:
                self._control.revoke(slot)
            self._revoked += 0 if held.revoked else len(slots)
            held.revoked = True

    def _table_of(self, columns: Columns) -> int:
        for number, one in enumerate(self._columns):
            if one is columns:
                return number
        raise SchemaChangedError("the table has new columns, since it was empty before; open the stream again")


class _HeldDraw:
    """A draw whose rows are pinned for some slots."""

    __slots__ = ("drawn", "revoked", "slots")

    def __init__(self, drawn: BatchDraw, slots: int) -> None:
        self.drawn = drawn
        """The draw, until all slots were freed."""
        self.slots = slots
        """Slots that the learner was not seen to have freed."""
        self.revoked = False


def _shared(columns: Columns, request: pb.RowsRequest) -> SharedColumns:
    """Returns what a learner needs to read columns.

    Raises:
        RingError: it cannot.
    """
    shared = columns.shared
    if shared is None:
        raise RingError(f"the columns are not shared: storage.share_columns is off, or has no effect on {columns.where}")
    if shared.kind == "host" and not request.host_columns:
        raise RingError("the columns are in host memory, which the learner does not read")
    if shared.kind == "cuda" and shared.device_uuid not in request.cuda_devices:
        raise RingError(f"the columns are on the CUDA device {shared.device_uuid}, which the learner does not reach")
    return shared
