"""What the log tells of a writer's episodes: which were dropped or refused, and what is in the way of the others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from touchline._rpc.waits import FIRST_LINE_S, LINE_INTERVAL_S
from touchline.errors import ServerError, TouchlineError
from touchline.types import WriterCounters
from touchline_protos.codec import EpisodeKey
from touchline_protos.log_lines import get_logger

LOG_S = 10.0
"""Between two log lines about dropped episodes, or about an actor that is held up; the first is logged at once."""

logger = get_logger(__name__)


class SenderLog:
    """Tells of what happens to episodes: at once where it is news, now and then where it goes on.

    Args:
        name: of the sender.
        place: the spool's folder; empty without one.
        clock: seconds that never go back; for tests.
    """

    def __init__(self, name: str, spool_dir: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._name = name
        self._place = spool_dir
        self._troubles: dict[type[TouchlineError], float] = {}
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
        now = self._clock()
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
        now = self._clock()
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
        """Tells of an episode that is given up."""
        aside = f"; it is kept aside in {self._place}" if self._place else ""
        what = "is given up, and may have been stored" if isinstance(error, ServerError) else "is not stored"
        logger.error("%s: episode %s of %d rows %s%s: %s", self._name, key, length, what, aside, error)

    def tried_again(self, trouble: TouchlineError, waiting: int) -> None:
        """Tells why sending did not succeed: at once for each kind of reason, again after 10 s, then once a minute."""
        now, due = self._clock(), self._troubles.get(type(trouble))
        if due is None or now >= due:
            self._troubles[type(trouble)] = now + (FIRST_LINE_S if due is None else LINE_INTERVAL_S)
            logger.warning("%s: %d episodes wait, sending is tried again: %s", self._name, waiting, trouble)

    def answered(self) -> None:
        """Tells that the server answers again; every reason is news from now on."""
        logger.info("%s goes on: the server answers again", self._name)
        self._troubles.clear()
