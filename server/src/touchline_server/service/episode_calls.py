"""GetEpisodes."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.service import convert, tasks
from touchline_server.service.budgets import Reservation
from touchline_server.service.episode_framer import EpisodeFramer
from touchline_server.service.parts import ServiceParts
from touchline_server.service.session import Write
from touchline_server.service.streams import answering
from touchline_server.store.reader import EpisodeQuery, EpisodeReader
from touchline_server.tables.table import Table

Context = grpc.aio.ServicerContext[Any, Any]


class EpisodeCalls:
    """The call that reads stored episodes back. Lives in the event loop."""

    def __init__(self, parts: ServiceParts) -> None:
        self._parts = parts
        # One frame of one call at a time, so reading never occupies more than one of the threads that sampling needs.
        self._turn = asyncio.Lock()

    async def get_episodes(self, request: pb.GetEpisodesRequest, context: Context) -> None:
        """Sends the episodes that match a request."""
        table = self._parts.tables.get(request.table, context)
        query = convert.query(request)
        async with answering(self._parts, context):
            await self._send(table, query, request.max_frame_bytes, context.write)

    async def _send(self, table: Table, query: EpisodeQuery, max_frame_bytes: int, write: Write) -> None:
        pool, sending = self._parts.sample_pool, self._parts.budgets.sending
        async with self._turn:
            reader = await tasks.run(pool, EpisodeReader, table.store, query)
        framer = EpisodeFramer(reader, max_message_bytes=self._parts.limits.max_message_bytes, max_frame_bytes=max_frame_bytes)
        while True:
            # Lock order: bytes before the turn. The turn is only held while a thread makes a frame, never while waiting for bytes.
            await sending.reserve(framer.frame_bytes)
            reservation = Reservation(sending, framer.frame_bytes)
            try:
                async with self._turn:
                    frame = await tasks.run(pool, framer.next)
                table.check_not_dropped()
                if frame is None:
                    return
                reservation.resize(len(frame))
                await write(frame)
            finally:
                reservation.resize(0)
