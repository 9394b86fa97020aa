"""What the calls that stream their answers have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from touchline_server.service.parts import ServiceParts


@asynccontextmanager
async def answering(parts: ServiceParts, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Counts a stream of answers while the block lasts, and cancels the block once the server is stopping.

    Raises:
        OverLimitError: there are as many streams as the server allows.
        DrainingError: the block was cancelled.
    """
    with parts.calls.streams.count(context.peer()):
        # Before the first answer rather than with it: gRPC could not send the status of a call that is cancelled at that very moment.
        await context.send_initial_metadata(())
        async with parts.drain.cancel_on_drain():
            yield
