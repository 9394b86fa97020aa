"""The standard health service. It reports adding separately: a server whose disk is full or has failed keeps sampling."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]

from touchline_protos.types.metadata import HEALTH_DETAIL_METADATA_KEY
from touchline_server.buffer import ReplayBuffer
from touchline_server.durability.storage_state import StorageState
from touchline_server.errors import RestoringError
from touchline_server.service.healthcheck import ADDING

REPLAY = "touchline.v1.Replay"
"""Service name for which health reports, as for the empty name, whether the server accepts calls."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthService(health.HealthServicer):  # type: ignore[misc]
    """Reports the health of the server as a whole, of the replay service, and of adding. Lives in the server's event loop."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        super().__init__()
        self._buffer = buffer
        self._loop = asyncio.get_running_loop()
        self._detail = ""
        self._server_status = dict.fromkeys(("", REPLAY, ADDING), _NOT_SERVING)

    async def serve(self) -> None:
        """Reports from now on that the server accepts calls, and that it accepts episodes whenever its buffer does."""
        buffer = self._buffer

        def follow() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed while the buffer is still in use
                self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._follow(buffer)))

        if buffer.storage_monitor is not None:
            buffer.storage_monitor.subscribe(follow)
        for name in ("", REPLAY):
            await self.set(name, _SERVING)
        await self._follow(buffer)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """Answers as the standard says, and adds as metadata the progress of a restore or the reason why adding is refused."""
        detail = self._detail or _restoring(self._buffer)
        if detail:
            context.set_trailing_metadata(((HEALTH_DETAIL_METADATA_KEY, detail),))
        return await super().Check(request, context)

    async def _follow(self, buffer: ReplayBuffer) -> None:
        monitor = buffer.storage_monitor
        adding = monitor is None or monitor.state is StorageState.OK
        detail = f"adding is refused: {monitor.reason}" if monitor is not None and not adding else ""
        self._detail = _ascii(detail)
        await self.set(ADDING, _SERVING if adding else _NOT_SERVING)


def _restoring(buffer: ReplayBuffer) -> str:
    try:
        buffer.check_restored()
    except RestoringError as error:
        return _ascii(str(error))
    return ""


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()
