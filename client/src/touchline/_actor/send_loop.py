"""The background thread of a sender: takes the oldest episodes from the queue, sends them, and settles each."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from touchline._actor.queue import EpisodeQueue, Peeked, QueueTicket
from touchline._actor.recipient import EpisodeRecipient
from touchline._actor.sender_log import SenderLog
from touchline._actor.sender_status import SenderState, SenderStatus, StopSendingError
from touchline._actor.traces import EpisodeTraces
from touchline._rpc import waits
from touchline._rpc.calls import Backoff, delay_before_retry
from touchline._rpc.spool_note import from_spool
from touchline.errors import (
    ClosedError,
    DeadlineError,
    EpisodeResult,
    InvalidArgumentError,
    KeyConflictError,
    OverLimitError,
    ServerError,
    SpoolError,
    TooLargeError,
    TouchlineError,
    UnavailableError,
)
from touchline_protos.codec import Episode
from touchline_protos.log_lines import get_logger

SERVER_ERROR_ATTEMPTS = 5
"""Attempts at an episode that fails with an unexpected error in server or client, before it counts as refused."""
COUNTER_LAG_S = 0.01
"""Wait for another thread to count an episode that it has just put, or dropped."""
GROUP_EPISODES = 64
"""Maximum number of episodes in one call."""
GROUP_BYTES = 1 << 20
"""Maximum payload of a call with several episodes; a slow link carries it within the deadline."""

logger = get_logger(__name__)


class SendLoop:
    """Sends the episodes of a queue, oldest first. For one thread, which calls :meth:`run`; it never holds the status's lock in a call.

    Args:
        client: recipient of the episodes.
        queue: queue of the episodes.
        status: status that the loop shares with the sender.
        log: log of the sender.
        traces: spans of the episodes.
        name: name of the sender in log lines.
        grouping: whether a call may carry several episodes.
    """

    def __init__(
        self,
        client: EpisodeRecipient,
        queue: EpisodeQueue,
        status: SenderStatus,
        log: SenderLog,
        *,
        traces: EpisodeTraces,
        name: str,
        grouping: bool,
    ) -> None:
        self._client = client
        self._queue = queue
        self._status = status
        self._log = log
        self._traces = traces
        self._name = name
        self._grouping = grouping
        self._send_singly_left = 0
        self._wait = waits.waiting(name, client.address, status.why_pending)

    @property
    def failure(self) -> str:
        """Why the last attempt to send what is being sent failed; empty if none has."""
        return self._wait.noted or str(self._status.error or "")

    def run(self) -> None:
        """Runs until the sender or its client is closed, or something unexpected happens, which the status then says."""
        status = self._status
        try:
            while True:
                with status.changed:
                    status.changed.wait_for(lambda: status.pending > 0 or status.closed)
                    if status.closed:
                        return
                with self._wait:
                    self._send_next()
        except StopSendingError:
            with status.changed:
                if not status.closed:
                    status.set_state(SenderState.HALTED)
        except BaseException as error:
            self._traces.end_all(f"sending has ended: {error!r}")
            status.fail(error)  # otherwise flush() and close() would wait for this thread forever

    def _send_next(self) -> None:
        """Sends the oldest episodes, in one call if possible, and settles them."""
        group = self._next_group()
        if not group:
            return
        if len(group) > 1 and (errors := self._send_group(group)) is not None:
            for (ticket, content), error in zip(group, errors, strict=True):
                # An error that is not about the episode itself: send the episode again by itself, which retries.
                self._settle(ticket, error if isinstance(error, InvalidArgumentError | None) else self._send_or_refuse(ticket, content))
            return
        self._send_singly_left = max(self._send_singly_left - 1, 0)
        ticket, content = group[0]
        self._settle(ticket, self._send_or_refuse(ticket, content))

    def _next_group(self) -> list[Peeked]:
        """Returns the oldest episode and, unless something is wrong, the next ones that fit into the same call; empty if none waits.

        A call is for one table: the group ends before the first episode for another, so episodes are sent in the order of the queue.
        """
        oldest = self._peek()
        if oldest is None:
            return []
        group = [oldest]
        if not self._grouping or self._status.error is not None or self._send_singly_left:
            return group
        left_bytes = GROUP_BYTES
        while len(group) < GROUP_EPISODES:
            ticket, content = group[-1]
            left_bytes -= content.size_bytes if isinstance(content, Episode) else GROUP_BYTES
            if left_bytes <= 0:
                break
            try:
                following = self._queue.peek(ticket)
            except SpoolError:
                break
            if following is None or not isinstance(following[1], Episode) or following[1].size_bytes > left_bytes:
                break
            if following[0].table != ticket.table:
                break
            group.append(following)
        return group

    def _send_group(self, group: Sequence[Peeked]) -> list[TouchlineError | None] | None:
        """Sends episodes for one table in one call.

        Returns:
            None for each acknowledged episode, its error for any other. None if the call itself failed: some of the episodes may be stored,
            so each is sent again by itself, under its key.
        """
        episodes = [(ticket.key, content) for ticket, content in group]
        try:
            with self._traces.sending([key for key, _ in episodes]), self._noting_spool(len(episodes)):
                answered = list(self._client.deliver_all(episodes, table=group[0][0].table))
            return [result.error for results in answered for result in results]
        except TouchlineError as error:
            logger.debug("%s: a call with %d episodes failed, each is sent by itself: %s", self._name, len(group), error)
        except Exception:
            logger.exception("%s: a call with %d episodes failed, each is sent by itself", self._name, len(group))
        self._send_singly_left = len(group)
        return None

    def _noting_spool(self, episodes: int) -> AbstractContextManager[None]:
        """Adds to the calls in a block how much waits in the spool besides this many episodes, if there is a spool."""
        if not self._queue.spool_dir:
            return nullcontext()
        return from_spool(self._status.pending - episodes, self._queue.size_bytes)

    def _send_or_refuse(self, ticket: QueueTicket, content: Episode | TouchlineError) -> TouchlineError | None:
        return self._send(content, ticket.table) if isinstance(content, Episode) else content

    def _peek(self) -> Peeked | None:
        delays = _delays()
        while True:
            try:
                oldest = self._queue.peek()
            except SpoolError as error:
                self._pause(error, next(delays))
                continue
            # The queue may be ahead of the counters: the thread that put or dropped an episode counts it right afterwards.
            if oldest is not None or self._status.pending <= 0:
                return oldest
            self._status.sleep(COUNTER_LAG_S)

    def _send(self, episode: Episode, table: str) -> TouchlineError | None:
        """Sends an episode until it is answered; returns None once it is acknowledged, or the error if it never will be."""
        delays = _delays()
        failures = 0
        while True:
            try:
                with self._traces.sending([episode.key]), self._noting_spool(1):
                    self._client.deliver(episode, table=table)
            except (UnavailableError, DeadlineError, OverLimitError) as error:  # passes by itself: retry without limit
                reason: TouchlineError = error
            except (InvalidArgumentError, KeyConflictError, TooLargeError) as error:  # about this episode: refused for good
                return error
            except ServerError as error:  # perhaps about this episode: retry a few times
                reason = error
                failures += 1
            except TouchlineError as error:  # about this client, not the episode: a spool keeps it for a client that is let in
                if not self._queue.spool_dir:
                    return error
                reason = error
                if isinstance(error, ClosedError):
                    self._status.note_retry(error)
                    raise StopSendingError from error
            except Exception as error:
                if not failures:
                    logger.exception("%s: sending failed", self._name)
                reason = ServerError(f"sending failed: {error!r}")
                failures += 1
            else:
                if self._status.error is not None:
                    self._log.recovered()
                    self._status.error = None
                return None
            if failures == SERVER_ERROR_ATTEMPTS:
                return ServerError(f"{reason}; gave up after {failures} attempts. It may be stored: adding it again under its key is safe")
            self._pause(reason, delay_before_retry(reason, next(delays)))

    def _settle(self, ticket: QueueTicket, error: TouchlineError | None) -> None:
        """Takes an answered episode out of the queue, and counts it."""
        if error is not None:
            self._log.refused(ticket.key, ticket.length, error)
        delays = _delays()
        while True:
            try:
                if error is None:
                    self._queue.acknowledge(ticket)
                else:
                    self._queue.dead_letter(ticket, error)
                break
            except SpoolError as failure:
                self._pause(failure, next(delays))
        self._traces.end(ticket.key, str(error or ""))
        if error is None:
            self._status.count(acknowledged=1, steps_acknowledged=ticket.length)
        else:
            self._status.note_refused(EpisodeResult(ticket.key, error=error))

    def _pause(self, error: TouchlineError, delay_s: float) -> None:
        """Waits before the next attempt, and logs why if that is news."""
        if self._status.closed:
            raise StopSendingError
        self._log.retrying(error, self._status.pending)
        self._status.note_retry(error)
        self._status.sleep(delay_s)


def _delays() -> Iterator[float]:
    # Seeded by the system's entropy on purpose: jitter must differ between processes that start alike.
    return Backoff(first_s=0.1, max_s=5.0).delays(random.Random())
