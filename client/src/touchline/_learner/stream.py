"""The sampling stream: batches that the server sends ahead of their use.

:class:`BatchStream` is what a user iterates. It takes batches from a :class:`BatchSource`: :class:`StreamSource`, which opens sessions
(:mod:`~touchline._learner.stream_session`) and opens another one after the server was away, or one that copies those batches to a CUDA
device (:mod:`~touchline._learner.cuda`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from touchline._learner.readiness import PROBE_TIMEOUT_S, readiness_of
from touchline._learner.ring_reader import RingBatches
from touchline._learner.row_offer import GatherMethod
from touchline._learner.stream_session import NO_REASON, StreamSession
from touchline._rpc.calls import RpcClient, delay_before_retry, is_passing
from touchline._rpc.convert import reach_of, resumed, table_names_of
from touchline._rpc.credentials import is_local
from touchline._rpc.deadline import Watchdog
from touchline._rpc.dropping import when_dropped
from touchline._rpc.process_bound import ProcessBound
from touchline._rpc.waits import waiting
from touchline.errors import (
    ClosedError,
    DeadlineError,
    NotReadyError,
    OverLimitError,
    TlsError,
    TouchlineError,
    UnavailableError,
)
from touchline_protos import Batch
from touchline_protos.log_lines import get_logger
from touchline_protos.shm.ring import shared_memory_id
from touchline_protos.v1 import replay_pb2 as pb

RECONNECT_S = 60.0
"""Longest time that the server may be away before a stream of batches gives up."""
LASTING_S = 5.0
"""Duration from which on a session counts as a success: its end is a new outage, and not another failed attempt of the same one."""

logger = get_logger(__name__)


class BatchSource(Protocol):
    """A source of batches, one after another. One thread takes; any thread may close."""

    def take(self) -> Batch:
        """Returns the next batch, waiting for it."""

    def close(self) -> None:
        """Ends the source; a ``take`` in progress raises ClosedError."""

    @property
    def transport(self) -> str:
        """How batches come: ``device``, ``ring``, ``stream``, or empty while there is no session."""

    @property
    def transport_reason(self) -> str:
        """Why batches do not come as was asked for; empty while they do or there is no session."""

    @property
    def ring(self) -> RingBatches | None:
        """The ring that the last batch came through; None if it came in a message."""


class BatchStream(ProcessBound):
    """An endless iterator of batches; also a context manager that closes it. Made by :meth:`~touchline.ReplayClient.batches`.

    ::

        with client.batches(batch_size=256, horizon=3) as stream:
            for obs, action, reward, done in stream:
                ...  # obs [4, 256, *obs_shape], action [3, 256, A], reward and done [3, 256, 1]

    The batches are the caller's: nothing overwrites them, however long they are held, unless ``reuse`` was asked for. One thread iterates;
    any thread may close. A stream that is dropped without being closed ends its session once it is collected.

    In a forked child the stream is still the parent's: using it there raises ForkError, closing it does nothing. Limit: if one thread forks
    while another takes a batch that comes in messages (not through a ring), gRPC itself may be caught half-way and hang in the child. Fork
    from the thread that iterates, or pause the iteration meanwhile.
    """

    _instead = "call batches() there, on the client, which may be forked, pickled and copied"

    def __init__(self, source: BatchSource, convert: Callable[[Batch], Batch]) -> None:
        super().__init__()
        self._source = source
        self._convert = convert
        self._closed = False
        when_dropped(self, source.close)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch, waiting for it. After an error the next call tries again.

        Raises:
            StopIteration: the stream was closed here.
            UnavailableError: the server could not be reached for 60 s, or for ``timeout_s``.
            OverLimitError: the server was over a limit for as long.
            NotReadyError: nothing could be sampled within ``timeout_s``; carries the counts.
            DeadlineError: no batch came within ``timeout_s`` for another reason.
            ForkError: the stream was opened by the parent of this forked child.
            TouchlineError: the server refused the request.
        """
        if self._closed:
            raise StopIteration
        self._check_process()
        try:
            return self._convert(self._source.take())
        except ClosedError:
            if self._closed:
                raise StopIteration from None
            raise

    @property
    def transport(self) -> str:
        """How batches come: ``device`` (gathered here, from the server's memory), ``ring`` (in memory that is shared with a server on this
        host), ``stream`` (in messages), or empty before the first.
        """
        return self._source.transport

    @property
    def transport_reason(self) -> str:
        """Why batches do not come as was asked for, in words: in messages instead of a ring, or through a ring instead of being gathered
        here. Empty if they do, or before the first.
        """
        return self._source.transport_reason

    def close(self) -> None:
        """Ends the session with the server. Closing again does nothing."""
        self._closed = True
        if not self._inherited:
            self._source.close()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(slots=True)
class _Outage:
    """A time during which the server is away, up to the next batch."""

    since: float
    """Moment of the first failure, by the monotonic clock."""
    answered_at: float | None = None
    """Moment at which the server answered again, with no batch since; None if it has not answered."""


class StreamSource:
    """Batches as numpy arrays from SampleStream; opens another session after the server was away. One thread takes, any closes.

    Args:
        rpc: client of the server's service, for the sessions.
        request: request that opens each session.
        prefetch: batches that the server may have in flight.
        timeout_s: longest wait for a batch, for whatever reason; None waits without limit while the server is there.
        reconnect_s: longest time that the server may be away, if there is no ``timeout_s``.
        ring: take batches through a ring in shared memory if the server offers one.
        method: how this process gathers batches by itself, if the server shares its columns; None: it does not.
        as_bodies: lay out batches that come in messages as those of a ring, every array aligned to 64 bytes.
    """

    def __init__(
        self,
        rpc: RpcClient,
        request: pb.SampleRequest,
        *,
        prefetch: int,
        timeout_s: float | None,
        reconnect_s: float,
        ring: bool,
        method: GatherMethod | None = None,
        as_bodies: bool = False,
    ) -> None:
        self._rpc = rpc
        self._request = request
        self._prefetch = prefetch
        # One message grants several credits, since a message costs as much as a small batch.
        self._grant = max(1, prefetch // 2)
        self._timeout_s = timeout_s
        self._reconnect_s = reconnect_s if timeout_s is None else timeout_s
        self._use_ring = ring
        self._method = method
        self._as_bodies = as_bodies
        self._readiness = readiness_of(rpc, request)
        self._horizon = reach_of(request)
        self._table_names = table_names_of(request)
        # Must not refer to this object, which would keep a dropped stream alive.
        self._wait = waiting("batches()", rpc.channel.address, partial(self._readiness.explain, self._horizon))
        self._watchdog = Watchdog(timeout_s) if timeout_s is not None else None
        self._closed = threading.Event()
        self._session: StreamSession | None = None
        self._ready: deque[Batch] = deque()
        self._taken = 0
        """Batches taken since the last grant."""
        self._taken_ever = 0
        """Batches taken since the first session began."""
        self._delays = rpc.delays()
        self._outage: _Outage | None = None
        self._first_session = True
        self._logged = ""
        """The transport whose choice was logged."""

    def take(self) -> Batch:
        """Returns the next batch; raises as :meth:`BatchStream.__next__` does."""
        while not self._ready:
            self._receive()
        batch = self._ready.popleft()
        if self._table_names:
            batch = replace(batch, table_names=self._table_names)
        self._taken += 1
        self._taken_ever += 1
        if self._taken == self._grant and self._session is not None:
            self._taken = 0
            self._session.grant(self._grant)
        return batch

    @property
    def transport(self) -> str:
        """How batches come: ``device``, ``ring``, ``stream``, or empty while there is no session."""
        session = self._session
        return session.transport if session is not None else ""

    @property
    def transport_reason(self) -> str:
        """Why batches do not come as was asked for; empty while they do or there is no session."""
        session = self._session
        return session.transport_reason if session is not None else ""

    @property
    def ring(self) -> RingBatches | None:
        """The ring that the last batch came through; None if it came in a message, or was gathered here."""
        session = self._session
        return session.ring if session is not None and session.transport == "ring" else None

    def close(self) -> None:
        """Ends the session; a ``take`` in progress raises ClosedError."""
        self._closed.set()
        session = self._session
        if session is not None:
            session.close()
        if self._watchdog is not None:
            self._watchdog.stop()

    def _receive(self) -> None:
        """Receives until a batch is complete."""
        with self._wait:
            ends = None if self._timeout_s is None else time.monotonic() + self._timeout_s
            while not self._ready:
                if self._closed.is_set():
                    raise ClosedError("the stream was closed")
                if ends is not None and time.monotonic() >= ends:
                    raise self._timeout_error()
                self._receive_once(ends)
        if self._watchdog is not None:
            self._watchdog.disarm()
        if self._outage is not None:
            logger.info("%s is back: sampling goes on", self._rpc.channel.address)
            self._outage = None

    def _receive_once(self, ends: float | None) -> None:
        """Receives one message, or waits until the server is back."""
        try:
            session = self._session or self._open()
            if self._watchdog is not None and ends is not None:
                self._watchdog.arm(session, ends)
            self._ready.extend(session.receive())
        except TouchlineError as error:
            self._drop_session()
            if self._closed.is_set() or (ends is not None and time.monotonic() >= ends):
                return  # the caller raises what there is to raise
            if not isinstance(error, UnavailableError | OverLimitError) or not is_passing(error):
                raise
            self._wait.note(str(error))
            self._wait_for_return(error, ends)
        except BaseException:
            self._drop_session()  # it is unknown how much of a message was read
            raise
        else:
            if self._use_ring and session.transport != self._logged and session.has_answer:
                self._log_transport(session)

    def _log_transport(self, session: StreamSession) -> None:
        """Logs, once for each transport, that a better one was refused, or that batches are gathered here."""
        transport, reason, address = session.transport, session.transport_reason, self._rpc.channel.address
        self._logged = transport
        if transport == "device":
            assert self._method is not None
            logger.info("%s: batches are gathered by %s, from memory that the server shares", address, self._method.name)
        elif transport == "ring" and reason:
            logger.info("%s: batches come through a ring instead of being gathered here: %s", address, reason)
        elif transport == "stream" and reason not in ("", NO_REASON):
            # With a server on another host there is nothing to fix.
            level = logging.WARNING if is_local(address) and shared_memory_id() else logging.INFO
            logger.log(level, "%s: batches come in messages instead of a ring: %s", address, reason)

    def _open(self) -> StreamSession:
        self._taken = 0
        request = self._request if self._first_session else resumed(self._request, self._taken_ever)
        session = StreamSession(self._rpc, request, self._prefetch, ring=self._use_ring, method=self._method, as_bodies=self._as_bodies)
        self._session, self._first_session = session, False
        if self._closed.is_set():  # close() ran in another thread before it could see the session
            session.end()
        return session

    def _drop_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _wait_for_return(self, error: UnavailableError | OverLimitError, ends: float | None) -> None:
        """Waits until the server answers a probe, so that a session is only opened with a server that is up.

        Raises:
            UnavailableError, OverLimitError: the server was away for too long.
        """
        outage = self._continue_outage(error)
        limit = min(outage.since + self._reconnect_s, ends if ends is not None else float("inf"))
        while True:
            delay_s = delay_before_retry(error, next(self._delays))
            if self._closed.wait(max(0.0, min(delay_s, limit - time.monotonic()))):
                return
            if time.monotonic() >= limit:
                self._outage = None  # a caller that goes on after this error has the whole time again
                message = f"no batch for {time.monotonic() - outage.since:.1f} s: {error}"
                if isinstance(error, OverLimitError):
                    raise OverLimitError(message, error.retry_after_s) from error
                raise UnavailableError(message) from error
            try:
                self._readiness.probe(self._horizon, min(PROBE_TIMEOUT_S, max(limit - time.monotonic(), 0.1)))
            except TlsError:
                raise
            except (UnavailableError, DeadlineError, OverLimitError):
                continue
            outage.answered_at = time.monotonic()
            return

    def _continue_outage(self, error: TouchlineError) -> _Outage:
        """Returns the outage that a failure belongs to: the present one, or a new one if the last session lasted."""
        now = time.monotonic()
        outage = self._outage
        # The server was up during a session that lasted, even if nothing could be sampled.
        if outage is None or (outage.answered_at is not None and now - outage.answered_at > LASTING_S):
            outage = self._outage = _Outage(since=now)
            self._delays = self._rpc.delays()
            logger.warning("sampling was interrupted, trying again: %s", error)
        return outage

    def _timeout_error(self) -> TouchlineError:
        """Ends the session and returns the error that says why no batch came in time."""
        message = f"no batch within {self._timeout_s} s"
        self._drop_session()
        try:
            state = self._readiness.probe(self._horizon, PROBE_TIMEOUT_S)
            limit = self._readiness.limit() if state.can_sample else ""
        except TouchlineError as error:
            return UnavailableError(f"{message}: {error}")
        if state.can_sample:
            return DeadlineError(f"{message}: {limit}" if limit else message)
        return NotReadyError(f"{message}: {state.describe()}", state.counts)
