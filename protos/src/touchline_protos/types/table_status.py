"""The part of :mod:`.status` that is about one table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from touchline_protos.types.counts import Counts
from touchline_protos.types.status_parts import LatencyStatus, StatusPart, Transport, Verdict, WaitCause


@dataclass(frozen=True, slots=True)
class WaitStatus(StatusPart):
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
class DeliveredStatus(StatusPart):
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
class FlowStatus(StatusPart):
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
class HeldCaller(StatusPart):
    """A caller that a rate limit holds back."""

    who: str
    """Name of the actor, or address of the learner."""
    waiting_s: float
    """Seconds since it was first held back, without having been granted anything since."""


@dataclass(frozen=True, slots=True)
class RateInfo(StatusPart):
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
class DurabilityStatus(StatusPart):
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
    sync: LatencyStatus = field(default_factory=LatencyStatus)
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
class EpisodeSummary(StatusPart):
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
class TableStatus(StatusPart):
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
