"""Episodes, their limits, and the errors of the codec::

ValueError
└── CodecError         malformed; the text names the column, the value found and the one expected
    └── OversizeError  well-formed as far as it was read, but over a limit
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from touchline_protos.types.limits import DEFAULT_MAX_COLUMNS, DEFAULT_MAX_EPISODE_BYTES


@dataclass(frozen=True, slots=True)
class EpisodeKey:
    """Identifies an episode for its sender, which makes adding idempotent. Immutable, hashable."""

    client_id: str
    """Name of the sender, 1 to 128 characters."""
    incarnation: int
    """Number that differs each time the sender starts (int64)."""
    sequence: int
    """Position among the sender's episodes since its start, from 0 (int64)."""


class CodecError(ValueError):
    """A value that cannot be encoded, or a message that cannot be decoded.

    Args:
        message: text that names the column, the value found and the one expected.
        key: key of the episode concerned; None if unknown.
        fatal: whether the stream of messages has lost its framing, so that no later message can be understood.
    """

    def __init__(self, message: str, *, key: EpisodeKey | None = None, fatal: bool = False) -> None:
        super().__init__(message)
        self.key = key
        self.fatal = fatal


class OversizeError(CodecError):
    """Something over a limit: too many bytes, columns, dimensions or characters."""


@dataclass(frozen=True, slots=True)
class CodecLimits:
    """Maximum sizes that a receiver accepts of one episode; checked before anything is allocated. Immutable, hashable."""

    max_episode_bytes: int = DEFAULT_MAX_EPISODE_BYTES
    """Maximum payload of all columns together, in bytes."""
    max_columns: int = DEFAULT_MAX_COLUMNS
    """Maximum number of columns."""
    max_name_chars: int = 256
    """Maximum number of characters in the name of a column or table."""
    max_dims: int = 16
    """Maximum number of dimensions of a column, including the rows."""
    max_nesting: int = 8
    """Maximum number of dots in a column's name, which stand for levels of nested mappings."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One whole episode.

    The codec accepts any columns; the store checks that they have the same number of rows and fit the schema.
    """

    columns: dict[str, np.ndarray]
    """Columns [rows, ...] by (dotted) name, in wire order. Those of a decoded episode are C-contiguous and little-endian."""
    key: EpisodeKey | None = None
    """Key of the episode; None if it has none, so that a retry is a new episode."""
    actor: str = ""
    """Name of the actor that played it, up to 128 characters; may be empty."""
    policy_version: int = 0
    """Version of the policy that acted (int64); 0 if unknown."""

    @property
    def length(self) -> int:
        """Number of rows, of the first column that has a dimension; 0 if no column has."""
        return next((int(column.shape[0]) for column in self.columns.values() if column.ndim), 0)

    @property
    def size_bytes(self) -> int:
        """Payload of all columns together, in bytes."""
        return sum(column.nbytes for column in self.columns.values())


@dataclass(frozen=True, slots=True)
class StoredEpisode:
    """One whole stored episode. Its arrays belong to the caller: writable, and sharing memory with nothing else."""

    id: int
    """Id that the store gave it, and gives to no other episode."""
    columns: dict[str, np.ndarray]
    """Columns [length, ...] that were asked for, by dotted name in the schema's order, bit for bit as they were added."""
    key: EpisodeKey | None
    """Key under which it was added; None if it had none."""
    actor: str
    """Name of the actor that played it; may be empty."""
    policy_version: int
    """Version of the policy that acted; 0 if unknown."""
    length: int
    """Number of rows: one more than its transitions."""

    @property
    def size_bytes(self) -> int:
        """Payload of its columns together, in bytes."""
        return sum(column.nbytes for column in self.columns.values())
