"""The gRPC service: turns calls into calls on the buffer, and nothing else. Blocking work runs on two small pools of threads, so
adding and sampling do not wait for each other's turn and a client costs no thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message

from touchline_protos import PROTOCOL_METADATA_KEY, PROTOCOL_VERSION
from touchline_protos.codec import CodecError, CodecLimits, Episode, LoadDecoder, decode_add_episode
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.buffer import ReplayBuffer
from touchline_server.errors import (
    IncompatibleVersionError,
    InvalidArgumentError,
    InvalidEpisodeError,
    OverLimitError,
    ReplayError,
    RestoringError,
    TooLargeError,
    UnknownTableError,
)
from touchline_server.service import convert, tasks
from touchline_server.service.batch_framer import BatchFramer
from touchline_server.service.budgets import Budgets, Reservation
from touchline_server.service.change_notifier import ChangeNotifier
from touchline_server.service.drain import Drain
from touchline_server.service.episode_framer import EpisodeFramer
from touchline_server.service.grpc_status import abort
from touchline_server.service.ingest import EpisodeIngest, IngestResult
from touchline_server.service.receiver import MessageReaders, UploadReservation
from touchline_server.service.ring_producer import RingPool
from touchline_server.service.session import SampleSession, Write
from touchline_server.service.throttle import AddThrottle
from touchline_server.store.index import Fill
from touchline_server.store.reader import EpisodeQuery, EpisodeReader
from touchline_server.tables.table import SampleSpec

SERVICE_NAME = "touchline.v1.Replay"

MAX_WAIT_S = 3600.0
"""Longest time that a call may wait for the store to fill."""

LEAVING_S = 5.0
"""How long after a failed write the end of the call is waited for."""

LOAD_REST_S = 1.0
"""A call that loads episodes, and is not in the middle of one, is ended by a server that stops once nothing came for this time."""

MAX_LOAD_RESULTS = 100_000
"""Most episodes of one LoadEpisodes call: its answer has a result for each."""

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class ReplayService:
    """``touchline.v1.Replay`` on one buffer. Lives in one event loop; end it with :meth:`drain`, :meth:`drained` and :meth:`close`."""

    def __init__(self, buffer: ReplayBuffer, budgets: Budgets, receptions: MessageReaders) -> None:
        self._buffer = buffer
        self._budgets = budgets
        self._receptions = receptions
        config = buffer.config.server
        self._limits = buffer.config.limits
        self._codec_limits = CodecLimits(max_episode_bytes=self._limits.max_episode_bytes, max_columns=self._limits.max_columns)
        self._adding = ThreadPoolExecutor(config.add_workers, thread_name_prefix="touchline-add")
        self._sampling = ThreadPoolExecutor(config.sample_workers, thread_name_prefix="touchline-sample")
        self._reading = asyncio.Lock()
        self._rng = buffer.seeds.stream()
        self._changes = ChangeNotifier(asyncio.get_running_loop())
        self._drain = Drain(self._changes.notify)
        self._unsubscribe = buffer.store.subscribe(self._changes.notify)
        self._rings = RingPool(buffer.config.ring)
        self._gate = AddThrottle(config.sample_share)
        self._intake = EpisodeIngest(buffer, self._adding, self._gate)
        self._streams = 0
        self._calls = 0
        self._serving = buffer.restored

    def serve(self) -> None:
        """Takes work from now on: the durable store is read."""
        self._serving = True
        self._changes.notify()

    def _refuse_restoring(self) -> None:
        self._buffer.check_restored()
        raise RestoringError("the server has read its durable store and is about to serve; try again")

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Returns the service's method handlers.

        gRPC hands over bytes: the codec reads and writes the hot messages, and what is no message gets a status of ours.
        """

        def unary(method: Any, request: Any, *, early: bool = False) -> grpc.RpcMethodHandler[Any, Any]:
            return grpc.unary_unary_rpc_method_handler(self._guarded(_parsing(method, request), early=early), None, convert.serialize)

        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "AddEpisode": grpc.unary_unary_rpc_method_handler(self._guarded(self._add_episode), None, convert.serialize),
                "LoadEpisodes": grpc.stream_unary_rpc_method_handler(self._guarded(self._load_episodes), None, convert.serialize),
                "Sample": grpc.unary_unary_rpc_method_handler(self._guarded(_parsing(self._sample, pb.SampleRequest)), None, None),
                "SampleStream": grpc.stream_stream_rpc_method_handler(self._guarded(self._sample_stream), None, None),
                "GetEpisodes": grpc.unary_stream_rpc_method_handler(
                    self._guarded(_parsing(self._get_episodes, pb.GetEpisodesRequest)), None, None
                ),
                "Ready": unary(self._ready, pb.ReadyRequest, early=True),
                "Info": unary(self._info, pb.InfoRequest),
                "Clear": unary(self._clear, pb.ClearRequest),
            },
        )

    def drain(self) -> None:
        """Refuses new work from now on and ends the streams that might last for ever; all other calls end by themselves."""
        self._drain.begin()

    async def drained(self, timeout_s: float) -> bool:
        """Waits until the calls in progress have ended, ``timeout_s`` seconds at most; new ones are told meanwhile that it drains.

        Returns:
            Whether they have.
        """
        return await self._changes.until(lambda: self._calls == 0, timeout_s)

    def close(self) -> None:
        """Ends the threads, once every call has ended."""
        self._unsubscribe()
        self._adding.shutdown()
        self._sampling.shutdown()

    def _guarded(self, method: Callable[[Any, Context], Awaitable[T]], *, early: bool = False) -> Callable[[Any, Context], Awaitable[T]]:
        """Wraps a method with what holds for all: the protocol's version, draining, and errors as statuses.

        Args:
            method: the method.
            early: whether it may be called while the durable store is read.
        """

        async def guarded(request: Any, context: Context) -> T:
            try:
                _check_protocol(context)
                self._drain.refuse()
                if not self._serving and not early:
                    self._refuse_restoring()
                with self._call():
                    return await method(request, context)
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except Exception as error:
                if context.done() or (isinstance(error, grpc.aio.InternalError) and await _is_left(context)):
                    # The peer left while it was being answered: nobody is to be told, and nothing went wrong here.
                    raise asyncio.CancelledError from error
                await abort(context, error)

        return guarded

    async def _add_episode(self, message: bytes, context: Context) -> pb.AddEpisodeResponse:
        def decode(message: bytes) -> tuple[Episode]:
            table, episode = decode_add_episode(message, limits=self._codec_limits)
            _check_table(table)
            return (episode,)

        (taken,) = await self._intake.take(message, decode)
        stored = await self._intake.stored(taken)
        return pb.AddEpisodeResponse(episode_id=stored.episode_id, duplicate=stored.duplicate, counts=convert.counts(stored.counts))

    async def _load_episodes(self, requests: AsyncIterator[bytes], context: Context) -> pb.LoadEpisodesResponse:
        decoder = LoadDecoder(self._codec_limits)
        answers: list[pb.EpisodeResult | IngestResult] = []

        def decode(message: bytes) -> Iterator[Episode | CodecError]:
            episodes = decoder.feed_all(message)
            _check_table(decoder.table)
            return episodes

        with self._stream():
            async with UploadReservation(self._receptions, decoder, context.peer()) as assembling:
                while True:
                    # A peer that is in the middle of an episode is waited for; one that is not may never say anything again.
                    async with nullcontext() if decoder.in_progress else self._drain.breaking(rest_s=LOAD_REST_S):
                        message = await assembling.receive(requests)
                    if message is None:
                        break
                    if len(answers) >= MAX_LOAD_RESULTS:
                        raise TooLargeError(
                            f"more than {MAX_LOAD_RESULTS} episodes in one call; those are stored, send the others in a new one"
                        )
                    answers += [
                        convert.refusal(taken.key, taken.outcome) if isinstance(taken.outcome, CodecError | ReplayError) else taken
                        for taken in await self._intake.take(message, decode)
                    ]
                    del message  # its room is given back
                    await assembling.settle()
        # Episodes of one call that wait for the disk share its fsync.
        results = [answer if isinstance(answer, pb.EpisodeResult) else await self._result(answer) for answer in answers]
        if decoder.in_progress:
            error = InvalidEpisodeError("the stream ended within an episode's chunks; the episodes before it are stored")
            self._buffer.store.count_refused(str(error))
            raise error
        return pb.LoadEpisodesResponse(results=results, counts=convert.counts(self._buffer.counts()))

    async def _result(self, taken: IngestResult) -> pb.EpisodeResult:
        try:
            stored = await self._intake.stored(taken)
        except ReplayError as error:
            return convert.refusal(taken.key, error)
        return convert.acceptance(taken.key, stored)

    async def _sample(self, request: pb.SampleRequest, context: Context) -> bytes:
        spec = self._spec(request)
        # numpy's generators are not thread-safe, so each call gets one of its own.
        rng = self._buffer.seeds.stream(request.seed) if request.HasField("seed") else self._rng.spawn(1)[0]
        wait_s = _checked_wait(request.wait_s)
        await self._changes.until(lambda: self._drain.begun or self._buffer.store.can_sample(spec.horizon), wait_s)
        self._drain.refuse()
        columns = self._buffer.store.columns
        size, quick = 0, False
        # What cannot be sampled yet is not ready, however large it would be.
        if columns is not None and self._buffer.store.can_sample(spec.horizon):
            # Before anything is drawn: the rows alone of the largest batch that may be asked for take half a gigabyte.
            layout = self._buffer.table.layout(spec)
            assert layout is not None
            size, quick = layout.message_bytes(unary=True), self._buffer.table.fits_inline(spec)
            self._check_message_size(size)
        await self._budgets.sending.reserve(size)
        # gRPC calls this once it has handed the answer to the transport, or given the call up.
        context.add_done_callback(lambda _: self._budgets.sending.release(size))  # type: ignore[arg-type]
        return self._sample_message(spec, rng) if quick else await tasks.run(self._sampling, self._sample_message, spec, rng)

    def _sample_message(self, spec: SampleSpec, rng: np.random.Generator) -> bytes:
        with self._buffer.table.draw(spec, rng) as drawn:
            actors = self._buffer.table.actor_names(drawn.actors())
            self._check_message_size(drawn.layout.message_bytes(actors=actors, unary=True))
            message, body = drawn.layout.sample_response(actors)
            drawn.gather_into((body,))
        return message

    def _check_message_size(self, size: int) -> None:
        if size > self._limits.max_message_bytes:
            raise TooLargeError(
                f"a batch of {size} bytes, expected at most the message limit of {self._limits.max_message_bytes}; "
                "SampleStream has no such limit: it sends big batches in chunks"
            )

    async def _sample_stream(self, stream: AsyncIterator[bytes], context: Context) -> None:
        async with self._broken_off(context):
            await self._run_session(convert.parse_all(pb.SampleStreamRequest, stream), context)

    async def _run_session(self, requests: AsyncIterator[pb.SampleStreamRequest], context: Context) -> None:
        first = await anext(requests, None)
        if first is None:
            return
        if first.WhichOneof("request") != "open":
            raise InvalidArgumentError("the first message of a sampling stream grants credits, expected it to open the stream")
        source = BatchFramer(
            self._buffer.table,
            self._spec(first.open.sample),
            self._buffer.seeds.stream(first.open.sample.seed if first.open.sample.HasField("seed") else None),
            max_batches=first.open.max_batches_per_frame,
        )
        session = SampleSession(source, self._changes, self._sampling, self._rings, self._gate, self._budgets.sending)
        await session.run(first.open, requests, context.write)

    async def _get_episodes(self, request: pb.GetEpisodesRequest, context: Context) -> None:
        _check_table(request.table)
        query = convert.query(request)
        async with self._broken_off(context):
            await self._send_episodes(query, request.max_frame_bytes, context.write)

    async def _send_episodes(self, query: EpisodeQuery, max_frame_bytes: int, write: Write) -> None:
        # One frame of one call at a time: reading never has more than one of the threads that sampling needs.
        async with self._reading:
            reader = await tasks.run(self._sampling, EpisodeReader, self._buffer.store, query)
        frames = EpisodeFramer(reader, max_message_bytes=self._limits.max_message_bytes, max_frame_bytes=max_frame_bytes)
        while True:
            await self._budgets.sending.reserve(frames.room_bytes)
            room = Reservation(self._budgets.sending, frames.room_bytes)
            try:
                async with self._reading:
                    frame = await tasks.run(self._sampling, frames.next)
                if frame is None:
                    return
                room.resize(len(frame))
                await write(frame)
            finally:
                room.resize(0)

    async def _ready(self, request: pb.ReadyRequest, context: Context) -> pb.ReadyResponse:
        _check_table(request.table)
        config = self._buffer.config
        if request.min_steps < 0:
            raise InvalidArgumentError(f"min_steps: {request.min_steps}, expected 0 or more")
        if request.min_steps > config.buffer_size:
            raise InvalidArgumentError(f"min_steps: {request.min_steps}, expected at most the buffer's capacity of {config.buffer_size}")
        wanted = request.min_steps or config.min_history
        horizon = self._buffer.spec(horizon=request.horizon if request.HasField("horizon") else None).horizon

        def reached() -> bool:
            return self._drain.begun or (self._serving and _is_ready(self._buffer.store.fill(horizon), wanted))

        await self._changes.until(reached, _checked_wait(request.wait_s))
        if not self._serving:
            self._refuse_restoring()
        fill = self._buffer.store.fill(horizon)
        return pb.ReadyResponse(
            can_sample=fill.eligible > 0,
            min_steps_reached=fill.has(wanted),
            min_history=config.min_history,
            counts=convert.counts(self._buffer.counts()),
            horizon=horizon,
            episodes_eligible=fill.eligible,
            longest_episode=fill.longest,
        )

    async def _info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        _check_table(request.table)
        return convert.info(self._buffer)

    async def _clear(self, request: pb.ClearRequest, context: Context) -> pb.ClearResponse:
        _check_table(request.table)
        return pb.ClearResponse(counts=convert.counts(await tasks.run(self._adding, self._buffer.clear)))

    def _spec(self, request: pb.SampleRequest) -> SampleSpec:
        _check_table(request.table)
        return self._buffer.spec(
            batch_size=request.batch_size if request.HasField("batch_size") else None,
            horizon=request.horizon if request.HasField("horizon") else None,
            law=convert.law(request.law),
        )

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Counts a call while it is in progress."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            if self._drain.begun:
                self._changes.notify()

    @asynccontextmanager
    async def _broken_off(self, context: Context) -> AsyncIterator[None]:
        """Counts a stream of answers while it lasts, and breaks it off once the server stops."""
        with self._stream():
            # Before the first answer, and not with it: gRPC could not tell the status of a call that is broken off in that very moment.
            await context.send_initial_metadata(())
            async with self._drain.breaking():
                yield

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """Counts a long call while it lasts."""
        if self._streams == self._limits.max_streams:
            raise OverLimitError(f"{self._streams} streams are open, expected at most limits.max_streams; close some or try again later")
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1


def _parsing(method: Callable[[Any, Context], Awaitable[T]], request: type[Message]) -> Callable[[bytes, Context], Awaitable[T]]:
    """Returns a method that takes its request as bytes."""

    async def parsing(data: bytes, context: Context) -> T:
        return await method(convert.parse(request, data), context)

    return parsing


def _is_ready(fill: Fill, steps: int) -> bool:
    return fill.eligible > 0 and fill.has(steps)


async def _is_left(context: Context) -> bool:
    """Returns whether the peer is gone. gRPC tells it a moment later than it fails to write what the peer is sent."""
    ended = asyncio.Event()
    context.add_done_callback(lambda _: ended.set())  # type: ignore[arg-type]
    with suppress(TimeoutError):
        await asyncio.wait_for(ended.wait(), LEAVING_S)
    return context.done()


def _check_protocol(context: Context) -> None:
    for name, value in context.invocation_metadata() or ():
        version = value if isinstance(value, str) else value.decode(errors="replace")
        if name == PROTOCOL_METADATA_KEY and version.partition(".")[0] != PROTOCOL_VERSION.partition(".")[0]:
            raise IncompatibleVersionError(
                f"the client speaks protocol {version}, this server {PROTOCOL_VERSION}; install a client of major version "
                f"{PROTOCOL_VERSION.partition('.')[0]}"
            )


def _check_table(table: str) -> None:
    if table:
        raise UnknownTableError(f"table: {table!r} does not exist, expected the empty name of the default table")


def _checked_wait(wait_s: float) -> float:
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise InvalidArgumentError(f"wait_s: {wait_s}, expected 0 to {MAX_WAIT_S:.0f} seconds")
    return wait_s
