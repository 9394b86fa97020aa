"""The actor's side: steps in, whole episodes out, from a background thread."""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from touchline import leaving
from touchline.calls import Backoff, delay_before_retry
from touchline.errors import ClosedError, DeadlineError, OverLimitError, ServerError, TouchlineError, UnacknowledgedError, UnavailableError
from touchline.forking import forget_in_child
from touchline.messages import check_actor, check_policy_version, whole_number
from touchline.rows import EpisodeRows, row_columns
from touchline.types import EpisodeResult, WriterCounters
from touchline_protos.codec import Episode, EpisodeKey

if TYPE_CHECKING:
    from touchline.client import ReplayClient

SERVER_ERROR_ATTEMPTS = 5
"""How often an episode is sent to a server that fails on it, before it counts as refused."""

logger = logging.getLogger(__name__)


class EpisodeWriter:
    """Collects an actor's steps into episodes and sends each, whole, from a background thread.

    The first row of an episode is the reset observation. It may leave out columns that the later rows have: they are NaN there (zero
    where the dtype has no NaN) and never reach a batch. An episode that does not end is cut after ``max_steps`` transitions; the row at
    which it was cut is the last of one piece and the first of the next, so that no transition is lost.

    While the server is away, episodes wait and sending is tried again for ever; when ``max_pending`` episodes wait, ``append`` and
    ``end_episode`` block. An episode that the server refuses is logged and counted, and reported once: by the next ``append``,
    ``end_episode``, ``flush`` or ``close``, which raise UnacknowledgedError. ``append`` and ``end_episode`` do so before they do
    anything else, so that the same call may simply be made again.

    The thread does not keep the process alive. A writer that was not closed at exit has two seconds to finish, and what is then not
    acknowledged is logged as an error. In a forked child a writer starts empty: what its parent collected is the parent's to send.

    One thread appends and ends episodes; ``flush``, ``close`` and the counters may be used from any.

    Args:
        client: sends the episodes; close the writer before it.
        actor: name of the actor, up to 128 characters; None takes the client's.
        policy_version: of the policy that acts; may be set between episodes.
        max_steps: transitions after which an episode is cut; None never cuts.
        max_pending: episodes that may wait to be sent.

    Raises:
        InvalidArgumentError: an argument out of range.
    """

    def __init__(
        self,
        client: ReplayClient,
        *,
        actor: str | None = None,
        policy_version: int = 0,
        max_steps: int | None = None,
        max_pending: int = 64,
    ) -> None:
        self._client = client
        self._actor = client.actor if actor is None else check_actor(actor)
        self._policy_version = check_policy_version(policy_version)
        self._max_rows = None if max_steps is None else whole_number("max_steps", max_steps, least=1) + 1
        self._max_pending = whole_number("max_pending", max_pending, least=1)
        self._start()
        forget_in_child(self)
        leaving.watch(self)

    def _start(self) -> None:
        self._rows = EpisodeRows()
        self._rows_version = self._policy_version
        self._cut = False
        self._changed = threading.Condition()
        self._pending: deque[Episode] = deque()
        self._unreported: list[EpisodeResult] = []
        self._trouble: TouchlineError | None = None
        self._counters = WriterCounters()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._closed = False

    # What the actor calls.

    @property
    def policy_version(self) -> int:
        """Version of the policy that acts. A new value counts from the next episode, or the next piece of a cut one, on."""
        return self._policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self._policy_version = check_policy_version(version)

    @property
    def counters(self) -> WriterCounters:
        """What was done so far; all figures are of one moment."""
        with self._changed:
            return self._counters

    def append(self, step: Mapping[str, Any]) -> None:
        """Adds one row; may block while too many episodes wait.

        Args:
            step: values of one row by column name, nested or with dots: numpy arrays, torch tensors, numbers (a float is float32).
                Copied: the caller may use its arrays again.

        Raises:
            InvalidEpisodeError: a column is missing or unknown, or of another dtype or shape than in the rows before. The row is not added.
            UnacknowledgedError: earlier episodes were refused; the row is not added.
            ClosedError: the writer was closed.
        """
        self._check()
        row = row_columns(step)
        if not len(self._rows):
            self._rows_version = self._policy_version
        self._rows.append(row)
        if len(self._rows) == self._max_rows:
            self._finish(overlap=True, block=True)

    def end_episode(self) -> EpisodeKey | None:
        """Hands the episode on to be sent; may block while too many episodes wait.

        Returns:
            The key under which it (or its last piece) goes out. None where there is no transition to send: no row since the last end or
            cut; or one row alone, which is discarded, counted and logged.

        Raises:
            UnacknowledgedError: earlier episodes were refused; this one is not ended.
            ClosedError: the writer was closed.
        """
        self._check()
        return self._end(block=True)

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until every ended episode is acknowledged. The unfinished one stays.

        Raises:
            UnacknowledgedError: some were refused, or are not acknowledged in time; those go on being sent.
        """
        with self._changed:
            answered = self._changed.wait_for(lambda: not self._pending, timeout_s)
            results, self._unreported = self._unreported, []
            if not answered:
                reason = self._trouble or DeadlineError(f"no acknowledgement within {timeout_s} s")
                results += [EpisodeResult(episode.key, error=reason) for episode in self._pending if episode.key is not None]
        if results:
            raise _unacknowledged(results)

    def close(self, timeout_s: float | None = None) -> None:
        """Ends the unfinished episode and waits until everything is acknowledged. Closing again waits for what is left.

        Args:
            timeout_s: the longest wait; None waits as long as it takes, also for a server that is away.

        Raises:
            UnacknowledgedError: some were refused, or are not acknowledged in time. The latter go on being sent in the background while the
                process lives.
        """
        if not self._closing:
            self._end(block=False)
            self._closing = True
        try:
            self.flush(timeout_s)
        finally:
            with self._changed:
                self._closed = not self._pending
                self._changed.notify_all()
            if self._closed:
                leaving.forget(self)

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes. If the body failed, the unfinished episode is discarded, the ended ones have the client's timeout to go out, and what is
        not acknowledged then is logged, so that the body's own error is the one that is seen."""
        if kind is None:
            self.close()
            return
        if len(self._rows):
            self._discard("the body of its `with` failed")
        try:
            self.close(self._client.timeout_s)
        except UnacknowledgedError as unacknowledged:
            logger.error("episode writer of actor %r, closed because of %s: %s", self._actor, kind.__name__, unacknowledged)

    # At the process's exit and after a fork.

    def describe_loss(self) -> str | None:
        """Returns what would be lost if the process ended now; None for nothing."""
        with self._changed:
            pending, rows = len(self._pending), len(self._rows)
        if not pending and not rows:
            return None
        lost = f"{pending} episodes not acknowledged, {rows} rows of an unfinished one"
        return f"episode writer of actor {self._actor!r} was not closed: {lost}"

    def after_fork_in_child(self) -> None:
        """Starts empty; a closed writer stays closed."""
        closing, closed = self._closing, self._closed
        self._start()
        self._closing, self._closed = closing, closed

    # Inside.

    def _check(self) -> None:
        if self._closing:
            raise ClosedError("the episode writer was closed")
        if self._unreported:
            with self._changed:
                results, self._unreported = self._unreported, []
            raise _unacknowledged(results)

    def _end(self, *, block: bool) -> EpisodeKey | None:
        cut = self._cut
        self._cut = False
        if len(self._rows) < 2:
            if len(self._rows) and not cut:
                self._discard("one row holds no transition")
            self._rows.clear()
            return None
        return self._finish(overlap=False, block=block)

    def _finish(self, *, overlap: bool, block: bool) -> EpisodeKey:
        key = self._client.next_key()
        length = len(self._rows)
        episode = Episode(self._rows.take(overlap=overlap), key=key, actor=self._actor, policy_version=self._rows_version)
        self._cut = overlap
        self._rows_version = self._policy_version
        with self._changed:
            if block:
                self._changed.wait_for(lambda: len(self._pending) < self._max_pending)
            self._pending.append(episode)
            self._count(appended=1, pending=1, steps_appended=length)
            if self._thread is None:
                leaving.watch(self)
                self._thread = threading.Thread(target=self._work, name="touchline-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return key

    def _discard(self, why: str) -> None:
        logger.warning("episode writer of actor %r discarded %d rows of an unfinished episode: %s", self._actor, len(self._rows), why)
        self._rows.clear()
        self._cut = False
        with self._changed:
            self._count(discarded=1)

    def _count(self, **more: int) -> None:
        """Adds to the counters; under the lock."""
        now = self._counters
        self._counters = replace(now, **{name: getattr(now, name) + count for name, count in more.items()})

    # The background thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if not self._pending:
                    return
                episode = self._pending[0]
            error = self._send(episode)
            with self._changed:
                self._pending.popleft()
                if error is None:
                    self._count(pending=-1, acknowledged=1, steps_acknowledged=episode.length)
                else:
                    assert episode.key is not None
                    self._unreported.append(EpisodeResult(episode.key, error=error))
                    self._count(pending=-1, refused=1)
                self._changed.notify_all()

    def _send(self, episode: Episode) -> TouchlineError | None:
        """Returns None once the episode is acknowledged, or why it never will be."""
        delays = Backoff(first_s=0.1, max_s=5.0).delays(random.Random())
        failures = 0
        while True:
            try:
                self._client.deliver(episode)
            except (UnavailableError, DeadlineError, OverLimitError) as error:
                trouble: TouchlineError = error
            except ServerError as error:
                trouble = error
                failures += 1
                if failures == SERVER_ERROR_ATTEMPTS:
                    return self._give_up(episode, error)
            except TouchlineError as error:
                return self._give_up(episode, error)
            except Exception as error:
                logger.exception("episode writer of actor %r: sending failed", self._actor)
                return self._give_up(episode, ServerError(f"sending failed: {error!r}"))
            else:
                if self._trouble is not None:
                    logger.info("episode writer of actor %r goes on: the server answers again", self._actor)
                    self._trouble = None
                return None
            if self._trouble is None:
                logger.warning(
                    "episode writer of actor %r: %d episodes wait, sending is tried again: %s", self._actor, len(self._pending), trouble
                )
            self._trouble = trouble
            with self._changed:
                self._changed.wait_for(lambda: self._closed, delay_before_retry(trouble, next(delays)))

    def _give_up(self, episode: Episode, error: TouchlineError) -> TouchlineError:
        logger.error("episode writer of actor %r: episode %s of %d rows is not stored: %s", self._actor, episode.key, episode.length, error)
        return error


def _unacknowledged(results: list[EpisodeResult]) -> UnacknowledgedError:
    shown = "; ".join(
        f"episode {result.key.client_id}/{result.key.incarnation}/{result.key.sequence}: {result.error}" for result in results[:5]
    )
    more = f"; and {len(results) - 5} more" if len(results) > 5 else ""
    return UnacknowledgedError(f"{len(results)} episodes are not acknowledged: {shown}{more}", results)
