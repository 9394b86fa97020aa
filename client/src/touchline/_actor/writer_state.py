"""What an episode writer has not sent yet: the writer itself may be dropped, this is not before it is told what becomes of it."""

from __future__ import annotations

from touchline._actor import exit_hooks
from touchline._actor.queue import EpisodeQueue, OverflowPolicy
from touchline._actor.recipient import EpisodeRecipient
from touchline._actor.rows import EpisodeRows
from touchline._actor.sender import EpisodeSender
from touchline.errors import SpoolError, UnacknowledgedError
from touchline_protos.codec import Episode
from touchline_protos.log_lines import get_logger

logger = get_logger(__name__)


class WriterState:
    """The rows of a writer's unfinished episode, an episode that ended and was not taken yet, and the outbox of those that were.

    Args:
        client: sends the episodes.
        queue: keeps them until they are acknowledged.
        actor: whose writer it is, in the log.
        when_full: what happens to an episode for which the queue has no room.
    """

    def __init__(
        self,
        client: EpisodeRecipient,
        queue: EpisodeQueue,
        *,
        actor: str,
        when_full: OverflowPolicy,
    ) -> None:
        self._actor = actor
        self.rows = EpisodeRows()
        """Of the unfinished episode."""
        self.cut = False
        """Whether the first of them is the last of the piece before."""
        self.refused = ""
        """Why further rows are refused until the episode is ended; empty if they are not."""
        self.due: Episode | None = None
        """That ended, and is not in the outbox yet."""
        self.sender = EpisodeSender(client, queue, name=f"episode writer of actor {actor!r}", when_full=when_full)
        """Of those that ended before."""

    def discard(self, why: str) -> None:
        """Gives the unfinished episode up; it is logged and counted."""
        logger.warning("episode writer of actor %r discarded %d rows of an unfinished episode: %s", self._actor, len(self.rows), why)
        self.rows.clear()
        self.cut = False
        self.sender.count_discarded()

    def end(self) -> None:
        """The writer was dropped without being closed: gives its unfinished episode up, and ends once all others are dealt with.

        They are sent as long as it takes, those of a spool for the client's timeout; what is then left in that waits for the next writer.
        """
        told = self.describe_loss() or self.describe_rest()
        if self.sender.idle:
            return
        if told is not None:
            logger.warning("%s, and nothing refers to it any more; call close(), or use `with`", told)
        if len(self.rows) > self.cut:  # a row that is also in the piece before is not lost
            self.discard("its writer was dropped without being closed")
        try:
            if self.due is not None:
                self.sender.put(self.due, ends=0.0, force=True)
                self.due = None
            self.sender.close()
        except (UnacknowledgedError, SpoolError) as error:
            logger.error("episode writer of actor %r, dropped without being closed: %s", self._actor, error)
        finally:
            exit_hooks.unregister(self)

    # At the process's exit.

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until every ended episode is acknowledged, and raises what :meth:`EpisodeSender.flush` does."""
        self.sender.flush(timeout_s)

    def describe_loss(self) -> str | None:
        """Returns what would be lost if the process ended now; None for nothing."""
        pending = 0 if self.sender.durable else self.sender.counters.pending
        rows = len(self.rows) + (self.due.length if self.due is not None else 0)
        if not pending and not rows:
            return None
        waiting = "" if self.sender.durable else f"{pending} episodes not acknowledged, "
        return f"episode writer of actor {self._actor!r} was not closed: {waiting}{rows} rows of an unfinished one"

    def describe_rest(self) -> str | None:
        """Returns what waits in the spool for the next start; None for nothing."""
        pending = self.sender.counters.pending
        if not pending or not self.sender.durable:
            return None
        return (
            f"episode writer of actor {self._actor!r} was not closed: {pending} episodes wait in {self.sender.spool_dir} for its next start"
        )
