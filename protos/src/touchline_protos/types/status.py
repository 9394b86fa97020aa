"""What a server does at one moment: what command line, page and metrics show, the same on both sides of the wire.

Each class is a message of ``replay.proto``, field by field. Totals are since the server started unless a field says otherwise. A field that
is None is not known. Nothing here needs numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from touchline_protos.types.status_parts import LATENCY_BOUNDS_S as LATENCY_BOUNDS_S
from touchline_protos.types.status_parts import MAX_INTERVAL_S as MAX_INTERVAL_S
from touchline_protos.types.status_parts import MAX_NAMED as MAX_NAMED
from touchline_protos.types.status_parts import MAX_NEWEST_EPISODES as MAX_NEWEST_EPISODES
from touchline_protos.types.status_parts import MIN_INTERVAL_S as MIN_INTERVAL_S
from touchline_protos.types.status_parts import WINDOWS_S as WINDOWS_S
from touchline_protos.types.status_parts import LatencyStatus as LatencyStatus
from touchline_protos.types.status_parts import ServingState as ServingState
from touchline_protos.types.status_parts import StatusPart as StatusPart
from touchline_protos.types.status_parts import Transport as Transport
from touchline_protos.types.status_parts import Verdict as Verdict
from touchline_protos.types.status_parts import WaitCause as WaitCause
from touchline_protos.types.table_status import DeliveredStatus as DeliveredStatus
from touchline_protos.types.table_status import DurabilityStatus as DurabilityStatus
from touchline_protos.types.table_status import EpisodeSummary as EpisodeSummary
from touchline_protos.types.table_status import FlowStatus as FlowStatus
from touchline_protos.types.table_status import HeldCaller as HeldCaller
from touchline_protos.types.table_status import RateInfo as RateInfo
from touchline_protos.types.table_status import TableStatus as TableStatus
from touchline_protos.types.table_status import WaitStatus as WaitStatus


@dataclass(frozen=True, slots=True)
class PoolStatus(StatusPart):
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
class MethodStatus(StatusPart):
    """Calls of one method that have ended."""

    method: str = ""
    """Name of the method: ``AddEpisode``."""
    failed: int = 0
    """Calls that ended with an error, refused ones included."""
    latency: LatencyStatus = field(default_factory=LatencyStatus)
    """Time from the call's admission to its end; a stream's is how long it lasted."""


@dataclass(frozen=True, slots=True)
class ServerState(StatusPart):
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
    loop_delay: LatencyStatus = field(default_factory=LatencyStatus)
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
class ActorStatus(StatusPart):
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
class LearnerStatus(StatusPart):
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
    wait: LatencyStatus = field(default_factory=LatencyStatus)
    """Wait for a batch, 0 for one that was ready. With a ring the learner measures it."""
    waits_share: float = 0.0
    """Share of the last minute for which the learner waited."""
    others: int = 0
    """If not 0: the entry sums this many learners beyond those that are named."""


@dataclass(frozen=True, slots=True)
class RefusalStatus(StatusPart):
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
class ServerStatus(StatusPart):
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
