"""Bounds on memory: how many bytes may be on their way through the server at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from touchline_server.errors import OverLimitError, TooLargeError

if TYPE_CHECKING:
    from touchline_server.config.sections import LimitsConfig

ADMISSION_WAIT_S = 5.0
"""How long a request waits for room before its caller is told to come again later."""

QUESTIONS = 32
"""Requests that bring no episodes and are being read at a time: their room is not the episodes', so neither waits for the other."""

CONNECTION_SHARE = 4
"""One connection gets one part in so many of the room for what it sends, or that of one message or episode where that is more."""

HEALTH_QUESTIONS = 16
"""Questions to the health service that are being read at a time; it is open to all, so its room is nobody else's."""

REFLECTION_QUESTIONS = 4
"""Questions about the server's methods that are being read at a time."""


class ByteBudget:
    """So many bytes, lent to whoever asks, first come, first served. Lives in the event loop.

    Args:
        total: bytes.
        key: of the configuration, that sets it; for the text of errors.
        wait_s: the longest wait for room.
        within: a budget of which this one is a part: what this one lends is lent by both.
    """

    def __init__(self, total: int, *, key: str, wait_s: float = ADMISSION_WAIT_S, within: ByteBudget | None = None) -> None:
        self.total = total
        self._key = key
        self._wait_s = wait_s
        self._within = within
        self._used = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def used(self) -> int:
        """Bytes that are lent now."""
        return self._used

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for room, here or in what this is a part of."""
        return bool(self._waiters) or (self._within is not None and self._within.wanted)

    def try_reserve(self, size: int) -> bool:
        """Takes so many bytes if they are free and nobody waits; returns whether it did."""
        if self._waiters or self._used + size > self.total or (self._within is not None and not self._within.try_reserve(size)):
            return False
        self._used += size
        return True

    async def reserve(self, size: int) -> None:
        """Takes so many bytes, waiting for them.

        Raises:
            TooLargeError: there are not that many in all.
            OverLimitError: they did not become free in time.
        """
        if self.try_reserve(size):
            return
        await self._reserve_own(size)
        if self._within is not None:
            try:
                await self._within.reserve(size)
            except BaseException:
                self._release_own(size)
                raise

    def release(self, size: int) -> None:
        """Gives bytes back."""
        self._release_own(size)
        if self._within is not None:
            self._within.release(size)

    def part(self, total: int) -> ByteBudget:
        """Returns a budget of so many bytes of this one."""
        return ByteBudget(total, key=self._key, wait_s=self._wait_s, within=self)

    async def _reserve_own(self, size: int) -> None:
        if not self._waiters and self._used + size <= self.total:
            self._used += size
            return
        if size > self.total:
            raise TooLargeError(f"{size} bytes at a time, expected at most {self.total}; see {self._key}")
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (size, granted)
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(self._wait_s):
                await granted
        except BaseException as error:
            if granted.done() and not granted.cancelled():
                self._release_own(size)  # granted in the very moment in which its waiter gave up
            else:
                if waiter in self._waiters:  # else it was passed over already
                    self._waiters.remove(waiter)
                self._grant()
            if isinstance(error, TimeoutError):
                raise OverLimitError(
                    f"{self._used} of the {self.total} bytes that {self._key} allows are in use, and {size} did not become free "
                    f"within {self._wait_s:g} s; try again later"
                ) from None
            raise

    def _release_own(self, size: int) -> None:
        self._used -= size
        self._grant()

    def _grant(self) -> None:
        while self._waiters:
            size, granted = self._waiters[0]
            if not granted.cancelled():  # else its waiter gave up, and its turn to leave is yet to come
                if self._used + size > self.total:
                    return
                self._used += size
                granted.set_result(None)
            self._waiters.popleft()


class Reservation:
    """Bytes that a budget lent."""

    def __init__(self, budget: ByteBudget, size: int) -> None:
        self._budget = budget
        self.size = size
        """Bytes that it has now."""

    def resize(self, size: int) -> None:
        """Makes it what turned out to be needed. Growing does not wait: the memory is there already."""
        self._budget.release(self.size - size)
        self.size = size


class PerConnectionBudget:
    """The parts of a budget that its connections get, so that none of them has it all.

    Args:
        budget: what is shared.
        largest: bytes that one request may need; no part is smaller.
    """

    def __init__(self, budget: ByteBudget, *, largest: int) -> None:
        self.budget = budget
        self._total = max(largest, budget.total // CONNECTION_SHARE)
        self._of: WeakValueDictionary[str, ByteBudget] = WeakValueDictionary()

    def of(self, peer: str) -> ByteBudget:
        """Returns what a connection takes from; keep it for as long as something is taken.

        Args:
            peer: the connection's name in gRPC. Those of Unix sockets have the same, so that nothing is apart for them.
        """
        if self._total >= self.budget.total or peer.startswith("unix:"):
            return self.budget
        share = self._of.get(peer)
        if share is None:
            share = self._of[peer] = self.budget.part(self._total)
        return share


class Budgets:
    """The budgets of a server. Whoever waits for one holds nothing of it; what holds ``assembling`` waits for ``messages`` alone, and what
    holds that, for its peer. So nobody waits in a circle. A connection's part of a budget is taken before the budget itself."""

    def __init__(self, limits: LimitsConfig) -> None:
        self.request_bytes = min(limits.max_message_bytes, limits.max_request_bytes)
        """What a request takes that is not read yet: gRPC itself refuses a larger one when it has read the message's head."""
        self.messages = ByteBudget(limits.max_receive_bytes // 2, key="limits.max_receive_bytes")
        """Messages with episodes: from before their first byte is read until they are stored."""
        self.assembling = ByteBudget(limits.max_receive_bytes // 2, key="limits.max_receive_bytes")
        """Episodes that come in chunks, from their header on."""
        self.questions = ByteBudget(QUESTIONS * self.request_bytes, key="limits.max_request_bytes")
        """All other requests."""
        self.health = ByteBudget(HEALTH_QUESTIONS * self.request_bytes, key="limits.max_request_bytes")
        """Requests to the health service."""
        self.reflection = ByteBudget(REFLECTION_QUESTIONS * self.request_bytes, key="limits.max_request_bytes")
        """Requests about the server's methods."""
        self.sending = ByteBudget(limits.max_send_bytes, key="limits.max_send_bytes")
        """Batches and episodes, from before they are made until the transport took them."""

    def __iter__(self) -> Iterator[ByteBudget]:
        return iter((self.messages, self.assembling, self.questions, self.health, self.reflection, self.sending))
