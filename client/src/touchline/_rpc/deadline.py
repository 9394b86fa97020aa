"""A deadline for what gRPC has none for: one message of a stream."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Protocol

from touchline_protos.log_lines import get_logger

logger = get_logger(__name__)


class Endable(Protocol):
    """A session that may be ended from any thread."""

    def end(self) -> None:
        """Ends it; whoever waits for it gets an error."""


@dataclass(slots=True)
class _Deadline:
    """A session and when it ends."""

    session: Endable
    ends: float
    over: bool = False


class Watchdog:
    """Ends a session that brings nothing until a moment: gRPC has no deadline for one response of many.

    It looks a few times within each ``timeout_s`` and so may be late by a part of it, which costs the reader nothing for each message.
    """

    def __init__(self, timeout_s: float) -> None:
        self._period_s = min(max(timeout_s / 20, 0.01), 1.0)
        self._watched: _Deadline | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, session: Endable, ends: float) -> None:
        """Ends the session at a moment of ``time.monotonic()``, unless :meth:`rest` is called before.

        Raises:
            RuntimeError: the system has no other thread; nothing is watched.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="touchline-watchdog", daemon=True)
            thread.start()
            self._thread = thread
        self._watched = _Deadline(session, ends)

    def rest(self) -> None:
        """Ends nothing until the next :meth:`watch`."""
        self._watched = None

    def stop(self) -> None:
        """Ends the watchdog's thread."""
        self._stopped.set()

    def _work(self) -> None:
        while not self._stopped.wait(self._period_s):
            # Only the reader writes the attribute: a later term that it sets meanwhile must not be lost.
            term = self._watched
            if term is None or term.over or time.monotonic() < term.ends:
                continue
            try:
                term.session.end()
            except Exception:
                logger.exception("a session whose time is over cannot be ended; that is tried again")
            else:
                term.over = True
