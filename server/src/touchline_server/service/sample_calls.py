"""Sample, SampleStream and UpdatePriorities."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import grpc
import numpy as np

from touchline_protos.types.status import WaitCause
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.errors import InvalidArgumentError, NotReadyError, TooLargeError
from touchline_server.metrics.learners import Learner
from touchline_server.metrics.server_metrics import Caller
from touchline_server.metrics.waits import WaitClock
from touchline_server.service import convert, tasks
from touchline_server.service.batch_framer import BatchFramer
from touchline_server.service.callers import caller_of
from touchline_server.service.parts import ServiceParts
from touchline_server.service.session import SampleSession
from touchline_server.service.streams import answering
from touchline_server.service.traces import Traces
from touchline_server.tables.mix_sampler import MixSampler
from touchline_server.tables.ranks import Rank, RankJobs, RankShare
from touchline_server.tables.sampler import Reserved, Sampler, TableSampler
from touchline_server.tables.table import Table

MAX_INLINE_PRIORITIES = 1 << 16
"""Priorities that the event loop takes by itself, in half a millisecond: the next draw applies them."""

Context = grpc.aio.ServicerContext[Any, Any]


class SampleCalls:
    """The calls that draw batches. Lives in the event loop."""

    def __init__(self, parts: ServiceParts) -> None:
        self._parts = parts
        self._traces = Traces()
        self._max_message_bytes = parts.limits.max_message_bytes
        self._rngs: WeakKeyDictionary[Table, np.random.Generator] = WeakKeyDictionary()
        """Sources of the random numbers of Sample calls without a seed."""
        self._jobs = RankJobs()
        for table in parts.tables.registry:
            self._rng(table)

    async def sample(self, request: pb.SampleRequest, context: Context) -> bytes:
        """Draws one batch, waiting up to ``wait_s`` seconds until it can."""
        sampler = self._traces.sampler(self._sampler(request, context), context)
        clock = WaitClock()
        clock.want()
        reserved = await self._reserve_batch(sampler, convert.checked_wait(request.wait_s), clock)
        try:
            message = await self._answer(sampler, reserved, context)
        except BaseException:
            sampler.cancel(*reserved)
            raise
        sampler.delivered(*reserved)
        if self._parts.metrics.enabled:
            self._count_call(sampler, request, reserved, clock, caller_of(context))
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
            with ExitStack() as session:
                framer = self._framer(first.open, context, session)
                learner = _learner(framer.sampler, first.open.sample, caller_of(context))
                self._parts.metrics.opened(learner)
                session.callback(self._parts.metrics.closed, learner)
                await SampleSession(framer, self._parts, learner).run(first.open, requests, context.write)

    async def update_priorities(self, request: pb.UpdatePrioritiesRequest, context: Context) -> pb.UpdatePrioritiesResponse:
        """Sets the priorities of slices that were drawn."""
        table = self._parts.tables.get(request.table, context)
        update = convert.priority_update(request)
        slices = len(update.start)
        if update.priorities.size <= MAX_INLINE_PRIORITIES:
            updated = table.update_priorities(update)
        else:
            updated = await tasks.run(self._parts.sample_pool, table.update_priorities, update)
        return pb.UpdatePrioritiesResponse(updated=updated, evicted=slices - updated)

    def _count_call(self, sampler: Sampler, request: pb.SampleRequest, reserved: Reserved, clock: WaitClock, caller: Caller) -> None:
        """Counts the batch of a Sample call, and how long its caller waited for it."""
        key = (caller.address, sampler.batch_size, sampler.horizon, *_tables(sampler, request))
        learner = self._parts.metrics.caller(key, lambda: _learner(sampler, request, caller))
        layout = sampler.layout()
        learner.delivered(*reserved, layout.body_bytes if layout is not None else 0)
        learner.waits.observe(clock.end())
        for cause, waited_s in clock.over_s.items():
            learner.clock.over_s[cause] += waited_s

    async def _reserve_batch(self, sampler: Sampler, wait_s: float, clock: WaitClock) -> Reserved:
        """Waits until a batch can be drawn and the rate limit allows it, and reserves it with the limit.

        Raises:
            NotReadyError: there is still nothing to sample, or the rate limit does not allow a batch, after ``wait_s`` seconds.
            DrainingError: the server is stopping.
        """
        drain = self._parts.drain
        reserved: Reserved | None = None

        def is_over() -> bool:
            nonlocal reserved
            if reserved is None and not drain.begun:
                if sampler.can_sample():
                    reserved = sampler.reserve(1, waits=wait_s > 0)
                    clock.blame(WaitCause.SAMPLING if reserved is not None else WaitCause.RATE)
                else:
                    clock.blame(WaitCause.DATA)
                    sampler.leave()  # others go on meanwhile
            return drain.begun or reserved is not None

        try:
            await self._parts.changes.until(is_over, sampler.changes, wait_s)
            drain.raise_if_draining()
        except BaseException:
            if reserved is not None:
                sampler.cancel(*reserved)
            raise
        finally:
            sampler.leave()
        if reserved is None:
            raise NotReadyError(sampler.explain_not_ready())
        return reserved

    def _sampler(self, request: pb.SampleRequest, context: Context, session: ExitStack | None = None) -> Sampler:
        """Returns the source of a request's batches, whose random numbers no other call or stream has, except for the other ranks of a job.

        Args:
            request: what to draw.
            context: the call.
            session: the stream's, at whose end its rank leaves its job; None for a call that gets one batch.

        Raises:
            UnknownTableError: a table does not exist.
            AccessDeniedError: the token is confined to other tables.
            InvalidArgumentError: something in the request is out of range, or the columns of a mix's tables do not fit each other.
        """
        mix = convert.mix(request)
        tables = [self._parts.tables.get(name, context) for name in (mix.names if mix is not None else (request.table,))]
        rank = convert.rank(request)
        share = None if rank is None else self._join(rank, tables, request, session)
        if share is not None:
            rng = share.rng
        elif session is None and not request.HasField("seed"):
            # numpy's generators are not thread-safe, so each call gets one of its own.
            rng = self._rng(tables[0]).spawn(1)[0]
        else:
            rng = _rng_of_stream(tables[0], request)
        if mix is not None:
            return MixSampler(mix, tables, rng, learner=context.peer(), share=share, **_given(request))
        return TableSampler(tables[0], tables[0].spec(**_given(request)), rng, learner=context.peer(), share=share)

    def _join(self, rank: Rank, tables: list[Table], request: pb.SampleRequest, session: ExitStack | None) -> RankShare:
        """Makes a stream part of the job of its rank until the end of its session.

        Raises:
            InvalidArgumentError: it is no stream, its global batches are too large, or it does not fit the job.
        """
        if session is None:
            raise InvalidArgumentError(f"rank: {rank.rank} for a single batch, expected it only for a stream: batches()")
        spec, most = tables[0].spec(**_given(request)), tables[0].config.limits.max_batch_size
        if spec.batch_size * rank.world_size > most:
            raise InvalidArgumentError(
                f"batch_size: {spec.batch_size} for each of {rank.world_size} ranks, expected up to {most} for all (limits.max_batch_size)"
            )
        asked = convert.asked_of_all_ranks(request)
        return session.enter_context(self._jobs.join(rank, tuple(tables), asked, lambda: _rng_of_stream(tables[0], request)))

    def _rng(self, table: Table) -> np.random.Generator:
        rng = self._rngs.get(table)
        if rng is None:
            rng = self._rngs[table] = table.seeds.stream()
        return rng

    async def _answer(self, sampler: Sampler, reserved: Reserved, context: Context) -> bytes:
        sending = self._parts.budgets.sending
        size, inline = self._size(sampler)
        await sending.reserve(size)
        # gRPC calls this once it has passed the answer to the transport or given up the call.
        context.add_done_callback(lambda _: sending.release(size))  # type: ignore[arg-type]
        if inline:
            return self._sample_message(sampler, reserved)
        return await tasks.run(self._parts.sample_pool, self._sample_message, sampler, reserved)

    def _framer(self, opening: pb.SampleStreamOpen, context: Context, session: ExitStack) -> BatchFramer:
        sampler = self._traces.sampler(self._sampler(opening.sample, context, session), context)
        return BatchFramer(sampler, max_message_bytes=self._max_message_bytes, max_batches=opening.max_batches_per_frame)

    def _size(self, sampler: Sampler) -> tuple[int, bool]:
        """Returns the bytes of the answer and whether it is gathered inline; 0 bytes if nothing can be sampled.

        Raises:
            TooLargeError: the answer is above the message limit. Checked before anything is drawn: just the row numbers of the
                largest batch that may be requested take half a gigabyte.
        """
        layout = sampler.layout()
        # If nothing can be sampled, the call fails as not ready, however large its batch would be.
        if layout is None or not sampler.can_sample():
            return 0, False
        size = layout.message_bytes(unary=True)
        self._check_message_size(size)
        return size, sampler.fits_inline()

    def _sample_message(self, sampler: Sampler, reserved: Reserved) -> bytes:
        with sampler.draw(reserved) as drawn:
            actors = sampler.actor_names(drawn.actors())
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


def _rng_of_stream(table: Table, request: pb.SampleRequest) -> np.random.Generator:
    return table.seeds.stream(request.seed if request.HasField("seed") else None)


def _tables(sampler: Sampler, request: pb.SampleRequest) -> tuple[str, ...]:
    return sampler.table_names or (request.table,)


def _learner(sampler: Sampler, request: pb.SampleRequest, caller: Caller) -> Learner:
    return Learner(
        _tables(sampler, request),
        address=caller.address,
        metadata=caller.metadata,
        batch_size=sampler.batch_size,
        horizon=sampler.horizon,
    )


def _given(request: pb.SampleRequest) -> dict[str, Any]:
    """Returns what a request asks for, as arguments of :meth:`Table.spec`; None for what it leaves out."""
    return {
        "batch_size": request.batch_size if request.HasField("batch_size") else None,
        "horizon": request.horizon if request.HasField("horizon") else None,
        "law": convert.law(request.law),
        "options": convert.law_options(request),
        "pad": convert.pad(request.pad),
    }
