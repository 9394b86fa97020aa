"""Sharing time between adding and sampling, which compete for the interpreter lock when actors insert at full speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

MESSAGE_COST_S = 150e-6
"""Time to receive and answer a message, on top of storing its episodes."""

STALLED_S = 1.0
"""A learner that has not asked for more within this time is slow itself or gone, and no longer counts as waiting."""


class AddThrottle:
    """Delays adds so that sampling keeps its share of the time while learners wait for batches.

    After each add the next one waits as long as the share demands, in proportion to the time that the add took. While no learner waits,
    adds are not delayed. :meth:`sampler_waiting` may be called from any thread, everything else from the event loop's.

    Args:
        sample_share: sampling's share of the time, from 0 (adds never wait) to below 1.
    """

    def __init__(self, sample_share: float) -> None:
        self._pause_per_second = sample_share / (1.0 - sample_share)
        self._waiting_samplers: set[object] = set()
        self._waiting_since = 0.0
        self._turn = asyncio.Lock()
        self._next = 0.0

    @contextmanager
    def sampler_waiting(self) -> Iterator[None]:
        """Counts a learner as waiting while the block lasts, for up to :data:`STALLED_S` seconds."""
        mark = object()
        self._waiting_since = time.monotonic()
        self._waiting_samplers.add(mark)
        try:
            yield
        finally:
            self._waiting_samplers.discard(mark)

    async def admit(self) -> float:
        """Waits for an add's turn; first come, first served. Returns for how long, in seconds."""
        if not self._pause_per_second or not self._is_sampler_waiting():
            return 0.0
        begin = time.monotonic()
        loop = asyncio.get_running_loop()
        # Lock order: an add holds its message's bytes while it waits here. Nothing is reserved or awaited inside except the pause, so an
        # add that holds the turn always returns it.
        async with self._turn:
            delay = self._next - loop.time()
            if delay > 0:
                await asyncio.sleep(delay)
        return time.monotonic() - begin

    def record_cost(self, cost_s: float) -> None:
        """Records what an add took, for which later adds wait. While no learner waits, only the last add counts."""
        now = asyncio.get_running_loop().time()
        begin = max(now, self._next) if self._is_sampler_waiting() else now
        self._next = begin + (cost_s + MESSAGE_COST_S) * self._pause_per_second

    def _is_sampler_waiting(self) -> bool:
        return bool(self._waiting_samplers) and time.monotonic() - self._waiting_since <= STALLED_S
