"""From a received message to the store: small messages in the event loop itself, others on a thread."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from touchline_protos.codec import CodecError, Episode, EpisodeKey
from touchline_protos.types.status import WaitCause
from touchline_server.errors import OverLimitError, ReplayError
from touchline_server.limiters.place import InsertPlace
from touchline_server.metrics.actors import Played
from touchline_server.metrics.server_metrics import Caller, Metrics
from touchline_server.service import tasks
from touchline_server.service.add_pools import AddPools
from touchline_server.service.change_notifier import ChangeNotifier
from touchline_server.service.drain import Drain
from touchline_server.service.grpc_status import status_of
from touchline_server.service.table_report import REWARD, return_of
from touchline_server.service.throttle import AddThrottle
from touchline_server.store.inserts import Stored
from touchline_server.store.subscriptions import Subscriptions
from touchline_server.tables.table import Table

if TYPE_CHECKING:
    from touchline_server.config.sections import LimitsConfig
    from touchline_server.store.inserts import CommitFuture

MAX_INLINE_BYTES = 1 << 19
"""Size of the largest message whose episodes are stored in the event loop."""

MAX_INLINE_S = 3e-3
"""Time after which the event loop passes the rest of a message to a thread, since it serves no other call meanwhile."""

HELD_SHARE = 8
"""Part of ``limits.max_receive_bytes``, and of ``limits.max_calls``, that adds which the rate limits hold back may take: one eighth. What
is above is answered immediately, so that a limited table does not hold up the adds to others."""

UNCOUNTED = Played("", 0, 0, None)
"""Stands for an episode of which nothing is counted."""

Decode = Callable[[bytes], tuple[Table, Iterable[Episode | CodecError]]]
"""Returns the table that a message is for, and the episodes that are complete with it; a malformed one is returned as its error."""


@dataclass(frozen=True, slots=True)
class IngestResult:
    """Outcome of one received episode."""

    key: EpisodeKey | None
    """The episode's key, if it has one."""
    outcome: Stored | CommitFuture | CodecError | ReplayError
    """Stored, on its way to the disk, or refused."""
    played: Played
    """What metrics count of it; of a malformed one, nothing but its sender."""
    table: str
    """Name of the table that it is for."""
    caller: Caller
    """Caller that sent it."""


class EpisodeIngest:
    """Decodes messages and stores their episodes. Lives in the event loop.

    Passing work to a thread and back costs more than storing a small episode does, not least because two threads then compete for the
    interpreter lock. So small messages are stored inline if nothing is in the way: no other add, no gather, no disk, no device, no rate
    limit. Episodes that the rate limit holds back wait in the event loop, never on a thread.

    Args:
        pools: threads for what may take longer, of its own for each table.
        throttle: delays adds while learners wait.
        changes: wakes episodes that the rate limit holds back.
        drain: ends their wait when the server stops.
        limits: limits on bytes and calls, of which episodes that wait take a part.
        metrics: counts the episodes, and the waits of their senders.
    """

    def __init__(
        self, pools: AddPools, throttle: AddThrottle, changes: ChangeNotifier, drain: Drain, limits: LimitsConfig, *, metrics: Metrics
    ) -> None:
        self._pools = pools
        self._metrics = metrics
        self._throttle = throttle
        self._changes = changes
        self._drain = drain
        self._free_bytes = limits.max_receive_bytes // HELD_SHARE
        self._free_calls = max(limits.max_calls // HELD_SHARE, 1)

    async def ingest(self, message: bytes, decode: Decode, *, hold_s: float, caller: Caller) -> list[IngestResult]:
        """Stores the episodes that are complete with a message. A refused episode is counted and does not stop the others.

        If it is cancelled, it ends once no thread uses the message any more, so that its bytes can be released then.

        Args:
            message: the message.
            decode: function that returns its table and its episodes.
            hold_s: time for which the rate limit may hold back an episode, in seconds.
            caller: sender of the message.

        Raises:
            CodecError: the message as a whole is malformed.
            OverLimitError: the rate limit held an episode back for that time, or holds back as many as may wait. Those before it are
                stored.
            DrainingError: the server stops while the rate limit holds an episode back.
            ReplayError: whatever ``decode`` raises.
        """
        held_s = await self._throttle.admit()
        storing = _Storing(message, decode, caller, counted=self._metrics.enabled)
        stored_s = 0.0
        try:
            done = len(message) <= MAX_INLINE_BYTES and storing.try_inline()
            while not done:
                begin = time.monotonic()
                pool = await self._pool_of(storing)
                # The actor is not known before the message is decoded, so its share is added at the end.
                with self._metrics.waiting(storing.table_name, "", WaitCause.STORING):
                    done = await tasks.run(pool, storing.run)
                stored_s += time.monotonic() - begin
                if not done:
                    with self._metrics.waiting(storing.table_name, storing.actor, WaitCause.RATE):
                        await self._wait_for_limiter(storing, hold_s)
            return storing.results
        finally:
            storing.cancel_reservation()
            self._throttle.record_cost(storing.cost_s)
            if self._metrics.enabled:
                self._report(storing)
                for cause, waited_s in ((WaitCause.THROTTLE, held_s), (None, stored_s)):
                    if waited_s:
                        self._metrics.waited(storing.table_name, storing.actor, cause, waited_s)

    def _report(self, storing: _Storing) -> None:
        """Reports the episodes of a message to the metrics, those that wait for the disk once they are stored."""
        for result in storing.results:
            outcome = result.outcome
            if isinstance(outcome, Stored):
                self._metrics.stored(result.table, result.caller, result.played, duplicate=outcome.duplicate)
            elif isinstance(outcome, Exception):
                self._report_refused(result, outcome)
            else:
                outcome.add_done_callback(partial(self._report_done, result))

    def _report_done(self, result: IngestResult, done: Future[Stored]) -> None:
        """Reports an episode that has waited for the disk; from the thread that wrote it."""
        if not done.cancelled() and done.exception() is None:
            self._metrics.stored(result.table, result.caller, result.played, duplicate=done.result().duplicate)

    def _report_refused(self, result: IngestResult, error: Exception) -> None:
        self._metrics.refused_episode(result.table, result.caller, result.played.actor, error, status_of(error).reason.value)

    async def _pool_of(self, storing: _Storing) -> ThreadPoolExecutor:
        """Returns the threads of the table that a message is for; with several tables, a large message is decoded to find that out."""
        if storing.table is None and self._pools.are_several:
            await tasks.run(self._pools.decoding, storing.open)
        return self._pools.of(storing.table)

    async def _wait_for_limiter(self, storing: _Storing, hold_s: float) -> None:
        """Waits until the rate limit allows the next episode, whose steps are reserved then.

        It holds the message's bytes, and the call's place, but no thread. So only some may wait, and not for long: the peer has the
        episode, and sends it again.
        """
        size_bytes = storing.held_bytes
        if self._free_bytes < size_bytes or not self._free_calls:
            raise storing.held_back()
        self._free_bytes -= size_bytes
        self._free_calls -= 1
        try:
            await self._changes.until(lambda: self._drain.begun or storing.try_reserve(queue=True), storing.changes, hold_s)
            self._drain.raise_if_draining()
            if not storing.try_reserve():
                raise storing.held_back()
        finally:
            storing.leave_queue()
            self._free_bytes += size_bytes
            self._free_calls += 1

    async def wait_durable(self, result: IngestResult) -> Stored:
        """Returns once the episode is as durable as configured, without using a thread; immediately if there is no durable store.

        Raises:
            CodecError: the episode is malformed.
            ReplayError: it was refused.
        """
        outcome = result.outcome
        if isinstance(outcome, Stored):
            return outcome
        if isinstance(outcome, CodecError | ReplayError):
            raise outcome
        try:
            if outcome.done():
                return outcome.result()
            with self._metrics.waiting(result.table, result.played.actor, WaitCause.STORING):
                return await asyncio.wrap_future(outcome)
        except ReplayError as error:
            self._report_refused(result, error)
            raise
        finally:
            if outcome.done():
                self._throttle.record_cost(outcome.cost_s)


class _Storing:
    """The episodes of one message on their way into a table. One thread at a time."""

    def __init__(self, message: bytes, decode: Decode, caller: Caller, *, counted: bool) -> None:
        self._caller = caller
        self._message = message
        self._counted = counted
        self._decode = decode
        self.table: Table | None = None
        """Table that the message is for; None until it is decoded."""
        self._episodes: Iterator[Episode | CodecError] | None = None
        self._next: Episode | None = None
        """Episode that could not be stored yet."""
        self._place: InsertPlace | None = None
        self._reserved = False
        """Whether the next episode's steps are reserved with the rate limit."""
        self.results: list[IngestResult] = []
        self.cost_s = 0.0
        """Seconds of work so far."""

    def open(self) -> None:
        """Decodes the message as far as to know its table."""
        begin = time.thread_time()
        try:
            self._open()
        finally:
            self.cost_s += time.thread_time() - begin

    def try_inline(self) -> bool:
        """Stores episodes until one would have to wait or the time is up; returns whether all are stored."""
        begin = time.perf_counter()
        try:
            for episode in self._remaining():
                if isinstance(episode, CodecError):
                    self._refuse(episode)
                    continue
                try:
                    stored = self._opened.try_add(episode) if time.perf_counter() < begin + MAX_INLINE_S else None
                except ReplayError as error:
                    self._append(episode, error)
                    continue
                if stored is None:
                    self._next = episode
                    return False
                self._append(episode, stored)
            return True
        finally:
            self.cost_s += time.perf_counter() - begin

    def run(self) -> bool:
        """Stores episodes until the rate limit holds one back; returns whether all are stored. May wait for other adds and the disk."""
        begin = time.thread_time()
        try:
            for episode in self._remaining():
                if isinstance(episode, CodecError):
                    self._refuse(episode)
                    continue
                self._next = episode
                if not self.try_reserve():
                    return False
                self._next, self._reserved = None, False
                self._submit(episode)
            return True
        finally:
            self.cost_s += time.thread_time() - begin

    @property
    def changes(self) -> tuple[Subscriptions, ...]:
        """Changes of the table that may allow the next episode."""
        return (self._opened.subscriptions,)

    @property
    def table_name(self) -> str:
        """Name of the table that the message is for; the default one's until it is known."""
        return self.table.name if self.table is not None else ""

    @property
    def actor(self) -> str:
        """Actor of the episode that waits, or of the last one that did not."""
        if self._next is not None:
            return _actor(self._next)
        return self.results[-1].played.actor if self.results else ""

    @property
    def held_bytes(self) -> int:
        """Bytes that are kept while the next episode waits: the message's, or those of the chunks before it."""
        return max(len(self._message), 0 if self._next is None else self._next.size_bytes)

    def try_reserve(self, *, queue: bool = False) -> bool:
        """Reserves the steps of the next episode with the rate limit, unless they are already; returns whether they are.

        Args:
            queue: whether to queue for them if they are not granted. Call :meth:`leave_queue` then.

        Raises:
            UnknownTableError: the table was dropped.
        """
        assert self._next is not None
        if self._reserved:
            return True
        self._opened.check_not_dropped()
        if queue:
            if self._place is None:
                self._place = InsertPlace(self._opened.limiter)
            self._reserved = self._place.reserve(self._next.length, who=_actor(self._next))
        else:
            self._reserved = self._opened.limiter.reserve_insert(self._next.length)
        return self._reserved

    def leave_queue(self) -> None:
        """Leaves the place in the rate limit's queue, if there is one."""
        if self._place is not None:
            self._place.leave()

    def held_back(self) -> OverLimitError:
        """Returns the error of an episode that the rate limit holds back for too long."""
        table = f" of table {self._opened.name!r}" if self._opened.name else ""
        return OverLimitError(f"the rate limit{table} holds adds back: {self._opened.limiter.explain_adds()}")

    def cancel_reservation(self) -> None:
        """Cancels what is reserved for an episode that will not be stored."""
        if self._reserved and self._next is not None:
            self._opened.limiter.cancel_insert(self._next.length)
            self._reserved = False

    @property
    def _opened(self) -> Table:
        assert self.table is not None
        return self.table

    def _open(self) -> None:
        if self._episodes is None:
            self.table, episodes = self._decode(self._message)
            self._episodes = iter(episodes)

    def _remaining(self) -> Iterator[Episode | CodecError]:
        self._open()
        assert self._episodes is not None
        # Not a generator: its end would close the episodes, with which the next call goes on.
        return itertools.chain(() if self._next is None else (self._next,), self._episodes)

    def _submit(self, episode: Episode) -> None:
        """Stores an episode whose steps are reserved."""
        try:
            self._append(episode, self._opened.submit(episode))
        except ReplayError as error:
            self._append(episode, error)

    def _append(self, episode: Episode, outcome: Stored | CommitFuture | ReplayError) -> None:
        if not self._counted:
            played = UNCOUNTED
        elif isinstance(outcome, ReplayError):  # of which nothing is certain
            played = UNCOUNTED._replace(actor=_actor(episode))
        else:
            played = played_of(episode, incoming=self._opened.store.incoming)
        self.results.append(IngestResult(episode.key, outcome, played, self._opened.name, self._caller))

    def _refuse(self, error: CodecError) -> None:
        self._opened.store.count_refused(str(error))
        sender = error.key.client_id if error.key is not None else ""
        self.results.append(IngestResult(error.key, error, UNCOUNTED._replace(actor=sender), self._opened.name, self._caller))


def played_of(episode: Episode, *, incoming: bool) -> Played:
    """Returns what metrics count of an episode.

    Args:
        episode: the episode.
        incoming: the row convention, which says whether the first row's reward is undefined or the last row's.
    """
    reward = episode.columns.get(REWARD)
    return Played(_actor(episode), episode.length, episode.policy_version, None if reward is None else return_of(reward, incoming=incoming))


def _actor(episode: Episode) -> str:
    """Returns the name of an episode's actor, for the rate limit and the metrics."""
    return episode.actor or (episode.key.client_id if episode.key is not None else "an actor without a name")
