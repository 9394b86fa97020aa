"""The only table that maps errors to gRPC status codes.

Beside the code, the trailing metadata ``touchline-reason`` carries a :class:`~touchline_protos.types.reasons.Reason`, because the codes are
too coarse for programs. If waiting helps, ``grpc-retry-pushback-ms`` carries the delay.
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
    """What a client receives of an error, beside its message."""

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
    # For the client this is one limit among others: the same call may succeed later.
    StorageFullError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVER_LIMIT),
    StorageFailedError: Status(grpc.StatusCode.UNAVAILABLE, Reason.STORAGE_FAILED),
    RestoringError: Status(grpc.StatusCode.UNAVAILABLE, Reason.RESTORING),
    DrainingError: Status(grpc.StatusCode.UNAVAILABLE, Reason.DRAINING),
}

INTERNAL = Status(grpc.StatusCode.INTERNAL, Reason.INTERNAL)

MAX_TEXT_BYTES = 4096
"""Largest message of an error on the wire, as gRPC encodes it: it travels in a header, and peers refuse headers over 8 KiB."""


def status_of(error: Exception) -> Status:
    """Returns the status of an error's nearest class in the table, INTERNAL if there is none."""
    for kind in type(error).__mro__:
        if kind in STATUS_OF:
            return STATUS_OF[kind]
    return INTERNAL


def shorten(text: str) -> str:
    """Returns a text on one line, cut at its end if it does not fit into :data:`MAX_TEXT_BYTES` as gRPC encodes it.

    Messages contain names that clients choose, so clients choose their length too.
    """
    text = escape(text)
    left = MAX_TEXT_BYTES
    for position, character in enumerate(text):
        # gRPC percent-encodes what is not printable ASCII: three characters a byte.
        left -= 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode(errors="replace"))
        if left < 0:
            return f"{text[:position]}... ({len(text) - position} characters more)"
    return text


def trailing_metadata(error: Exception) -> tuple[tuple[str, str], ...]:
    """Returns the trailing metadata of a call that failed with an error: the reason, and the delay if waiting helps."""
    reason = (REASON_METADATA_KEY, status_of(error).reason.value)
    retry_after_s = error.retry_after_s if isinstance(error, ReplayError) else None
    return (reason,) if retry_after_s is None else (reason, (RETRY_METADATA_KEY, str(math.ceil(retry_after_s * 1000))))


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """Ends a call with the status of an error.

    An error that is not the caller's is logged with its trace; the caller gets only its type.
    """
    status = status_of(error)
    if status is INTERNAL:
        logger.exception("a call failed", exc_info=error)
        details = f"internal error ({type(error).__name__}); the server's log has the trace"
    else:
        logger.debug("answered %s (%s): %s", status.code.name, status.reason, error)
        details = shorten(str(error))
    await context.abort(status.code, details, trailing_metadata=trailing_metadata(error))
