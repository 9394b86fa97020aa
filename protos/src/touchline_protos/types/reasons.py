"""Reasons for which a server refuses a call, as words for programs; a status code by itself does not distinguish them all."""

from __future__ import annotations

import enum


class Reason(str, enum.Enum):
    """Values of the trailing metadata ``touchline-reason``. They are part of the wire contract, see docs/wire.md."""

    INVALID_ARGUMENT = "invalid-argument"
    """An argument is out of range."""
    INVALID_EPISODE = "invalid-episode"
    """The episode is malformed, or not of the table's schema."""
    UNKNOWN_TABLE = "unknown-table"
    """The table does not exist."""
    UNKNOWN_EPISODE = "unknown-episode"
    """An episode asked for by id is not stored."""
    KEY_CONFLICT = "key-conflict"
    """The episode's key was used before for another payload."""
    TOO_LARGE = "too-large"
    """Over a size limit."""
    OVER_LIMIT = "over-limit"
    """A limit on what may be in progress is reached, or the server's disk is full; try again later."""
    NOT_READY = "not-ready"
    """Nothing can be sampled yet."""
    INCOMPATIBLE_VERSION = "incompatible-version"
    """The client speaks another major version of the protocol."""
    UNAUTHENTICATED = "unauthenticated"
    """No token, or an unknown one."""
    PERMISSION_DENIED = "permission-denied"
    """The token's roles do not include the call."""
    RESTORING = "restoring"
    """The server is reading its durable store."""
    DRAINING = "draining"
    """The server is stopping."""
    SCHEMA_CHANGED = "schema-changed"
    """Batches no longer have the layout that the stream was opened with."""
    STORAGE_FAILED = "storage-failed"
    """The durable store cannot be read or written."""
    INTERNAL = "internal"
    """Something went wrong inside the server."""

    __str__ = str.__str__
