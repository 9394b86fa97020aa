"""The end of a server's work: what is refused from then on, and what is broken off at once because it might never end by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from touchline_server.errors import DrainingError


class Drain:
    """Whether the server stops. Lives in the event loop.

    Args:
        wake: wakes whoever waits for a condition that says so.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._blocks: dict[asyncio.Timeout, float] = {}
        self.begun = False
        """Whether it does."""

    def begin(self) -> None:
        """Refuses new work and breaks off what :meth:`breaking` guards; everything else ends by itself."""
        self.begun = True
        for block, rests_at in self._blocks.items():
            block.reschedule(rests_at)
        self._wake()

    def refuse(self) -> None:
        """Raises DrainingError where it has begun."""
        if self.begun:
            raise DrainingError("the server is stopping and takes no new work; try again when it is back")

    @asynccontextmanager
    async def breaking(self, *, rest_s: float = 0.0) -> AsyncIterator[None]:
        """Breaks the block off, wherever it waits, once the server stops and the block has lasted for ``rest_s`` seconds.

        Raises:
            DrainingError: it was broken off.
        """
        rests_at = asyncio.get_running_loop().time() + rest_s
        try:
            async with asyncio.timeout_at(rests_at if self.begun else None) as block:
                self._blocks[block] = rests_at
                try:
                    yield
                finally:
                    del self._blocks[block]
        except TimeoutError:
            if not block.expired():
                raise
            raise DrainingError("the server is stopping and waits no longer; try again when it is back") from None
