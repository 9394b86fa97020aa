"""Bounds on memory: how many bytes may be on their way through the server at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from touchline_server.errors import OverloadedError, TooLargeError

if TYPE_CHECKING:
    from types import TracebackType

    from touchline_protos.codec import LoadDecoder
    from touchline_server.tables import ServerConfig

ADMISSION_WAIT_S = 5.0
"""How long a request waits for room before its caller is told to come again later."""

QUESTIONS = 8
"""Requests that bring no episodes and are being read at a time: their room is not the episodes', so neither waits for the other."""

HEALTH_QUESTIONS = 4
"""Questions to the health service that are being read at a time; it is open to all, so its room is nobody else's."""


class ByteBudget:
    """So many bytes, lent to whoever asks, first come, first served. Lives in the event loop.

    Args:
        total: bytes.
        key: of the configuration, that sets it; for the text of errors.
        wait_s: the longest wait for room.
    """

    def __init__(self, total: int, *, key: str, wait_s: float = ADMISSION_WAIT_S) -> None:
        self.total = total
        self._key = key
        self._wait_s = wait_s
        self._used = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def used(self) -> int:
        """Bytes that are lent now."""
        return self._used

    def try_reserve(self, size: int) -> bool:
        """Takes so many bytes if they are free and nobody waits; returns whether it did."""
        if self._waiters or self._used + size > self.total:
            return False
        self._used += size
        return True

    async def reserve(self, size: int) -> None:
        """Takes so many bytes, waiting for them.

        Raises:
            TooLargeError: there are not that many in all.
            OverloadedError: they did not become free in time.
        """
        if self.try_reserve(size):
            return
        if size > self.total:
            raise TooLargeError(f"{size} bytes at a time, expected at most {self.total}; see {self._key}")
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((size, granted))
        try:
            async with asyncio.timeout(self._wait_s):
                await granted
        except BaseException as error:
            if granted.done() and not granted.cancelled():
                self.release(size)  # granted in the very moment in which its waiter gave up
            else:
                self._waiters.remove((size, granted))
                self._grant()
            if isinstance(error, TimeoutError):
                raise OverloadedError(
                    f"{self._used} of the {self.total} bytes that {self._key} allows are in use, and {size} did not become free "
                    f"within {self._wait_s:g} s; try again later"
                ) from None
            raise

    def release(self, size: int) -> None:
        """Gives bytes back."""
        self._used -= size
        self._grant()

    def _grant(self) -> None:
        while self._waiters and self._used + self._waiters[0][0] <= self.total:
            size, granted = self._waiters.popleft()
            self._used += size
            granted.set_result(None)


class Loan:
    """Bytes that a budget lent."""

    def __init__(self, budget: ByteBudget, size: int) -> None:
        self._budget = budget
        self.size = size
        """Bytes that it has now."""

    def resize(self, size: int) -> None:
        """Makes it what turned out to be needed. Growing does not wait: the memory is there already."""
        self._budget.release(self.size - size)
        self.size = size


class Assembling:
    """The room of one call that loads episodes: that of its next message, and that of the episode whose chunks are coming in. A context
    manager, which gives it back."""

    def __init__(self, budgets: Budgets, decoder: LoadDecoder) -> None:
        self._budgets = budgets
        self._decoder = decoder
        self._message = Loan(budgets.messages, 0)
        self._episode = Loan(budgets.assembling, 0)

    async def receive(self, requests: AsyncIterator[bytes]) -> bytes | None:
        """Returns the next message once there is room for it; None at the end.

        Raises:
            OverloadedError: there is none.
        """
        self._message.resize(0)
        size = self._budgets.max_message_bytes
        await self._budgets.messages.reserve(size)
        self._message.size = size
        message = await anext(aiter(requests), None)
        self._message.resize(len(message) if message is not None else 0)
        return message

    async def settle(self) -> None:
        """Takes room for the episode that a header announced, before its first chunk, and gives that of a complete one back.

        Raises:
            OverloadedError: there is none.
        """
        self._message.resize(0)
        needed = self._decoder.announced_bytes
        if needed > self._episode.size:
            self._episode.resize(0)
            await self._budgets.assembling.reserve(needed)
            self._episode.size = needed
        elif needed < self._episode.size:
            self._episode.resize(needed)

    async def __aenter__(self) -> Assembling:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._message.resize(0)
        self._episode.resize(0)


class Budgets:
    """The budgets of a server. Whoever waits for one holds nothing of it; what holds ``assembling`` waits for ``messages`` alone, and what
    holds that, for its peer. So nobody waits in a circle."""

    def __init__(self, config: ServerConfig) -> None:
        self.max_message_bytes = config.max_message_bytes
        """What a message takes that is not read yet."""
        self.messages = ByteBudget(config.max_receive_bytes // 2, key="server.max_receive_bytes")
        """Messages with episodes: from before their first byte is read until they are stored."""
        self.assembling = ByteBudget(config.max_receive_bytes // 2, key="server.max_receive_bytes")
        """Episodes that come in chunks, from their header on."""
        self.questions = ByteBudget(QUESTIONS * config.max_message_bytes, key="server.max_message_bytes")
        """All other requests."""
        self.health = ByteBudget(HEALTH_QUESTIONS * config.max_message_bytes, key="server.max_message_bytes")
        """Requests to the health service."""
        self.sending = ByteBudget(config.max_send_bytes, key="server.max_send_bytes")
        """Batches and episodes, from before they are made until the transport took them."""

    def __iter__(self) -> Iterator[ByteBudget]:
        return iter((self.messages, self.assembling, self.questions, self.health, self.sending))
