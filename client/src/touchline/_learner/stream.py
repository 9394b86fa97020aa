"""The sampling stream: batches that the server pushes ahead of their use."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from touchline._learner.readiness import PROBE_TIMEOUT_S, Readiness
from touchline._learner.ring_reader import RingBatches, RingEndedError, attach
from touchline._rpc.calls import RpcClient, delay_before_retry, is_passing
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
    ServerError,
    TlsError,
    TouchlineError,
    UnavailableError,
)
from touchline_protos import Batch
from touchline_protos.codec import BatchDecoder, CodecError
from touchline_protos.log_lines import get_logger
from touchline_protos.shm.ring import RingError, shared_memory_id
from touchline_protos.v1 import replay_pb2 as pb

LASTING_S = 5.0
"""A session of this length was no failed attempt to open one."""

NO_REASON = "the server offered none and did not say why, as older ones do"
"""Why there is no ring, where only the server knows."""

logger = get_logger(__name__)


class BatchSource(Protocol):
    """Where batches come from, one after the other."""

    def take(self) -> Batch:
        """Returns the next batch, waiting for it."""

    def close(self) -> None:
        """Ends it; a ``take`` under way raises ClosedError."""

    @property
    def transport(self) -> str:
        """How batches come: ``ring``, ``stream``, or ``""`` while there is no session."""

    @property
    def transport_reason(self) -> str:
        """Why they do not come by a ring; ``""`` while they do or there is no session."""

    @property
    def ring(self) -> RingBatches | None:
        """The ring that the last batch came through; None where it came in messages."""


class BatchStream(ProcessBound):
    """An endless iterator of batches; also a context manager that closes it.

    One thread iterates, any thread may close; one that is dropped ends its session once it is collected. The batches are the caller's:
    nothing overwrites them, however long they are held.

    In a forked child the stream is still the parent's: using it there raises ForkError, closing it does nothing. Limit: if one thread forks
    while another takes a batch that comes in messages (not through a ring), gRPC itself may be caught half-way and hang in the child. Fork
    from the thread that iterates, or pause the iteration meanwhile.
    """

    _instead = "call batches() there, on the client, which may be forked, pickled and copied"

    def __init__(self, source: BatchSource, deliver: Callable[[Batch], Batch]) -> None:
        super().__init__()
        self._source = source
        self._deliver = deliver
        self._closed = False
        when_dropped(self, source.close)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch, waiting for it.

        Raises:
            StopIteration: the stream was closed here.
            UnavailableError: the server could not be reached for as long as it may be away.
            OverLimitError: it had too much to do for as long as that.
            NotReadyError: nothing could be sampled within ``timeout_s``.
            DeadlineError: no batch came within ``timeout_s`` for another reason.
            ForkError: the stream was opened by the parent of this forked child.
            TouchlineError: the server refused the request.
        """
        if self._closed:
            raise StopIteration
        self._check_process()
        try:
            return self._deliver(self._source.take())
        except ClosedError:
            if self._closed:
                raise StopIteration from None
            raise

    @property
    def transport(self) -> str:
        """How batches come: ``ring`` (shared memory, on the server's own host), ``stream`` (messages), or ``""`` before the first."""
        return self._source.transport

    @property
    def transport_reason(self) -> str:
        """Why batches come in messages and not by a ring, in words; ``""`` if they come by a ring, or before the first."""
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


class StreamSource:
    """Batches as numpy arrays from SampleStream; opens the session anew when the server was away. One thread takes, any closes.

    Args:
        calls: to the server.
        request: what to draw.
        prefetch: batches that the server may have under way.
        timeout_s: the longest wait for a batch, for whatever reason; None waits without limit while the server lives.
        reconnect_s: the longest time that the server may be away.
        ring: whether a ring in shared memory is taken where the server offers one.
    """

    def __init__(
        self, calls: RpcClient, request: pb.SampleRequest, *, prefetch: int, timeout_s: float | None, reconnect_s: float, ring: bool
    ) -> None:
        self._calls = calls
        self._use_ring = ring
        self._request = request
        self._prefetch = prefetch
        # One message grants several credits: a message costs as much as a small batch.
        self._grant = max(1, prefetch // 2)
        self._timeout_s = timeout_s
        self._reconnect_s = reconnect_s if timeout_s is None else timeout_s
        self._readiness = Readiness(calls, table=request.table)
        self._horizon = request.horizon if request.HasField("horizon") else None
        # Of this object it must hold nothing: that would keep a dropped stream alive.
        self._wait = waiting("batches()", calls.transport.address, partial(self._readiness.explain, self._horizon))
        self._session: _Session | None = None
        self._no_ring_told = False
        self._closed = threading.Event()
        self._ready: deque[Batch] = deque()
        self._taken = 0
        self._delays = self._calls.delays()
        self._away_since: float | None = None
        self._returned_at: float | None = None
        self._watchdog = Watchdog(self._timeout_s) if self._timeout_s is not None else None

    def take(self) -> Batch:
        """Returns the next batch; see :class:`BatchStream` for what it raises."""
        while not self._ready:
            self._receive()
        batch = self._ready.popleft()
        self._taken += 1
        if self._taken == self._grant and self._session is not None:
            self._taken = 0
            self._session.grant(self._grant)
        return batch

    @property
    def transport(self) -> str:
        """How batches come: ``ring``, ``stream``, or ``""`` while there is no session."""
        session = self._session
        return session.transport if session is not None else ""

    @property
    def transport_reason(self) -> str:
        """Why they do not come by a ring; ``""`` while they do or there is no session."""
        session = self._session
        return session.transport_reason if session is not None else ""

    @property
    def ring(self) -> RingBatches | None:
        """The ring that the last batch came through; None where it came in messages."""
        session = self._session
        return session.ring if session is not None else None

    def close(self) -> None:
        """Ends the session; a ``take`` under way raises ClosedError."""
        self._closed.set()
        session = self._session
        if session is not None:
            session.end()
        if self._watchdog is not None:
            self._watchdog.stop()

    def _receive(self) -> None:
        """Reads frames until a batch is complete."""
        with self._wait:
            self._read_frames()

    def _read_frames(self) -> None:
        ends = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        while not self._ready:
            if self._closed.is_set():
                raise ClosedError("the stream was closed")
            if ends is not None and time.monotonic() >= ends:
                raise self._late()
            try:
                session = self._session or self._open()
                if self._watchdog is not None and ends is not None:
                    self._watchdog.watch(session, ends)
                batches = session.receive()
            except TouchlineError as error:
                self._drop()
                if self._closed.is_set() or (ends is not None and time.monotonic() >= ends):
                    continue
                if not isinstance(error, UnavailableError | OverLimitError) or not is_passing(error):
                    raise
                self._wait.note(str(error))
                self._wait_for_return(error, ends)
            except BaseException:
                self._drop()  # who knows how far a message was read
                raise
            else:
                self._ready.extend(batches)
                self._say_why_there_is_no_ring(session)
        if self._watchdog is not None:
            self._watchdog.rest()
        if self._away_since is not None:
            logger.info("%s is back: sampling goes on", self._calls.transport.address)
            self._away_since = self._returned_at = None

    def _say_why_there_is_no_ring(self, session: _Session) -> None:
        """Says once why batches come in messages, where a ring was wanted."""
        if self._use_ring and not self._no_ring_told and session.transport_reason not in ("", NO_REASON):
            self._no_ring_told = True
            address = self._calls.transport.address
            # Elsewhere there is nothing to put right.
            level = logging.WARNING if is_local(address) and shared_memory_id() else logging.INFO
            logger.log(level, "%s: batches come in messages instead of a ring: %s", address, session.transport_reason)

    def _open(self) -> _Session:
        self._taken = 0
        session = _Session(self._calls, self._request, self._prefetch, ring=self._use_ring)
        self._session = session
        if self._closed.is_set():  # closed by another thread before it could see the session
            session.end()
        return session

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.end()

    def _wait_for_return(self, error: UnavailableError | OverLimitError, ends: float | None) -> None:
        """Waits a little, then asks whether the server is there; the session is opened only after it was."""
        now = time.monotonic()
        # A session that lasted was one with a server that was there, though nothing could be sampled: this is another outage.
        if self._away_since is None or (self._returned_at is not None and now - self._returned_at > LASTING_S):
            self._away_since, self._returned_at = now, None
            self._delays = self._calls.delays()
            logger.warning("sampling was interrupted, trying again: %s", error)
        limit = min(self._away_since + self._reconnect_s, ends if ends is not None else float("inf"))
        while True:
            delay_s = delay_before_retry(error, next(self._delays))
            if self._closed.wait(max(0.0, min(delay_s, limit - time.monotonic()))):
                return
            if time.monotonic() >= limit:
                away_s = time.monotonic() - self._away_since
                self._away_since = None  # whoever goes on after this error gets the whole time again
                told = f"no batch for {away_s:.1f} s: {error}"
                raise (
                    OverLimitError(told, error.retry_after_s) if isinstance(error, OverLimitError) else UnavailableError(told)
                ) from error
            try:
                self._readiness.probe(self._horizon, min(PROBE_TIMEOUT_S, max(limit - time.monotonic(), 0.1)))
            except TlsError:
                raise
            except (UnavailableError, DeadlineError, OverLimitError):
                continue
            self._returned_at = time.monotonic()
            return

    def _late(self) -> TouchlineError:
        waited = f"no batch within {self._timeout_s} s"
        self._drop()
        try:
            state = self._readiness.probe(self._horizon, PROBE_TIMEOUT_S)
        except TouchlineError as error:
            return UnavailableError(f"{waited}: {error}")
        return DeadlineError(waited) if state.can_sample else NotReadyError(f"{waited}: {state.describe()}", state.counts)


class _Session:
    """One call of SampleStream: batches in its messages, or in a ring that the server offers on the same host."""

    def __init__(self, calls: RpcClient, request: pb.SampleRequest, prefetch: int, *, ring: bool) -> None:
        self._calls = calls
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        identity = shared_memory_id() if ring else ""
        self.transport_reason = ""
        """Why batches do not come by a ring; ``""`` while they do, or that is not known yet."""
        if not identity:
            self.transport_reason = "this machine is not Linux on x86-64, or has no /dev/shm" if ring else "turned off by ring=False"
        opening = pb.SampleStreamOpen(sample=request, credits=prefetch, shared_memory_id=identity)
        self._requests.put(pb.SampleStreamRequest(open=opening).SerializeToString())
        self._offers = bool(opening.shared_memory_id)
        self.ring: RingBatches | None = None
        self._decoder = BatchDecoder()
        self._grants: dict[int, bytes] = {}
        self._call: Any = calls.stream("SampleStream", iter(self._requests.get, None))

    def receive(self) -> list[Batch]:
        """Returns the batches that the next frame completes.

        Raises:
            TouchlineError: the session ended.
        """
        try:
            if self.ring is not None:
                batch = self.ring.take()
                return [] if batch is None else [batch]
            message = next(self._call)
            return [] if self._offers and self._answer(message) else self._decoder.feed(message)
        except RingEndedError as error:
            if isinstance(error.reason, Exception) and not isinstance(error.reason, StopIteration):
                raise self._calls.translate(error.reason) from error.reason
            raise UnavailableError(f"{self._calls.transport.address}: the server ended the stream") from None
        except StopIteration:
            raise UnavailableError(f"{self._calls.transport.address}: the server ended the stream") from None
        except (CodecError, RingError) as error:
            raise ServerError(f"{self._calls.transport.address}: a frame that is none: {error}") from error
        except Exception as error:
            raise self._calls.translate(error) from error

    @property
    def transport(self) -> str:
        """How batches come: ``ring`` or ``stream``."""
        return "stream" if self.ring is None else "ring"

    def _answer(self, message: bytes) -> bool:
        """Takes the server's offer of a ring, if its first message is one; returns whether it was."""
        self._offers = False
        try:
            ring = attach(message, self._call)
            if ring is None:
                self.transport_reason = NO_REASON
                return False
            if isinstance(ring, str):
                self.transport_reason = ring
                return True
            ring.start()
        except (CodecError, RingError, RuntimeError) as error:  # the last where the system has no other thread
            self.transport_reason = f"the server's ring cannot be used here: {error}"
        else:
            self.ring = ring
        answer = pb.RingAttachment(attached=self.ring is not None, reason=self.transport_reason)
        self._requests.put(pb.SampleStreamRequest(ring=answer).SerializeToString())
        return True

    def grant(self, batches: int) -> None:
        """Lets the server push so many batches more."""
        if self.ring is not None:
            return  # the ring's free slots are its credits
        message = self._grants.get(batches)
        if message is None:
            credit = pb.SampleStreamRequest(credit=pb.SampleStreamCredit(batches=batches))
            message = self._grants[batches] = credit.SerializeToString()
        self._requests.put(message)

    def end(self) -> None:
        """Ends the call, from any thread."""
        self._requests.put(None)  # releases gRPC's thread that waits for requests
        self._call.cancel()
        if self.ring is not None:
            self.ring.interrupt()
