"""Waiting in the event loop for the store to change, without a thread per waiter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class ChangeNotifier:
    """Wakes coroutines when the store has changed or the server drains.

    :meth:`notify` may be called from any thread, everything else from the event loop's. No change is missed: a waiter registers before it
    checks its condition, and a change is made before it is notified.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiters: set[asyncio.Event] = set()

    def notify(self) -> None:
        """Wakes every waiter; cheap while there are none."""
        if self._waiters:
            with suppress(RuntimeError):  # the loop is closed, so no coroutine waits any more
                self._loop.call_soon_threadsafe(self._wake)

    @contextmanager
    def waiter(self) -> Iterator[asyncio.Event]:
        """Yields an event that is set at every change while the block lasts. Clear it before checking the condition."""
        event = asyncio.Event()
        self._waiters.add(event)
        try:
            yield event
        finally:
            self._waiters.discard(event)

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Waits up to ``timeout_s`` seconds until the condition holds; returns whether it does."""
        if condition() or timeout_s <= 0:
            return condition()
        with self.waiter() as changed:
            try:
                async with asyncio.timeout(timeout_s):
                    while not condition():
                        await changed.wait()
                        changed.clear()
            except TimeoutError:
                return condition()
        return True

    def _wake(self) -> None:
        for event in self._waiters:
            event.set()
