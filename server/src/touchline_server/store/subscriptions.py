"""Listeners that are called after changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable


class Subscriptions:
    """The listeners to changes of what a table holds or allows. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Replaced as a whole, so that notify() needs no lock.
        self._listeners: tuple[Callable[[], None], ...] = ()

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls ``listener`` after every change from now on, in the thread that made it; it must not block.

        Returns:
            The function that ends the subscription.
        """
        with self._lock:
            self._listeners += (listener,)

        def unsubscribe() -> None:
            with self._lock:
                self._listeners = tuple(other for other in self._listeners if other is not listener)

        return unsubscribe

    def notify(self) -> None:
        """Calls every listener."""
        for listener in self._listeners:
            listener()


def subscribe_all(changes: Iterable[Subscriptions], listener: Callable[[], None]) -> Callable[[], None]:
    """Calls ``listener`` after every change of any of several; see :meth:`Subscriptions.subscribe`."""
    ends = [one.subscribe(listener) for one in changes]

    def unsubscribe() -> None:
        for end in ends:
            end()

    return unsubscribe
