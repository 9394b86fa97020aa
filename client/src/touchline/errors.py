"""The errors of the client. The server's in-process buffer raises errors of the same names, in the same tree (``touchline_server.errors``).

TouchlineError
├── InvalidArgumentError (also ValueError)  an argument is out of range
│   ├── InvalidEpisodeError         malformed, or not of the table's schema: column, found, expected
│   ├── UnknownTableError           the table does not exist
│   └── UnknownEpisodeError         an episode asked for by id is not stored
├── KeyConflictError                the episode's key was used before for another payload
├── TooLargeError                   a message, an episode or a batch is over a size limit
├── OverLimitError (.retry_after_s) as much is in progress as the server allows, or its disk is full; try again later
├── NotReadyError (.counts)         nothing can be sampled yet, or too little is stored
├── IncompatibleVersionError        client and server speak different major versions of the protocol
├── AccessDeniedError               the token's roles do not include the call
│   └── UnauthenticatedError        no token, or one that the server does not know
├── UnavailableError                the server cannot be reached, is starting or stopping, or cannot use its storage
│   └── TlsError                    no TLS session: a certificate, name or key is wrong, so trying again does not help
├── DeadlineError                   no answer in time; whether the call had an effect is not known
├── ClosedError                     used after it was closed
├── ForkError                       used in a forked child
├── LoadError (.results)            some episodes of a load were refused; the others are stored
├── SpoolError                      a writer's spool on disk is in use, damaged, or cannot be read or written
├── UnacknowledgedError (.results)  episodes of an EpisodeWriter were refused, or not acknowledged in time
└── ServerError                     something went wrong inside the server, or between it and the client

Every error can be pickled and copied, for example by ``multiprocessing``: its message is enough to make one, and what else it carries
travels in its ``__dict__``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from touchline_protos import Counts
from touchline_protos.codec import EpisodeKey


class TouchlineError(Exception):
    """Base of every error that this package raises on its own."""

    key: EpisodeKey | None = None
    """Key of the episode that ``add`` sent, if it is not known whether it is stored: added again with this key, it is stored once."""


class InvalidArgumentError(TouchlineError, ValueError):
    """An argument is out of range, or names something that does not exist."""


class InvalidEpisodeError(InvalidArgumentError):
    """The episode is malformed or not of the table's schema. The message names the column, what was found and what was expected."""


class UnknownTableError(InvalidArgumentError):
    """The table does not exist."""


class UnknownEpisodeError(InvalidArgumentError):
    """An episode asked for by its id is not stored: it was evicted or cleared, or never existed. The message names the ids."""


class KeyConflictError(TouchlineError):
    """The episode's key was used before for another payload; nothing was stored."""


class TooLargeError(TouchlineError):
    """An episode, a message or a batch is over a size limit; the message names the limit."""


class OverLimitError(TouchlineError):
    """As much is in progress as the server allows (streams, for instance), or its disk is full; the same call may succeed later.

    Idempotent calls were retried, after the delay that the server asked for, before this was raised.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds that the server asks to wait before the next attempt; None if it did not say."""


class NotReadyError(TouchlineError):
    """Nothing can be sampled yet, or less is stored than was waited for."""

    def __init__(self, message: str, counts: Counts | None = None) -> None:
        super().__init__(message)
        self.counts = counts
        """Counts of the table; None if they are not known."""


class IncompatibleVersionError(TouchlineError):
    """Client and server speak different major versions of the protocol."""


class AccessDeniedError(TouchlineError):
    """The server, or a proxy before it, refused the call: the roles of the client's token do not include it."""


class UnauthenticatedError(AccessDeniedError):
    """The client sent no token, or one that the server does not know."""


class UnavailableError(TouchlineError):
    """The server cannot be reached, is starting or stopping, or cannot use its storage.

    Idempotent calls were retried before this was raised.
    """


class TlsError(UnavailableError):
    """Client and server cannot agree on a TLS session: the client does not trust the server's certificate, the name in it is another, or
    one of the two does not use TLS. Not retried, because a certificate or a setting has to change."""


class DeadlineError(TouchlineError):
    """There was no answer in time. Whether the call had an effect is not known; an episode may be sent again with the same key."""


class ClosedError(TouchlineError):
    """The client, writer or stream has been closed."""


class ForkError(TouchlineError):
    """A forked child used what belongs to its parent: a stream or writer that was open at the fork or, if gRPC was imported before this
    package and without fork support, the client itself."""


@dataclass(frozen=True, slots=True)
class EpisodeResult:
    """Outcome of one episode."""

    key: EpisodeKey
    """Key of the episode: sent again with it, the episode is never stored twice."""
    episode_id: int = -1
    """The server's number for the episode; -1 if it was refused or the number is not known."""
    duplicate: bool = False
    """Whether its key was stored before: acknowledged, not stored again."""
    error: TouchlineError | None = None
    """Why it was refused or not acknowledged; None if it is stored."""


class LoadError(TouchlineError):
    """Some episodes of a load were refused; all others are stored."""

    def __init__(self, message: str, results: Sequence[EpisodeResult] = ()) -> None:
        super().__init__(message)
        self.results = tuple(results)
        """Outcome of every episode, in the order in which they were given."""


class SpoolError(TouchlineError):
    """The spool of an :class:`~touchline.EpisodeWriter` is in use by another writer, damaged, of a newer format, or cannot be read or
    written."""


class UnacknowledgedError(TouchlineError):
    """Episodes of a writer were refused by the server, or not acknowledged in time."""

    def __init__(self, message: str, results: Sequence[EpisodeResult] = ()) -> None:
        super().__init__(message)
        self.results = tuple(results)
        """Outcome of every such episode, with its key and error."""


class ServerError(TouchlineError):
    """Something went wrong inside the server, or between it and the client; the server's log has the details."""
