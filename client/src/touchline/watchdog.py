"""A deadline for what gRPC has none for: one message of a stream."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Endable(Protocol):
    """A session that may be ended from any thread."""

    def end(self) -> None:
        """Ends it; whoever waits for it gets an error."""


class Watchdog:
    """Ends a session that brings nothing until a moment: gRPC has no deadline for one response of many.

    It looks a few times within each ``timeout_s`` and so may be late by a part of it, which costs the reader nothing for each message.
    """

    def __init__(self, timeout_s: float) -> None:
        self._period_s = min(max(timeout_s / 20, 0.01), 1.0)
        self._watched: tuple[Endable, float] | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, session: Endable, ends: float) -> None:
        """Ends the session at a moment of ``time.monotonic()``, unless :meth:`rest` is called before."""
        self._watched = (session, ends)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="touchline-watchdog", daemon=True)
            self._thread.start()

    def rest(self) -> None:
        """Ends nothing until the next :meth:`watch`."""
        self._watched = None

    def stop(self) -> None:
        """Ends the watchdog's thread."""
        self._stopped.set()

    def _work(self) -> None:
        while not self._stopped.wait(self._period_s):
            watched = self._watched
            if watched is not None and time.monotonic() >= watched[1]:
                self._watched = None
                watched[0].end()
