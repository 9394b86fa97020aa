"""What can go wrong with a request, in the domain's own words. gRPC's words for them are in one table, :mod:`.service.grpc_status`.

ReplayError
├── InvalidEpisodeError     an episode that is malformed or does not fit the schema
├── InvalidRequestError     a batch size, horizon, law, table or seed out of range
│   ├── UnknownTableError   a table that does not exist
│   └── UnknownEpisodeError an episode that is not stored
├── KeyConflictError        a key that was used before for another payload
├── NotReadyError           nothing can be sampled yet
├── TooLargeError           over a limit of size: of a message, an episode, the memory
├── OverloadedError         as many streams or actors as the server takes
├── UnauthenticatedError    no token, or none of the server's
├── AccessDeniedError       a token that is for something else
├── IncompatibleVersionError  a client of another major version
├── SchemaChangedError      batches look otherwise than when the stream was opened
├── RestoringError          the durable store is being read, or cannot be
├── StorageFullError        the durable store's disk is full
├── StorageFailedError      the durable store cannot be read or written
│   ├── DamagedStoreError   something in it is not as it was written
│   └── StorageUncertainError  writing failed once the commit had begun: it may be stored
├── StoreMismatchError      the durable store is of another format or configuration
├── StoreInUseError         another server has the data_dir or the scratch_dir
└── DrainingError           the server is about to stop
"""

from __future__ import annotations


class ReplayError(Exception):
    """Base of every error that a caller can act on. Its text says what was wrong, what was found and what was expected."""

    retry_after_s: float | None = None
    """Seconds after which the same request may pass; clients are told. None: waiting is not what helps, or how long is not known."""


class InvalidEpisodeError(ReplayError):
    """The episode is malformed or does not fit the schema; nothing of it was stored."""


class InvalidRequestError(ReplayError):
    """A parameter of the request is out of range."""


class UnknownTableError(InvalidRequestError):
    """The table does not exist."""


class UnknownEpisodeError(InvalidRequestError):
    """An episode that was asked for by its id is not stored: evicted, cleared, or never there. The text names the ids."""


class KeyConflictError(ReplayError):
    """The episode's key was used before for another payload; nothing was stored."""


class NotReadyError(ReplayError):
    """No stored episode is long enough to be sampled."""


class TooLargeError(ReplayError):
    """Over a limit of size; the text says which, and what to do instead."""


class OverloadedError(ReplayError):
    """The server has as much going on as it takes; the text says what. Try again later."""

    retry_after_s = 1.0


class UnauthenticatedError(ReplayError):
    """The call carries no token, or none of the server's."""


class AccessDeniedError(ReplayError):
    """The call's token is for something else."""


class IncompatibleVersionError(ReplayError):
    """The client speaks another major version of the protocol."""


class SchemaChangedError(ReplayError):
    """The table was cleared, so batches would look otherwise than when the stream was opened. Open it again."""


class DrainingError(ReplayError):
    """The server takes no new work because it is about to stop."""


class RestoringError(ReplayError):
    """The server is reading its durable store and takes no work before it has. Try again later."""


class StorageFullError(ReplayError):
    """The durable store has no room for the episode; nothing of it was stored. Try again once there is room."""

    retry_after_s = 5.0


class StorageFailedError(ReplayError):
    """The durable store cannot be read or written; the text says why."""


class DamagedStoreError(StorageFailedError):
    """Something in the durable store is not as it was written; the text says what to do."""


class StorageUncertainError(StorageFailedError):
    """Writing failed after the commit had begun. Whether the episode is stored is not known before the server is started again; sent again
    under the same key it is stored once."""


class StoreMismatchError(ReplayError):
    """The durable store was written in another format or under another configuration; the text says which."""


class StoreInUseError(ReplayError):
    """Another buffer has the data_dir or the scratch_dir."""
