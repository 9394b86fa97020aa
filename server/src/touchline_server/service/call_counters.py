"""Counts of the calls in progress, and how many the server allows."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from touchline_server.errors import OverLimitError

if TYPE_CHECKING:
    from touchline_server.config.sections import LimitsConfig

MAX_HEALTH_CALLS = 256
"""Most calls to the health service in progress, except Watch."""

MAX_HEALTH_WATCHES = 128
"""Most calls in progress that watch the health. They last, so they have a limit of their own and cannot block the other health calls."""

MAX_REFLECTION_CALLS = 64
"""Most calls to the reflection service in progress."""

STANDARD_SHARE = 16
"""One connection gets 1 / STANDARD_SHARE of the calls to a service that is not Touchline's own."""


class CallCounter:
    """Counts calls in progress and refuses those above a limit. Lives in the event loop.

    Args:
        limit: most calls in progress, over all connections.
        what: noun for the calls, for the error text.
        setting: what sets the limit, for the error text.
        per_connection: most calls of one connection; None: ``limit``. Connections over a Unix socket cannot be told apart and are exempt.
    """

    def __init__(self, limit: int, *, what: str = "calls", setting: str, per_connection: int | None = None) -> None:
        self._limit = limit
        self._what = what
        self._setting = setting
        self._per_connection = limit if per_connection is None else per_connection
        self._by_connection: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self.now = 0
        """Calls in progress."""

    @property
    def connections(self) -> int:
        """Connections with a call in progress; all those over a Unix socket are one."""
        return len(self._by_connection)

    @contextmanager
    def count(self, peer: str) -> Iterator[None]:
        """Counts one call while the block lasts.

        Args:
            peer: gRPC's name of the connection.

        Raises:
            OverLimitError: the call is above the limit.
        """
        self._enter(peer)
        try:
            yield
        finally:
            self._leave(peer)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits up to ``timeout_s`` seconds until no call is in progress; returns whether that happened."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _enter(self, peer: str) -> None:
        if self.now == self._limit:
            raise OverLimitError(f"{self.now} {self._what} are in progress, the limit of {self._setting}; try again later")
        if self._by_connection[peer] == self._per_connection and not peer.startswith("unix:"):
            raise OverLimitError(
                f"{self._per_connection} {self._what} of one connection are in progress, its share of the limit of {self._setting}; "
                "try again later"
            )
        self._by_connection[peer] += 1
        self.now += 1
        self._idle.clear()

    def _leave(self, peer: str) -> None:
        self.now -= 1
        self._by_connection[peer] -= 1
        if not self._by_connection[peer]:
            del self._by_connection[peer]
        if not self.now:
            self._idle.set()


class CallCounters:
    """The call counters of a server, one for each limit."""

    def __init__(self, limits: LimitsConfig) -> None:
        self.replay = CallCounter(limits.max_calls, setting="limits.max_calls")
        """Calls to ``touchline.v1.Replay``, streams included."""
        self.streams = CallCounter(limits.max_streams, what="streams", setting="limits.max_streams")
        """Long calls to ``touchline.v1.Replay``: sampling streams, loads, and reading episodes."""
        self.health = _standard(MAX_HEALTH_CALLS, "the health service")
        """Calls to the health service, except those that watch it."""
        self.health_watches = _standard(MAX_HEALTH_WATCHES, "the health service")
        """Calls that watch the health service."""
        self.reflection = _standard(MAX_REFLECTION_CALLS, "the reflection service")
        """Calls to the reflection service."""


def _standard(limit: int, service: str) -> CallCounter:
    return CallCounter(limit, setting=service, per_connection=limit // STANDARD_SHARE)
