"""Log lines about a writer's episodes: which were dropped or refused, and what delays the others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from touchline._rpc.waits import FIRST_LINE_S, LINE_INTERVAL_S
from touchline.errors import ServerError, TouchlineError
from touchline.types import WriterCounters
from touchline_protos.codec import EpisodeKey
from touchline_protos.log_lines import get_logger

LOG_INTERVAL_S = 10.0
"""Time between two log lines about dropped episodes, or about a blocked actor; the first is logged immediately."""

logger = get_logger(__name__)


class SenderLog:
    """Logs what happens to episodes: immediately if it is news, at intervals while it lasts. For one thread a method.

    Args:
        name: name of the sender.
        spool_dir: folder of the spool; empty without one.
        clock: monotonic clock, in seconds; a test may replace it.
    """

    def __init__(self, name: str, spool_dir: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._name = name
        self._spool_dir = spool_dir
        self._next_retry_line: dict[type[TouchlineError], float] = {}
        self._held_up_at, self._failure_known = -math.inf, False
        self._drops_logged, self._drops_at = 0, -math.inf

    def resumed(self, episodes: int) -> None:
        """Logs how many episodes the spool had from earlier writers."""
        if episodes:
            logger.info("%s: sends %d episodes of %s first", self._name, episodes, self._spool_dir)

    def left_in_spool(self, episodes: int) -> None:
        """Logs how many episodes stay in the spool."""
        if episodes:
            logger.warning("%s: %d episodes wait in %s for its next start", self._name, episodes, self._spool_dir)

    def held_up(self, pending: int, failure: str) -> None:
        """Logs that the actor is blocked, how many episodes are pending, and why sending fails.

        The first failure is logged immediately: it is news after a line that said only that there is no answer.
        """
        now = self._clock()
        if now - self._held_up_at >= LOG_INTERVAL_S or (failure and not self._failure_known):
            reason = failure or "the server has not answered yet"
            logger.warning("%s is blocked: no space for another episode, %d are pending: %s", self._name, pending, reason)
            self._held_up_at, self._failure_known = now, bool(failure)

    def dropped(self, counters: WriterCounters, policy: str, error: TouchlineError | None, *, last: bool = False) -> None:
        """Logs how many episodes were dropped since the last such line, if any were.

        Args:
            counters: counters of the writer.
            policy: policy by which they were dropped.
            error: error because of which sending is being retried.
            last: whether this is the last call, which logs whatever was not logged yet.
        """
        now = self._clock()
        if counters.dropped == self._drops_logged or (now - self._drops_at < LOG_INTERVAL_S and not last):
            return
        logger.error(
            "%s: dropped %d episodes since the last such line (%s), %d with %d rows in all: no space, the server does not store them fast "
            "enough: %s",
            self._name,
            counters.dropped - self._drops_logged,
            policy,
            counters.dropped,
            counters.steps_dropped,
            error or "it answers",
        )
        self._drops_logged, self._drops_at = counters.dropped, now

    def refused(self, key: EpisodeKey, length: int, error: TouchlineError) -> None:
        """Logs an episode that was given up."""
        kept = f"; it is kept in {self._spool_dir}" if self._spool_dir else ""
        outcome = "is given up, and may be stored" if isinstance(error, ServerError) else "is not stored"
        logger.error("%s: episode %s with %d rows %s%s: %s", self._name, key, length, outcome, kept, error)

    def retrying(self, error: TouchlineError, pending: int) -> None:
        """Logs why sending did not succeed: immediately for each type of error, again after 10 s, then once a minute."""
        now, due = self._clock(), self._next_retry_line.get(type(error))
        if due is None or now >= due:
            self._next_retry_line[type(error)] = now + (FIRST_LINE_S if due is None else LINE_INTERVAL_S)
            logger.warning("%s: %d episodes are pending, retrying: %s", self._name, pending, error)

    def recovered(self) -> None:
        """Logs that the server answers again; from now on every type of error is news."""
        logger.info("%s: the server answers again", self._name)
        self._next_retry_line.clear()
