"""Calls to the server: the only module that knows deadlines, metadata, retries and the meaning of status codes.

:class:`RpcClient` makes calls on a channel; :func:`translate` turns a failed one into an error of :mod:`touchline.errors`.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from touchline._rpc.channel import ServerChannel
from touchline._rpc.fork import gate
from touchline._rpc.spool_note import spool_metadata
from touchline._rpc.tls_failures import explain
from touchline._rpc.waits import Wait, waiting
from touchline.errors import (
    AccessDeniedError,
    ClosedError,
    DeadlineError,
    IncompatibleVersionError,
    InvalidArgumentError,
    InvalidEpisodeError,
    KeyConflictError,
    NotReadyError,
    OverLimitError,
    ServerError,
    TlsError,
    TooLargeError,
    TouchlineError,
    UnauthenticatedError,
    UnavailableError,
    UnknownEpisodeError,
    UnknownTableError,
)
from touchline_protos import PROTOCOL_METADATA_KEY, PROTOCOL_VERSION, __version__
from touchline_protos.log_lines import escape
from touchline_protos.tracing import trace_metadata
from touchline_protos.types.metadata import CLIENT_METADATA_KEY, REASON_METADATA_KEY, RETRY_METADATA_KEY
from touchline_protos.types.reasons import Reason
from touchline_protos.v1 import replay_pb2 as pb

ERROR_OF_REASON: dict[str, type[TouchlineError]] = {
    Reason.INVALID_ARGUMENT: InvalidArgumentError,
    Reason.INVALID_EPISODE: InvalidEpisodeError,
    Reason.UNKNOWN_TABLE: UnknownTableError,
    Reason.UNKNOWN_EPISODE: UnknownEpisodeError,
    Reason.KEY_CONFLICT: KeyConflictError,
    Reason.TOO_LARGE: TooLargeError,
    Reason.OVER_LIMIT: OverLimitError,
    Reason.NOT_READY: NotReadyError,
    Reason.INCOMPATIBLE_VERSION: IncompatibleVersionError,
    Reason.UNAUTHENTICATED: UnauthenticatedError,
    Reason.PERMISSION_DENIED: AccessDeniedError,
    Reason.RESTORING: UnavailableError,
    Reason.DRAINING: UnavailableError,
    Reason.SCHEMA_CHANGED: UnavailableError,  # ends a stream, which is then opened again
    Reason.STORAGE_FAILED: UnavailableError,
    Reason.INTERNAL: ServerError,
}
"""Error of each reason that a Touchline server gives; more exact than the status code, so it is looked up first."""

ERROR_OF_STATUS: dict[grpc.StatusCode, type[TouchlineError]] = {
    grpc.StatusCode.OK: ServerError,  # a failed call cannot have it
    grpc.StatusCode.CANCELLED: UnavailableError,  # a call that reaches a server at the very end of its stop
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.NOT_FOUND: InvalidArgumentError,
    grpc.StatusCode.ALREADY_EXISTS: KeyConflictError,
    grpc.StatusCode.PERMISSION_DENIED: AccessDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TooLargeError,  # gRPC's own limit on messages; the server's limits have a reason
    grpc.StatusCode.FAILED_PRECONDITION: NotReadyError,
    grpc.StatusCode.ABORTED: ServerError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.UNIMPLEMENTED: IncompatibleVersionError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: ServerError,
}
"""Error of each status code, for a failure without a reason: from a proxy, from gRPC itself, from a server of another kind."""

VERBS = {
    "AddEpisode": "add()",
    "LoadEpisodes": "load()",
    "Sample": "sample()",
    "UpdatePriorities": "update_priorities()",
    "Ready": "ready() or counts()",
    "Info": "info()",
    "Clear": "clear()",
    "Status": "status()",
}
"""Verb of the client that calls each method, for the log."""

METADATA = (
    (PROTOCOL_METADATA_KEY, PROTOCOL_VERSION),
    (CLIENT_METADATA_KEY, f"touchline/{__version__} python/{'.'.join(map(str, sys.version_info[:3]))}"),
)
"""Metadata of every call, before the metadata of the credentials."""


def translate(error: grpc.RpcError, address: str, *, tls: bool, server_name: str = "") -> TouchlineError:
    """Returns the client's error for a failed call, by its reason or status code; for TLS failures, which have no code, by their words.

    Args:
        error: error that gRPC raised.
        address: address of the server.
        tls: whether the call used TLS.
        server_name: name that the server's certificate must have; empty for the host of the address.
    """
    failed: Any = error  # grpc.RpcError declares none of the methods that the errors have
    code = failed.code()
    trailing = dict(failed.trailing_metadata() or ())
    reason = trailing.get(REASON_METADATA_KEY, "")
    kind = ERROR_OF_REASON.get(reason) or ERROR_OF_STATUS.get(code, ServerError)
    details = escape(failed.details() or "no details")
    if code is grpc.StatusCode.UNAVAILABLE and not reason:
        # No Touchline server sent this: nothing answered at the address, or something that expects TLS or expects none.
        wrong = explain(details, address, server_name=server_name) if tls else None
        if wrong is not None:
            return TlsError(f"{wrong}: {details}")
        expected = f"a running touchline-server that uses {'TLS' if tls else 'no TLS'}, as this client does"
        return kind(f"{address}: {details} (UNAVAILABLE); expected {expected}")
    if issubclass(kind, UnavailableError | DeadlineError | ServerError | IncompatibleVersionError | AccessDeniedError):
        return kind(f"{address}: {details} ({code.name})")
    if issubclass(kind, OverLimitError):
        return kind(details, _retry_after_s(trailing.get(RETRY_METADATA_KEY)))
    return kind(details)


def reason_of(error: TouchlineError) -> str:
    """Returns the reason that a Touchline server gave with an error; empty for a refusal by gRPC itself or by a proxy."""
    if not isinstance(error.__cause__, grpc.RpcError):
        return ""
    failed: Any = error.__cause__
    return str(dict(failed.trailing_metadata() or ()).get(REASON_METADATA_KEY, ""))


def is_passing(error: TouchlineError) -> bool:
    """Returns whether the same call may succeed later without a change on this side."""
    return isinstance(error, UnavailableError | OverLimitError) and not isinstance(error, TlsError)


def delay_before_retry(error: TouchlineError, backoff_s: float) -> float:
    """Returns how long to wait before the next attempt, in seconds.

    Args:
        error: error of the last attempt.
        backoff_s: the client's own delay. It is added to the delay that the server asked for, so that clients that were all asked for the
            same delay do not return together.
    """
    asked_s = error.retry_after_s if isinstance(error, OverLimitError) else None
    return backoff_s + (asked_s or 0.0)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays between attempts: exponentially longer, each shortened by chance so that clients spread."""

    first_s: float = 0.05
    """Upper bound of the first delay."""
    max_s: float = 2.0
    """Upper bound of every delay."""
    factor: float = 2.0
    """Growth of the upper bound from one delay to the next."""

    def delays(self, rng: random.Random) -> Iterator[float]:
        """Yields delays in seconds, without end; each is between half of its upper bound and the whole."""
        full = self.first_s
        while True:
            yield full * rng.uniform(0.5, 1.0)
            full = min(full * self.factor, self.max_s)


class RpcClient:
    """Makes calls on a channel. Thread-safe.

    Args:
        channel: channel to the server; stays open when this object goes.
        timeout_s: deadline of a call, all its attempts together.
        backoff: delays between attempts; None takes the defaults.
        sleep: function that waits for a number of seconds; replaced in tests.
    """

    def __init__(
        self,
        channel: ServerChannel,
        *,
        timeout_s: float,
        backoff: Backoff | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.channel = channel
        self._metadata = (*METADATA, *channel.metadata)
        self.timeout_s = timeout_s
        self.backoff = backoff or Backoff()
        self._sleep = sleep
        # Seeded by the system's entropy on purpose: jitter must differ between processes that were started alike.
        self._rng = random.Random()
        self._server_version: tuple[int, ...] | None = None

    def delays(self) -> Iterator[float]:
        """Yields the delays of one sequence of attempts."""
        return self.backoff.delays(self._rng)

    def check_server_version(self, feature: str, *, least: tuple[int, int] = (1, 1), table: str = "") -> None:
        """Checks that the server knows a feature. It is asked once, when a feature is first used that not all servers know.

        Args:
            feature: the feature, as the user knows it; empty checks nothing.
            least: version of the protocol that introduced it.
            table: a table that this client may ask about.

        Raises:
            IncompatibleVersionError: the server is older: it would ignore the feature.
            TouchlineError: the server could not be asked.
        """
        if not feature:
            return
        if self._server_version is None:
            info = pb.InfoResponse.FromString(self.unary("Info", pb.InfoRequest(table=table).SerializeToString()))
            self._server_version = tuple(int(part) for part in info.protocol_version.split(".") if part.isdecimal())
        if self._server_version < least:
            speaks, needs = (".".join(map(str, version)) for version in (self._server_version, least))
            raise IncompatibleVersionError(f"{self.channel.address}: the server speaks {speaks}, {feature} needs {needs}: update it")

    def unary(self, name: str, request: bytes, *, timeout_s: float | None = None, wait_s: float = 0.0, retry: bool = True) -> bytes:
        """Returns the response to one request.

        Args:
            name: name of the method.
            request: the message.
            timeout_s: deadline of the call; None takes the client's.
            wait_s: time that the server may wait before it answers, added to the deadline.
            retry: try again while the server is unavailable or over a limit, until the deadline.

        Raises:
            TouchlineError: the call failed; its class says why.
        """

        def attempt(left_s: float) -> bytes:
            method: Any = self.channel.method("unary_unary", name)
            if not wait_s:
                # Faster than a future, but this thread waits inside gRPC, and a fork waits for this thread.
                with gate:
                    return method(request, timeout=left_s, metadata=self._call_metadata())
            with gate:
                call = method.future(request, timeout=left_s, metadata=self._call_metadata())
            return _await(call)

        return self._run(name, attempt, (self.timeout_s if timeout_s is None else timeout_s) + wait_s, retry)

    def first_answer(self, name: str, request: bytes, *, timeout_s: float | None = None) -> bytes:
        """Returns the first response of a method that streams them, and ends the call. Otherwise as :meth:`unary`."""

        def attempt(left_s: float) -> bytes:
            method: Any = self.channel.method("unary_stream", name)
            with gate:
                call = method(request, timeout=left_s, metadata=self._call_metadata())
            try:
                return next(call)
            finally:
                call.cancel()

        return self._run(name, attempt, self.timeout_s if timeout_s is None else timeout_s, True)

    def upload(self, name: str, requests: Callable[[], Iterator[bytes]], *, timeout_s: float) -> bytes:
        """Returns the response to a stream of requests.

        Args:
            name: name of the method.
            requests: function that returns the messages; called again for each attempt.
            timeout_s: deadline of the call.

        Raises:
            TouchlineError: the call failed; its class says why.
            Exception: ``requests`` raised it.
        """
        failures: list[Exception] = []

        def guarded() -> Iterator[bytes]:
            # gRPC reads the messages in a thread of its own and would only log an error there.
            try:
                yield from requests()
            except Exception as error:
                failures.append(error)
                raise

        def attempt(left_s: float) -> bytes:
            method: Any = self.channel.method("stream_unary", name)
            with gate:
                call = method.future(guarded(), timeout=left_s, metadata=self._call_metadata())
            try:
                return _await(call)
            except grpc.RpcError:
                if failures:
                    raise failures[0] from None
                raise

        return self._run(name, attempt, timeout_s, True)

    def stream(self, name: str, requests: Iterator[bytes]) -> Any:
        """Returns an open bidirectional call, an iterator of responses with ``cancel()``. It has no deadline and is not retried."""
        method: Any = self.channel.method("stream_stream", name)
        with gate:
            return method(requests, metadata=self._call_metadata())

    def download(self, name: str, request: bytes) -> Any:
        """Returns an open call with one request, an iterator of responses with ``cancel()``. It has no deadline and is not retried."""
        method: Any = self.channel.method("unary_stream", name)
        with gate:
            return method(request, metadata=self._call_metadata())

    def _call_metadata(self) -> tuple[tuple[str, str], ...]:
        return (*self._metadata, *spool_metadata(), *trace_metadata())

    def translate(self, error: Exception) -> TouchlineError:
        """Returns the client's error for a failed call.

        Raises:
            Exception: the given error, if gRPC did not raise it.
        """
        if self.channel.closed:
            return ClosedError(f"the client of {self.channel.address} was closed")
        if isinstance(error, grpc.RpcError):
            return translate(error, self.channel.address, tls=self.channel.tls, server_name=self.channel.server_name)
        raise error

    def _run(self, name: str, attempt: Callable[[float], bytes], timeout_s: float, retry: bool) -> bytes:
        """Returns the response of the first attempt that succeeds; an attempt gets the seconds that are left. Logs long waits."""
        with waiting(VERBS.get(name, name), self.channel.address, lambda: f"no answer yet, the call ends after {timeout_s:g} s") as wait:
            return self._attempts(attempt, time.monotonic() + timeout_s, retry, wait)

    def _attempts(self, attempt: Callable[[float], bytes], ends: float, retry: bool, wait: Wait) -> bytes:
        delays = self.delays()
        last: TouchlineError | None = None
        while True:
            try:
                return attempt(max(ends - time.monotonic(), 0.001))
            except (grpc.RpcError, grpc.FutureCancelledError, ValueError) as error:
                # gRPC raises ValueError for a call on a channel that was closed meanwhile; translate() re-raises any other.
                failure = self.translate(error)
                cause = error
            if isinstance(failure, DeadlineError) and last is not None:
                raise last from cause  # the deadline cut this attempt short; the failure before it says why
            if not retry or not is_passing(failure):
                raise failure from cause
            last = failure
            delay_s = delay_before_retry(failure, next(delays))
            if time.monotonic() + delay_s >= ends:
                raise failure from cause
            wait.note(str(failure))
            self._sleep(delay_s)


def _retry_after_s(value: object) -> float | None:
    """Returns a delay in seconds; None if the server sent none, or something other than a number of milliseconds."""
    if not isinstance(value, str) or not value.isascii() or not value.isdigit():
        return None
    return int(value) / 1000


def _await(call: Any) -> bytes:
    try:
        return call.result()
    except BaseException:
        call.cancel()  # Ctrl-C, for example: the server need not go on
        raise
