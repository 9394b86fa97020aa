"""Status of a sender: what the threads that put episodes and the thread that sends them share."""

from __future__ import annotations

import enum
import threading
from collections.abc import Sequence
from dataclasses import replace

from touchline._actor.queue import EpisodeQueue
from touchline.errors import EpisodeResult, ServerError, TouchlineError, UnacknowledgedError
from touchline.types import WriterCounters
from touchline_protos.log_lines import get_logger

logger = get_logger(__name__)


class SenderState(enum.Enum):
    """State of a sender. Its thread ends RUNNING with HALTED or FAILED; ``close`` ends each of them with CLOSED."""

    RUNNING = enum.auto()
    """Episodes are being sent; the thread starts with the first one."""
    HALTED = enum.auto()
    """The client was closed: nothing is sent, and episodes wait in the spool."""
    FAILED = enum.auto()
    """The thread ended unexpectedly: nothing is sent."""
    CLOSED = enum.auto()
    """Nothing is pending here: every episode was answered, or waits in the spool for the next writer."""


class StopSendingError(Exception):
    """Ends the sending thread; pending episodes stay in the queue."""


class SenderStatus:
    """State, counters and errors of a sender, and the condition that its threads wait on (a monitor).

    Thread-safe, except that the caller of a method that says so holds ``changed``. Single values may be read without it. The lock is taken
    before the queue's own, never while that one is held.

    Args:
        queue: queue of the episodes.
        name: name of the sender in log lines.
    """

    def __init__(self, queue: EpisodeQueue, *, name: str) -> None:
        self._queue = queue
        self._name = name
        self.changed = threading.Condition()
        """Condition that is notified of every change of the values below."""
        self.state = SenderState.RUNNING
        self.counters = WriterCounters(resumed=queue.resumed, pending=queue.resumed)
        self.error: TouchlineError | None = None
        """Error because of which sending is being retried or has ended; None while nothing is wrong."""
        self._unreported: list[EpisodeResult] = []
        self._failure_reported = False

    @property
    def closed(self) -> bool:
        """Whether nothing is pending here: every episode was answered, or waits in the spool for the next writer."""
        return self.state is SenderState.CLOSED

    @property
    def failed(self) -> bool:
        """Whether the thread ended unexpectedly."""
        return self.state is SenderState.FAILED

    @property
    def pending(self) -> int:
        """Episodes that are not answered yet."""
        return self.counters.pending

    @property
    def answered(self) -> int:
        """Episodes that were acknowledged or refused."""
        return self.counters.acknowledged + self.counters.refused

    @property
    def done(self) -> bool:
        """Whether nothing is left to send."""
        return not self.pending or self.state is not SenderState.RUNNING

    def set_state(self, state: SenderState) -> None:
        """Changes the state. The caller holds ``changed``."""
        self.state = state
        self.changed.notify_all()

    def count(self, **more: int) -> None:
        """Adds to the counters; ``pending`` follows from the others."""
        with self.changed:
            now = self.counters

            def total(name: str) -> int:
                return int(getattr(now, name)) + more.get(name, 0)

            pending = total("appended") + now.resumed - total("acknowledged") - total("refused") - total("dropped")
            self.counters = replace(now, pending=pending, **{name: total(name) for name in more})
            self.changed.notify_all()

    def note_refused(self, result: EpisodeResult, **more: int) -> None:
        """Counts a refused episode, which the next call of the writer reports."""
        with self.changed:
            self._unreported.append(result)
            self.count(refused=1, **more)

    def note_retry(self, error: TouchlineError) -> None:
        """Records why sending is being retried."""
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def sleep(self, delay_s: float) -> None:
        """Waits in the sending thread.

        Raises:
            StopSendingError: the sender was closed.
        """
        with self.changed:
            if self.changed.wait_for(lambda: self.closed, delay_s):
                raise StopSendingError

    def fail(self, error: BaseException) -> None:
        """Ends sending after an unexpected error, and logs it."""
        spool_dir = self._queue.spool_dir
        rest = f"which sends what waits in {spool_dir}" if spool_dir else "the pending episodes are lost with this one"
        with self.changed:
            self.error = ServerError(
                f"the thread that sends the episodes ended unexpectedly ({error!r}): close this writer and make another, {rest}"
            )
            logger.error("%s: %s", self._name, self.error, exc_info=error)
            self.set_state(SenderState.FAILED)

    def why_pending(self) -> str:
        """Returns why episodes are pending. Takes no lock: the thread that waits for them may hold it."""
        return f"{self.pending} episodes wait to be stored: {self.error or 'the server has not answered yet'}"

    def raise_unreported(self) -> None:
        """Raises UnacknowledgedError if episodes were refused, or the thread has failed, and no call has reported it yet."""
        if self._unreported:
            raise unacknowledged(self.take_unreported())
        if self.failed and not self._failure_reported:
            raise self.report_failure()

    def take_unreported(self) -> list[EpisodeResult]:
        """Returns the refused episodes that no call has reported yet; the caller reports them."""
        with self.changed:
            results, self._unreported = self._unreported, []
        return results

    def report_failure(self, refused: Sequence[EpisodeResult] = ()) -> UnacknowledgedError:
        """Returns the error that reports the end of the thread, with every pending episode and those refused before."""
        assert self.error is not None
        self._failure_reported = True
        pending = [EpisodeResult(key, error=self.error) for key in self._queue.waiting_keys()]
        return UnacknowledgedError(f"{len(pending)} episodes are not acknowledged: {self.error}", [*refused, *pending])


def unacknowledged(results: list[EpisodeResult]) -> UnacknowledgedError:
    """Returns the error for episodes that are not acknowledged; its text shows the first five."""
    shown = "; ".join(
        f"episode {result.key.client_id}/{result.key.incarnation}/{result.key.sequence}: {result.error}" for result in results[:5]
    )
    more = f"; and {len(results) - 5} more" if len(results) > 5 else ""
    return UnacknowledgedError(f"{len(results)} episodes are not acknowledged: {shown}{more}", results)
