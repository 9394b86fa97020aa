"""Priorities on their way back to the server: sent by a thread, so that the learner goes on with its next batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from touchline._learner.ring_returns import ReturnQueue, queue_of
from touchline._rpc.calls import RpcClient
from touchline._rpc.convert import seconds_or_none
from touchline._rpc.fork import register_after_fork
from touchline.errors import ClosedError, DeadlineError, InvalidArgumentError, TouchlineError
from touchline.types import PriorityCounters
from touchline_protos import Batch
from touchline_protos.log_lines import get_logger
from touchline_protos.types.casting import ColumnError
from touchline_protos.types.priorities import PriorityUpdate, float_priorities, updates_by_table
from touchline_protos.v1 import replay_pb2 as pb

MAX_PENDING = 256
"""Updates that wait for the server; the oldest gives way to a new one."""

MAX_CALL_SLICES = 16_384
"""Slices in a call. What waits while a call is in progress goes into the next one together."""

LINGER_S = 0.01
"""Longest time that an update waits for others to share a call with: for the server, a call costs as much as several updates."""

LINGER_SLICES = 8192
"""Slices that are enough for a call."""

IDLE_S = 5.0
"""Time without an update after which the thread ends; the next update starts another one."""

CLOSE_S = 1.0
"""Longest time that closing waits for updates to be sent."""

LOG_INTERVAL_S = 10.0
"""Time between two log lines about dropped updates."""

HEADER_BYTES = 4096
"""Bytes reserved in a message for everything but the arrays."""

logger = get_logger(__name__)


class PriorityUpdates:
    """Updates of priorities, sent in their order, one call at a time. Thread-safe; a forked child starts without any.

    A call takes what has come within :data:`LINGER_S`, or :data:`LINGER_SLICES`, and what has come while the one before was in progress.
    If the server does not keep up, :data:`MAX_PENDING` updates wait; then the oldest is dropped, counted and logged. Slices of episodes
    that were evicted meanwhile are counted and not applied.

    Those of a batch that came through a ring go back through the ring, unless some wait for a call: so all are applied in their order.

    Args:
        rpc: client of the server's service.
        max_message_bytes: size limit of a request.
    """

    def __init__(self, rpc: RpcClient, *, max_message_bytes: int) -> None:
        self._rpc = rpc
        self._max_bytes = max_message_bytes - HEADER_BYTES
        self._reset()
        register_after_fork(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        """Guards all that follows."""
        self._pending: deque[tuple[str, PriorityUpdate]] = deque()
        """Updates in their order, each with the table that it is for."""
        self._pending_slices = 0
        self._hurried = 0
        """Callers that wait for all updates to be sent."""
        self._sending = False
        self._rings: list[ReturnQueue] = []
        """Rings that updates went back through, and that may not have applied them all."""
        self._thread: threading.Thread | None = None
        self._closed = False
        self._error: TouchlineError | None = None
        self._updated = self._evicted = self._dropped = 0
        self._next_line = 0.0

    def after_fork_in_child(self) -> None:
        """Starts without updates: those that waited at the fork are the parent's."""
        self._reset()

    def counters(self) -> PriorityCounters:
        """Returns what happened to the slices so far."""
        with self._changed:
            self._forget_finished()
            rings = [ring.counts() for ring in self._rings]
            return PriorityCounters(
                self._updated + sum(counts.updated for counts in rings),
                self._evicted + sum(counts.evicted for counts in rings),
                self._dropped + sum(counts.dropped for counts in rings),
                self._pending_slices + sum(counts.pending for counts in rings),
            )

    def update(self, slices: Batch | tuple[Any, ...], priorities: Any, *, table: str) -> None:
        """Takes an update and returns; see :meth:`touchline.ReplayClient.update_priorities`.

        Raises:
            InvalidArgumentError: a shape, a dtype or a number is wrong, or the batch was drawn by another law.
            ClosedError: the client was closed.
            TouchlineError: an earlier update failed. This one was taken all the same.
        """
        try:
            if isinstance(slices, Batch) and self._put_in_ring(slices, priorities):
                return
            updates = updates_by_table(slices, priorities, table)
        except ColumnError as error:
            raise InvalidArgumentError(str(error)) from None
        self.put(updates)

    def _put_in_ring(self, batch: Batch, priorities: Any) -> bool:
        """Sends priorities of a batch back through its ring, if it can take them; returns whether it could.

        Raises:
            ColumnError: the priorities are not an array.
            TouchlineError: an earlier update failed. This one was taken all the same.
        """
        origin = batch.origin
        ring = None if origin is None or not origin.is_of(batch) else queue_of(origin.source, self._rpc)
        if origin is None or ring is None or self._rpc.channel.closed:
            return False
        values = float_priorities(priorities)
        with self._changed:
            if self._pending or self._sending or values.dtype.kind != "f" or not ring.put(origin.number, values):
                return False
            if ring not in self._rings:
                self._forget_finished()
                self._rings.append(ring)
            self._raise_error()
        return True

    def put(self, updates: Sequence[tuple[str, PriorityUpdate]]) -> None:
        """Takes checked updates, each with its table, and returns. The arrays must not change any more.

        Raises:
            ClosedError: the client was closed.
            TouchlineError: an earlier update failed. These were taken all the same.
        """
        if self._rpc.channel.closed:
            raise ClosedError(f"the client of {self._rpc.channel.address} was closed")
        with self._changed:
            for update in updates:
                if len(self._pending) == MAX_PENDING:
                    self._drop(self._pop(), "the server does not keep up with them")
                before = self._pending_slices
                self._pending.append(update)
                self._pending_slices += len(update[1].start)
                # The thread only has to know of the first update, and of enough.
                if not before or before < LINGER_SLICES <= self._pending_slices:
                    self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="touchline-priorities", daemon=True)
                self._thread.start()
            self._raise_error()

    def flush(self, timeout_s: float | None = None) -> PriorityCounters:
        """Waits until every update has been answered, and returns what happened to the slices so far.

        Args:
            timeout_s: longest wait; None takes the client's.

        Raises:
            DeadlineError: it has not within ``timeout_s``.
            TouchlineError: an update failed.
        """
        limit_s = seconds_or_none("timeout_s", timeout_s) or self._rpc.timeout_s
        ends = time.monotonic() + limit_s
        with self._changed:
            done = self._wait_sent(limit_s)
            self._raise_error()
        if not (self._wait_rings(ends) and done):
            waiting = len(self._pending) + sum(ring.waiting() for ring in self._rings)
            raise DeadlineError(f"priorities: {waiting} updates wait after {limit_s:g} s, expected none")
        return self.counters()

    def close(self) -> None:
        """Ends the thread. Updates that wait are sent if that takes no more than :data:`CLOSE_S`."""
        ends = time.monotonic() + CLOSE_S
        with self._changed:
            self._wait_sent(CLOSE_S)
        self._wait_rings(ends)
        with self._changed:
            self._forget_finished()
            self._closed = True
            while self._pending:
                self._drop(self._pop(), "the client was closed")
            self._changed.notify_all()

    def _wait_rings(self, ends: float) -> bool:
        """Waits until what went back through rings is applied, or lost; returns whether it is before ``ends``, by the monotonic clock."""
        done = [ring.wait(ends) or ring.finished for ring in tuple(self._rings)]
        return all(done)

    def _forget_finished(self) -> None:
        """Drops the rings whose streams have ended, once nothing more comes of them. Called with the lock held."""
        for ring in [ring for ring in self._rings if ring.finished]:
            counts = ring.counts()
            self._rings.remove(ring)
            self._updated += counts.updated
            self._evicted += counts.evicted
            self._count_dropped(counts.dropped, "the stream of their batches ended before the server took them")

    def _wait_sent(self, limit_s: float) -> bool:
        """Waits until every update has been answered; returns whether they were. Called with the lock held."""
        self._hurried += 1
        self._changed.notify_all()
        try:
            return self._changed.wait_for(lambda: not self._pending and not self._sending, limit_s)
        finally:
            self._hurried -= 1

    def _pop(self) -> PriorityUpdate:
        """Removes the oldest update. Called with the lock held."""
        _, update = self._pending.popleft()
        self._pending_slices -= len(update.start)
        return update

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed, IDLE_S)
                if not self._pending:
                    self._thread = None
                    return
                self._changed.wait_for(lambda: self._closed or self._hurried or self._pending_slices >= LINGER_SLICES, LINGER_S)
                if not self._pending:
                    continue  # dropped by close()
                table, update = self._take()
                self._sending = True
            try:
                self._send(table, update)
            except Exception as error:
                with self._changed:
                    self._fail(update, error)
            finally:
                with self._changed:
                    self._sending = False
                    self._changed.notify_all()

    def _take(self) -> tuple[str, PriorityUpdate]:
        """Removes and returns the oldest updates as one, as many of the same table as fit in a call. Called with the lock held."""
        table = self._pending[0][0]
        first = self._pop()
        transitions = len(first.priorities)
        most = max(min(MAX_CALL_SLICES, self._max_bytes // (16 + 4 * transitions)), 1)
        if len(first.start) > most:
            self._pending.appendleft((table, _part(first, most, None)))
            self._pending_slices += len(first.start) - most
            return table, _part(first, 0, most)
        group, slices = [first], len(first.start)
        while self._pending:
            following_table, following = self._pending[0]
            alike = (following_table, len(following.priorities), following.store_generation) == (table, transitions, first.store_generation)
            if not alike or slices + len(following.start) > most:
                break
            group.append(self._pop())
            slices += len(following.start)
        return table, first if len(group) == 1 else _joined(group)

    def _send(self, table: str, update: PriorityUpdate) -> None:
        # What went back through a ring before was given before.
        self._wait_rings(time.monotonic() + CLOSE_S)
        self._rpc.check_server_version("update_priorities()", table=table)
        answer = pb.UpdatePrioritiesResponse.FromString(self._rpc.unary("UpdatePriorities", update_request(table, update)))
        with self._changed:
            self._updated += answer.updated
            self._evicted += answer.evicted

    def _fail(self, update: PriorityUpdate, error: Exception) -> None:
        self._dropped += len(update.start)
        if not isinstance(error, TouchlineError):
            error = TouchlineError(f"update_priorities(): {error!r}")
        if self._error is None and not self._closed:
            self._error = error

    def _drop(self, update: PriorityUpdate, reason: str) -> None:
        self._count_dropped(len(update.start), reason)

    def _count_dropped(self, slices: int, reason: str) -> None:
        self._dropped += slices
        if slices and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LOG_INTERVAL_S
            logger.warning("priorities of %d slices were dropped so far: %s", self._dropped, reason)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def update_request(table: str, update: PriorityUpdate) -> bytes:
    """Returns an UpdatePrioritiesRequest."""
    return pb.UpdatePrioritiesRequest(
        table=table,
        episode_id=_tensor(update.episode_id, pb.DTYPE_INT64),
        start=_tensor(update.start, pb.DTYPE_INT64),
        priorities=_tensor(update.priorities, pb.DTYPE_FLOAT32),
        store_generation=update.store_generation,
    ).SerializeToString()


def _tensor(array: np.ndarray, dtype: pb.DType) -> pb.Tensor:
    return pb.Tensor(dtype=dtype, shape=array.shape, data=array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def _joined(group: list[PriorityUpdate]) -> PriorityUpdate:
    return PriorityUpdate(
        np.concatenate([update.episode_id for update in group]),
        np.concatenate([update.start for update in group]),
        np.concatenate([update.priorities for update in group], axis=1),
        group[0].store_generation,
    )


def _part(update: PriorityUpdate, begin: int, end: int | None) -> PriorityUpdate:
    return PriorityUpdate(update.episode_id[begin:end], update.start[begin:end], update.priorities[:, begin:end], update.store_generation)
