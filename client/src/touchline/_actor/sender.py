"""The way of ended episodes from a writer to the server: a queue, the thread that empties it, and the account of both."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from touchline._actor.queue import EpisodeQueue, OverflowPolicy, QueueTicket
from touchline._actor.recipient import EpisodeRecipient
from touchline._actor.sender_log import SenderLog
from touchline._rpc import waits
from touchline._rpc.calls import Backoff, delay_before_retry
from touchline.errors import (
    ClosedError,
    DeadlineError,
    EpisodeResult,
    InvalidArgumentError,
    KeyConflictError,
    OverLimitError,
    ServerError,
    SpoolError,
    TlsError,
    TooLargeError,
    TouchlineError,
    UnacknowledgedError,
    UnavailableError,
)
from touchline.types import WriterCounters
from touchline_protos.codec import Episode
from touchline_protos.log_lines import get_logger

SERVER_ERROR_ATTEMPTS = 5
"""How often an episode is sent where server or client fail on it, before it counts as refused."""
POLL_INTERVAL_S = 1.0
"""How often a blocked writer looks for room that nobody tells it of, such as on a disk that others fill."""
GROUP_EPISODES = 64
"""Most episodes of one call."""
GROUP_BYTES = 1 << 20
"""Most payload of one call that several share; little enough for a slow link to carry within the deadline."""
logger = get_logger(__name__)


class _StoppedError(Exception):
    """The thread is to end; what waits stays where it is."""


class EpisodeSender:
    """Takes ended episodes, sends them oldest first from a background thread, and counts what becomes of each.

    One thread puts; the rest may be called from any. The thread does not keep the process alive.

    Args:
        client: sends the episodes.
        queue: keeps them until they are acknowledged; closed with this.
        name: of the sender, in the log.
        when_full: what happens to an episode for which the queue has no room.
    """

    def __init__(self, client: EpisodeRecipient, queue: EpisodeQueue, *, name: str, when_full: OverflowPolicy) -> None:
        self._client = client
        self._queue = queue
        self._name = name
        self._log = SenderLog(name, queue.spool_dir)
        self._when_full = when_full
        self._changed = threading.Condition()
        self._counters = WriterCounters(resumed=queue.resumed[0], pending=queue.resumed[0])
        self._unreported: list[EpisodeResult] = []
        self._trouble: TouchlineError | None = None
        self._settled = 0
        self._send_singly_left = 0
        self._halted = self._stopped = False
        self._failure: ServerError | None = None
        self._failure_told = False
        self._thread: threading.Thread | None = None
        self._log.resumed(queue.resumed[0])
        if queue.resumed[0]:
            with self._changed:
                self._start()

    @property
    def counters(self) -> WriterCounters:
        """What was done so far."""
        with self._changed:
            counters = self._counters
        return replace(counters, spool_bytes=self._queue.size_bytes)

    @property
    def durable(self) -> bool:
        """What waits outlives the process."""
        return bool(self._queue.spool_dir)

    @property
    def spool_dir(self) -> str:
        """The spool's folder; empty without one."""
        return self._queue.spool_dir

    @property
    def idle(self) -> bool:
        """Nothing waits here: all was answered, or it is the next writer's."""
        return self._stopped

    @property
    def trouble(self) -> TouchlineError | None:
        """Why sending is being tried again, or is over; None where nothing is in the way."""
        return self._failure or self._trouble

    def wait(self, timeout_s: float) -> bool:
        """Returns whether nothing is to be sent any more: at once where that is so, else at the latest after this time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._done, timeout_s)

    def count_discarded(self) -> None:
        """Counts an episode that was not handed on."""
        with self._changed:
            self._count(discarded=1)

    def raise_unreported(self) -> None:
        """Raises UnacknowledgedError where episodes were refused since the last report, or the thread has failed since."""
        if self._unreported:
            with self._changed:
                results, self._unreported = self._unreported, []
            raise _unacknowledged(results)
        if self._failure is not None and not self._failure_told:
            raise self._failed(self._failure)

    def put(self, episode: Episode, *, ends: float = math.inf, force: bool = False) -> bool:
        """Takes an episode over; with a spool it is on the disk when this returns.

        Args:
            episode: its columns are this outbox's from now on.
            ends: until when, by the monotonic clock, to wait for room where the policy is to block.
            force: beyond the bounds of a queue in memory.

        Returns:
            Whether it was kept: False where it was dropped (and counted).

        Raises:
            SpoolError: it could not be written, or there was no room in time; it is still the caller's.
            ClosedError: there is no room and never will be, since the client was closed.
            UnacknowledgedError: the same, since the thread has failed; without a spool also where there is room. Still the caller's.
        """
        assert episode.key is not None
        if self._failure is not None and not self.durable and not force:
            raise self._failed(self._failure)
        try:
            item = self._queue.pack(episode)
        except TouchlineError as error:
            self._log.refused(episode.key, episode.length, error)
            with self._changed:
                self._unreported.append(EpisodeResult(episode.key, error=error))
                self._count(appended=1, refused=1, steps_appended=episode.length)
            return True
        while True:
            settled = self._settled
            admission = self._queue.put(item, drop_oldest=self._when_full == "drop-oldest", force=force)
            dropped = len(admission.dropped)
            if dropped:
                with self._changed:
                    self._count(pending=-dropped, dropped=dropped, steps_dropped=sum(waiting.length for waiting in admission.dropped))
            if admission.error is not None:
                raise admission.error
            if admission.kept or self._when_full != "block":
                break
            self._log.held_up(self._counters.pending)
            self._wait_for_room(settled, ends)
        with self._changed:
            if admission.kept:
                self._count(appended=1, pending=1, steps_appended=episode.length)
            else:
                self._count(appended=1, dropped=1, steps_appended=episode.length, steps_dropped=episode.length)
            self._start()
            self._changed.notify_all()
        self._log.dropped(self._counters, self._when_full, self._trouble)
        return admission.kept

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until everything is acknowledged.

        Raises:
            UnacknowledgedError: some episodes were refused, or are not acknowledged in time; those go on being sent.
            ClosedError: closed before, and episodes wait in the spool.
        """
        with self._changed:
            if self._stopped and self._counters.pending:
                raise ClosedError(f"the episode writer was closed; {self._counters.pending} episodes wait in {self._queue.spool_dir}")
            answered = self._wait_for_all("flush()", timeout_s) and not self._counters.pending
            results, self._unreported = self._unreported, []
            reason = self._trouble or DeadlineError(f"no acknowledgement within {timeout_s} s")
        if not answered:
            if self._failure is not None:
                raise self._failed(self._failure, results)
            results += [EpisodeResult(key, error=reason) for key in self._queue.waiting_keys()]
        if results:
            raise _unacknowledged(results)

    def close(self, timeout_s: float | None = None) -> None:
        """Waits until everything is acknowledged, and ends the thread.

        With a spool, what is not acknowledged in time stays there for the next writer; the wait is the client's timeout where none is
        given. Without one it goes on being sent.

        Raises:
            UnacknowledgedError: some episodes were refused or, without a spool, are not acknowledged in time.
        """
        self._log.dropped(self._counters, self._when_full, self._trouble, last=True)
        if not self.durable:
            try:
                self.flush(timeout_s)
            finally:
                with self._changed:
                    self._stopped = not self._counters.pending
                    self._changed.notify_all()
            return
        with self._changed:
            self._wait_for_all("close()", self._client.timeout_s if timeout_s is None else timeout_s)
            results, self._unreported = self._unreported, []
            told, self._stopped = self._stopped, True
            failure = self._failure if not told else None
            left = self._counters.pending
            self._changed.notify_all()
        try:
            if failure is not None:
                raise self._failed(failure, results)
        finally:
            self._queue.close()
            if not told:
                self._log.left(left)
        if results:
            raise _unacknowledged(results)

    def _wait_for_room(self, settled: int, ends: float) -> None:
        with self._changed:
            if self._failure is not None:
                raise self._failed(self._failure)
            if self._halted:
                raise ClosedError("the client was closed, and the spool has no room for another episode")
            left_s = ends - time.monotonic()
            if left_s <= 0:
                raise SpoolError("the queue has no room for another episode, and got none in time")
            self._changed.wait_for(lambda: self._settled != settled or self._halted, min(left_s, POLL_INTERVAL_S))

    def _wait_for_all(self, verb: str, timeout_s: float | None) -> bool:
        """Waits until nothing is to be sent any more, or will not be before somebody changes a setting; under the lock."""
        with waits.waiting(f"{verb} of the {self._name}", self._client.address, self._why):
            ends = math.inf if timeout_s is None else time.monotonic() + timeout_s
            while not self._done and not isinstance(self._trouble, TlsError):
                left_s = ends - time.monotonic()
                if left_s <= 0:
                    return False
                # In pieces: a Ctrl-C that comes just before a wait does not end it.
                self._changed.wait(min(left_s, POLL_INTERVAL_S))
            return True

    @property
    def _done(self) -> bool:
        return not self._counters.pending or self._halted or self._stopped

    def _start(self) -> None:
        """Has the thread run; under the lock."""
        if self._thread is not None or self._stopped or self._failure is not None:
            return
        thread = threading.Thread(target=self._work, name="touchline-writer", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no other thread
            self._fail(error)
        else:
            self._thread = thread

    def _count(self, **more: int) -> None:
        """Adds to the counters; under the lock."""
        now = self._counters
        self._counters = replace(now, **{name: getattr(now, name) + count for name, count in more.items()})

    # The background thread.

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._counters.pending > 0 or self._stopped)
                    if self._stopped:
                        return
                with waits.waiting(self._name, self._client.address, self._why):
                    self._send_next()
        except _StoppedError:
            with self._changed:
                self._halted = True
                self._changed.notify_all()
        except BaseException as error:
            # Whoever waits for this thread would wait for ever.
            with self._changed:
                self._fail(error)

    def _send_next(self) -> None:
        """Sends the oldest episodes and deals with what becomes of them."""
        taken = self._next_group()
        if not taken:
            return
        if len(taken) > 1 and (answers := self._send_group([episode for _, episode in taken])) is not None:
            for (waiting, episode), answer in zip(taken, answers, strict=True):
                # What says nothing of the episode itself is tried again.
                self._settle(waiting, answer if isinstance(answer, InvalidArgumentError | None) else self._send_or_refuse(episode))
        else:
            self._send_singly_left = max(self._send_singly_left - 1, 0)
            waiting, found = taken[0]
            self._settle(waiting, self._send_or_refuse(found))

    def _why(self) -> str:
        """Returns why episodes wait. Takes no lock: whoever waits for them may hold it."""
        return f"{self._counters.pending} episodes wait to be stored: {self.trouble or 'the server has not answered yet'}"

    def _fail(self, error: BaseException) -> None:
        """Notes that nothing is sent any more, and says so; under the lock."""
        rest = f"which sends what waits in {self._queue.spool_dir}" if self.durable else "what waits is lost with this one"
        self._failure = ServerError(
            f"the thread that sends the episodes ended unexpectedly ({error!r}): close this writer and make another, {rest}"
        )
        self._halted = True
        logger.error("%s: %s", self._name, self._failure, exc_info=error)
        self._changed.notify_all()

    def _next_group(self) -> list[tuple[QueueTicket, Episode | TouchlineError]]:
        """Returns the oldest episode, and where things go well those behind it that a call may share with it; none where none waits."""
        oldest = self._peek()
        if oldest is None:
            return []
        taken = [oldest]
        # What is being sent cannot be dropped: under that policy it is one at a time.
        if self._when_full == "drop-oldest" or self._trouble is not None or self._send_singly_left:
            return taken
        room = GROUP_BYTES
        while len(taken) < GROUP_EPISODES:
            waiting, found = taken[-1]
            room -= found.size_bytes if isinstance(found, Episode) else GROUP_BYTES
            if room <= 0:
                break
            try:
                following = self._queue.peek(waiting)
            except SpoolError:
                break
            if following is None or not isinstance(following[1], Episode) or following[1].size_bytes > room:
                break
            taken.append(following)
        return taken

    def _send_group(self, found: Sequence[Episode | TouchlineError]) -> list[TouchlineError | None] | None:
        """Sends episodes in one call.

        Returns:
            For each None once it is acknowledged, or why it is not; None where the call failed: then they, some of which may be stored, go
            one by one, which knows what to do.
        """
        episodes = [(episode.key, episode) for episode in found if isinstance(episode, Episode) and episode.key is not None]
        try:
            return [result.error for results in self._client.deliver_all(episodes) for result in results]
        except TouchlineError as error:
            logger.debug("%s: %d episodes go one by one: %s", self._name, len(found), error)
        except Exception:
            logger.exception("%s: sending %d episodes together failed, they go one by one", self._name, len(found))
        self._send_singly_left = len(found)
        return None

    def _send_or_refuse(self, found: Episode | TouchlineError) -> TouchlineError | None:
        """Returns None once an episode is acknowledged, or why it never will be."""
        return self._send(found) if isinstance(found, Episode) else found

    def _peek(self) -> tuple[QueueTicket, Episode | TouchlineError] | None:
        delays = self._delays()
        while True:
            try:
                taken = self._queue.peek()
            except SpoolError as error:
                self._pause(error, next(delays))
                continue
            if taken is not None:
                return taken
            # What the counters still call pending was just dropped, or answered before it was counted: its thread is about to say so.
            if self._counters.pending <= 0:
                return None
            self._sleep(0.01)

    def _send(self, episode: Episode) -> TouchlineError | None:
        """Returns None once the episode is acknowledged, or why it never will be."""
        delays = self._delays()
        failures = 0
        while True:
            try:
                self._client.deliver(episode)
            except (UnavailableError, DeadlineError, OverLimitError) as error:
                trouble: TouchlineError = error
            except (InvalidArgumentError, KeyConflictError, TooLargeError) as error:
                return error
            except ServerError as error:
                trouble = error
                failures += 1
            except TouchlineError as error:
                # It says something of this client, nothing of the episode: with a spool that waits for a client that is let in.
                if not self.durable:
                    return error
                trouble = error
                if isinstance(error, ClosedError):
                    self._trouble = error
                    raise _StoppedError from error
            except Exception as error:
                if not failures:
                    logger.exception("%s: sending failed", self._name)
                trouble = ServerError(f"sending failed: {error!r}")
                failures += 1
            else:
                if self._trouble is not None:
                    self._log.answered()
                    self._trouble = None
                return None
            if failures == SERVER_ERROR_ATTEMPTS:
                return ServerError(
                    f"{trouble}; given up after {failures} attempts, it may have been stored: sent again under its key it is once"
                )
            self._pause(trouble, delay_before_retry(trouble, next(delays)))

    def _settle(self, waiting: QueueTicket, error: TouchlineError | None) -> None:
        if error is not None:
            self._log.refused(waiting.key, waiting.length, error)
        delays = self._delays()
        while True:
            try:
                if error is None:
                    self._queue.acknowledge(waiting)
                else:
                    self._queue.dead_letter(waiting, error)
                break
            except SpoolError as failure:
                self._pause(failure, next(delays))
        with self._changed:
            if error is None:
                self._count(pending=-1, acknowledged=1, steps_acknowledged=waiting.length)
            else:
                self._unreported.append(EpisodeResult(waiting.key, error=error))
                self._count(pending=-1, refused=1)
            self._settled += 1
            self._changed.notify_all()

    def _pause(self, trouble: TouchlineError, delay_s: float) -> None:
        """Waits before the next attempt; says why where that is news."""
        if self._stopped:
            raise _StoppedError
        self._log.tried_again(trouble, self._counters.pending)
        with self._changed:
            self._trouble = trouble
            self._changed.notify_all()
        self._sleep(delay_s)

    def _sleep(self, delay_s: float) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: self._stopped, delay_s):
                raise _StoppedError

    def _failed(self, failure: ServerError, refused: Sequence[EpisodeResult] = ()) -> UnacknowledgedError:
        """Returns what tells of the thread's end, with all that waits and those that were refused before."""
        self._failure_told = True
        waiting = [EpisodeResult(key, error=failure) for key in self._queue.waiting_keys()]
        return UnacknowledgedError(f"{len(waiting)} episodes are not acknowledged: {failure}", [*refused, *waiting])

    @staticmethod
    def _delays() -> Iterator[float]:
        # Jitter must differ between processes started alike: seeded by the system's entropy on purpose.
        return Backoff(first_s=0.1, max_s=5.0).delays(random.Random())


def _unacknowledged(results: list[EpisodeResult]) -> UnacknowledgedError:
    shown = "; ".join(
        f"episode {result.key.client_id}/{result.key.incarnation}/{result.key.sequence}: {result.error}" for result in results[:5]
    )
    more = f"; and {len(results) - 5} more" if len(results) > 5 else ""
    return UnacknowledgedError(f"{len(results)} episodes are not acknowledged: {shown}{more}", results)
