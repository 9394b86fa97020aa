"""What the classes of :mod:`.status` have in common: words, limits, durations, and how they become JSON."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

LATENCY_BOUNDS_S = (
    *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
"""Upper bounds of the buckets of every :class:`LatencyStatus`, in seconds; one more bucket has none."""

MIN_INTERVAL_S = 0.5
"""Shortest interval between two snapshots."""

MAX_INTERVAL_S = 3600.0
"""Longest interval between two snapshots."""

MAX_NEWEST_EPISODES = 64
"""Most episodes of a table that a snapshot names."""

MAX_NAMED = 128
"""Most actors of a table, and most learners, that a snapshot names; the others are summed in one entry."""

WINDOWS_S = (60.0, 600.0, 3600.0)
"""Lengths of the windows of a table's flows; a last one, 0, is since the start."""


class ServingState(str, enum.Enum):
    """What a server is doing."""

    UNSPECIFIED = ""
    """Not known: said by a newer server."""
    RESTORING = "restoring"
    """Reads its durable store; calls other than Status are refused."""
    SERVING = "serving"
    """Accepts calls."""
    DRAINING = "draining"
    """Stops: no new calls are accepted."""

    __str__ = str.__str__


class Verdict(str, enum.Enum):
    """Who waits for whom at a table."""

    UNSPECIFIED = ""
    """Not known: the table is being restored."""
    IDLE = "idle"
    """Nothing was added, sampled or refused in the last minute."""
    BALANCED = "balanced"
    """No caller waits for long."""
    LEARNERS_WAIT = "learners_wait"
    """Learners wait for batches."""
    ACTORS_WAIT = "actors_wait"
    """Actors wait until their episodes are taken."""
    STORE_FULL = "store_full"
    """The durable store's disk takes nothing: it is full or has failed."""

    __str__ = str.__str__


class WaitCause(str, enum.Enum):
    """What a caller waits for."""

    UNSPECIFIED = ""
    """Not known: said by a newer server."""
    DATA = "data"
    """Learners: nothing can be sampled."""
    RATE = "rate"
    """Both sides: the table's rate limit."""
    SAMPLING = "sampling"
    """Learners: the server draws, gathers and sends."""
    BUDGET = "budget"
    """Actors: bytes of ``limits.max_receive_bytes``."""
    THROTTLE = "throttle"
    """Actors: their turn, while learners wait for batches (``server.sample_share``)."""
    STORING = "storing"
    """Actors: other adds to the table, its readers, and the disk."""

    __str__ = str.__str__


class Transport(str, enum.Enum):
    """How batches come to a learner."""

    UNSPECIFIED = ""
    """Not decided yet."""
    RING = "ring"
    """A sampling stream, in shared memory."""
    STREAM = "stream"
    """A sampling stream, in messages."""
    UNARY = "unary"
    """Calls of Sample."""
    DEVICE = "device"
    """A sampling stream, as row numbers by which the learner gathers."""

    __str__ = str.__str__


class StatusPart:
    """Base of what a snapshot is made of."""

    __slots__ = ()
    derived: ClassVar[tuple[str, ...]] = ()
    """Names of the properties that :meth:`to_dict` adds to the fields."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, and what follows from them, as values that JSON has: dicts, lists, strings, numbers, bools and None."""
        plain = {one.name: _plain(getattr(self, one.name)) for one in fields(self)}  # type: ignore[arg-type]
        return plain | {name: getattr(self, name) for name in self.derived}


def _plain(value: Any) -> Any:
    if isinstance(value, StatusPart):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, enum.Enum):
        return value.value
    return {one.name: getattr(value, one.name) for one in fields(value)} if is_dataclass(value) else value


@dataclass(frozen=True, slots=True)
class LatencyStatus(StatusPart):
    """How long something takes."""

    count: int = 0
    """Durations measured."""
    sum_s: float = 0.0
    """Sum of the durations."""
    p50_s: float = 0.0
    """Median over the last minute, interpolated within its bucket; 0 if there is none."""
    p99_s: float = 0.0
    """99th percentile over the last minute."""
    bounds_s: tuple[float, ...] = ()
    """Upper bounds of the buckets except for the last one."""
    buckets: tuple[int, ...] = ()
    """Counts of the durations up to each bound and above the one before it, one more than bounds."""
