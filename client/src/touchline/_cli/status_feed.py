"""Snapshots of a server, taken by a thread of its own, also while the server is away for a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from touchline.client import ReplayClient
from touchline.errors import AccessDeniedError, IncompatibleVersionError, InvalidArgumentError, TouchlineError
from touchline.types import ServerStatus

RETRY_S = 1.0
"""Time between attempts while the server is away."""
FINAL_ERRORS = (AccessDeniedError, IncompatibleVersionError, InvalidArgumentError)
"""Errors that another attempt does not change."""


class StatusFeed:
    """Keeps the newest snapshot of a server, or why there is none. A context manager that ends the thread.

    Args:
        client: client of the server.
        tables: names of tables; none stands for all.
        interval_s: seconds from one snapshot to the next.
        on_change: function that the thread calls after each change; must not block.
    """

    def __init__(self, client: ReplayClient, tables: Sequence[str], interval_s: float, on_change: Callable[[], None]) -> None:
        self._client = client
        self._tables = list(tables) or None
        self._interval_s = interval_s
        self._on_change = on_change
        self._ended = threading.Event()
        self._watch = client.watch_status(interval_s, tables=self._tables)
        self._thread = threading.Thread(target=self._run, name="touchline-status", daemon=True)
        self.status: ServerStatus | None = None
        """The newest snapshot; None before the first."""
        self.error: TouchlineError | None = None
        """Why there has been no snapshot since; None if the newest is current."""
        self.changed_s = time.monotonic()
        """Moment of the newest snapshot, by the monotonic clock."""

    def __enter__(self) -> StatusFeed:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._watch.close()
        self._thread.join()

    @property
    def interval_s(self) -> float:
        """Seconds from one snapshot to the next."""
        return self._interval_s

    def set_interval(self, interval_s: float) -> None:
        """Changes the interval; the next snapshot comes immediately."""
        self._interval_s = interval_s
        self._watch.close()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                for status in self._watch:
                    self.status, self.error, self.changed_s = status, None, time.monotonic()
                    self._on_change()
            except TouchlineError as error:
                self.error = error
                self._on_change()
                if isinstance(error, FINAL_ERRORS) or self._ended.wait(RETRY_S):
                    return
            self._watch = self._client.watch_status(self._interval_s, tables=self._tables)
