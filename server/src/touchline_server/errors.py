"""The errors of the server and of the in-process buffer.

Names and tree are those of the client (``touchline.errors``), so the same ``except`` clauses serve both; distinctions that only the server
makes stand below them. One table, :mod:`.service.grpc_status`, maps them to gRPC's status codes.

ReplayError
├── InvalidArgumentError (also ValueError)  an argument is out of range
│   ├── InvalidEpisodeError         malformed, or not of the table's schema
│   ├── UnknownTableError           the table does not exist
│   └── UnknownEpisodeError         an episode asked for by id is not stored
├── KeyConflictError                the episode's key was used before for another payload
├── TooLargeError                   a message, an episode or the memory is over a size limit
├── OverLimitError                  as much is in progress as the limits allow; try again later
│   └── StorageFullError            the durable store's disk is full
├── NotReadyError                   nothing can be sampled yet
├── IncompatibleVersionError        the client speaks another major version of the protocol
├── AccessDeniedError               the token's roles do not include the call
│   └── UnauthenticatedError        no token, or an unknown one
├── UnavailableError                the server cannot serve the call now
│   ├── RestoringError              the durable store is being read
│   ├── DrainingError               the server is stopping
│   ├── SchemaChangedError          batches no longer have the layout that the stream was opened with
│   └── StorageFailedError          the durable store cannot be read or written
│       ├── DamagedStoreError       its contents are not what was written
│       └── StorageUncertainError   a write failed after the commit had begun: the episode may be stored
├── StoreMismatchError              the durable store has another format or configuration
└── StoreInUseError                 another server holds the data_dir or the scratch_dir
"""

from __future__ import annotations

import warnings
from typing import Any

RENAMED = {"InvalidRequestError": "InvalidArgumentError", "OverloadedError": "OverLimitError"}
"""Former names, which still work and warn."""


class ReplayError(Exception):
    """Base of every error that a caller can act on. The message says what was wrong, what was found and what was expected."""

    retry_after_s: float | None = None
    """Seconds after which the same request may succeed; sent to clients. None: waiting does not help, or the delay is not known."""


class InvalidArgumentError(ReplayError, ValueError):
    """An argument of the request is out of range."""


class InvalidEpisodeError(InvalidArgumentError):
    """The episode is malformed or does not fit the schema; nothing of it was stored."""


class UnknownTableError(InvalidArgumentError):
    """The table does not exist."""


class UnknownEpisodeError(InvalidArgumentError):
    """An episode asked for by its id is not stored: it was evicted or cleared, or never existed. The message names the ids."""


class KeyConflictError(ReplayError):
    """The episode's key was used before for another payload; nothing was stored."""


class TooLargeError(ReplayError):
    """A size limit was exceeded; the message names the limit and what to do instead."""


class OverLimitError(ReplayError):
    """As much is in progress as the limits allow; the message names the limit. Try again later."""

    retry_after_s = 1.0


class StorageFullError(OverLimitError):
    """The durable store has no space for the episode; nothing of it was stored. Try again once there is space."""

    retry_after_s = 5.0


class NotReadyError(ReplayError):
    """No stored episode is long enough to be sampled."""


class IncompatibleVersionError(ReplayError):
    """The client speaks another major version of the protocol."""


class AccessDeniedError(ReplayError):
    """The roles of the call's token do not include the call."""


class UnauthenticatedError(AccessDeniedError):
    """The call carries no token, or one that the server does not know."""


class UnavailableError(ReplayError):
    """The server cannot serve the call now. Try again later, or once the fault that the message names is repaired."""


class RestoringError(UnavailableError):
    """The server is reading its durable store and accepts no work until it has finished."""


class DrainingError(UnavailableError):
    """The server is stopping and accepts no new work."""


class SchemaChangedError(UnavailableError):
    """The table was cleared, so batches no longer have the layout that the stream was opened with. Open the stream again."""


class StorageFailedError(UnavailableError):
    """The durable store cannot be read or written; the message says why."""


class DamagedStoreError(StorageFailedError):
    """The durable store's contents are not what was written; the message says what to do."""


class StorageUncertainError(StorageFailedError):
    """A write failed after the commit had begun. Whether the episode is stored is not known until the server is started again; sent again
    under the same key, it is stored once."""


class StoreMismatchError(ReplayError):
    """The durable store was written in another format or under another configuration; the message says which."""


class StoreInUseError(ReplayError):
    """Another buffer holds the data_dir or the scratch_dir."""


def __getattr__(name: str) -> Any:
    if name not in RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"touchline_server.errors.{name} is now {RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[RENAMED[name]]
