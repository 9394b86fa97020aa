"""The standard health service. It reports adding separately: a server whose disk is full or has failed keeps sampling."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any
from weakref import WeakSet

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]

from touchline_protos.types.metadata import HEALTH_DETAIL_METADATA_KEY
from touchline_server.durability.storage_state import StorageState
from touchline_server.errors import RestoringError
from touchline_server.service.healthcheck import ADDING
from touchline_server.tables.registry import TableRegistry
from touchline_server.tables.table import Table

REPLAY = "touchline.v1.Replay"
"""Service name for which health reports, as for the empty name, whether the server accepts calls."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthService(health.HealthServicer):  # type: ignore[misc]
    """Reports the health of the server as a whole, of the replay service, and of adding. Lives in the server's event loop.

    Adding has a name for each further table too: ``touchline.v1.Replay/AddEpisode/NAME``.
    """

    def __init__(self, tables: TableRegistry) -> None:
        super().__init__()
        self._tables = tables
        self._loop = asyncio.get_running_loop()
        self._details: dict[str, str] = {}
        """Why adding is refused, by the name that reports it."""
        self._server_status = dict.fromkeys(("", REPLAY, ADDING), _NOT_SERVING)
        self._followed: WeakSet[Table] = WeakSet()

    async def serve(self) -> None:
        """Reports from now on that the server accepts calls, and that it accepts episodes whenever its tables do."""
        self._tables.members.subscribe(self._schedule)
        for name in ("", REPLAY):
            await self.set(name, _SERVING)
        await self._follow()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """Answers as the standard says, and adds as metadata the progress of a restore or the reason why adding is refused."""
        detail = self._details.get(request.service) or self._details.get(ADDING) or _restoring(self._tables)
        if detail:
            context.set_trailing_metadata(((HEALTH_DETAIL_METADATA_KEY, detail),))
        return await super().Check(request, context)

    def _schedule(self) -> None:
        """Schedules another check of the tables. May be called from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed while the tables are still in use
            self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._follow()))

    async def _follow(self) -> None:
        details, names = {}, set()
        for table in self._tables:
            if table not in self._followed and table.storage_monitor is not None:
                self._followed.add(table)
                table.storage_monitor.subscribe(self._schedule)
            name = f"{ADDING}/{table.name}" if table.name else ADDING
            reason = _why_refused(table)
            names.add(name)
            if reason:
                details[name] = _ascii(f"adding is refused: {reason}")
                # As a whole, adding is refused if any table refuses it: a supervisor restarts the server for each.
                details.setdefault(ADDING, _ascii(f"adding is refused: {f'table {table.name!r}: ' if table.name else ''}{reason}"))
        self._details = details
        for name in names:
            await self.set(name, _NOT_SERVING if name in details else _SERVING)
        for name in [name for name in self._server_status if name.startswith(f"{ADDING}/") and name not in names]:
            await self.set(name, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            self._server_status.pop(name, None)


def _why_refused(table: Table) -> str:
    """Returns why a table refuses episodes; empty if it does not."""
    monitor = table.storage_monitor
    return monitor.reason if monitor is not None and monitor.state is not StorageState.OK else ""


def _restoring(tables: TableRegistry) -> str:
    try:
        tables.check_restored()
    except RestoringError as error:
        return _ascii(str(error))
    return ""


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()
