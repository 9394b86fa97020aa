"""What a server does at one moment: what command line, page and metrics show, the same on both sides of the wire.

Each class is a message of ``replay.proto``, field by field. Totals are since the server started unless a field says otherwise. A field that
is None is not known. Nothing here needs numpy.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from touchline_protos.types.counts import Counts

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

    __str__ = str.__str__


class _Status:
    """Base of what a snapshot is made of."""

    __slots__ = ()
    derived: ClassVar[tuple[str, ...]] = ()
    """Names of the properties that :meth:`to_dict` adds to the fields."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, and what follows from them, as values that JSON has: dicts, lists, strings, numbers, bools and None."""
        plain = {one.name: _plain(getattr(self, one.name)) for one in fields(self)}  # type: ignore[arg-type]
        return plain | {name: getattr(self, name) for name in self.derived}


def _plain(value: Any) -> Any:
    if isinstance(value, _Status):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, enum.Enum):
        return value.value
    return {one.name: getattr(value, one.name) for one in fields(value)} if is_dataclass(value) else value


@dataclass(frozen=True, slots=True)
class LatencyStatus(_Status):
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


@dataclass(frozen=True, slots=True)
class PoolStatus(_Status):
    """Threads that do the same."""

    name: str = ""
    """``event-loop``, ``add``, ``decode``, ``sample``, ``ring``, ``commit``, ``table`` or ``http``."""
    threads: int = 0
    """Threads that exist."""
    busy: int = 0
    """Threads that work, or wait for a lock or the disk."""
    queued: int = 0
    """Pieces of work that wait for a thread."""
    cpu_share: float = 0.0
    """CPU time over the last minute, in cores."""


@dataclass(frozen=True, slots=True)
class MethodStatus(_Status):
    """Calls of one method that have ended."""

    method: str = ""
    """Name of the method: ``AddEpisode``."""
    failed: int = 0
    """Calls that ended with an error, refused ones included."""
    latency: LatencyStatus = LatencyStatus()
    """Time from the call's admission to its end; a stream's is how long it lasted."""


@dataclass(frozen=True, slots=True)
class ServerState(_Status):
    """The server as a whole."""

    version: str = ""
    """Version of the server."""
    protocol_version: str = ""
    """Version of the wire contract, MAJOR.MINOR."""
    state: ServingState = ServingState.UNSPECIFIED
    """State of the server: restoring, serving or draining."""
    uptime_s: float = 0.0
    """Time since the start."""
    memory_bytes: int = 0
    """Resident memory of the process, shared memory included."""
    ring_bytes: int = 0
    """Shared memory of the rings."""
    device_bytes: int = 0
    """Memory of the columns on CUDA devices."""
    cpu_share: float = 0.0
    """CPU time of the process over the last minute, in cores."""
    pools: tuple[PoolStatus, ...] = ()
    """Threads by what they do; the first is the event loop."""
    loop_delay: LatencyStatus = LatencyStatus()
    """How late the event loop wakes, looked at every second."""
    connections: int = 0
    """Connections with a call in progress."""
    calls: int = 0
    """Calls in progress, streams included."""
    streams: int = 0
    """Sampling streams, loads and reads in progress."""
    receive_bytes: int = 0
    """Bytes reserved for episodes that are being received."""
    receive_limit_bytes: int = 0
    """``limits.max_receive_bytes``."""
    send_bytes: int = 0
    """Bytes reserved for batches and episodes that are being sent."""
    send_limit_bytes: int = 0
    """``limits.max_send_bytes``."""
    methods: tuple[MethodStatus, ...] = ()
    """Calls that have ended, by method."""


@dataclass(frozen=True, slots=True)
class WaitStatus(_Status):
    """Waits of one side for one thing."""

    learners: bool = False
    """Whether learners wait; otherwise actors."""
    cause: WaitCause = WaitCause.UNSPECIFIED
    """Thing that they wait for."""
    waited_s: float = 0.0
    """Seconds waited in the last minute, summed over the callers."""
    waiting: int = 0
    """Callers that wait now."""
    total_s: float = 0.0
    """Seconds waited since the start, summed over the callers."""


@dataclass(frozen=True, slots=True)
class DeliveredStatus(_Status):
    """Batches that learners have, by transport."""

    transport: Transport = Transport.UNSPECIFIED
    """Way that the batches took."""
    batches: int = 0
    """Batches with slices of the table; one that is mixed from several tables counts at each."""
    slices: int = 0
    """Slices of the table."""
    rows: int = 0
    """Rows of these slices: H + 1 each."""
    bytes: int = 0
    """Bytes of the slices' columns and provenance."""


@dataclass(frozen=True, slots=True)
class FlowStatus(_Status):
    """What came into a table and went out of it during some time."""

    derived: ClassVar[tuple[str, ...]] = ("replay_ratio", "slices_per_row")

    window_s: float = 0.0
    """Length of the window: 60, 600 or 3600; 0 since the start."""
    span_s: float = 0.0
    """Seconds that it covers so far, by which to divide for a rate: less than the window after the start."""
    episodes_in: int = 0
    """Episodes added."""
    rows_in: int = 0
    """Rows added."""
    bytes_in: int = 0
    """Bytes of these episodes' columns."""
    rows_evicted: int = 0
    """Rows replaced or cleared."""
    episodes_evicted: int = 0
    """Episodes replaced or cleared."""
    delivered: tuple[DeliveredStatus, ...] = ()
    """Batches delivered, by transport."""

    @property
    def replay_ratio(self) -> float | None:
        """Rows sampled for each row added; None if none was added."""
        return sum(one.rows for one in self.delivered) / self.rows_in if self.rows_in else None

    @property
    def slices_per_row(self) -> float | None:
        """Slices delivered for each row added, which a rate limit's ``samples_per_insert`` is about; None if none was added."""
        return sum(one.slices for one in self.delivered) / self.rows_in if self.rows_in else None


@dataclass(frozen=True, slots=True)
class HeldCaller(_Status):
    """A caller that a rate limit holds back."""

    who: str
    """Name of the actor, or address of the learner."""
    waiting_s: float
    """Seconds since it was first held back, without having been granted anything since."""


@dataclass(frozen=True, slots=True)
class RateInfo(_Status):
    """A table's rate limit, and how it stands."""

    derived: ClassVar[tuple[str, ...]] = ("ratio", "recent_ratio")

    samples_per_insert: float
    """Target: slices delivered for each step added; 0 for any number."""
    tolerance: float
    """Slices by which deliveries may be ahead of the target, or behind it."""
    min_steps: int
    """Steps that must be stored before batches are delivered. They do not count for the target."""
    steps_added: int
    """Steps added since the limit is in force, or since the server started, that count for the target."""
    slices_delivered: int
    """Slices delivered since then."""
    recent_steps_added: int
    """Steps added within the last minute."""
    recent_slices_delivered: int
    """Slices delivered within the last minute."""
    owed_slices: float
    """Slices that learners are behind the target; negative if they are ahead of it."""
    adds_held: int
    """Number of actors that wait."""
    batches_held: int
    """Number of learners that wait."""
    adds: tuple[HeldCaller, ...]
    """Up to 16 of the actors that wait, those that have waited longest first."""
    batches: tuple[HeldCaller, ...]
    """Up to 16 of the learners that wait, those that have waited longest first."""
    adds_wait_for: str = ""
    """What actors wait for, in words; empty if none waits."""
    batches_wait_for: str = ""
    """What learners wait for, in words; empty if none waits."""

    @property
    def ratio(self) -> float | None:
        """Slices delivered for each step added, since the limit is in force; None if no step was added."""
        return self.slices_delivered / self.steps_added if self.steps_added else None

    @property
    def recent_ratio(self) -> float | None:
        """Slices delivered for each step added, within the last minute; None if no step was added."""
        return self.recent_slices_delivered / self.recent_steps_added if self.recent_steps_added else None


@dataclass(frozen=True, slots=True)
class DurabilityStatus(_Status):
    """A durable store."""

    mode: str = ""
    """``sync``, ``batch`` or ``memory``."""
    state: str = ""
    """``ok``; ``full``, which takes no episodes until the disk has space; ``failed``, until the server restarts. Empty while it is read."""
    reason: str = ""
    """Why the store accepts no episodes; empty if it does."""
    pending_episodes: int = 0
    """Episodes that are acknowledged or queued, and not yet committed."""
    pending_bytes: int = 0
    """Bytes of these episodes' columns."""
    unsynced_s: float = 0.0
    """Time since the oldest commit that is not synced; 0 if all are."""
    sync: LatencyStatus = LatencyStatus()
    """Duration of an fsync."""
    file_bytes: int = 0
    """Size of the database and its log."""
    disk_free_bytes: int = 0
    """Free space of the disk."""
    last_snapshot_unix_s: float = 0.0
    """Time of the last snapshot of the store; 0: never, or not known."""
    restored: bool = False
    """Whether the store was read; until then the table is not served."""
    restored_rows: int = 0
    """Rows read so far, or at the start."""
    restore_rows: int = 0
    """Rows in the store at the start."""


@dataclass(frozen=True, slots=True)
class EpisodeSummary(_Status):
    """A stored episode without its columns."""

    episode_id: int = 0
    """Id that the table gave it."""
    actor: str = ""
    """Name of the actor that played the episode."""
    rows: int = 0
    """Number of rows."""
    reward_sum: float | None = None
    """Return: the sum of the column reward; None if that is not finite."""
    bytes: int = 0
    """Bytes of all columns."""
    age_s: float = -1.0
    """Time since it was added; -1: from before the start."""
    policy_version: int = 0
    """Version of the policy that acted."""


@dataclass(frozen=True, slots=True)
class TableStatus(_Status):
    """One table."""

    table: str = ""
    """Name; empty for the default table."""
    counts: Counts = field(default_factory=Counts)
    """Counts."""
    capacity: int = 0
    """Maximum number of rows."""
    size_bytes: int = 0
    """Memory, or disk space, allocated for the columns."""
    device: str = ""
    """Device of the columns: ``cpu``, ``cuda:N`` or ``disk``; empty before the first episode."""
    verdict: Verdict = Verdict.UNSPECIFIED
    """Side that waits, if any."""
    verdict_text: str = ""
    """The verdict in a sentence: who waited for how long in the last minute, and for what."""
    learners_waited_s: float = 0.0
    """Seconds that learners waited in the last minute, summed over learners."""
    actors_waited_s: float = 0.0
    """Seconds that actors waited in the last minute, summed over actors."""
    waits: tuple[WaitStatus, ...] = ()
    """Waits of both sides by their causes."""
    flows: tuple[FlowStatus, ...] = ()
    """Flows in and out: in the last 60, 600 and 3600 s, and since the start."""
    seconds_until_full: float = -1.0
    """Seconds until each add evicts, at the last minute's rate; 0: it does already; -1: not known."""
    oldest_stored_s: float = -1.0
    """Time since the oldest stored episode was added; -1: none, or from before the start."""
    median_stored_s: float = -1.0
    """Time since the episode in the middle was added; -1 as above."""
    mean_sampled_s: float = -1.0
    """Mean age of the sampled episodes in the last minute; -1: none, or from before the start."""
    newest_policy_version: int | None = None
    """Highest policy version of the stored episodes; None without any."""
    mean_stored_policy_version: float | None = None
    """Mean policy version of the stored episodes; None without any."""
    mean_sampled_policy_version: float | None = None
    """Mean policy version of the sampled slices in the last minute; None without any."""
    episodes_not_sampled: int = 0
    """Stored episodes that are too short for a slice, as configured."""
    episodes_eligible: int = 0
    """Stored episodes that can be sampled, as configured."""
    rate: RateInfo | None = None
    """The rate limit and how it stands; None if there is none."""
    durability: DurabilityStatus | None = None
    """The durable store; None if there is none."""
    newest: tuple[EpisodeSummary, ...] = ()
    """The most recent episodes, newest first."""


@dataclass(frozen=True, slots=True)
class ActorStatus(_Status):
    """An actor, by its name and table; without a name, by the sender in its keys."""

    table: str = ""
    """Table that it adds to."""
    name: str = ""
    """Name of the actor, or of the sender."""
    address: str = ""
    """Address of the last call."""
    client_version: str = ""
    """Version of the client; empty if not known."""
    last_episode_age_s: float = -1.0
    """Time since the last episode was stored; -1: none was."""
    episodes: int = 0
    """Episodes stored."""
    rows: int = 0
    """Rows of these episodes."""
    rows_per_s: float = 0.0
    """Rows stored a second, in the last minute."""
    mean_rows: float = 0.0
    """Mean length of these episodes."""
    mean_reward_sum: float | None = None
    """Mean return of these episodes; None without a finite one."""
    policy_version: int = 0
    """Policy version of the last episode."""
    duplicates: int = 0
    """Episodes sent again that were stored already."""
    refused: int = 0
    """Episodes refused."""
    waited_s: float = 0.0
    """Seconds that the actor's calls waited in the last minute."""
    spool_episodes: int | None = None
    """Episodes in the actor's spool, as it said last; None without one."""
    spool_bytes: int | None = None
    """Bytes that the spool occupies on the actor's disk."""
    others: int = 0
    """If not 0: the entry sums this many actors beyond those that are named."""


@dataclass(frozen=True, slots=True)
class LearnerStatus(_Status):
    """A learner: a sampling stream, or the callers of Sample at one address."""

    learner_id: int = 0
    """Number of the stream since the start; 0 for callers of Sample and for the others."""
    address: str = ""
    """Address of the learner."""
    client_version: str = ""
    """Version of the client; empty if not known."""
    tables: tuple[str, ...] = ()
    """Tables that are sampled, in the order of a mix."""
    transport: Transport = Transport.UNSPECIFIED
    """Transport of the batches."""
    ring_refused: str = ""
    """Why there is no ring; empty with a ring, and if it asked for none."""
    batch_size: int = 0
    """Slices in a batch."""
    horizon: int = 0
    """Transitions in a slice."""
    connected_s: float = 0.0
    """Time since the stream was opened, or the first call."""
    credits: int = 0
    """Batches that the learner has granted and that were not sent yet; with a ring, free slots."""
    pending_bytes: int = 0
    """Bytes of batches that are made and not taken yet."""
    batches: int = 0
    """Batches delivered."""
    batches_per_s: float = 0.0
    """Batches a second, in the last minute."""
    wait: LatencyStatus = LatencyStatus()
    """Wait for a batch, 0 for one that was ready. With a ring the learner measures it."""
    waits_share: float = 0.0
    """Share of the last minute for which the learner waited."""
    others: int = 0
    """If not 0: the entry sums this many learners beyond those that are named."""


@dataclass(frozen=True, slots=True)
class RefusalStatus(_Status):
    """What was refused for one reason."""

    reason: str = ""
    """A :class:`~touchline_protos.types.reasons.Reason`."""
    table: str | None = None
    """Table of the refused episodes; None for calls that concern none, or are refused before it is known."""
    count: int = 0
    """Refused calls and episodes."""
    last_message: str = ""
    """Text of the last one."""
    last_who: str = ""
    """Actor or address that got it."""
    last_unix_s: float = 0.0
    """Time of the last one."""


@dataclass(frozen=True, slots=True)
class ServerStatus(_Status):
    """What a server does at one moment."""

    server: ServerState = field(default_factory=ServerState)
    """The server as a whole."""
    tables: tuple[TableStatus, ...] = ()
    """Tables that were asked for, the default one first."""
    actors: tuple[ActorStatus, ...] = ()
    """Actors by table: up to 128 of each table, the others in one entry."""
    learners: tuple[LearnerStatus, ...] = ()
    """Learners: up to 128, the others in one entry."""
    refusals: tuple[RefusalStatus, ...] = ()
    """Refused calls and episodes by reason and table, the most recent first."""
    time_unix_s: float = 0.0
    """Time of the snapshot."""
