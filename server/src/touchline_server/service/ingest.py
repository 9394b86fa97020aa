"""The way of received episodes into the buffer: each in its turn, small ones in the event loop itself, others on threads."""

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

MAX_AT_ONCE_BYTES = 1 << 19
"""Largest message whose episodes are stored in the event loop."""

MAX_AT_ONCE_S = 3e-3
"""Time after which the event loop leaves what is left of a message to a thread: meanwhile it answers nobody else."""

Decode = Callable[[bytes], Iterable[Episode | CodecError]]
"""Reads the episodes that are complete with a message; one that is malformed stands as its error."""


@dataclass(frozen=True, slots=True)
class IngestResult:
    """An episode that was received, and what became of it."""

    key: EpisodeKey | None
    outcome: Stored | CommitFuture | CodecError | ReplayError


class EpisodeIngest:
    """Decodes messages and stores what they bring. Lives in the event loop.

    To hand work to a thread and back costs more than storing a small episode does, also because two threads then share the
    interpreter lock. So what is small is stored at once where nothing is in the way: no other add, no gather, no disk, no device.

    Args:
        buffer: gets the episodes.
        pool: threads for what may take longer.
        gate: gives adds their turn.
    """

    def __init__(self, buffer: ReplayBuffer, pool: ThreadPoolExecutor, gate: AddThrottle) -> None:
        self._buffer = buffer
        self._pool = pool
        self._gate = gate

    async def take(self, message: bytes, decode: Decode) -> list[IngestResult]:
        """Stores the episodes that are complete with a message. One that is refused is counted, and does not stop the others.

        Where it is cancelled it ends only once no thread has the message any more, so that its room is not another's before.

        Raises:
            CodecError: the message as a whole is refused; counted.
            ReplayError: what ``decode`` raises.
        """
        await self._gate.admit()
        taken: list[IngestResult] = []
        cost_s = 0.0

        def submit(episodes: Iterator[Episode | CodecError] | None, first: Episode | None) -> None:
            nonlocal cost_s
            begin = time.thread_time()
            try:
                if first is not None:
                    taken.append(self._submitted(first))
                for episode in iter(decode(message)) if episodes is None else episodes:
                    taken.append(self._submitted(episode))
            finally:
                cost_s += time.thread_time() - begin

        try:
            if len(message) > MAX_AT_ONCE_BYTES:
                await tasks.run(self._pool, submit, None, None)
                return taken
            begin = time.perf_counter()
            try:
                episodes = iter(decode(message))
                blocked = self._store_at_once(episodes, taken, begin + MAX_AT_ONCE_S)
            finally:
                cost_s = time.perf_counter() - begin
            if blocked is not None:
                await tasks.run(self._pool, submit, episodes, blocked)
            return taken
        except CodecError as error:
            self._buffer.store.count_refused(str(error))
            raise
        finally:
            self._gate.charge(cost_s)

    async def stored(self, taken: IngestResult) -> Stored:
        """Waits for the durable store, where there is one, without a thread.

        Raises:
            CodecError: the episode is malformed.
            ReplayError: it was refused.
        """
        outcome = taken.outcome
        if isinstance(outcome, Stored):
            return outcome
        if isinstance(outcome, CodecError | ReplayError):
            raise outcome
        try:
            return await asyncio.wrap_future(outcome)
        finally:
            if outcome.done():
                self._gate.charge(outcome.cost_s)

    def _store_at_once(self, episodes: Iterator[Episode | CodecError], taken: list[IngestResult], ends: float) -> Episode | None:
        """Stores episodes up to the first that would have to wait or finds the time over, and returns that one; None for none."""
        for episode in episodes:
            if isinstance(episode, CodecError):
                taken.append(self._submitted(episode))
                continue
            try:
                stored = self._buffer.store.try_add(episode) if time.perf_counter() < ends else None
            except ReplayError as error:
                taken.append(IngestResult(episode.key, error))
                continue
            if stored is None:
                return episode
            taken.append(IngestResult(episode.key, stored))
        return None

    def _submitted(self, episode: Episode | CodecError) -> IngestResult:
        if isinstance(episode, CodecError):
            self._buffer.store.count_refused(str(episode))
            return IngestResult(episode.key, episode)
        try:
            return IngestResult(episode.key, self._buffer.table.submit(episode))
        except ReplayError as error:
            return IngestResult(episode.key, error)
