"""Bounds on memory: how many bytes may be in transit through the server at the same time."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from touchline_server.errors import OverLimitError, TooLargeError

if TYPE_CHECKING:
    from touchline_server.config.sections import LimitsConfig

RESERVE_TIMEOUT_S = 5.0
"""Time for which a request waits for bytes before it fails with the advice to try again later."""

CONNECTION_SHARE = 4
"""One connection gets 1 / CONNECTION_SHARE of the bytes for what peers send, or one message or episode if that is more."""

CONTROL_MESSAGES = 32
"""Messages without episodes that may be received at the same time. They have bytes of their own, so adds never block them."""

HEALTH_MESSAGES = 16
"""Requests to the health service that may be received at the same time. It is open to all, so its bytes are separate as well."""

REFLECTION_MESSAGES = 4
"""Requests to the reflection service that may be received at the same time."""


class ByteBudget:
    """A number of bytes that callers reserve and release, first come, first served. Lives in the event loop.

    Args:
        total: size of the budget.
        key: the configuration key that sets it, for error texts.
        wait_s: longest wait for bytes.
        parent: budget that this one is a part of: what is reserved here is reserved there too.
    """

    def __init__(self, total: int, *, key: str, wait_s: float = RESERVE_TIMEOUT_S, parent: ByteBudget | None = None) -> None:
        self.total = total
        self._key = key
        self._wait_s = wait_s
        self._parent = parent
        self._used = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def used(self) -> int:
        """Bytes that are reserved now."""
        return self._used

    @property
    def has_waiters(self) -> bool:
        """Whether a caller waits for bytes, of this budget or of its parent."""
        return bool(self._waiters) or (self._parent is not None and self._parent.has_waiters)

    def try_reserve(self, size: int) -> bool:
        """Reserves ``size`` bytes if they are free and no call waits; returns whether it did."""
        if self._waiters or self._used + size > self.total or (self._parent is not None and not self._parent.try_reserve(size)):
            return False
        self._used += size
        return True

    async def reserve(self, size: int) -> None:
        """Reserves ``size`` bytes, waiting for them if necessary.

        Raises:
            TooLargeError: the budget is smaller than that.
            OverLimitError: they did not become free in time.
        """
        if self.try_reserve(size):
            return
        # Lock order: the part before the whole. A connection that has used up its part waits here and keeps nothing of the whole.
        await self._reserve_own(size)
        if self._parent is not None:
            try:
                await self._parent.reserve(size)
            except BaseException:
                self._release_own(size)
                raise

    def release(self, size: int) -> None:
        """Releases ``size`` bytes; a negative size reserves without waiting."""
        self._release_own(size)
        if self._parent is not None:
            self._parent.release(size)

    def sub_budget(self, total: int) -> ByteBudget:
        """Returns a budget of ``total`` bytes that is a part of this one."""
        return ByteBudget(total, key=self._key, wait_s=self._wait_s, parent=self)

    async def _reserve_own(self, size: int) -> None:
        if not self._waiters and self._used + size <= self.total:
            self._used += size
            return
        if size > self.total:
            raise TooLargeError(f"{size} bytes, expected at most {self.total}; see {self._key}")
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (size, granted)
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(self._wait_s):
                await granted
        except BaseException as error:
            if granted.done() and not granted.cancelled():
                self._release_own(size)  # granted at the very moment at which the waiter was cancelled
            else:
                if waiter in self._waiters:  # _grant may have skipped it already
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
            if not granted.cancelled():  # a cancelled waiter is skipped; it removes itself if it runs first
                if self._used + size > self.total:
                    return
                self._used += size
                granted.set_result(None)
            self._waiters.popleft()


class Reservation:
    """Bytes that were reserved from a budget."""

    def __init__(self, budget: ByteBudget, size: int) -> None:
        self._budget = budget
        self.size = size
        """Bytes reserved now."""

    def resize(self, size: int) -> None:
        """Changes the size to what turned out to be needed; 0 releases it. Growing does not wait: the memory is in use already."""
        self._budget.release(self.size - size)
        self.size = size


class PerConnectionBudget:
    """A budget of which each connection can use only a part, so that none of them can use it all.

    Args:
        budget: the whole.
        largest: bytes that one request may need; no part is smaller.
    """

    def __init__(self, budget: ByteBudget, *, largest: int) -> None:
        self.budget = budget
        self._part = max(largest, budget.total // CONNECTION_SHARE)
        # Weak: a connection's part exists for as long as one of its calls uses it.
        self._of: WeakValueDictionary[str, ByteBudget] = WeakValueDictionary()

    def of(self, peer: str) -> ByteBudget:
        """Returns the budget of one connection; keep a reference for as long as bytes of it are reserved.

        Args:
            peer: gRPC's name of the connection. Those over a Unix socket all have the same name, so they get the whole.
        """
        if self._part >= self.budget.total or peer.startswith("unix:"):
            return self.budget
        part = self._of.get(peer)
        if part is None:
            part = self._of[peer] = self.budget.sub_budget(self._part)
        return part


class Budgets:
    """The budgets of a server.

    Lock order: ``uploads``, then ``messages``; a call that waits for any other budget holds nothing. A call that holds ``messages`` waits
    only for its peer, which the receive timeout bounds. So no two calls can wait for each other.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self.request_bytes = min(limits.max_message_bytes, limits.max_request_bytes)
        """Bytes reserved for a request that is not received yet: gRPC refuses a larger one once it has read the message's header."""
        self.messages = ByteBudget(limits.max_receive_bytes // 2, key="limits.max_receive_bytes")
        """Messages with episodes: from before their first byte is read until they are stored."""
        self.uploads = ByteBudget(limits.max_receive_bytes // 2, key="limits.max_receive_bytes")
        """Episodes in chunks: from their header until they are complete."""
        self.control = ByteBudget(CONTROL_MESSAGES * self.request_bytes, key="limits.max_request_bytes")
        """All other requests to ``touchline.v1.Replay``."""
        self.health = ByteBudget(HEALTH_MESSAGES * self.request_bytes, key="limits.max_request_bytes")
        """Requests to the health service."""
        self.reflection = ByteBudget(REFLECTION_MESSAGES * self.request_bytes, key="limits.max_request_bytes")
        """Requests to the reflection service."""
        self.sending = ByteBudget(limits.max_send_bytes, key="limits.max_send_bytes")
        """Batches and episodes: from before they are made until the transport has accepted them."""
