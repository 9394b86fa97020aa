"""Ready, Info and Clear."""

from __future__ import annotations

from typing import Any

import grpc

from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.config.settings import Config
from touchline_server.errors import InvalidArgumentError
from touchline_server.service import convert, tasks
from touchline_server.service.parts import ServiceParts

Context = grpc.aio.ServicerContext[Any, Any]


class TableCalls:
    """The calls that concern a table as a whole. Lives in the event loop."""

    def __init__(self, parts: ServiceParts) -> None:
        self._parts = parts

    async def ready(self, request: pb.ReadyRequest, context: Context) -> pb.ReadyResponse:
        """Waits up to ``wait_s`` seconds until enough is stored, and answers what is."""
        table = self._parts.tables.get(request.table)
        store, drain = table.store, self._parts.drain
        min_steps = _min_steps(request, table.config)
        horizon = table.spec(horizon=request.horizon if request.HasField("horizon") else None).horizon

        def is_over() -> bool:
            fill = store.fill(horizon)
            return drain.begun or (fill.eligible > 0 and fill.has(min_steps))

        await self._parts.changes.until(is_over, convert.checked_wait(request.wait_s))
        fill = store.fill(horizon)
        return pb.ReadyResponse(
            can_sample=fill.eligible > 0,
            min_steps_reached=fill.has(min_steps),
            min_history=table.config.min_history,
            counts=convert.counts(table.counts()),
            horizon=horizon,
            episodes_eligible=fill.eligible,
            longest_episode=fill.longest,
        )

    async def info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        """Answers what the server is and holds."""
        return convert.info(self._parts.tables.get(request.table))

    async def clear(self, request: pb.ClearRequest, context: Context) -> pb.ClearResponse:
        """Removes all episodes."""
        table = self._parts.tables.get(request.table)
        return pb.ClearResponse(counts=convert.counts(await tasks.run(self._parts.add_pool, table.clear)))


def _min_steps(request: pb.ReadyRequest, config: Config) -> int:
    if request.min_steps < 0:
        raise InvalidArgumentError(f"min_steps: {request.min_steps}, expected 0 or more")
    if request.min_steps > config.buffer_size:
        raise InvalidArgumentError(f"min_steps: {request.min_steps}, expected at most the buffer's capacity of {config.buffer_size}")
    return request.min_steps or config.min_history
