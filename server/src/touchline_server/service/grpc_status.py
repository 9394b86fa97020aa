"""The one table that turns the domain's errors into gRPC statuses.

The status comes with the call's trailing metadata ``touchline-reason``: a word for programs, where the status alone is too coarse.
Where waiting helps, ``grpc-retry-pushback-ms`` says how long.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import grpc

from touchline_protos.codec import CodecError, OversizeError
from touchline_protos.log_lines import escape, get_logger
from touchline_server.errors import (
    AccessDeniedError,
    DrainingError,
    IncompatibleVersionError,
    InvalidEpisodeError,
    InvalidRequestError,
    KeyConflictError,
    NotReadyError,
    OverloadedError,
    ReplayError,
    RestoringError,
    SchemaChangedError,
    StorageFailedError,
    StorageFullError,
    TooLargeError,
    UnauthenticatedError,
    UnknownEpisodeError,
    UnknownTableError,
)

logger = get_logger(__name__)

REASON_METADATA_KEY = "touchline-reason"

RETRY_METADATA_KEY = "grpc-retry-pushback-ms"
"""gRPC's own name for the delay that a server asks for (proposal A6), in whole milliseconds."""


class Status(NamedTuple):
    """How an error looks to a client."""

    code: grpc.StatusCode
    reason: str


STATUS_OF: dict[type[Exception], Status] = {
    InvalidEpisodeError: Status(grpc.StatusCode.INVALID_ARGUMENT, "invalid-episode"),
    CodecError: Status(grpc.StatusCode.INVALID_ARGUMENT, "invalid-episode"),
    InvalidRequestError: Status(grpc.StatusCode.INVALID_ARGUMENT, "invalid-argument"),
    UnknownTableError: Status(grpc.StatusCode.NOT_FOUND, "unknown-table"),
    UnknownEpisodeError: Status(grpc.StatusCode.NOT_FOUND, "unknown-episode"),
    KeyConflictError: Status(grpc.StatusCode.ALREADY_EXISTS, "key-conflict"),
    NotReadyError: Status(grpc.StatusCode.FAILED_PRECONDITION, "not-ready"),
    IncompatibleVersionError: Status(grpc.StatusCode.FAILED_PRECONDITION, "incompatible-version"),
    UnauthenticatedError: Status(grpc.StatusCode.UNAUTHENTICATED, "unauthenticated"),
    AccessDeniedError: Status(grpc.StatusCode.PERMISSION_DENIED, "permission-denied"),
    TooLargeError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "too-large"),
    OversizeError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "too-large"),
    OverloadedError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "over-limit"),
    SchemaChangedError: Status(grpc.StatusCode.UNAVAILABLE, "schema-changed"),
    # The client's word for it: what the server has no room for now may pass later.
    StorageFullError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "over-limit"),
    StorageFailedError: Status(grpc.StatusCode.UNAVAILABLE, "storage-failed"),
    RestoringError: Status(grpc.StatusCode.UNAVAILABLE, "restoring"),
    DrainingError: Status(grpc.StatusCode.UNAVAILABLE, "draining"),
}

INTERNAL = Status(grpc.StatusCode.INTERNAL, "internal")

MAX_TEXT_BYTES = 4096
"""Room of an error's text on the wire: it travels in a header, and peers refuse a call whose headers are over 8 KiB."""


def status_of(error: Exception) -> Status:
    """Returns the status of an error: that of its nearest listed class, INTERNAL where none is."""
    for kind in type(error).__mro__:
        if kind in STATUS_OF:
            return STATUS_OF[kind]
    return INTERNAL


def shorten(text: str) -> str:
    """Returns a text on one line that fits into :data:`MAX_TEXT_BYTES` as gRPC encodes it, cut at its end where it does not.

    Names that clients chose stand in it, so its length is theirs to choose too.
    """
    text = escape(text)
    room = MAX_TEXT_BYTES
    for position, character in enumerate(text):
        # Whatever is not printable ASCII takes three characters a byte.
        room -= 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode(errors="replace"))
        if room < 0:
            return f"{text[:position]}... ({len(text) - position} characters more)"
    return text


def trailing_metadata(error: Exception) -> tuple[tuple[str, str], ...]:
    """Returns what programs are told of an error besides its status."""
    reason = (REASON_METADATA_KEY, status_of(error).reason)
    retry_after_s = error.retry_after_s if isinstance(error, ReplayError) else None
    return (reason,) if retry_after_s is None else (reason, (RETRY_METADATA_KEY, str(math.ceil(retry_after_s * 1000))))


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """Ends a call with the status of an error. What is not the caller's doing is logged with its trace and not told."""
    status = status_of(error)
    if status is INTERNAL:
        logger.exception("a call failed", exc_info=error)
        details = f"internal error ({type(error).__name__}); the server's log has the trace"
    else:
        logger.debug("answered %s (%s): %s", status.code.name, status.reason, error)
        details = shorten(str(error))
    await context.abort(status.code, details, trailing_metadata=trailing_metadata(error))
