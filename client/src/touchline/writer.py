"""The actor's side: steps go in, and whole episodes are sent from a background thread."""

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
from touchline._rpc.convert import check_actor, check_dtype, check_policy_version, check_table, whole_number
from touchline._rpc.dropping import when_dropped
from touchline._rpc.process_bound import ProcessBound
from touchline.errors import ClosedError, InvalidArgumentError, InvalidEpisodeError, SpoolError, UnacknowledgedError
from touchline.types import WriterCounters
from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.log_lines import get_logger

if TYPE_CHECKING:
    from touchline.client import ReplayClient

MAX_PENDING_BYTES = 1 << 30
"""Default maximum of payload that waits in memory."""
SPOOL_LIMIT_BYTES = 1 << 30
"""Default maximum size of a spool."""

logger = get_logger(__name__)


class EpisodeWriter(ProcessBound):
    """Collects an actor's steps into episodes and sends each episode, whole, from a background thread. ::

        import numpy as np

        from touchline import EpisodeWriter, ReplayClient

        client = ReplayClient("127.0.0.1:50051", actor="arm-3")
        with client, EpisodeWriter(client, policy_version=7) as writer:
            writer.append({"obs": np.zeros(4, np.float32)})  # row 0: the observation of the reset
            for step in range(1, 11):
                obs, reward, terminated = np.full(4, step, np.float32), 0.5, step == 10
                writer.append({"obs": obs, "action": np.zeros(2, np.float32), "reward": reward, "done": float(terminated)})
            key = writer.end_episode()
        # Leaving the `with` block has waited for the acknowledgement: the episode of 10 transitions is stored, exactly once.
        print(key, writer.counters.acknowledged)  # EpisodeKey(client_id='...', incarnation=..., sequence=0) 1

    **Rows.** An episode of T transitions has T + 1 rows. Row 0 holds the observation of the reset; row t holds the observation that the
    t-th action led to, the action, its reward, and ``done`` (1 if it terminated the episode). Row 0 may lack the other columns: they are
    NaN there, or zero if the dtype has no NaN, and never appear in a batch. This is the server's default row convention, ``incoming``;
    under ``outgoing``, row t holds the action that follows its observation, and the last row lacks one. Values are copied, so the caller
    may reuse its arrays as soon as ``append`` returns.

    **Long episodes** are cut after ``max_steps`` transitions. The row at the cut is the last of one piece and the first of the next, so no
    transition is lost.

    **A bad row** (InvalidEpisodeError) ends the episode before it, as truncated: no transition may lead across a missing row. All further
    rows are refused until ``end_episode``.

    **Waiting episodes.** While the server is away, ended episodes wait, and sending is retried without limit, oldest first, with backoff
    and jitter. Up to ``max_pending`` episodes wait in memory. ``when_full`` decides about the next one: ``"block"`` blocks ``end_episode``
    (and an ``append`` that cuts) until there is space, and loses nothing; ``"drop-oldest"`` drops the oldest episode that is not being
    sent; ``"drop-newest"`` drops the new one. Dropped episodes are counted and logged.

    **Spool.** With ``spool_dir``, ended episodes wait on the disk instead. Once ``end_episode`` (or an ``append`` that cuts) has returned,
    the episode survives a kill of this process and a loss of power. The next writer on the same folder sends what is left.

    **Exactly once.** Each episode carries a key, made when it ends. The server stores an episode with a known key only once, so retries,
    also those of the next process on a spool, never store it twice.

    **Refused episodes** are logged, counted, and reported once: the next ``append``, ``end_episode``, ``flush`` or ``close`` raises
    UnacknowledgedError. ``append`` and ``end_episode`` raise it before they do anything else, so simply repeat the call. A spool keeps the
    64 most recent refused episodes with the reason, unless their space is needed (``touchline spool show``). If the server rejects the
    client itself (access denied, another protocol version) or the client is closed, episodes stay in a spool; without one they count as
    refused.

    **An unexpected end of the background thread** (a defect, or the system's limit of threads) is logged and raised by the next call as
    UnacknowledgedError; no call waits for it. ``flush`` and ``close`` raise it again, and so does ``end_episode`` if the episode would have
    to wait in memory, or for space in a spool. A spool keeps accepting episodes, and the next writer on the folder sends them.

    **At exit.** The thread does not keep the process alive. A writer that is still open at exit has two seconds to finish; what is not
    acknowledged then is logged, as an error if it is lost, as a warning if it waits in a spool. A writer that is garbage-collected without
    being closed logs that, discards its unfinished episode, and sends the others as ``close`` does.

    **Threads and processes.** One thread appends and ends episodes; ``flush``, ``close`` and ``counters`` are thread-safe. In a forked
    child the writer still belongs to the parent: using it raises ForkError, closing it does nothing, and the child makes a writer of its
    own (if with a spool, in another folder).

    Args:
        client: client that sends the episodes; close the writer before it.
        table: table on the server that the episodes are for; None takes the client's. An episode keeps its table in the spool: the next
            writer on the folder sends it there, whatever its own table is. Episodes for a table that does not exist count as refused.
        actor: name of the actor, up to 128 characters; None takes the client's.
        policy_version: version of the acting policy; may be set between episodes.
        max_steps: maximum number of transitions in an episode or piece; None never cuts.
        max_pending: maximum number of episodes that wait, at least 2 for ``"drop-oldest"``; None is 64 without a spool, and with one as
            many as fit.
        max_pending_bytes: maximum payload that waits in memory; a single episode above it waits by itself. Ignored with a spool.
        spool_dir: folder on a local disk, used by no other writer; made if it does not exist. None keeps episodes only in memory.
        spool_limit_bytes: maximum size of the folder with all of SQLite's files, at least 1 MiB. An episode takes twice its size while it
            is written; one that would not fit into an empty spool counts as refused.
        when_full: ``"block"``, ``"drop-oldest"`` or ``"drop-newest"``.
        dtype: ``"float32"`` stores float64 values as float32; None takes the client's setting.

    Raises:
        InvalidArgumentError: an argument is out of range.
        SpoolError: another writer uses the spool, or it is damaged, has a newer format, or cannot be made.
    """

    _instead = "make a writer there (if with a spool, in another folder) with the client, which may be forked, pickled and copied"

    def __init__(
        self,
        client: ReplayClient,
        *,
        table: str | None = None,
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
        self._table = client.table if table is None else check_table(table)
        self._actor = client.actor if actor is None else check_actor(actor)
        self._policy_version = check_policy_version(policy_version)
        self._max_rows = None if max_steps is None else whole_number("max_steps", max_steps, least=1) + 1
        # The episode being sent is never dropped, so there must be another one.
        least = 2 if when_full == "drop-oldest" else 1
        self._max_pending = None if max_pending is None else whole_number("max_pending", max_pending, least=least)
        self._max_pending_bytes = whole_number("max_pending_bytes", max_pending_bytes, least=1, most=(1 << 63) - 1)
        self._spool_limit_bytes = whole_number("spool_limit_bytes", spool_limit_bytes, least=1 << 20, most=(1 << 63) - 1)
        self._dtype = client.dtype if dtype is None else check_dtype(dtype)
        self._closing = False
        self._rows_version = self._policy_version
        self._state = WriterState(client, self._open_queue(spool_dir), actor=self._actor, when_full=when_full)
        exit_hooks.register(self._state)
        when_dropped(self, self._state.end)

    def _open_queue(self, spool_dir: str | os.PathLike[str] | None) -> EpisodeQueue:
        if spool_dir is None:
            return MemoryQueue(max_pending=self._max_pending or MAX_PENDING, max_bytes=self._max_pending_bytes, table=self._table)
        from touchline._spool.queue import Spool  # imported only now: some Pythons lack sqlite3, and need it only for a spool

        return Spool(Path(spool_dir), limit_bytes=self._spool_limit_bytes, max_pending=self._max_pending, table=self._table)

    @property
    def table(self) -> str:
        """Table on the server that the episodes are for; empty for the default one."""
        return self._table

    @property
    def actor(self) -> str:
        """Name of the actor."""
        return self._actor

    @property
    def policy_version(self) -> int:
        """Version of the acting policy. A new value applies from the next episode, or the next piece of a cut one, on."""
        return self._policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self._policy_version = check_policy_version(version)

    @property
    def counters(self) -> WriterCounters:
        """Counters of this writer, all of the same moment."""
        self._check_process()
        return self._state.sender.counters

    def append(self, step: Mapping[str, Any]) -> None:
        """Adds one row. If the row cuts the episode, blocks while too many episodes wait.

        Args:
            step: values of one row by column name, nested or dotted: numpy arrays, torch tensors, numbers. Copied; not modified. The first
                value of a column fixes its dtype (a Python float is float32, an int int64). A later scalar of another dtype is converted if
                that loses nothing but digits of a float.

        Raises:
            InvalidEpisodeError: a value cannot be stored, or a column is missing, unknown, or differs in dtype or shape from the rows
                before. The row is not added, the rows before it are sent as an episode, and further rows raise this until ``end_episode``.
            UnacknowledgedError: earlier episodes were refused. The row is not added; repeat the call.
            SpoolError: an episode that ended before cannot be written to the spool. The row is not added; the call may be repeated.
            ClosedError: the writer was closed.
            ForkError: the writer belongs to the parent process.
        """
        self._check()
        self._hand_over_due()
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
                self._hand_over_due()
            except SpoolError as error:
                logger.error("episode writer of actor %r: the next call retries: %s", self._actor, error)
            except UnacknowledgedError:
                pass  # logged already; the row was added, so the next call raises it

    def end_episode(self) -> EpisodeKey | None:
        """Ends the episode and hands it to the background thread; blocks while too many episodes wait.

        Returns:
            Key of the episode, or of its last piece. None if there is no transition to send: no row since the last end or cut, or a single
            row, which is discarded, counted and logged. None also if ``when_full`` dropped the episode.

        Raises:
            UnacknowledgedError: earlier episodes were refused, and this one has not ended; repeat the call. Or nothing is sent any more:
                then this one has ended, and waits in memory.
            SpoolError: the episode cannot be written to the spool. It has ended; this call or the next ``append`` writes it again.
            ClosedError: the writer was closed.
            ForkError: the writer belongs to the parent process.
        """
        self._check()
        return self._end()

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until every ended episode is acknowledged, including those of earlier writers in the spool. The unfinished one stays.

        Args:
            timeout_s: longest wait; None waits without limit.

        Raises:
            UnacknowledgedError: episodes were refused, or are not acknowledged in time; the latter are still being sent, unless the text
                says otherwise.
            ClosedError: the writer was closed, and episodes wait in the spool.
            ForkError: the writer belongs to the parent process.
        """
        self._check_process()
        self._state.sender.flush(timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Ends the unfinished episode and waits until every episode is acknowledged. Closing again waits for those still pending.

        With a spool, episodes that are not acknowledged in time wait there for the next writer on the folder, which may be opened as soon
        as this returns. That is logged and not an error; ``counters.pending`` is their number.

        Args:
            timeout_s: longest wait. None waits without limit, also for an absent server; with a spool, it is the client's ``timeout_s``.

        Raises:
            UnacknowledgedError: episodes were refused or, without a spool, are not acknowledged in time; the latter are still being sent
                while the process lives. Or the background thread has failed, with a spool as well.
            SpoolError: the unfinished episode cannot be written to the spool, or finds no space there in time. It is kept in memory; close
                again.
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
            if self._state.sender.closed:
                exit_hooks.unregister(self._state)

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes the writer. If the body failed, discards the unfinished episode and gives the ended ones the client's timeout to be sent
        (two seconds after Ctrl-C). What is not acknowledged then is only logged, so that the body's own error is raised."""
        if kind is None or error is None or self._inherited:
            self.close()
            return
        if len(self._state.rows):
            self._state.discard("the body of its `with` failed")
        grace_s = self._client.timeout_s if isinstance(error, Exception) else exit_hooks.grace_after(error)
        pending = self._state.sender.counters.pending
        if pending:
            logger.warning(
                "episode writer of actor %r: %s ended the body of its `with`; %d episodes have %.0f s to be sent",
                self._actor,
                kind.__name__,
                pending,
                grace_s,
            )
        try:
            self.close(grace_s)
        except (UnacknowledgedError, SpoolError) as failure:
            logger.error("episode writer of actor %r, closed because of %s: %s", self._actor, kind.__name__, failure)
            if not isinstance(error, Exception):
                exit_hooks.unregister(self._state)  # its grace period is over, and the log says what is lost

    def _check(self) -> None:
        self._check_process()
        if self._closing:
            raise ClosedError("the episode writer was closed")
        self._state.sender.raise_unreported()

    def _end(self, *, ends: float = math.inf, force: bool = False) -> EpisodeKey | None:
        key = self._hand_over_due(ends=ends, force=force)
        cut = self._state.cut
        self._state.cut = False
        self._state.refused = ""
        if len(self._state.rows) < 2:
            if len(self._state.rows) and not cut:
                self._state.discard("one row holds no transition")
            self._state.rows.clear()
            return key
        self._finish(overlap=False)
        return self._hand_over_due(ends=ends, force=force)

    def _refuse(self, error: InvalidEpisodeError) -> InvalidEpisodeError:
        """Ends the episode before a row that cannot be stored; returns the error to raise."""
        number = len(self._state.rows)
        row = f"row {number} since the last cut" if self._state.cut else f"row {number}"
        hint = "; row 0 needs only obs: omit what a reset does not have" if not number else ""
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
        """Makes an episode of the rows. The sender has taken the episode before."""
        assert self._state.due is None
        key = self._client.next_key()
        begun_ns = self._state.rows.begun_ns
        self._state.due = Episode(self._state.rows.take(overlap=overlap), key=key, actor=self._actor, policy_version=self._rows_version)
        self._state.sender.traces.begin(self._state.due, table=self._table, begun_ns=begun_ns)
        self._state.cut = overlap
        self._rows_version = self._policy_version

    def _hand_over_due(self, *, ends: float = math.inf, force: bool = False) -> EpisodeKey | None:
        """Hands the ended episode to the sender, if there is one; returns its key unless it was dropped."""
        episode = self._state.due
        if episode is None:
            return None
        exit_hooks.register(self._state)
        kept = self._state.sender.put(episode, ends=ends, force=force)
        self._state.due = None
        return episode.key if kept else None
