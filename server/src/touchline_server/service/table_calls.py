"""Ready, Info and Clear, and the calls that create, drop and list tables."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import grpc

from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.config.settings import Config
from touchline_server.errors import InvalidArgumentError, UnknownTableError
from touchline_server.service import convert, tasks
from touchline_server.service.parts import ServiceParts

Context = grpc.aio.ServicerContext[Any, Any]


class TableCalls:
    """The calls that concern a table as a whole. Lives in the event loop."""

    def __init__(self, parts: ServiceParts) -> None:
        self._parts = parts
        self._changing = parts.table_pool

    async def ready(self, request: pb.ReadyRequest, context: Context) -> pb.ReadyResponse:
        """Waits up to ``wait_s`` seconds until enough is stored, and answers what is."""
        table = self._parts.tables.get(request.table, context)
        store, drain = table.store, self._parts.drain
        min_steps = _min_steps(request, table.config)
        spec = table.spec(horizon=request.horizon if request.HasField("horizon") else None)

        def is_over() -> bool:
            table.check_not_dropped()
            fill = store.fill(spec.reach)
            return drain.begun or (fill.eligible > 0 and fill.has(min_steps))

        await self._parts.changes.until(is_over, (table.subscriptions,), convert.checked_wait(request.wait_s))
        fill = store.fill(spec.reach)
        return pb.ReadyResponse(
            can_sample=fill.eligible > 0,
            min_steps_reached=fill.has(min_steps),
            min_history=table.config.min_history,
            counts=convert.counts(table.counts()),
            horizon=spec.reach,
            episodes_eligible=fill.eligible,
            longest_episode=fill.longest,
        )

    async def info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        """Answers what the server is and holds."""
        table = self._parts.tables.get(request.table, context)
        return convert.info(table, self._described(context, with_config=False))

    async def clear(self, request: pb.ClearRequest, context: Context) -> pb.ClearResponse:
        """Removes all episodes."""
        table = self._parts.tables.get(request.table, context)
        return pb.ClearResponse(counts=convert.counts(await tasks.run(self._parts.add_pools.of(table), table.clear)))

    async def create_table(self, request: pb.CreateTableRequest, context: Context) -> pb.CreateTableResponse:
        """Creates a table."""
        self._parts.tables.check(request.table, context)
        keys = convert.table_keys(request.config_toml)
        await tasks.run(self._changing, self._parts.tables.registry.create, request.table, keys)
        return pb.CreateTableResponse()

    async def set_table(self, request: pb.SetTableRequest, context: Context) -> pb.SetTableResponse:
        """Changes a table's rate limit."""
        table = self._parts.tables.get(request.table, context)
        keys = convert.table_keys(request.config_toml)
        await tasks.run(self._changing, self._parts.tables.registry.change, table.name, keys)
        return pb.SetTableResponse()

    async def drop_table(self, request: pb.DropTableRequest, context: Context) -> pb.DropTableResponse:
        """Removes a table."""
        table = self._parts.tables.get(request.table, context)
        counts = await tasks.run(self._changing, self._parts.tables.registry.drop, table.name)
        return pb.DropTableResponse(counts=convert.counts(counts))

    async def list_tables(self, request: pb.ListTablesRequest, context: Context) -> pb.ListTablesResponse:
        """Describes the tables that the caller may use."""
        return pb.ListTablesResponse(tables=self._described(context, with_config=True))

    def _described(self, context: Context, *, with_config: bool) -> list[pb.TableInfo]:
        """Returns the descriptions of the tables that the caller may use."""
        tables = self._parts.tables
        described = []
        for table in tables.visible(context):
            with suppress(UnknownTableError):  # it was dropped a moment ago
                described.append(convert.table_info(table, created=tables.registry.is_created(table.name), with_config=with_config))
        return described


def _min_steps(request: pb.ReadyRequest, config: Config) -> int:
    if request.min_steps < 0:
        raise InvalidArgumentError(f"min_steps: {request.min_steps}, expected 0 or more")
    if request.min_steps > config.buffer_size:
        raise InvalidArgumentError(f"min_steps: {request.min_steps}, expected at most the buffer's capacity of {config.buffer_size}")
    return request.min_steps or config.min_history
