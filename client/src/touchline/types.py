"""The values that the client returns beside batches and counts."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from touchline.errors import EpisodeResult as EpisodeResult  # beside the error that it carries; users find it here as well
from touchline_protos import Counts

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, slots=True)
class ReadyState:
    """How far a table is from being sampled."""

    can_sample: bool
    """At least one episode is long enough for the horizon."""
    min_steps_reached: bool
    """At least as many rows are stored as were asked for (``min_history`` if none were), or the buffer is full: another episode as long as
    its longest would evict."""
    min_history: int
    """Rows before training should start, as the server is configured."""
    counts: Counts
    """The table's figures at that moment."""
    horizon: int = 0
    """Transitions of a slice that ``can_sample`` speaks of; 0 from a server of an older version, which does not say."""
    episodes_eligible: int = 0
    """Stored episodes with at least horizon + 1 rows."""
    longest_episode: int = 0
    """Rows of the longest stored episode."""

    def describe(self) -> str:
        """Returns the figures in words: what is stored, and how much of it is long enough."""
        stored = f"{self.counts.steps_stored} steps in {self.counts.episodes_stored} episodes"
        if not self.horizon:
            return f"{stored}, {'some' if self.can_sample else 'none'} of them long enough"
        return (
            f"{stored}, {self.episodes_eligible} of them with the {self.horizon + 1} steps that horizon {self.horizon} needs, "
            f"the longest has {self.longest_episode}"
        )


@dataclass(frozen=True, slots=True)
class ColumnInfo:
    """What one stored column holds."""

    dtype: str
    """``float32``, ``bfloat16``, ..."""
    shape: tuple[int, ...]
    """Of one row."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says about itself."""

    version: str
    """Of the server."""
    protocol_version: str
    """MAJOR.MINOR; another major version than the client's is refused."""
    config_toml: str
    """The configuration in force, as TOML."""
    columns: dict[str, ColumnInfo]
    """The schema that the first episode fixed; empty before it."""
    device: str
    """Where the columns are: ``cpu``, ``cuda:N``, ``disk``; empty before the first episode."""
    size_bytes: int
    """Allocated for the columns."""
    capacity: int
    """Rows that fit."""
    max_message_bytes: int
    """Of one request or response; what is larger travels in chunks."""
    counts: Counts
    """The table's figures at that moment."""
    storage_state: str = ""
    """Of the durable store: ``ok``; ``full``, it takes no episodes until there is room on the disk; ``failed``, it takes none until the
    server is started again. Empty without one."""
    storage_reason: str = ""
    """Why it takes no episodes; empty if it does."""

    @property
    def row_convention(self) -> str:
        """Which row of an episode has no action: ``"incoming"``, the first; ``"outgoing"``, the last."""
        return str(tomllib.loads(self.config_toml)["sampling"]["row_convention"])

    @property
    def max_episode_bytes(self) -> int:
        """Of one episode, summed over its columns; a larger one is refused."""
        sections = tomllib.loads(self.config_toml)
        return int(sections.get("limits", sections["server"])["max_episode_bytes"])  # earlier servers have it in [server]


@dataclass(frozen=True, slots=True)
class WriterCounters:
    """What an :class:`~touchline.EpisodeWriter` did so far.

    Always ``appended + resumed == pending + acknowledged + refused + dropped``.
    """

    appended: int = 0
    """Episodes that were finished and handed on to be sent; the pieces of a cut episode count one each."""
    pending: int = 0
    """Of these and the resumed ones, not answered yet."""
    acknowledged: int = 0
    """Of these, stored by the server."""
    refused: int = 0
    """Of these, given up: refused by the server, damaged in the spool, or, without a spool, the client was closed."""
    discarded: int = 0
    """Episodes never handed on: unfinished when the body of ``with`` failed, or a single row, which holds no transition."""
    steps_appended: int = 0
    """Rows of the episodes that count as appended; the row at which an episode was cut counts in both pieces."""
    steps_acknowledged: int = 0
    """Rows of the episodes that count as acknowledged."""
    resumed: int = 0
    """Episodes of earlier writers that lay in the spool when this one opened it."""
    dropped: int = 0
    """Of the appended and the resumed ones, given up for want of room, as ``when_full`` says."""
    steps_dropped: int = 0
    """Rows of the episodes that count as dropped."""
    spool_bytes: int = 0
    """What the spool takes on the disk now, its log and free pages included; 0 without one."""
