"""Sharing the server's time between adding and sampling, which fight for the interpreter lock when actors insert flat out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

MESSAGE_COST_S = 150e-6
"""Time that receiving and answering a message takes, beside storing what it brings."""

STALLED_S = 1.0
"""A learner that has not come back for more after this time does not wait for batches: it is slow itself, or gone."""


class AddThrottle:
    """Holds adds back so that sampling keeps its share of the time while learners wait for batches.

    After each add the next one waits as long as the share asks for, measured against the time that the add took. While no learner
    waits, adds pass at once. :meth:`sampler_waiting` may be called from any thread, everything else from the loop's.

    Args:
        sample_share: of the time, 0 (adds never wait) to below 1.
    """

    def __init__(self, sample_share: float) -> None:
        self._pause_per_second = sample_share / (1.0 - sample_share)
        self._hungry: set[object] = set()
        self._hungry_since = 0.0
        self._turn = asyncio.Lock()
        self._next = 0.0

    @contextmanager
    def sampler_waiting(self) -> Iterator[None]:
        """Says that a learner waits while the block lasts, for :data:`STALLED_S` seconds at most."""
        mark = object()
        self._hungry_since = time.monotonic()
        self._hungry.add(mark)
        try:
            yield
        finally:
            self._hungry.discard(mark)

    async def admit(self) -> None:
        """Waits for an add's turn; first come, first served."""
        if not self._pause_per_second or not self._is_waited_for():
            return
        loop = asyncio.get_running_loop()
        async with self._turn:
            delay = self._next - loop.time()
            if delay > 0:
                await asyncio.sleep(delay)

    def charge(self, cost_s: float) -> None:
        """Notes what an add took; the next ones wait for it. While nobody is hungry the last one alone counts: nobody missed the others."""
        now = asyncio.get_running_loop().time()
        begin = max(now, self._next) if self._is_waited_for() else now
        self._next = begin + (cost_s + MESSAGE_COST_S) * self._pause_per_second

    def _is_waited_for(self) -> bool:
        return bool(self._hungry) and time.monotonic() - self._hungry_since <= STALLED_S
