"""Waiting in the event loop for something to change in the store, without a thread for each waiter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class ChangeNotifier:
    """Wakes coroutines when the store changed or the server drains.

    :meth:`notify` may be called from any thread, everything else from the loop's. A waiter looks at its condition after it was registered
    and a change is made before it is notified, so none is missed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiters: set[asyncio.Event] = set()

    def notify(self) -> None:
        """Wakes every waiter; cheap while there are none."""
        if self._waiters:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._wake)

    @contextmanager
    def waiter(self) -> Iterator[asyncio.Event]:
        """Gives an event that is set at every change while the block lasts; clear it before looking at the condition."""
        event = asyncio.Event()
        self._waiters.add(event)
        try:
            yield event
        finally:
            self._waiters.discard(event)

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until the condition holds, ``timeout_s`` seconds at most.

        Returns:
            Whether it holds.
        """
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
