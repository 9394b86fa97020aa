"""Sample and SampleStream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np

from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.errors import InvalidArgumentError, TooLargeError
from touchline_server.service import convert, tasks
from touchline_server.service.batch_framer import BatchFramer
from touchline_server.service.parts import ServiceParts
from touchline_server.service.session import SampleSession
from touchline_server.service.streams import answering
from touchline_server.tables.table import SampleSpec

Context = grpc.aio.ServicerContext[Any, Any]


class SampleCalls:
    """The calls that draw batches. Lives in the event loop."""

    def __init__(self, parts: ServiceParts) -> None:
        self._parts = parts
        self._buffer = parts.buffer
        self._max_message_bytes = parts.buffer.config.limits.max_message_bytes
        self._rng = parts.buffer.seeds.stream()

    async def sample(self, request: pb.SampleRequest, context: Context) -> bytes:
        """Draws one batch, waiting up to ``wait_s`` seconds until it can."""
        spec = self._spec(request)
        # numpy's generators are not thread-safe, so each call gets one of its own.
        rng = self._buffer.seeds.stream(request.seed) if request.HasField("seed") else self._rng.spawn(1)[0]
        drain, store, sending = self._parts.drain, self._buffer.store, self._parts.budgets.sending
        await self._parts.changes.until(lambda: drain.begun or store.can_sample(spec.horizon), convert.checked_wait(request.wait_s))
        drain.raise_if_draining()
        size, inline = self._size(spec)
        await sending.reserve(size)
        # gRPC calls this once it has passed the answer to the transport or given up the call.
        context.add_done_callback(lambda _: sending.release(size))  # type: ignore[arg-type]
        if inline:
            return self._sample_message(spec, rng)
        return await tasks.run(self._parts.sample_pool, self._sample_message, spec, rng)

    async def sample_stream(self, stream: AsyncIterator[bytes], context: Context) -> None:
        """Runs a sampling session."""
        async with answering(self._parts, context):
            requests = convert.parse_all(pb.SampleStreamRequest, stream)
            first = await anext(requests, None)
            if first is None:
                return
            if first.WhichOneof("request") != "open":
                raise InvalidArgumentError("the first message of a sampling stream grants credits, expected it to open the stream")
            await SampleSession(self._framer(first.open), self._parts).run(first.open, requests, context.write)

    def _framer(self, opening: pb.SampleStreamOpen) -> BatchFramer:
        rng = self._buffer.seeds.stream(opening.sample.seed if opening.sample.HasField("seed") else None)
        return BatchFramer(self._buffer.table, self._spec(opening.sample), rng, max_batches=opening.max_batches_per_frame)

    def _size(self, spec: SampleSpec) -> tuple[int, bool]:
        """Returns the bytes of the answer and whether it is gathered inline; 0 bytes if nothing can be sampled.

        Raises:
            TooLargeError: the answer is above the message limit. Checked before anything is drawn: just the row numbers of the
                largest batch that may be requested take half a gigabyte.
        """
        columns = self._buffer.store.columns
        # If nothing can be sampled, the call fails as not ready, however large its batch would be.
        if columns is None or not self._buffer.store.can_sample(spec.horizon):
            return 0, False
        layout = self._buffer.table.layout(spec)
        assert layout is not None
        size = layout.message_bytes(unary=True)
        self._check_message_size(size)
        return size, self._buffer.table.fits_inline(spec)

    def _sample_message(self, spec: SampleSpec, rng: np.random.Generator) -> bytes:
        with self._buffer.table.draw(spec, rng) as drawn:
            actors = self._buffer.table.actor_names(drawn.actors())
            self._check_message_size(drawn.layout.message_bytes(actors=actors, unary=True))
            message, body = drawn.layout.sample_response(actors)
            drawn.gather_into((body,))
        return message

    def _check_message_size(self, size: int) -> None:
        if size > self._max_message_bytes:
            raise TooLargeError(
                f"a batch of {size} bytes, expected at most the message limit of {self._max_message_bytes}; "
                "SampleStream has no such limit: it sends large batches in chunks"
            )

    def _spec(self, request: pb.SampleRequest) -> SampleSpec:
        convert.check_table(request.table)
        return self._buffer.spec(
            batch_size=request.batch_size if request.HasField("batch_size") else None,
            horizon=request.horizon if request.HasField("horizon") else None,
            law=convert.law(request.law),
        )
