"""What can go wrong, as one tree::

TouchlineError
├── InvalidArgumentError (also ValueError)    an argument out of range, an unknown table
│   └── InvalidEpisodeError                   malformed, or not of the table's schema: column, found, expected
├── KeyConflictError                          the episode's key was used before for another payload
├── TooLargeError                             over a limit on sizes
├── OverLimitError (.retry_after_s)           the server has as much to do as it allows; try again later
├── NotReadyError (.counts)                   nothing can be sampled yet, or too little is stored
├── IncompatibleVersionError                  client and server speak different major versions
├── AccessDeniedError                         the server wants credentials that were not given, or others
├── UnavailableError                          the server cannot be reached, is starting, or is draining
│   └── TlsError                              no TLS session: a certificate, name or key is wrong, so trying again does not help
├── DeadlineError                             no answer in time; whether the call had an effect is not known
├── ClosedError                               used after it was closed
├── ForkError                                 used in a forked child that cannot use gRPC
├── LoadError (.results)                      some episodes of a load were refused; the others are stored
├── SpoolError                                a writer's spool on the disk is in use, damaged, or cannot be written
├── UnacknowledgedError (.results)            an EpisodeWriter's episodes that were refused or not acknowledged in time
└── ServerError                               something went wrong inside the server, or between it and us

All of them can be pickled and copied, as ``multiprocessing`` does to hand one on: each can be made from its message alone, and what else
it carries travels in its ``__dict__``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from touchline_protos import Counts
from touchline_protos.codec import EpisodeKey


class TouchlineError(Exception):
    """The root of all errors that this package raises on its own."""

    key: EpisodeKey | None = None
    """Of the episode that ``add`` sent, if it is not known whether it is stored: added again with this key it is stored once."""


class InvalidArgumentError(TouchlineError, ValueError):
    """An argument is out of range, or names what does not exist."""


class InvalidEpisodeError(InvalidArgumentError):
    """The episode is malformed or not of the table's schema. The message names the column, what was found and what was expected."""


class KeyConflictError(TouchlineError):
    """The episode's key was used before for another payload."""


class TooLargeError(TouchlineError):
    """An episode, a message or a batch is over a limit on sizes."""


class OverLimitError(TouchlineError):
    """The server has as much to do as it allows (streams, for instance); the same call may pass later. What is idempotent was retried,
    after the delay that the server asked for, before this was raised."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds that the server asks to wait before the next attempt; None where it did not say."""


class NotReadyError(TouchlineError):
    """Nothing can be sampled yet, or less is stored than was waited for."""

    def __init__(self, message: str, counts: Counts | None = None) -> None:
        super().__init__(message)
        self.counts = counts
        """The table's figures, where they could be had."""


class IncompatibleVersionError(TouchlineError):
    """Client and server speak different major versions of the protocol."""


class AccessDeniedError(TouchlineError):
    """The server, or something before it, did not let the call pass."""


class UnavailableError(TouchlineError):
    """The server cannot be reached, is starting, or is draining. What is idempotent was retried before this was raised."""


class TlsError(UnavailableError):
    """Client and server cannot agree on a TLS session: the client does not trust the server's certificate, the name in it is another, or
    one of the two speaks no TLS. Not retried: somebody has to change a certificate or a setting."""


class DeadlineError(TouchlineError):
    """There was no answer in time. Whether the call had an effect is not known; an episode may be sent again with the same key."""


class ClosedError(TouchlineError):
    """The client, writer or stream was closed before."""


class ForkError(TouchlineError):
    """This process is a forked child in which gRPC cannot work, because it was loaded without fork support in the parent."""


@dataclass(frozen=True, slots=True)
class EpisodeResult:
    """What became of one episode."""

    key: EpisodeKey
    """The episode's key: an episode sent again with it is never stored twice."""
    episode_id: int = -1
    """The server's number for it; -1 where refused or not known."""
    duplicate: bool = False
    """Its key was stored before: acknowledged, not stored again."""
    error: TouchlineError | None = None
    """Why it was refused or is not acknowledged; None where it is stored."""


class LoadError(TouchlineError):
    """Some episodes of a load were refused; all others are stored."""

    def __init__(self, message: str, results: Sequence[EpisodeResult] = ()) -> None:
        super().__init__(message)
        self.results = tuple(results)
        """What became of every episode, in the order in which they were given."""


class SpoolError(TouchlineError):
    """The spool of an :class:`~touchline.EpisodeWriter` is another writer's, damaged, of a newer format, or cannot be read or written."""


class UnacknowledgedError(TouchlineError):
    """Episodes of a writer were refused by the server, or not acknowledged in time."""

    def __init__(self, message: str, results: Sequence[EpisodeResult] = ()) -> None:
        super().__init__(message)
        self.results = tuple(results)
        """Every such episode: its key, and why."""


class ServerError(TouchlineError):
    """Something went wrong inside the server, or between it and us; the server's log says what."""
