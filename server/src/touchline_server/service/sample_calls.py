"""Sample and SampleStream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np

from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.errors import InvalidArgumentError, NotReadyError, TooLargeError
from touchline_server.service import convert, tasks
from touchline_server.service.batch_framer import BatchFramer
from touchline_server.service.parts import ServiceParts
from touchline_server.service.session import SampleSession
from touchline_server.service.streams import answering
from touchline_server.tables.table import SampleSpec, Table

Context = grpc.aio.ServicerContext[Any, Any]


class SampleCalls:
    """The calls that draw batches. Lives in the event loop."""

    def __init__(self, parts: ServiceParts) -> None:
        self._parts = parts
        self._max_message_bytes = parts.limits.max_message_bytes
        self._rngs = {table.name: table.seeds.stream() for table in parts.tables}
        """Sources of the random numbers of Sample calls without a seed, by table."""

    async def sample(self, request: pb.SampleRequest, context: Context) -> bytes:
        """Draws one batch, waiting up to ``wait_s`` seconds until it can."""
        table = self._parts.tables.get(request.table)
        spec = _spec(table, request)
        # numpy's generators are not thread-safe, so each call gets one of its own.
        rng = table.seeds.stream(request.seed) if request.HasField("seed") else self._rng(table).spawn(1)[0]
        await self._reserve_batch(table, spec, convert.checked_wait(request.wait_s))
        try:
            message = await self._answer(table, spec, rng, context)
        except BaseException:
            table.limiter.cancel_batches(1, spec.batch_size)
            raise
        table.limiter.delivered(1, spec.batch_size)
        return message

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

    async def _reserve_batch(self, table: Table, spec: SampleSpec, wait_s: float) -> None:
        """Waits until a batch can be drawn and the rate limit allows it; then one is reserved with the limit.

        Raises:
            NotReadyError: there is still nothing to sample, or the rate limit does not allow a batch, after ``wait_s`` seconds.
            DrainingError: the server is stopping.
        """
        drain, reserved = self._parts.drain, False

        def is_over() -> bool:
            nonlocal reserved
            if not reserved and not drain.begun and table.store.can_sample(spec.horizon):
                reserved = table.limiter.reserve_batches(1, spec.batch_size) > 0
            return drain.begun or reserved

        try:
            await self._parts.changes.until(is_over, wait_s)
            drain.raise_if_draining()
        except BaseException:
            if reserved:
                table.limiter.cancel_batches(1, spec.batch_size)
            raise
        if not reserved:
            fill = table.store.fill(spec.horizon)
            limited = f"the rate limit holds batches back: {table.limiter.explain()}"
            raise NotReadyError(limited if fill.eligible else fill.explain_not_ready())

    def _rng(self, table: Table) -> np.random.Generator:
        rng = self._rngs.get(table.name)
        if rng is None:
            rng = self._rngs[table.name] = table.seeds.stream()
        return rng

    async def _answer(self, table: Table, spec: SampleSpec, rng: np.random.Generator, context: Context) -> bytes:
        sending = self._parts.budgets.sending
        size, inline = self._size(table, spec)
        await sending.reserve(size)
        # gRPC calls this once it has passed the answer to the transport or given up the call.
        context.add_done_callback(lambda _: sending.release(size))  # type: ignore[arg-type]
        if inline:
            return self._sample_message(table, spec, rng)
        return await tasks.run(self._parts.sample_pool, self._sample_message, table, spec, rng)

    def _framer(self, opening: pb.SampleStreamOpen) -> BatchFramer:
        table = self._parts.tables.get(opening.sample.table)
        rng = table.seeds.stream(opening.sample.seed if opening.sample.HasField("seed") else None)
        return BatchFramer(table, _spec(table, opening.sample), rng, max_batches=opening.max_batches_per_frame)

    def _size(self, table: Table, spec: SampleSpec) -> tuple[int, bool]:
        """Returns the bytes of the answer and whether it is gathered inline; 0 bytes if nothing can be sampled.

        Raises:
            TooLargeError: the answer is above the message limit. Checked before anything is drawn: just the row numbers of the
                largest batch that may be requested take half a gigabyte.
        """
        layout = table.layout(spec)
        # If nothing can be sampled, the call fails as not ready, however large its batch would be.
        if layout is None or not table.store.can_sample(spec.horizon):
            return 0, False
        size = layout.message_bytes(unary=True)
        self._check_message_size(size)
        return size, table.fits_inline(spec)

    def _sample_message(self, table: Table, spec: SampleSpec, rng: np.random.Generator) -> bytes:
        with table.draw(spec, rng) as drawn:
            actors = table.actor_names(drawn.actors())
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


def _spec(table: Table, request: pb.SampleRequest) -> SampleSpec:
    return table.spec(
        batch_size=request.batch_size if request.HasField("batch_size") else None,
        horizon=request.horizon if request.HasField("horizon") else None,
        law=convert.law(request.law),
        options=convert.law_options(request),
    )
