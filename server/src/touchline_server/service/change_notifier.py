"""Waiting in the event loop for tables to change, without a thread per waiter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from touchline_server.store.subscriptions import Subscriptions


class ChangeNotifier:
    """Wakes coroutines when a table that they wait for has changed, or the server drains. Lives in the event loop.

    Each table has a signal of its own while a caller waits for it, so that adding to one wakes none that waits for another. No change is
    missed: a waiter registers before it checks its condition, and a change, in whatever thread, is made before it is notified.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiters: set[asyncio.Event] = set()
        self._signals: dict[Subscriptions, _Signal] = {}

    def notify_all(self) -> None:
        """Wakes every waiter, whatever it waits for."""
        for event in self._waiters:
            event.set()

    @contextmanager
    def waiter(self, changes: Iterable[Subscriptions]) -> Iterator[asyncio.Event]:
        """Yields an event that is set at every change while the block lasts. Clear it before checking the condition.

        Args:
            changes: the changes of each table that is waited for.
        """
        event = asyncio.Event()
        self._waiters.add(event)
        signals = {key: self._signals.get(key) or _Signal(self._loop, key) for key in changes}
        self._signals |= signals
        for signal in signals.values():
            signal.events.add(event)
        try:
            yield event
        finally:
            self._waiters.discard(event)
            for key, signal in signals.items():
                signal.events.discard(event)
                if not signal.events:
                    signal.unsubscribe()
                    del self._signals[key]

    async def until(self, condition: Callable[[], bool], changes: Iterable[Subscriptions], timeout_s: float) -> bool:
        """Waits up to ``timeout_s`` seconds until the condition holds; returns whether it does.

        Args:
            condition: the condition, checked at every change.
            changes: the changes of each table that it depends on.
            timeout_s: longest wait in seconds.
        """
        if condition() or timeout_s <= 0:
            return condition()
        with self.waiter(changes) as changed:
            try:
                async with asyncio.timeout(timeout_s):
                    while not condition():
                        await changed.wait()
                        changed.clear()
            except TimeoutError:
                return condition()
        return True


class _Signal:
    """The waiters for one table."""

    def __init__(self, loop: asyncio.AbstractEventLoop, changes: Subscriptions) -> None:
        self._loop = loop
        self.events: set[asyncio.Event] = set()
        self.unsubscribe = changes.subscribe(self._notify)

    def _notify(self) -> None:
        with suppress(RuntimeError):  # the loop is closed, so no coroutine waits any more
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for event in self.events:
            event.set()
