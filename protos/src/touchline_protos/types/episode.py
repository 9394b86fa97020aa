"""The episode as both ends speak of it, its limits, and what is raised where a message is not one.

Errors::

    ValueError
    └── CodecError         malformed: the text names the column, what was found and what was expected
        └── OversizeError  well-formed as far as read, but over a limit
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from touchline_protos.types.limits import DEFAULT_MAX_COLUMNS, DEFAULT_MAX_EPISODE_BYTES


@dataclass(frozen=True, slots=True)
class EpisodeKey:
    """Makes adding idempotent: unique for each episode, chosen by its sender."""

    client_id: str
    """Names the sender, 1 to 128 characters."""
    incarnation: int
    """Differs each time the sender starts (int64)."""
    sequence: int
    """Counts the sender's episodes, from 0 (int64)."""


class CodecError(ValueError):
    """A value that cannot be put into a message, or a message that holds no valid value.

    Args:
        message: what was wrong, with the column's name, what was found and what was expected.
        key: of the episode that it concerns, where that could be told.
        fatal: whether the stream that the message came from has lost its framing, so that nothing after it can be
            understood.
    """

    def __init__(self, message: str, *, key: EpisodeKey | None = None, fatal: bool = False) -> None:
        super().__init__(message)
        self.key = key
        self.fatal = fatal


class OversizeError(CodecError):
    """Something over a limit: too many bytes, columns, dimensions or characters."""


@dataclass(frozen=True, slots=True)
class CodecLimits:
    """What a receiver takes of one episode; checked before anything is allocated."""

    max_episode_bytes: int = DEFAULT_MAX_EPISODE_BYTES
    """Payload of all columns together."""
    max_columns: int = DEFAULT_MAX_COLUMNS
    """Columns of an episode."""
    max_name_chars: int = 256
    """Characters of a column's or table's name."""
    max_dims: int = 16
    """Dimensions of a column, the row dimension included."""
    max_nesting: int = 8
    """Dots in a column's name: levels of nested mappings that it stands for."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One whole episode: columns by (dotted) name, ``[rows, ...]`` each.

    The codec carries any columns; whether they have the same number of rows and fit a schema is the store's business.
    """

    columns: dict[str, np.ndarray]
    """By name, in wire order. Arrays of a decoded episode are C-contiguous and little-endian."""
    key: EpisodeKey | None = None
    """None: a retry is a new episode."""
    actor: str = ""
    """Name of the actor, up to 128 characters."""
    policy_version: int = 0
    """Version of the policy that acted (int64); 0 where unknown."""

    @property
    def length(self) -> int:
        """Rows, going by the first column that has any dimension; 0 where none has."""
        return next((int(column.shape[0]) for column in self.columns.values() if column.ndim), 0)

    @property
    def size_bytes(self) -> int:
        """Payload of all columns together."""
        return sum(column.nbytes for column in self.columns.values())


@dataclass(frozen=True, slots=True)
class StoredEpisode:
    """One whole episode as it is stored. Its arrays are the caller's: fresh, writable, and of nobody else's memory."""

    id: int
    """The server's number for it, never given to another episode of the same store."""
    columns: dict[str, np.ndarray]
    """[length, ...] by dotted name in the schema's order, to the bit as they were added; those that were asked for."""
    key: EpisodeKey | None
    """Under which it was added; None where it had none."""
    actor: str
    """Name of the actor that played it; may be empty."""
    policy_version: int
    """Version of the policy that played it; 0 where unknown."""
    length: int
    """Rows: one more than its transitions."""

    @property
    def size_bytes(self) -> int:
        """Payload of its columns together."""
        return sum(column.nbytes for column in self.columns.values())
