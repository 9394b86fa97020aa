"""Stopping in order: new work is refused, and what might never end by itself is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from touchline_server.errors import DrainingError


class Drain:
    """Whether the server is stopping. Lives in the event loop.

    Args:
        wake: wakes everyone who waits for a condition that includes :attr:`begun`.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._blocks: dict[asyncio.Timeout, float] = {}
        self.begun = False
        """Whether the server is stopping."""

    def begin(self) -> None:
        """Refuses new work and cancels the blocks of :meth:`cancel_on_drain`; everything else ends by itself."""
        self.begun = True
        for block, cancel_at in self._blocks.items():
            block.reschedule(cancel_at)
        self._wake()

    def raise_if_draining(self) -> None:
        """Raises DrainingError if the server is stopping."""
        if self.begun:
            raise DrainingError("the server is stopping and takes no new work; try again when it is back")

    @asynccontextmanager
    async def cancel_on_drain(self, *, grace_s: float = 0.0) -> AsyncIterator[None]:
        """Cancels the block, wherever it waits, once the server is stopping and the block has lasted for ``grace_s`` seconds.

        Raises:
            DrainingError: the block was cancelled.
        """
        cancel_at = asyncio.get_running_loop().time() + grace_s
        try:
            async with asyncio.timeout_at(cancel_at if self.begun else None) as block:
                self._blocks[block] = cancel_at
                try:
                    yield
                finally:
                    del self._blocks[block]
        except TimeoutError:
            if not block.expired():
                raise
            raise DrainingError("the server is stopping and waits no longer; try again when it is back") from None
