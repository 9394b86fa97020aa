"""Connections of the HTTP server, with the two limits that uvicorn leaves out: their number, and the time for the first request."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 256
"""Most connections; a further one is closed, so files are left for the callers by gRPC."""

FIRST_REQUEST_S = 10.0
"""Time for the first request of a connection; uvicorn itself has a limit only for the next one."""


class LimitedConnection(H11Protocol):
    """A connection that is closed if there are too many, or if it sends no request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accepts the connection, or closes it."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self.loop.call_later(FIRST_REQUEST_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.abort()
