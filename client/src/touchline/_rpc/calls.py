"""Calls to the server: the one place that knows deadlines, metadata, retries and the meaning of status codes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from touchline._rpc.channel import ServerChannel
from touchline._rpc.fork import gate
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
from touchline_protos import PROTOCOL_METADATA_KEY, PROTOCOL_VERSION
from touchline_protos.log_lines import escape
from touchline_protos.types.metadata import REASON_METADATA_KEY, RETRY_METADATA_KEY
from touchline_protos.types.reasons import Reason

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
    Reason.SCHEMA_CHANGED: UnavailableError,  # of a stream that is opened again
    Reason.STORAGE_FAILED: UnavailableError,
    Reason.INTERNAL: ServerError,
}
"""Error of each reason that a Touchline server gives; more exact than the status code, so it is looked up first."""

ERROR_OF_STATUS: dict[grpc.StatusCode, type[TouchlineError]] = {
    grpc.StatusCode.OK: ServerError,  # a call that failed with it is a broken one
    grpc.StatusCode.CANCELLED: UnavailableError,  # what reaches a server in the last moment of its stop
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.NOT_FOUND: InvalidArgumentError,
    grpc.StatusCode.ALREADY_EXISTS: KeyConflictError,
    grpc.StatusCode.PERMISSION_DENIED: AccessDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TooLargeError,  # gRPC's own limit on messages; the server's others have a reason
    grpc.StatusCode.FAILED_PRECONDITION: NotReadyError,
    grpc.StatusCode.ABORTED: ServerError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.UNIMPLEMENTED: IncompatibleVersionError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: ServerError,
}
"""What a status code means where no reason was given: by a proxy, by gRPC itself, by a server of another kind."""

VERBS = {
    "AddEpisode": "add()",
    "LoadEpisodes": "load()",
    "Sample": "sample()",
    "Ready": "ready() or counts()",
    "Info": "info()",
    "Clear": "clear()",
}
"""Who calls each method, for the log."""

METADATA = ((PROTOCOL_METADATA_KEY, PROTOCOL_VERSION),)
"""Goes with every call, before what the transport's credentials add."""


def translate(error: grpc.RpcError, address: str, *, tls: bool, server_name: str = "") -> TouchlineError:
    """Returns what a failed call means. Status code and reason decide; the words of the message only for TLS, where gRPC has nothing else.

    Args:
        error: what gRPC raised.
        address: of the server.
        tls: whether it was asked by TLS.
        server_name: that its certificate has to have, where that is not the address's.
    """
    failed: Any = error  # the public class has none of what gRPC raises with
    code = failed.code()
    trailing = dict(failed.trailing_metadata() or ())
    reason = trailing.get(REASON_METADATA_KEY, "")
    kind = ERROR_OF_REASON.get(reason) or ERROR_OF_STATUS.get(code, ServerError)
    details = escape(failed.details() or "no details")
    if code is grpc.StatusCode.UNAVAILABLE and not reason:
        # No server said so: nobody answered, or not in the language of the question.
        wrong = explain(details, address, server_name=server_name) if tls else None
        if wrong is not None:
            return TlsError(f"{wrong}: {details}")
        expected = f"a touchline-server that is up there and speaks {'TLS' if tls else 'no TLS'}, as this client does"
        return kind(f"{address}: {details} (UNAVAILABLE); expected {expected}")
    if issubclass(kind, UnavailableError | DeadlineError | ServerError | IncompatibleVersionError | AccessDeniedError):
        return kind(f"{address}: {details} ({code.name})")
    if issubclass(kind, OverLimitError):
        return kind(details, _retry_after_s(trailing.get(RETRY_METADATA_KEY)))
    return kind(details)


def reason_of(error: TouchlineError) -> str:
    """Returns the reason that a Touchline server gave with an error; empty where gRPC itself, or a proxy, refused."""
    if not isinstance(error.__cause__, grpc.RpcError):
        return ""
    failed: Any = error.__cause__
    return str(dict(failed.trailing_metadata() or ()).get(REASON_METADATA_KEY, ""))


def is_passing(error: TouchlineError) -> bool:
    """Returns whether the same call may succeed later, with nothing changed on this side."""
    return isinstance(error, UnavailableError | OverLimitError) and not isinstance(error, TlsError)


def delay_before_retry(error: TouchlineError, backoff_s: float) -> float:
    """Returns how long to wait before the next attempt, in seconds.

    Args:
        error: of the last one.
        backoff_s: what the client would wait by itself; it comes on top of the delay that the server asked for, so that clients that
            were all told the same delay spread.
    """
    asked_s = error.retry_after_s if isinstance(error, OverLimitError) else None
    return backoff_s + (asked_s or 0.0)


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait between attempts: exponentially longer, and each by chance shorter so that clients spread."""

    first_s: float = 0.05
    """The longest first wait."""
    max_s: float = 2.0
    """The longest of all."""
    factor: float = 2.0
    """From one to the next."""

    def delays(self, rng: random.Random) -> Iterator[float]:
        """Yields waits in seconds, without end; each between half of the full length and the whole."""
        full = self.first_s
        while True:
            yield full * rng.uniform(0.5, 1.0)
            full = min(full * self.factor, self.max_s)


class RpcClient:
    """Makes calls on a transport. Safe to use from many threads.

    Args:
        transport: its channel is used; not closed by this.
        timeout_s: the deadline of a call, all its attempts together.
        backoff: between attempts.
        sleep: waits so many seconds; for tests.
    """

    def __init__(
        self,
        transport: ServerChannel,
        *,
        timeout_s: float,
        backoff: Backoff | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.channel = transport
        self._metadata = (*METADATA, *transport.metadata)
        self.timeout_s = timeout_s
        self.backoff = backoff or Backoff()
        self._sleep = sleep
        # Jitter must differ between processes started alike: seeded by the system's entropy on purpose.
        self._rng = random.Random()

    def delays(self) -> Iterator[float]:
        """Yields the waits of one sequence of attempts."""
        return self.backoff.delays(self._rng)

    def unary(self, name: str, request: bytes, *, timeout_s: float | None = None, wait_s: float = 0.0, retry: bool = True) -> bytes:
        """Returns the response to one request.

        Args:
            name: of the method.
            request: the message.
            timeout_s: the call's deadline; None takes the client's.
            wait_s: how long the server may take before it answers, on top of the deadline.
            retry: whether to try again while the server is unavailable or over a limit, until the deadline.

        Raises:
            TouchlineError: the call failed; which of the tree says why.
        """

        def attempt(left_s: float) -> bytes:
            method: Any = self.channel.method("unary_unary", name)
            if not wait_s:
                # The quicker way of the two: this thread itself waits inside gRPC, and a fork waits for it.
                with gate:
                    return method(request, timeout=left_s, metadata=self._metadata)
            with gate:
                call = method.future(request, timeout=left_s, metadata=self._metadata)
            return _await(call)

        return self._run(name, attempt, (self.timeout_s if timeout_s is None else timeout_s) + wait_s, retry)

    def upload(self, name: str, requests: Callable[[], Iterator[bytes]], *, timeout_s: float) -> bytes:
        """Returns the response to a stream of requests.

        Args:
            name: of the method.
            requests: makes the messages; called again for each attempt.
            timeout_s: the call's deadline.

        Raises:
            TouchlineError: the call failed; which of the tree says why.
            Exception: whatever ``requests`` raised.
        """
        failures: list[Exception] = []

        def guarded() -> Iterator[bytes]:
            # gRPC takes the messages in a thread of its own and would only log what went wrong there.
            try:
                yield from requests()
            except Exception as error:
                failures.append(error)
                raise

        def attempt(left_s: float) -> bytes:
            method: Any = self.channel.method("stream_unary", name)
            with gate:
                call = method.future(guarded(), timeout=left_s, metadata=self._metadata)
            try:
                return _await(call)
            except grpc.RpcError:
                if failures:
                    raise failures[0] from None
                raise

        return self._run(name, attempt, timeout_s, True)

    def stream(self, name: str, requests: Iterator[bytes]) -> Any:
        """Returns an open bidirectional call: an iterator of responses with ``cancel()``. It has no deadline and is not retried."""
        method: Any = self.channel.method("stream_stream", name)
        with gate:
            return method(requests, metadata=self._metadata)

    def download(self, name: str, request: bytes) -> Any:
        """Returns an open call with one request: an iterator of responses with ``cancel()``. It has no deadline and is not retried."""
        method: Any = self.channel.method("unary_stream", name)
        with gate:
            return method(request, metadata=self._metadata)

    def translate(self, error: Exception) -> TouchlineError:
        """Returns what a failure of a call means.

        Raises:
            Exception: the given one, where it is none of gRPC's.
        """
        if self.channel.closed:
            return ClosedError(f"the client of {self.channel.address} was closed")
        if isinstance(error, grpc.RpcError):
            return translate(error, self.channel.address, tls=self.channel.tls, server_name=self.channel.server_name)
        raise error

    def _run(self, name: str, attempt: Callable[[float], bytes], timeout_s: float, retry: bool) -> bytes:
        with waiting(VERBS.get(name, name), self.channel.address, lambda: f"no answer yet, the call ends after {timeout_s:g} s") as wait:
            return self._attempts(attempt, time.monotonic() + timeout_s, retry, wait)

    def _attempts(self, attempt: Callable[[float], bytes], ends: float, retry: bool, wait: Wait) -> bytes:
        delays = self.delays()
        last: TouchlineError | None = None
        while True:
            try:
                return attempt(max(ends - time.monotonic(), 0.001))
            except (grpc.RpcError, grpc.FutureCancelledError, ValueError) as error:
                # gRPC raises ValueError for a call on a channel that was closed meanwhile; any other goes on as it is.
                failure = self.translate(error)
                cause = error
            if isinstance(failure, DeadlineError) and last is not None:
                raise last from cause
            if not retry or not is_passing(failure):
                raise failure from cause
            last = failure
            delay_s = delay_before_retry(failure, next(delays))
            if time.monotonic() + delay_s >= ends:
                raise failure from cause
            wait.note(str(failure))
            self._sleep(delay_s)


def _retry_after_s(value: object) -> float | None:
    """Returns a delay in seconds; None where the server gave none, or one that is no number of milliseconds."""
    if not isinstance(value, str) or not value.isascii() or not value.isdigit():
        return None
    return int(value) / 1000


def _await(call: Any) -> bytes:
    try:
        return call.result()
    except BaseException:
        call.cancel()  # Ctrl-C, for one: the server need not go on
        raise
