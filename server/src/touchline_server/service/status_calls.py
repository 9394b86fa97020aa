"""Status: snapshots of what the server does."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from touchline_protos.codec.status import status_to_message
from touchline_protos.types.status import MAX_INTERVAL_S, MAX_NEWEST_EPISODES, MIN_INTERVAL_S
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.errors import DrainingError, InvalidArgumentError
from touchline_server.service.parts import ServiceParts
from touchline_server.service.status_report import confine
from touchline_server.service.streams import answering

Context = grpc.aio.ServicerContext[Any, Any]


class StatusCalls:
    """The call that shows what the server does. Lives in the event loop."""

    def __init__(self, parts: ServiceParts) -> None:
        self._parts = parts

    async def status(self, request: pb.StatusRequest, context: Context) -> None:
        """Sends one snapshot, or one every ``interval_s`` seconds, and a last one when the server stops."""
        _check(request)
        loop = asyncio.get_running_loop()
        due = loop.time()
        try:
            async with answering(self._parts, context):
                await self._send(request, context)
                while request.interval_s:
                    # From one due time to the next: snapshots do not drift by the time that they take. Missed ones are left out.
                    due = max(due + request.interval_s, loop.time())
                    await asyncio.sleep(due - loop.time())
                    await self._send(request, context)
        except DrainingError:
            await self._send(request, context)
            raise

    async def _send(self, request: pb.StatusRequest, context: Context) -> None:
        tables = self._parts.tables
        names: set[str] | None
        if request.tables:
            names = {tables.get(name, context).name for name in request.tables}
        else:
            allowed = tables.allowed(context)
            names = None if allowed is None else set(allowed)
        report = self._parts.status.snapshot(newest_episodes=request.newest_episodes, shared=request.interval_s > 0)
        snapshot = confine(report, names, whole=tables.allowed(context) is None)
        await context.write(status_to_message(snapshot).SerializeToString())


def _check(request: pb.StatusRequest) -> None:
    """Raises InvalidArgumentError if a field is out of range."""
    if request.interval_s and not MIN_INTERVAL_S <= request.interval_s <= MAX_INTERVAL_S:
        raise InvalidArgumentError(
            f"interval_s: {request.interval_s:g}, expected 0 for one snapshot, or {MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g} seconds"
        )
    if not 0 <= request.newest_episodes <= MAX_NEWEST_EPISODES:
        raise InvalidArgumentError(f"newest_episodes: {request.newest_episodes}, expected 0 to {MAX_NEWEST_EPISODES}")
