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
from touchline_protos.types.metadata import REASON_METADATA_KEY, RETRY_METADATA_KEY
from touchline_protos.types.reasons import Reason
from touchline_server.errors import (
    AccessDeniedError,
    DrainingError,
    IncompatibleVersionError,
    InvalidArgumentError,
    InvalidEpisodeError,
    KeyConflictError,
    NotReadyError,
    OverLimitError,
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


class Status(NamedTuple):
    """How an error looks to a client."""

    code: grpc.StatusCode
    reason: Reason


STATUS_OF: dict[type[Exception], Status] = {
    InvalidEpisodeError: Status(grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_EPISODE),
    CodecError: Status(grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_EPISODE),
    InvalidArgumentError: Status(grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_ARGUMENT),
    UnknownTableError: Status(grpc.StatusCode.NOT_FOUND, Reason.UNKNOWN_TABLE),
    UnknownEpisodeError: Status(grpc.StatusCode.NOT_FOUND, Reason.UNKNOWN_EPISODE),
    KeyConflictError: Status(grpc.StatusCode.ALREADY_EXISTS, Reason.KEY_CONFLICT),
    NotReadyError: Status(grpc.StatusCode.FAILED_PRECONDITION, Reason.NOT_READY),
    IncompatibleVersionError: Status(grpc.StatusCode.FAILED_PRECONDITION, Reason.INCOMPATIBLE_VERSION),
    UnauthenticatedError: Status(grpc.StatusCode.UNAUTHENTICATED, Reason.UNAUTHENTICATED),
    AccessDeniedError: Status(grpc.StatusCode.PERMISSION_DENIED, Reason.PERMISSION_DENIED),
    TooLargeError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.TOO_LARGE),
    OversizeError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.TOO_LARGE),
    OverLimitError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVER_LIMIT),
    SchemaChangedError: Status(grpc.StatusCode.UNAVAILABLE, Reason.SCHEMA_CHANGED),
    # The client's word for it: what the server has no room for now may pass later.
    StorageFullError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVER_LIMIT),
    StorageFailedError: Status(grpc.StatusCode.UNAVAILABLE, Reason.STORAGE_FAILED),
    RestoringError: Status(grpc.StatusCode.UNAVAILABLE, Reason.RESTORING),
    DrainingError: Status(grpc.StatusCode.UNAVAILABLE, Reason.DRAINING),
}

INTERNAL = Status(grpc.StatusCode.INTERNAL, Reason.INTERNAL)

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
    reason = (REASON_METADATA_KEY, status_of(error).reason.value)
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
