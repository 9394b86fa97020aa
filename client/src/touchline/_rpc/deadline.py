"""A deadline for what gRPC has none for: one message of a stream."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Protocol

from touchline_protos.log_lines import get_logger

logger = get_logger(__name__)


class Endable(Protocol):
    """A session that any thread may end."""

    def end(self) -> None:
        """Ends the session; a thread that waits for it gets an error."""


@dataclass(slots=True)
class _Deadline:
    """A session and the moment at which it is ended."""

    session: Endable
    ends: float
    done: bool = False


class Watchdog:
    """Ends a session that brings nothing in time: gRPC has no deadline for a single response of a stream.

    It checks about 20 times per ``timeout_s``, and so may be late by a twentieth of it; arming it costs the reader next to nothing. One
    thread arms and disarms; any thread may stop.

    Args:
        timeout_s: the deadline that it will be armed with, which its checks are spaced by.
    """

    def __init__(self, timeout_s: float) -> None:
        self._period_s = min(max(timeout_s / 20, 0.01), 1.0)
        self._deadline: _Deadline | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def arm(self, session: Endable, ends: float) -> None:
        """Ends the session at a moment of ``time.monotonic()``, unless :meth:`disarm` is called before.

        Raises:
            RuntimeError: the system has no thread left; the session is not watched.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._watch, name="touchline-watchdog", daemon=True)
            thread.start()
            self._thread = thread
        self._deadline = _Deadline(session, ends)

    def disarm(self) -> None:
        """Ends nothing until the next :meth:`arm`."""
        self._deadline = None

    def stop(self) -> None:
        """Ends the watchdog's thread."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(self._period_s):
            # This thread only marks the deadline that it has read. The attribute is the reader's to write, which may have set a later
            # deadline meanwhile: clearing it here would lose that one.
            deadline = self._deadline
            if deadline is None or deadline.done or time.monotonic() < deadline.ends:
                continue
            try:
                deadline.session.end()
            except Exception:
                logger.exception("a session that is over its deadline cannot be ended; trying again")
            else:
                deadline.done = True
