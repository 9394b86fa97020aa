"""The snapshots that the page shows: one a second however many pages are open, and the history that they leave."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

from touchline_protos.log_lines import get_logger
from touchline_protos.types.status import ServerStatus
from touchline_server.http.history import History
from touchline_server.http.parts import HttpParts, Tables

logger = get_logger(__name__)

INTERVAL_S = 1.0
"""Interval of the snapshots."""

HIDDEN = frozenset({"bounds_s", "buckets"})
"""Keys that the page does not show: the buckets of histograms."""


class LiveStatus:
    """The newest snapshot and the history. Lives in the HTTP server's event loop.

    Args:
        parts: the parts of the server.
    """

    def __init__(self, parts: HttpParts) -> None:
        self._parts = parts
        self.history = History()
        """Rates and levels of the last hour."""
        self._status: ServerStatus | None = None
        self._encoded: dict[Tables, str] = {}
        self._changed = asyncio.Condition()
        self._closed = False

    async def run(self) -> None:
        """Takes a snapshot every second until it is cancelled or the service's event loop has ended."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._closed:
            try:
                await self._show(await asyncio.wrap_future(self._parts.take_status()))
            except RuntimeError:  # the service's loop is closed
                return
            except Exception:
                logger.exception("no snapshot for the web page")
            due = max(due + INTERVAL_S, loop.time())
            await asyncio.sleep(due - loop.time())

    async def close(self) -> None:
        """Ends all streams of events."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def status(self, tables: Tables) -> ServerStatus:
        """Returns the newest snapshot, or waits for the first one.

        Args:
            tables: names of the tables that the caller may see; None: all.
        """
        if self._status is None:
            async with self._changed:
                await self._changed.wait_for(lambda: self._status is not None)
        assert self._status is not None
        return self._parts.confine(self._status, tables)

    async def events(self, tables: Tables) -> AsyncIterator[str]:
        """Yields the newest snapshot and each further one as an event (SSE), until :meth:`close`."""
        while not self._closed:
            await self.status(tables)
            if tables not in self._encoded:
                self._encoded[tables] = self._encode(tables)
            event, shown = self._encoded[tables], self._status
            yield event
            async with self._changed:
                await self._changed.wait_for(lambda shown=shown: self._closed or self._status is not shown)  # type: ignore[misc]

    async def _show(self, status: ServerStatus) -> None:
        self.history.add(status)
        async with self._changed:
            self._status = status
            self._encoded.clear()
            self._changed.notify_all()

    def _encode(self, tables: Tables) -> str:
        assert self._status is not None
        shown = self._parts.confine(self._status, tables).to_dict() | {"points": self.history.newest(tables)}
        return f"data: {encode_json(_without_hidden(shown))}\n\n"


def encode_json(value: Any) -> str:
    """Returns JSON; numbers that JSON does not have are null."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)


def _without_hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_hidden(one) for key, one in value.items() if key not in HIDDEN}
    return [_without_hidden(one) for one in value] if isinstance(value, list) else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
