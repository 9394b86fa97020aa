"""A sampling session: the learner grants credits, the server pushes frames or fills a ring on the same host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from touchline_protos.codec import BatchLayout
from touchline_protos.shm.ring import RingError, RingWriter
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.errors import InvalidArgumentError, NotReadyError
from touchline_server.service.batch_framer import BatchFramer
from touchline_server.service.budgets import ByteBudget, Reservation
from touchline_server.service.change_notifier import ChangeNotifier
from touchline_server.service.ring_producer import RingPool, RingProducer, ring_offer
from touchline_server.service.tasks import Job, consume_exception
from touchline_server.service.throttle import AddThrottle

MAX_CREDITS = 1 << 20
"""Credits that a learner may hold."""

Write = Callable[[bytes], Awaitable[None]]


class _FrameTask(NamedTuple):
    """Frames that are being made."""

    frames: asyncio.Future[tuple[int, list[bytes]]]
    """How many batches, and the frames that carry them."""
    job: Job[tuple[int, list[bytes]]] | None
    """That makes them; None where they are made."""
    room: Reservation
    """That they take."""

    async def leave(self) -> None:
        """Gives the room back, once no thread makes them any more."""
        consume_exception(self.frames)
        if self.job is not None:
            await self.job.leave()
        self.room.resize(0)


class SampleSession:
    """One learner's stream, from its first credits to its end. Lives in the event loop."""

    def __init__(
        self,
        framer: BatchFramer,
        changes: ChangeNotifier,
        pool: ThreadPoolExecutor,
        rings: RingPool,
        gate: AddThrottle,
        sending: ByteBudget,
    ) -> None:
        self._framer = framer
        self._changes = changes
        self._pool = pool
        self._rings = rings
        self._gate = gate
        self._sending = sending
        self._credits = 0
        self._closed = False
        self._attached: pb.RingAttachment | None = None
        self._fault: Exception | None = None

    async def run(self, opening: pb.SampleStreamOpen, requests: AsyncIterator[pb.SampleStreamRequest], write: Write) -> None:
        """Pushes batches until the learner closes its side and its credits are used up.

        Raises:
            InvalidArgumentError: the learner says what does not fit the session.
            SchemaChangedError: a ring's batches look otherwise now.
        """
        self._grant(opening.credits)
        with self._changes.waiter() as wake:
            reader = asyncio.create_task(self._read(requests, wake))
            try:
                if opening.shared_memory_id and await self._may_push(wake) and (layout := self._framer.layout()) is not None:
                    try:
                        ring = self._rings.open(opening.shared_memory_id, layout, self._credits)
                    except RingError as error:
                        await write(pb.SampleStreamResponse(ring=pb.RingSetup(refused=str(error))).SerializeToString())
                    else:
                        try:
                            if await self._offer(ring, layout, write, wake):
                                await self._feed(ring, layout, write, wake)
                                return
                        finally:
                            self._rings.close(ring)
                await self._push(write, wake)
            finally:
                reader.cancel()

    async def _push(self, write: Write, wake: asyncio.Event) -> None:
        """Sends frames as credits allow; the next ones are made while these are written."""
        making: _FrameTask | None = None
        try:
            while making is not None or await self._may_push(wake):
                if making is None:
                    # Here it holds no room, so that sessions never wait for each other in a circle.
                    size = self._framer.reserve_bytes(self._credits)
                    await self._sending.reserve(size)
                    making = self._make(size)
                made, making = making, None
                try:
                    with self._gate.sampler_waiting():
                        try:
                            count, frames = await made.frames
                        except NotReadyError:
                            continue  # cleared since it was looked at
                        self._credits -= count
                        self._check()
                        if self._credits and self._framer.can_sample():
                            size = self._framer.reserve_bytes(self._credits)
                            making = self._make(size) if self._sending.try_reserve(size) else None
                        await self._write(frames, write, made.room)
                finally:
                    await made.leave()
        finally:
            if making is not None:
                await making.leave()

    async def _write(self, frames: list[bytes], write: Write, room: Reservation) -> None:
        """Writes frames and gives their room back one by one."""
        left = sum(len(frame) for frame in frames)
        room.resize(left)
        frames.reverse()
        while frames:
            left -= len(frames[-1])
            await write(frames.pop())
            room.resize(left)

    def _make(self, size: int) -> _FrameTask:
        """Has the next frames made, in room that was reserved. To hand small ones to a thread and back costs as much as they do."""
        frames: asyncio.Future[tuple[int, list[bytes]]] = asyncio.get_running_loop().create_future()
        job: Job[tuple[int, list[bytes]]] | None = None
        try:
            made = self._framer.try_frames(self._credits)
            if made is None:
                job = Job(self._pool, self._framer.frames, self._credits)
                frames = job.result
            else:
                frames.set_result(made)
        except Exception as error:
            frames.set_exception(error)
        return _FrameTask(frames, job, Reservation(self._sending, size))

    async def _may_push(self, wake: asyncio.Event) -> bool:
        """Waits for a credit and for something to sample; returns False once the learner wants no more."""
        while True:
            wake.clear()
            self._check()
            if self._credits and self._framer.can_sample():
                return True
            if self._closed and not self._credits:
                return False
            await wake.wait()

    async def _offer(self, ring: RingWriter, layout: BatchLayout, write: Write, wake: asyncio.Event) -> bool:
        """Offers a ring; returns whether the learner has mapped it."""
        loop = asyncio.get_running_loop()
        loop.add_reader(ring.handover, ring.handover.serve)
        try:
            await write(ring_offer(ring, layout))
            while self._attached is None and not self._closed:
                wake.clear()
                self._check()
                await wake.wait()
        finally:
            loop.remove_reader(ring.handover)
            ring.handover.close()
        if self._attached is not None and not self._attached.attached:
            self._rings.log_once(f"the learner could not use the ring, and says {self._attached.reason[:200]!r}")
        return self._attached is not None and self._attached.attached

    async def _feed(self, ring: RingWriter, layout: BatchLayout, write: Write, wake: asyncio.Event) -> None:
        """Keeps a ring full until the learner leaves; the stream itself only tells actors' names."""
        loop = asyncio.get_running_loop()
        messages: list[bytes] = []
        ends: list[Exception | None] = []

        def hand_over(target: list[Exception | None] | list[bytes], item: Exception | bytes | None) -> None:
            target.append(item)  # type: ignore[arg-type]
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(wake.set)

        feeder = RingProducer(
            self._framer,
            ring,
            layout,
            self._gate,
            send=lambda message: hand_over(messages, message),
            on_end=lambda fault: hand_over(ends, fault),
        )
        feeder.start()
        try:
            while not self._closed:
                wake.clear()
                self._check()
                while messages:
                    await write(messages.pop(0))
                if ends and ends[0] is not None:
                    raise ends[0]
                await wake.wait()
        finally:
            feeder.stop()

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault

    async def _read(self, requests: AsyncIterator[pb.SampleStreamRequest], wake: asyncio.Event) -> None:
        try:
            async for request in requests:
                kind = request.WhichOneof("request")
                if kind == "credit":
                    self._grant(request.credit.batches)
                elif kind == "ring":
                    self._attached = request.ring
                else:
                    raise InvalidArgumentError("a sampling stream was opened twice, expected only credits after its first message")
                wake.set()
        except InvalidArgumentError as error:
            self._fault = error
        finally:
            self._closed = True
            wake.set()

    def _grant(self, credits: int) -> None:
        if not 0 <= credits <= MAX_CREDITS - self._credits:
            raise InvalidArgumentError(
                f"credits: {credits} more on top of {self._credits}, expected 0 or more and at most {MAX_CREDITS} in all"
            )
        self._credits += credits
