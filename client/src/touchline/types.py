"""Values that the client takes and returns, besides episodes, batches and counts."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypedDict

from touchline.errors import EpisodeResult as EpisodeResult  # defined beside the error that carries it; users find it here as well
from touchline_protos import Counts
from touchline_protos.types.mix import Mix
from touchline_protos.types.status import ActorStatus as ActorStatus
from touchline_protos.types.status import DeliveredStatus as DeliveredStatus
from touchline_protos.types.status import DurabilityStatus as DurabilityStatus
from touchline_protos.types.status import EpisodeSummary as EpisodeSummary
from touchline_protos.types.status import FlowStatus as FlowStatus
from touchline_protos.types.status import HeldCaller as HeldCaller
from touchline_protos.types.status import LatencyStatus as LatencyStatus
from touchline_protos.types.status import LearnerStatus as LearnerStatus
from touchline_protos.types.status import MethodStatus as MethodStatus
from touchline_protos.types.status import PoolStatus as PoolStatus
from touchline_protos.types.status import RateInfo as RateInfo
from touchline_protos.types.status import RefusalStatus as RefusalStatus
from touchline_protos.types.status import ServerState as ServerState
from touchline_protos.types.status import ServerStatus as ServerStatus
from touchline_protos.types.status import ServingState as ServingState
from touchline_protos.types.status import TableStatus as TableStatus
from touchline_protos.types.status import Transport as Transport
from touchline_protos.types.status import Verdict as Verdict
from touchline_protos.types.status import WaitCause as WaitCause
from touchline_protos.types.status import WaitStatus as WaitStatus

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class SampleOptions(TypedDict, total=False):
    """Keyword arguments of :meth:`~touchline.ReplayClient.sample` and :meth:`~touchline.ReplayClient.batches`: what to draw.

    A key that is left out, or None, stands for the table's configuration on the server.
    """

    table: str | None
    """Table to draw from; the client's if left out."""
    batch_size: int | None
    """Number of slices B."""
    horizon: int | None
    """Transitions H in a slice."""
    law: str | None
    """Sampling law: ``"episode"``, ``"step"``, ``"recent"``, ``"prioritized"``, ``"fresh_first"`` or ``"task"``; see docs/laws.md."""
    seed: int | None
    """Seed of the draws: the same seed, adds and draws give the same batches."""
    recent_steps: int | None
    """Newest rows that ``"recent"`` draws from, all alike. This or the next one replaces both of the table's."""
    recent_half_life: float | None
    """Rows behind the newest one after which a start is half as likely under ``"recent"``, at least 1."""
    beta: float | None
    """Exponent of the weights under ``"prioritized"``, 0 to 1."""
    pad: str | None
    """``"end"``: every transition can be a start; rows beyond the episode's end repeat its last one, and ``batch.valid`` says which
    transitions are real. ``"none"``: slices end with their episode."""
    mix: Mix | None
    """Share of each table in the batch, ``{"online": 0.5, "demos": 0.5}``, instead of one table: each provides an exact number of slices
    (largest remainder, ties in this order), which stand table by table. ``batch.table`` has the table of each slice as its position here,
    and ``batch.table_names`` the names. Each table draws by its own law unless ``law`` is given; the first has the other defaults. Tables
    whose columns differ are refused."""
    rank: int | None
    """Rank of this learner in a job of ``world_size``, from 0 on; only for :meth:`~touchline.ReplayClient.batches`. The ranks share global
    batches of ``world_size`` times ``batch_size`` slices, and each gets its own part of them, in the order of the ranks; see
    docs/several-learners.md. All ranks must ask for the same."""
    world_size: int | None
    """Number of ranks, if there is a ``rank``."""
    job: str
    """Name of the job: ranks of the same tables and name belong together. Needed if there are several at a time."""
    first_batch: int | None
    """Number of the global batch that this rank goes on with, such as the number of updates made so far. Needed after a restart of the rank
    while others go on; the first is 0."""
    when_empty: str
    """Rule for a table of the mix that has nothing to sample: ``"wait"`` for it (the default), or give its share to the ``"others"``."""


class EpisodeSelection(TypedDict, total=False):
    """Keyword arguments of :meth:`~touchline.ReplayClient.episodes`: which episodes to read, and which of their columns.

    Keys that are left out select everything.
    """

    table: str | None
    """Table to read; the client's if left out."""
    ids: Iterable[int] | None
    """Ids of the episodes, in any order, each once; excludes ``first``, ``last``, ``actor`` and ``newest``."""
    first: int | None
    """Lowest id, inclusive."""
    last: int | None
    """Highest id, inclusive."""
    actor: str | None
    """Name of the actor whose episodes are read."""
    newest: int | None
    """Maximum number of episodes: only the most recent matching ones."""
    columns: Iterable[str] | None
    """Names of the columns; ``obs`` also selects every ``obs.*``."""


@dataclass(frozen=True, slots=True)
class ReadyState:
    """How far a table is from being sampled."""

    can_sample: bool
    """Whether at least one episode is long enough for the horizon."""
    min_steps_reached: bool
    """Whether as many rows are stored as were asked for (``min_history`` by default), or the buffer is full: another episode as long as its
    longest would evict."""
    min_history: int
    """Number of rows before training should start, by the server's configuration."""
    counts: Counts
    """Counts of the table at that moment."""
    horizon: int = 0
    """Number of transitions in a slice that ``can_sample`` refers to, 1 if the table pads slices; 0 from a server of an older version,
    which does not report it."""
    episodes_eligible: int = 0
    """Number of stored episodes with at least horizon + 1 rows."""
    longest_episode: int = 0
    """Number of rows in the longest stored episode."""

    def describe(self) -> str:
        """Returns in words how much is stored, and how much of it is long enough."""
        stored = f"{self.counts.steps_stored} steps in {self.counts.episodes_stored} episodes"
        if not self.horizon:
            return f"{stored}, {'some' if self.can_sample else 'none'} of them long enough"
        short = self.counts.episodes_stored - self.episodes_eligible
        padded = f"; the other {short} are too short to be sampled without pad='end'" if short and self.horizon > 1 else ""
        return (
            f"{stored}, {self.episodes_eligible} of them with the {self.horizon + 1} steps that horizon {self.horizon} needs, "
            f"the longest has {self.longest_episode}{padded}"
        )


@dataclass(frozen=True, slots=True)
class PriorityCounters:
    """What happened to the slices whose priorities a client was given."""

    updated: int
    """Slices whose priorities the server has set."""
    evicted: int
    """Slices of episodes that were no longer stored."""
    dropped: int
    """Slices that were not sent, because the server did not keep up, or whose update failed."""
    pending: int
    """Slices that are still to be sent."""


@dataclass(frozen=True, slots=True)
class ColumnInfo:
    """Dtype and shape of a stored column."""

    dtype: str
    """Name of the dtype: ``float32``, ``bfloat16``, ..."""
    shape: tuple[int, ...]
    """Shape of one row."""


@dataclass(frozen=True, slots=True)
class TableInfo:
    """A table's configuration and state."""

    name: str
    """Name of the table; empty for the default table."""
    config_toml: str
    """Configuration in force, as TOML: the sections of a server's configuration, with this table's values. Empty in
    :attr:`ServerInfo.tables`."""
    counts: Counts
    """Counts of the table at that moment."""
    capacity: int
    """Number of rows that fit."""
    device: str
    """Device of the columns: ``cpu``, ``cuda:N`` or ``disk``; empty before the first episode."""
    size_bytes: int
    """Bytes allocated for the columns."""
    storage_state: str
    """State of the durable store: ``ok``; ``full``, which takes no episodes until the disk has space again; ``failed``, which takes none
    until the server is restarted. Empty without a durable store."""
    storage_reason: str
    """Why the durable store takes no episodes; empty if it does."""
    created: bool
    """Whether it was created at run time; otherwise it is in the server's configuration."""
    law: str = ""
    """Sampling law, as configured."""
    episodes_not_sampled: int = 0
    """Number of stored episodes that are too short for a slice, as configured."""
    rate: RateInfo | None = None
    """Rate limit and how it stands; None if there is none."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server's version and configuration, and the state of a table."""

    version: str
    """Version of the server."""
    protocol_version: str
    """Version of the protocol, MAJOR.MINOR; a client of another major version is refused."""
    config_toml: str
    """Configuration in force, as TOML."""
    columns: dict[str, ColumnInfo]
    """Schema that the first episode fixed, by column name; empty before it."""
    device: str
    """Device of the columns: ``cpu``, ``cuda:N`` or ``disk``; empty before the first episode."""
    size_bytes: int
    """Bytes allocated for the columns."""
    capacity: int
    """Number of rows that fit."""
    max_message_bytes: int
    """Size limit of one request or response; anything larger travels in chunks."""
    counts: Counts
    """Counts of the table at that moment."""
    storage_state: str = ""
    """State of the durable store, as in :class:`TableInfo`; empty without one."""
    storage_reason: str = ""
    """Why the durable store takes no episodes; empty if it does."""
    episodes_not_sampled: int = 0
    """Number of stored episodes that are too short for a slice, as configured; ``pad="end"`` samples those with at least two rows."""
    rate: RateInfo | None = None
    """Rate limit of the table; None if there is none."""
    tables: dict[str, TableInfo] = field(default_factory=dict)
    """Every table that the token may use, by name, the default one first; its name is empty. Nothing from a server of protocol 1.0."""

    @property
    def row_convention(self) -> str:
        """Which row of an episode has no action: ``"incoming"`` for the first, ``"outgoing"`` for the last."""
        return str(tomllib.loads(self.config_toml)["sampling"]["row_convention"])

    @property
    def max_episode_bytes(self) -> int:
        """Size limit of one episode, summed over its columns; a larger one is refused."""
        config = tomllib.loads(self.config_toml)
        # Servers of older versions have the key in [server].
        return int(config.get("limits", config["server"])["max_episode_bytes"])


@dataclass(frozen=True, slots=True)
class WriterCounters:
    """What an :class:`~touchline.EpisodeWriter` has done, at one moment.

    Always ``appended + resumed == pending + acknowledged + refused + dropped``.
    """

    appended: int = 0
    """Episodes that were ended and queued to be sent; each piece of a cut episode counts."""
    pending: int = 0
    """Episodes, of those appended and resumed, that have no answer yet."""
    acknowledged: int = 0
    """Episodes, of those appended and resumed, that the server has stored."""
    refused: int = 0
    """Episodes, of those appended and resumed, that were given up: refused by the server, damaged in the spool or, without a spool, left
    when the client was closed."""
    discarded: int = 0
    """Episodes that were never queued: unfinished when the body of ``with`` failed, or a single row, which holds no transition."""
    steps_appended: int = 0
    """Rows of the appended episodes; a row at which an episode was cut counts in both pieces."""
    steps_acknowledged: int = 0
    """Rows of the acknowledged episodes."""
    resumed: int = 0
    """Episodes of earlier writers that were in the spool when this writer opened it."""
    dropped: int = 0
    """Episodes, of those appended and resumed, that were given up because the queue was full, by the policy ``when_full``."""
    steps_dropped: int = 0
    """Rows of the dropped episodes."""
    spool_bytes: int = 0
    """Bytes that the spool occupies on disk now, its log and free pages included; 0 without a spool."""
