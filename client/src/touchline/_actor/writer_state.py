"""State of an episode writer, apart from the writer: a writer may be garbage-collected before its episodes are sent."""

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
    """Rows of a writer's unfinished episode, an ended episode that the sender has not taken yet, and the sender.

    Args:
        client: recipient of the episodes.
        queue: queue that holds episodes until they are acknowledged.
        actor: name of the actor, for log lines.
        when_full: policy for an episode that the queue has no space for.
    """

    def __init__(self, client: EpisodeRecipient, queue: EpisodeQueue, *, actor: str, when_full: OverflowPolicy) -> None:
        self._actor = actor
        self.rows = EpisodeRows()
        """Rows of the unfinished episode."""
        self.cut = False
        """Whether the first of these rows is also the last row of the piece before."""
        self.refused = ""
        """Reason why rows are refused until the episode ends; empty if they are not."""
        self.due: Episode | None = None
        """Ended episode that the sender has not taken yet."""
        self.sender = EpisodeSender(client, queue, name=f"episode writer of actor {actor!r}", when_full=when_full)
        """Sender of the episodes that ended."""

    def discard(self, why: str) -> None:
        """Discards the unfinished episode; logs and counts it."""
        logger.warning("episode writer of actor %r discarded %d rows of an unfinished episode: %s", self._actor, len(self.rows), why)
        self.rows.clear()
        self.cut = False
        self.sender.count_discarded()

    def end(self) -> None:
        """Ends the state of a writer that was garbage-collected without being closed: gives up its unfinished episode and sends the others.

        Without a spool, sending takes as long as it takes; with one, up to the client's timeout, and the rest waits for the next writer.
        """
        warning = self.describe_loss() or self.describe_spooled()
        if self.sender.closed:
            return
        if warning is not None:
            logger.warning("%s, and nothing refers to it any more; call close(), or use `with`", warning)
        if len(self.rows) > self.cut:  # the overlapping row of a cut episode is not lost: the piece before has it, too
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

    # For the exit hooks.

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until every ended episode is acknowledged; raises as :meth:`EpisodeSender.flush` does."""
        self.sender.flush(timeout_s)

    def describe_loss(self) -> str | None:
        """Returns what would be lost if the process ended now; None if nothing would."""
        pending = 0 if self.sender.durable else self.sender.counters.pending
        rows = len(self.rows) + (self.due.length if self.due is not None else 0)
        if not pending and not rows:
            return None
        unacknowledged = "" if self.sender.durable else f"{pending} episodes not acknowledged, "
        return f"episode writer of actor {self._actor!r} was not closed: {unacknowledged}{rows} rows of an unfinished one"

    def describe_spooled(self) -> str | None:
        """Returns what waits in the spool for the next process; None if nothing does."""
        pending = self.sender.counters.pending
        if not pending or not self.sender.durable:
            return None
        return (
            f"episode writer of actor {self._actor!r} was not closed: {pending} episodes wait in {self.sender.spool_dir} for its next start"
        )
