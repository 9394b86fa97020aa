"""From a received message to the store: small messages in the event loop itself, others on a thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from touchline_protos.codec import CodecError, Episode, EpisodeKey
from touchline_server.buffer import ReplayBuffer
from touchline_server.errors import ReplayError
from touchline_server.service import tasks
from touchline_server.service.throttle import AddThrottle
from touchline_server.store.inserts import Stored

if TYPE_CHECKING:
    from touchline_server.store.inserts import CommitFuture

MAX_INLINE_BYTES = 1 << 19
"""Size of the largest message whose episodes are stored in the event loop."""

MAX_INLINE_S = 3e-3
"""Time after which the event loop passes the rest of a message to a thread, since it serves no other call meanwhile."""

Decode = Callable[[bytes], Iterable[Episode | CodecError]]
"""Returns the episodes that are complete with a message; a malformed one is returned as its error."""


@dataclass(frozen=True, slots=True)
class IngestResult:
    """Outcome of one received episode."""

    key: EpisodeKey | None
    """The episode's key, if it has one."""
    outcome: Stored | CommitFuture | CodecError | ReplayError
    """Stored, on its way to the disk, or refused."""


class EpisodeIngest:
    """Decodes messages and stores their episodes. Lives in the event loop.

    Passing work to a thread and back costs more than storing a small episode does, not least because two threads then compete for the
    interpreter lock. So small messages are stored inline if nothing is in the way: no other add, no gather, no disk, no device.

    Args:
        buffer: buffer that stores the episodes.
        pool: threads for what may take longer.
        throttle: delays adds while learners wait.
    """

    def __init__(self, buffer: ReplayBuffer, pool: ThreadPoolExecutor, throttle: AddThrottle) -> None:
        self._buffer = buffer
        self._pool = pool
        self._throttle = throttle

    async def ingest(self, message: bytes, decode: Decode) -> list[IngestResult]:
        """Stores the episodes that are complete with a message. A refused episode is counted and does not stop the others.

        If it is cancelled, it ends once no thread uses the message any more, so that its bytes can be released then.

        Raises:
            CodecError: the message as a whole is malformed; counted.
            ReplayError: whatever ``decode`` raises.
        """
        await self._throttle.admit()
        results: list[IngestResult] = []
        cost_s = 0.0

        def submit(episodes: Iterator[Episode | CodecError] | None, first: Episode | None) -> None:
            nonlocal cost_s
            begin = time.thread_time()
            try:
                if first is not None:
                    results.append(self._submit(first))
                for episode in iter(decode(message)) if episodes is None else episodes:
                    results.append(self._submit(episode))
            finally:
                cost_s += time.thread_time() - begin

        try:
            if len(message) > MAX_INLINE_BYTES:
                await tasks.run(self._pool, submit, None, None)
                return results
            begin = time.perf_counter()
            try:
                episodes = iter(decode(message))
                blocked = self._store_inline(episodes, results, begin + MAX_INLINE_S)
            finally:
                cost_s = time.perf_counter() - begin
            if blocked is not None:
                await tasks.run(self._pool, submit, episodes, blocked)
            return results
        except CodecError as error:
            self._buffer.store.count_refused(str(error))
            raise
        finally:
            self._throttle.record_cost(cost_s)

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
            return await asyncio.wrap_future(outcome)
        finally:
            if outcome.done():
                self._throttle.record_cost(outcome.cost_s)

    def _store_inline(self, episodes: Iterator[Episode | CodecError], results: list[IngestResult], ends_at: float) -> Episode | None:
        """Stores episodes until one would have to wait or the time is up, and returns that one; None once all are stored."""
        for episode in episodes:
            if isinstance(episode, CodecError):
                results.append(self._submit(episode))
                continue
            try:
                stored = self._buffer.store.try_add(episode) if time.perf_counter() < ends_at else None
            except ReplayError as error:
                results.append(IngestResult(episode.key, error))
                continue
            if stored is None:
                return episode
            results.append(IngestResult(episode.key, stored))
        return None

    def _submit(self, episode: Episode | CodecError) -> IngestResult:
        if isinstance(episode, CodecError):
            self._buffer.store.count_refused(str(episode))
            return IngestResult(episode.key, episode)
        try:
            return IngestResult(episode.key, self._buffer.table.submit(episode))
        except ReplayError as error:
            return IngestResult(episode.key, error)
