"""What goes along the write path: a request to store an episode, its planned insert, and the answer."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from touchline_protos import Counts
from touchline_protos.codec import Episode
from touchline_server.store.schema import Schema


@dataclass(eq=False, slots=True)
class AddRequest:
    """An episode to be stored. Immutable, but not a frozen dataclass, which would triple the cost of creating one."""

    episode: Episode
    digest: int
    """Checksum of its columns (:func:`~touchline_server.store.dedup.payload_digest`); 0 if neither its key nor a journal needs one."""
    values_checked: bool = False
    """Whether its values are known to be finite where they must be. Then its columns need have only dtypes, shapes and first rows."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The answer to an add."""

    episode_id: int
    """Id of the stored episode; -1 for a duplicate whose id is no longer known."""
    first_row: int
    """Physical row of its first step; -1 for a duplicate."""
    duplicate: bool
    """Whether the episode was stored before, under the same key."""
    counts: Counts
    """The table's counts with this episode."""


@dataclass(eq=False, slots=True)
class PlannedInsert:
    """One episode that will be stored."""

    request: AddRequest
    episode_id: int
    length: int
    """Number of rows."""
    evicted: Sequence[int]
    """Ids of the episodes evicted for it, ascending; episodes of its own group may be among them."""
    schema: Schema | None
    """The schema, if this episode fixes it."""
    outcome: Stored | Exception | None = None
    """The answer, or why it could not be stored; None until the plan is applied or dropped."""


@dataclass(eq=False, slots=True)
class Duplicate:
    """A request whose key was stored before, or is to be stored by an earlier request of the group."""

    episode_id: int
    """-1 if only the key is still known."""
    original: PlannedInsert | None = None
    """The earlier request's insert; None if it was stored before."""


class CommitFuture(Future[Stored]):
    """The answer to an episode that was submitted and may still wait for the disk."""

    cost_s = 0.0
    """CPU seconds spent on storing it; set before the future is done."""
