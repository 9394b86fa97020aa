"""What the log tells of a writer's episodes: which were dropped or refused, and what is in the way of the others."""

from __future__ import annotations

import math
import time

from touchline.errors import TouchlineError
from touchline.types import WriterCounters
from touchline_protos.codec import EpisodeKey
from touchline_protos.log_lines import get_logger

LOG_S = 10.0
"""Between two log lines about dropped episodes, or about an actor that is held up; the first is logged at once."""

logger = get_logger(__name__)


class OutboxLog:
    """Tells of what happens to episodes: at once where it is news, now and then where it goes on.

    Args:
        name: of the sender.
        place: the spool's folder; empty without one.
    """

    def __init__(self, name: str, place: str) -> None:
        self._name = name
        self._place = place
        self._troubles: set[type[TouchlineError]] = set()
        self._held_up_at = -math.inf
        self._drops, self._drops_at = 0, -math.inf

    def resumed(self, episodes: int) -> None:
        """Tells what the spool had from before."""
        if episodes:
            logger.info("%s: %d episodes of %s go out first", self._name, episodes, self._place)

    def left(self, episodes: int) -> None:
        """Tells what stays in the spool."""
        if episodes:
            logger.warning("%s: %d episodes wait in %s for its next start", self._name, episodes, self._place)

    def held_up(self, waiting: int) -> None:
        """Tells that the actor waits for room, and behind how many."""
        now = time.monotonic()
        if now - self._held_up_at >= LOG_S:
            logger.warning("%s is held up: there is no room for another episode, %d wait", self._name, waiting)
            self._held_up_at = now

    def dropped(self, counters: WriterCounters, policy: str, trouble: TouchlineError | None, *, last: bool = False) -> None:
        """Tells what was dropped, where something was.

        Args:
            counters: with all that was.
            policy: by which.
            trouble: why sending is being tried again.
            last: nothing will be told later.
        """
        now = time.monotonic()
        if counters.dropped == self._drops or (now - self._drops_at < LOG_S and not last):
            return
        logger.error(
            "%s: %d episodes were dropped since the last such line (%s), %d of %d rows so far: there is no room, the server does not take "
            "them fast enough: %s",
            self._name,
            counters.dropped - self._drops,
            policy,
            counters.dropped,
            counters.steps_dropped,
            trouble or "it answers",
        )
        self._drops, self._drops_at = counters.dropped, now

    def refused(self, key: EpisodeKey, length: int, error: TouchlineError) -> None:
        """Tells of an episode that will never be stored."""
        aside = f"; it is kept aside in {self._place}" if self._place else ""
        logger.error("%s: episode %s of %d rows is not stored%s: %s", self._name, key, length, aside, error)

    def tried_again(self, trouble: TouchlineError, waiting: int) -> None:
        """Tells why sending did not succeed, once for each kind of reason."""
        if type(trouble) not in self._troubles:
            self._troubles.add(type(trouble))
            logger.warning("%s: %d episodes wait, sending is tried again: %s", self._name, waiting, trouble)

    def answered(self) -> None:
        """Tells that the server answers again; every reason is news from now on."""
        logger.info("%s goes on: the server answers again", self._name)
        self._troubles.clear()
