"""The actor's side: steps in, whole episodes out, from a background thread."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

from touchline._actor import exit_hooks
from touchline._actor.queue import MAX_PENDING, EpisodeQueue, MemoryQueue, OverflowPolicy
from touchline._actor.rows import row_columns
from touchline._actor.writer_state import WriterState
from touchline._rpc.convert import check_actor, check_dtype, check_policy_version, whole_number
from touchline._rpc.dropping import when_dropped
from touchline._rpc.process_bound import ProcessBound
from touchline.errors import ClosedError, InvalidArgumentError, InvalidEpisodeError, SpoolError, UnacknowledgedError
from touchline.types import WriterCounters
from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.log_lines import get_logger

if TYPE_CHECKING:
    from touchline.client import ReplayClient

MAX_PENDING_BYTES = 1 << 30
"""Payload that may wait in memory where nothing else was said."""
SPOOL_LIMIT_BYTES = 1 << 30
"""What a spool may take on the disk where nothing else was said."""

logger = get_logger(__name__)


class EpisodeWriter(ProcessBound):
    """Collects an actor's steps into episodes and sends each, whole, from a background thread.

    The first row of an episode is the reset observation. It may leave out columns that the later rows have: they are NaN there (zero
    where the dtype has no NaN) and never reach a batch. An episode that does not end is cut after ``max_steps`` transitions; the row at
    which it was cut is the last of one piece and the first of the next, so that no transition is lost.

    A row that cannot be stored is refused, and with it the rest of its episode: it ends before that row, as truncated, and further rows are
    refused until ``end_episode``, so that no transition leads across a row that is missing.

    While the server is away, episodes wait and sending is tried again for ever, oldest first, with backoff and jitter. They wait in memory,
    up to ``max_pending`` of them; or, with ``spool_dir``, on the disk: then an episode survives the death of this process and the
    machine's loss of power once ``end_episode`` (or the ``append`` that cut it) has returned, and the next writer on that folder sends what
    is left, under the first keys, so that none is stored twice. ``when_full`` says what happens to an episode for which there is no room:
    ``"block"`` holds the actor up and loses nothing; ``"drop-oldest"`` gives up the oldest one that is not being sent; ``"drop-newest"``
    the new one. What is dropped is counted and logged.

    An episode that the server refuses is logged and counted, and reported once: by the next ``append``, ``end_episode``, ``flush`` or
    ``close``, which raise UnacknowledgedError. ``append`` and ``end_episode`` do so before they do anything else, so that the same call may
    simply be made again. A spool keeps the newest 64 refused ones, with the reason, where their room is not wanted. Where it is the client
    that is refused (access denied, another protocol version, closed), episodes stay in a spool, and without one count as refused.

    Should the thread itself end of something unexpected (a defect, no other thread to be had), that is logged, and nobody waits for it:
    the next call says so as UnacknowledgedError. ``flush`` and ``close`` go on doing so, and so does ``end_episode`` where an episode would
    wait in memory, or where a spool that blocks has no room. What a spool has stays there, it goes on taking episodes, and the next
    writer on the folder sends them.

    The thread does not keep the process alive. A writer that was not closed at exit has two seconds to finish, and what is then not
    acknowledged is logged: as an error where it is lost, as a warning where it waits in a spool. One that is dropped without being closed
    logs that and gives its unfinished episode up; those that ended are sent, or wait in the spool as after ``close``. In a
    forked child the writer is still the parent's: using it there raises ForkError, closing it does nothing, and the child makes a writer of
    its own (if with a spool, in another folder).

    One thread appends and ends episodes; ``flush``, ``close`` and the counters may be used from any.

    Args:
        client: sends the episodes; close the writer before it.
        actor: name of the actor, up to 128 characters; None takes the client's.
        policy_version: of the policy that acts; may be set between episodes.
        max_steps: transitions after which an episode is cut; None never cuts.
        max_pending: episodes that may wait to be sent, at least 2 to drop the oldest; None is 64 without a spool, and with one as many as
            fit.
        max_pending_bytes: payload that may wait in memory; a single episode above it waits alone. Has no meaning with a spool.
        spool_dir: folder on a local disk, of this writer alone; made if it is not there. None keeps episodes in memory only.
        spool_limit_bytes: what the folder may take, all of SQLite's files included; at least 1 MiB. An episode takes its size twice while
            it is written, and one that would not fit into an empty spool counts as refused.
        when_full: ``"block"``, ``"drop-oldest"`` or ``"drop-newest"``.
        dtype: ``"float32"`` stores float64 values as float32; None does what the client does.

    Raises:
        InvalidArgumentError: an argument out of range.
        SpoolError: the spool is another writer's, damaged, of a newer format, or cannot be made.
    """

    _instead = "make a writer there (if with a spool, in another folder) with the client, which may be forked, pickled and copied"

    def __init__(
        self,
        client: ReplayClient,
        *,
        actor: str | None = None,
        policy_version: int = 0,
        max_steps: int | None = None,
        max_pending: int | None = None,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        spool_dir: str | os.PathLike[str] | None = None,
        spool_limit_bytes: int = SPOOL_LIMIT_BYTES,
        when_full: OverflowPolicy = "block",
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if when_full not in get_args(OverflowPolicy):
            raise InvalidArgumentError(f"when_full: {when_full!r}, expected {', '.join(map(repr, get_args(OverflowPolicy)))}")
        self._client = client
        self._actor = client.actor if actor is None else check_actor(actor)
        self._policy_version = check_policy_version(policy_version)
        self._max_rows = None if max_steps is None else whole_number("max_steps", max_steps, least=1) + 1
        # The one that is being sent is never dropped, so there has to be another.
        least = 2 if when_full == "drop-oldest" else 1
        self._max_pending = None if max_pending is None else whole_number("max_pending", max_pending, least=least)
        self._max_pending_bytes = whole_number("max_pending_bytes", max_pending_bytes, least=1, most=(1 << 63) - 1)
        self._spool_limit_bytes = whole_number("spool_limit_bytes", spool_limit_bytes, least=1 << 20, most=(1 << 63) - 1)
        self._when_full: OverflowPolicy = when_full
        self._dtype = client.dtype if dtype is None else check_dtype(dtype)
        self._closing = False
        self._rows_version = self._policy_version
        queue: EpisodeQueue = MemoryQueue(max_pending=self._max_pending or MAX_PENDING, max_bytes=self._max_pending_bytes)
        if spool_dir is not None:
            queue = self._open_spool(Path(spool_dir))
        self._state = WriterState(client, queue, actor=self._actor, when_full=when_full)
        exit_hooks.register(self._state)
        when_dropped(self, self._state.end)

    def _open_spool(self, folder: Path) -> EpisodeQueue:
        from touchline._spool.queue import Spool  # the standard library's sqlite3 may be missing where nobody wants a spool

        return Spool(folder, limit_bytes=self._spool_limit_bytes, max_pending=self._max_pending, table=self._client.table)

    # What the actor calls.

    @property
    def actor(self) -> str:
        """Name of the actor."""
        return self._actor

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
        self._check_process()
        return self._state.sender.counters

    def append(self, step: Mapping[str, Any]) -> None:
        """Adds one row; may block, while too many episodes wait, where it cuts the episode.

        Args:
            step: values of one row by column name, nested or with dots: numpy arrays, torch tensors, numbers (a float is float32).
                Copied: the caller may use its arrays again. The first row decides what a column holds: a number that comes as another type
                later is stored as that, if it loses nothing but digits of a float.

        Raises:
            InvalidEpisodeError: a value cannot be stored, a column is missing or unknown, or of another dtype or shape than in the rows
                before. The row is not added, the rows before it are an episode of their own, and this is raised for every further row
                until ``end_episode``.
            UnacknowledgedError: earlier episodes were refused; the row is not added.
            ForkError: the writer was made by the parent of this forked child. So it is for all methods but ``close``.
            SpoolError: an episode that ended before cannot be written to the spool; the row is not added, the same call may be made again.
            ClosedError: the writer was closed.
        """
        self._check()
        self._hand_on()
        if self._state.refused:
            raise InvalidEpisodeError(f"the episode was refused before: {self._state.refused}; call end_episode() and begin another")
        try:
            row = row_columns(step, known=self._state.rows.names, dtype=self._dtype)
            if not len(self._state.rows):
                self._rows_version = self._policy_version
            self._state.rows.append(row)
        except InvalidEpisodeError as error:
            raise self._refuse(error) from None
        if len(self._state.rows) == self._max_rows:
            self._finish(overlap=True)
            try:
                self._hand_on()
            except SpoolError as error:
                logger.error("episode writer of actor %r: the next call tries again: %s", self._actor, error)
            except UnacknowledgedError:
                pass  # logged; the row is added, so it is the next call that raises

    def end_episode(self) -> EpisodeKey | None:
        """Hands the episode on to be sent; may block while too many episodes wait.

        Returns:
            The key under which it (or its last piece) goes out. None where there is no transition to send: no row since the last end or
            cut; or one row alone, which is discarded, counted and logged. None also where ``when_full`` had it dropped.

        Raises:
            UnacknowledgedError: earlier episodes were refused; this one is not ended. Or nothing is sent any more; it has ended, and
                waits in memory.
            SpoolError: it cannot be written to the spool. It has ended; the same call may be made again and so may the next ``append``.
            ClosedError: the writer was closed.
        """
        self._check()
        return self._end()

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until every ended episode is acknowledged, those of earlier writers in the spool included. The unfinished one stays.

        Raises:
            UnacknowledgedError: some were refused, or are not acknowledged in time; those go on being sent, unless it says otherwise.
            ClosedError: closed before, and episodes wait in the spool.
        """
        self._check_process()
        self._state.sender.flush(timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Ends the unfinished episode and waits until everything is acknowledged. Closing again waits for what is left.

        With a spool, what is not acknowledged in time waits there for the next writer on that folder, which may be opened as soon as this
        returns: logged, no error, and ``counters.pending`` says how many.

        Args:
            timeout_s: the longest wait. None waits as long as it takes, also for a server that is away; with a spool, the client's
                ``timeout_s``.

        Raises:
            UnacknowledgedError: some were refused or, without a spool, are not acknowledged in time. The latter go on being sent in the
                background while the process lives. Or nothing was sent any more, with a spool as well.
            SpoolError: the unfinished episode cannot be written to the spool, or there is no room for it in time. It is kept in memory:
                close again.
        """
        if self._inherited:
            return
        if not self._closing:
            wait_s = math.inf if timeout_s is None else timeout_s
            if timeout_s is None and self._state.sender.durable:
                wait_s = self._client.timeout_s
            ends = time.monotonic() + wait_s
            self._end(ends=ends, force=True)
            self._closing = True
            timeout_s = None if timeout_s is None else max(0.0, ends - time.monotonic())
        try:
            self._state.sender.close(timeout_s)
        finally:
            if self._state.sender.idle:
                exit_hooks.unregister(self._state)

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes. If the body failed, the unfinished episode is discarded, the ended ones have the client's timeout to go out (two seconds
        after Ctrl-C), and what is not acknowledged then is logged, so that the body's own error is the one that is seen."""
        if kind is None or error is None or self._inherited:
            self.close()
            return
        if len(self._state.rows):
            self._state.discard("the body of its `with` failed")
        grace_s = self._client.timeout_s if isinstance(error, Exception) else exit_hooks.grace_after(error)
        pending = self._state.sender.counters.pending
        if pending:
            logger.warning(
                "episode writer of actor %r: %s ended the body of its `with`; %d episodes have %.0f s to go out",
                self._actor,
                kind.__name__,
                pending,
                grace_s,
            )
        try:
            self.close(grace_s)
        except (UnacknowledgedError, SpoolError) as trouble:
            logger.error("episode writer of actor %r, closed because of %s: %s", self._actor, kind.__name__, trouble)
            if not isinstance(error, Exception):
                exit_hooks.unregister(self._state)  # it has had its grace, and the log says what is lost

    # Inside.

    def _check(self) -> None:
        self._check_process()
        if self._closing:
            raise ClosedError("the episode writer was closed")
        self._state.sender.raise_unreported()

    def _end(self, *, ends: float = math.inf, force: bool = False) -> EpisodeKey | None:
        key = self._hand_on(ends=ends, force=force)
        cut = self._state.cut
        self._state.cut = False
        self._state.refused = ""
        if len(self._state.rows) < 2:
            if len(self._state.rows) and not cut:
                self._state.discard("one row holds no transition")
            self._state.rows.clear()
            return key
        self._finish(overlap=False)
        return self._hand_on(ends=ends, force=force)

    def _refuse(self, error: InvalidEpisodeError) -> InvalidEpisodeError:
        """Ends the episode before a row that cannot be stored, and returns the error to raise."""
        number = len(self._state.rows)
        row = f"row {number} since the last cut" if self._state.cut else f"row {number}"
        hint = "; row 0 needs only obs: leave out what a reset does not have" if not number else ""
        self._state.refused = f"{error} ({row}{hint})"
        if number > 1:
            self._finish(overlap=False)
        elif number and not self._state.cut:
            self._state.discard("one row holds no transition")
        self._state.rows.clear()
        self._state.cut = False
        kept = f"the {number} rows before it are kept as an episode, " if number > 1 else ""
        return InvalidEpisodeError(f"{self._state.refused}; {kept}further rows are refused until end_episode()")

    def _finish(self, *, overlap: bool) -> None:
        """Makes an episode of the rows. The last one was handed on before."""
        assert self._state.due is None
        key = self._client.next_key()
        self._state.due = Episode(self._state.rows.take(overlap=overlap), key=key, actor=self._actor, policy_version=self._rows_version)
        self._state.cut = overlap
        self._rows_version = self._policy_version

    def _hand_on(self, *, ends: float = math.inf, force: bool = False) -> EpisodeKey | None:
        """Gives the episode that ended to the outbox, if there is one; returns its key unless it was dropped."""
        episode = self._state.due
        if episode is None:
            return None
        exit_hooks.register(self._state)
        kept = self._state.sender.put(episode, ends=ends, force=force)
        self._state.due = None
        return episode.key if kept else None
