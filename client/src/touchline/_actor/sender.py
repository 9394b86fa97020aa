"""Sends a writer's ended episodes: the queue they wait in, the thread that empties it, and the counters of both."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace

from touchline._actor.queue import EpisodeQueue, OverflowPolicy, QueueItem
from touchline._actor.recipient import EpisodeRecipient
from touchline._actor.send_loop import SendLoop
from touchline._actor.sender_log import SenderLog
from touchline._actor.sender_status import SenderState, SenderStatus, unacknowledged
from touchline._actor.traces import EpisodeTraces
from touchline._rpc import waits
from touchline.errors import ClosedError, DeadlineError, EpisodeResult, SpoolError, TlsError, TouchlineError
from touchline.types import WriterCounters
from touchline_protos.codec import Episode

POLL_INTERVAL_S = 1.0
"""Interval at which a blocked writer looks for space that nothing notifies it of, such as on a disk that others fill, too."""


class EpisodeSender:
    """Takes ended episodes, sends them oldest first from a background thread, and counts their outcomes.

    One thread calls ``put``; every other method is thread-safe. The background thread does not keep the process alive.

    Args:
        client: recipient of the episodes.
        queue: queue that holds episodes until they are acknowledged; closed together with the sender.
        name: name of the sender in log lines and errors.
        when_full: policy for an episode that the queue has no space for.
    """

    def __init__(self, client: EpisodeRecipient, queue: EpisodeQueue, *, name: str, when_full: OverflowPolicy) -> None:
        self._client = client
        self._queue = queue
        self._name = name
        self._when_full = when_full
        self._log = SenderLog(name, queue.spool_dir)
        self._status = SenderStatus(queue, name=name)
        self.traces = EpisodeTraces()
        """Spans of the episodes, from their first row on."""
        # An episode that is being sent cannot be dropped, so under that policy they are sent one at a time.
        grouping = when_full != "drop-oldest"
        self._loop = SendLoop(client, queue, self._status, self._log, traces=self.traces, name=name, grouping=grouping)
        self._thread: threading.Thread | None = None
        self._log.resumed(queue.resumed)
        if queue.resumed:
            self._start_thread()

    @property
    def counters(self) -> WriterCounters:
        """Counters of this moment."""
        return replace(self._status.counters, spool_bytes=self._queue.size_bytes)

    @property
    def durable(self) -> bool:
        """Whether pending episodes outlive the process."""
        return bool(self._queue.spool_dir)

    @property
    def spool_dir(self) -> str:
        """Folder of the spool; empty without one."""
        return self._queue.spool_dir

    @property
    def closed(self) -> bool:
        """Whether nothing is pending here: every episode was answered, or waits in the spool for the next writer."""
        return self._status.closed

    @property
    def error(self) -> TouchlineError | None:
        """Error because of which sending is being retried or has ended; None while nothing is wrong."""
        return self._status.error

    def wait(self, timeout_s: float) -> bool:
        """Waits until nothing is left to send, up to ``timeout_s``; returns whether nothing is left."""
        with self._status.changed:
            return self._status.changed.wait_for(lambda: self._status.done, timeout_s)

    def count_discarded(self) -> None:
        """Counts an episode that was given up before it ended."""
        self._status.count(discarded=1)

    def raise_unreported(self) -> None:
        """Raises UnacknowledgedError if episodes were refused, or the thread has failed, and no call has reported it yet."""
        self._status.raise_unreported()

    def put(self, episode: Episode, *, ends: float = math.inf, force: bool = False) -> bool:
        """Takes an episode over; with a spool, it is on the disk when this returns.

        Args:
            episode: episode with its key. The sender owns its columns from now on.
            ends: time, by the monotonic clock, until which to wait for space under the policy ``"block"``.
            force: whether to exceed the bounds of a queue in memory.

        Returns:
            Whether the episode was kept; False if it was dropped (and counted).

        Raises:
            SpoolError: it could not be written, or there was no space in time. The caller still owns it.
            ClosedError: there is no space and will be none, because the client was closed. The caller still owns it.
            UnacknowledgedError: there is no space and will be none, because the thread has failed; without a spool, also if there is space.
                The caller still owns it.
        """
        assert episode.key is not None
        status = self._status
        if status.failed and not self.durable and not force:
            raise status.report_failure()
        try:
            item = self._queue.pack(episode)
        except TouchlineError as error:
            self._log.refused(episode.key, episode.length, error)
            self.traces.end(episode.key, str(error))
            status.note_refused(EpisodeResult(episode.key, error=error), appended=1, steps_appended=episode.length)
            return True
        kept = self._put_or_wait(item, ends=ends, force=force)
        if kept:
            status.count(appended=1, steps_appended=episode.length)
        else:
            status.count(appended=1, dropped=1, steps_appended=episode.length, steps_dropped=episode.length)
            self.traces.end(episode.key, "dropped: the queue had no space")
        self._start_thread()
        self._log.dropped(status.counters, self._when_full, status.error)
        return kept

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until every episode is acknowledged.

        Raises:
            UnacknowledgedError: episodes were refused, or are not acknowledged in time; the latter are still being sent.
            ClosedError: the sender was closed, and episodes wait in the spool.
        """
        status = self._status
        with status.changed:
            if status.closed and status.pending:
                raise ClosedError(f"the episode writer was closed; {status.pending} episodes wait in {self.spool_dir}")
            answered = self._wait_until_done("flush()", timeout_s) and not status.pending
            results = status.take_unreported()
            reason = status.error or DeadlineError(f"no acknowledgement within {timeout_s} s")
        if not answered:
            if status.failed:
                raise status.report_failure(results)
            results += [EpisodeResult(key, error=reason) for key in self._queue.waiting_keys()]
        if results:
            raise unacknowledged(results)

    def close(self, timeout_s: float | None = None) -> None:
        """Waits until every episode is acknowledged, and ends the thread.

        With a spool, episodes that are not acknowledged in time stay there for the next writer; the default wait is the client's timeout.
        Without one, they are still being sent, and the default wait has no limit.

        Raises:
            UnacknowledgedError: episodes were refused or, without a spool, are not acknowledged in time.
        """
        status = self._status
        self._log.dropped(status.counters, self._when_full, status.error, last=True)
        if not self.durable:
            try:
                self.flush(timeout_s)
            finally:
                with status.changed:
                    if not status.pending:
                        status.set_state(SenderState.CLOSED)
            return
        with status.changed:
            self._wait_until_done("close()", self._client.timeout_s if timeout_s is None else timeout_s)
            results = status.take_unreported()
            state, pending = status.state, status.pending
            status.set_state(SenderState.CLOSED)
        try:
            if state is SenderState.FAILED:
                raise status.report_failure(results)
        finally:
            self._queue.close()
            self.traces.end_all("waits in the spool")
            if state is not SenderState.CLOSED:
                self._log.left_in_spool(pending)
        if results:
            raise unacknowledged(results)

    def _put_or_wait(self, item: QueueItem, *, ends: float, force: bool) -> bool:
        """Puts an item into the queue, under the policy for a full one; returns whether it was kept."""
        while True:
            answered = self._status.answered  # read before the attempt: what is answered during it makes space, too
            result = self._queue.put(item, drop_oldest=self._when_full == "drop-oldest", force=force)
            if result.dropped:
                self._status.count(dropped=len(result.dropped), steps_dropped=sum(ticket.length for ticket in result.dropped))
                for ticket in result.dropped:
                    self.traces.end(ticket.key, "dropped: the queue had no space")
            if result.error is not None:
                raise result.error
            if result.kept or self._when_full != "block":
                return result.kept
            self._log.held_up(self._status.pending, self._loop.failure)
            self._wait_for_space(answered, ends)

    def _wait_for_space(self, answered: int, ends: float) -> None:
        status = self._status
        with status.changed:
            if status.failed:
                raise status.report_failure()
            if status.state is SenderState.HALTED:
                raise ClosedError("the client was closed, and the spool has no space for another episode")
            left_s = ends - time.monotonic()
            if left_s <= 0:
                raise SpoolError("the queue has no space for another episode, and none became free in time")
            status.changed.wait_for(
                lambda: status.answered != answered or status.state is not SenderState.RUNNING, min(left_s, POLL_INTERVAL_S)
            )

    def _wait_until_done(self, verb: str, timeout_s: float | None) -> bool:
        """Waits until nothing is left to send, or a setting has to be changed first. The caller holds ``status.changed``."""
        status = self._status
        with waits.waiting(f"{verb} of the {self._name}", self._client.address, status.why_pending):
            ends = math.inf if timeout_s is None else time.monotonic() + timeout_s
            while not status.done and not isinstance(status.error, TlsError):
                left_s = ends - time.monotonic()
                if left_s <= 0:
                    return False
                # In short waits: a Ctrl-C that arrives just before a wait does not end it.
                status.changed.wait(min(left_s, POLL_INTERVAL_S))
            return True

    def _start_thread(self) -> None:
        if self._thread is not None:
            return
        with self._status.changed:
            if self._status.state is not SenderState.RUNNING:
                return
            thread = threading.Thread(target=self._loop.run, name="touchline-writer", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system's limit of threads
                self._status.fail(error)
            else:
                self._thread = thread
