"""A sampling session: the learner grants credits, and the server sends frames or fills a ring on the same host."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from touchline_protos.shm.ring import RingError, RingWriter
from touchline_protos.types.status import Transport, WaitCause
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server.errors import InvalidArgumentError, NotReadyError
from touchline_server.metrics.learners import Ahead, Learner
from touchline_server.service.batch_framer import BatchFramer, NextFrames
from touchline_server.service.budgets import Reservation
from touchline_server.service.parts import ServiceParts
from touchline_server.service.ring_pool import ring_offer
from touchline_server.service.ring_producer import RingProducer
from touchline_server.service.row_slots import RowContent
from touchline_server.service.slot_fillers import BodyContent, SlotContent
from touchline_server.service.tasks import Job, consume_exception
from touchline_server.tables.sampler import Split

MAX_CREDITS = 1 << 20
"""Most credits that a learner may hold."""

MAX_REASON_CHARS = 200
"""Length up to which a learner's reason for refusing a ring is logged."""

Write = Callable[[bytes], Awaitable[None]]


class _Requests(enum.Enum):
    """The learner's side of the stream."""

    OPEN = enum.auto()
    """Open: more credits may come."""
    CLOSED = enum.auto()
    """Closed by the learner; the credits that it granted are still used up."""
    INVALID = enum.auto()
    """Ended by a request that does not fit the session, which ends with that error."""


@dataclass(slots=True)
class _FrameTask:
    """Frames that are being made, inline or by a job on a thread."""

    frames: asyncio.Future[list[bytes]]
    """Frames in the order of sending; done already if they were made inline."""
    job: Job[list[bytes]] | None
    """The job that makes them; None if they were made inline."""
    reservation: Reservation
    """Bytes reserved for the frames."""
    undelivered: int
    """Batches reserved with the rate limit and not delivered yet."""
    split: Split
    """The split of each of them."""
    batch_bytes: int
    """Bytes of the body of each of them."""

    async def cancel_and_join(self) -> None:
        """Releases the bytes, once no thread makes the frames any more."""
        consume_exception(self.frames)
        if self.job is not None:
            await self.job.cancel_and_join()
        self.reservation.resize(0)


class SampleSession:
    """One learner's stream, from its first credits to its end. Lives in the event loop.

    Args:
        framer: the learner's batches.
        parts: the service's parts.
        learner: counts of the learner.
    """

    def __init__(self, framer: BatchFramer, parts: ServiceParts, learner: Learner) -> None:
        self._framer = framer
        self._parts = parts
        self._learner = learner
        self._clock = learner.clock
        self._sending = parts.budgets.sending
        self._credits = 0
        self._first_credits = 0
        """Batches that the learner wants ahead: while it has granted as many, it has none left."""
        self._reservations: list[Reservation] = []
        """Bytes of the frames that are being made or sent, and of some that were."""
        self._requests = _Requests.OPEN
        self._error: InvalidArgumentError | None = None
        self._attachment: pb.RingAttachment | None = None

    async def run(self, opening: pb.SampleStreamOpen, requests: AsyncIterator[pb.SampleStreamRequest], write: Write) -> None:
        """Sends batches until the learner has closed its side and its credits are used up.

        Raises:
            InvalidArgumentError: a request of the learner does not fit the session.
            SchemaChangedError: the ring was made for batches of another schema.
        """
        self._first_credits = opening.credits
        self._grant(opening.credits)
        self._learner.ahead = lambda: Ahead(self._credits, sum(one.size for one in self._reservations))
        with self._parts.changes.waiter(self._framer.sampler.changes) as wake:
            reader = asyncio.create_task(self._read_requests(requests, wake))
            try:
                if not (opening.shared_memory_id and await self._serve_by_ring(opening, write, wake)):
                    await self._serve_by_messages(write, wake)
            finally:
                reader.cancel()

    # Batches in messages

    async def _serve_by_messages(self, write: Write, wake: asyncio.Event) -> None:
        """Sends frames as credits allow; the next ones are made while these are written."""
        self._learner.transport = Transport.STREAM
        making: _FrameTask | None = None
        try:
            while True:
                if making is None:
                    ahead = await self._reserve_frames(wake)
                    if ahead is None:
                        return
                    making = self._start_frames(ahead)
                task, making = making, None
                try:
                    with self._parts.throttle.sampler_waiting():
                        try:
                            frames = await task.frames
                        except NotReadyError:
                            continue  # the table was cleared after the check
                        self._credits -= task.undelivered
                        self._raise_error()
                        making = self._try_start_frames()
                        await self._write(frames, write, task.reservation)
                        self._framer.sampler.delivered(task.undelivered, task.split)
                        self._learner.delivered(task.undelivered, task.split, task.batch_bytes)
                        self._learner.waited_for(task.undelivered)
                        task.undelivered = 0
                finally:
                    await self._cancel(task)
        finally:
            self._framer.sampler.leave()
            if making is not None:
                await self._cancel(making)

    async def _reserve_frames(self, wake: asyncio.Event) -> NextFrames | None:
        """Waits until frames can be sent, and reserves their batches and bytes; returns None once the learner wants no more."""
        while await self._can_send(wake):
            ahead = self._framer.try_reserve(self._credits, waits=True)
            if ahead is None:
                self._clock.blame(WaitCause.RATE)
                await wake.wait()  # for the rate limit; cleared before it was asked
                continue
            self._clock.blame(WaitCause.SAMPLING)
            try:
                # Lock order: this session holds no bytes here, so sessions cannot wait for each other in a circle. Bytes for frames that
                # are made ahead are only ever tried for, in _try_start_frames. Bytes come after the rate limit: what waits for that,
                # maybe for minutes, must not hold any.
                await self._sending.reserve(ahead.size_bytes)
            except BaseException:
                self._framer.sampler.cancel(*ahead.reserved)
                raise
            return ahead
        return None

    async def _cancel(self, task: _FrameTask) -> None:
        """Ends a task, and returns what it has not delivered to the rate limit."""
        if task.undelivered:
            self._framer.sampler.cancel(task.undelivered, task.split)
        await task.cancel_and_join()

    async def _can_send(self, wake: asyncio.Event) -> bool:
        """Waits for a credit and for something to sample; returns False once the learner wants no more."""
        while True:
            wake.clear()
            self._raise_error()
            self._framer.sampler.check_not_dropped()
            if self._credits and self._framer.sampler.can_sample():
                return True
            if self._requests is not _Requests.OPEN and not self._credits:
                return False
            self._framer.sampler.leave()  # others go on meanwhile
            if self._credits:
                self._clock.blame(WaitCause.DATA)
            await wake.wait()

    def _try_start_frames(self) -> _FrameTask | None:
        """Starts the next frames if there are credits, something to sample, permission of the rate limit and bytes at this moment."""
        if not (self._credits and self._framer.sampler.can_sample()):
            return None
        ahead = self._framer.try_reserve(self._credits, waits=False)
        if ahead is None:
            return None
        if not self._sending.try_reserve(ahead.size_bytes):
            self._framer.sampler.cancel(*ahead.reserved)
            return None
        return self._start_frames(ahead)

    def _start_frames(self, ahead: NextFrames) -> _FrameTask:
        """Starts frames whose batches and bytes are reserved. Small ones are made inline: a thread would cost as much again."""
        frames: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        job: Job[list[bytes]] | None = None
        try:
            made = self._framer.try_frames(ahead)
            if made is None:
                job = Job(self._parts.sample_pool, self._framer.frames, ahead)
                frames = job.result
            else:
                frames.set_result(made)
        except Exception as error:
            frames.set_exception(error)
        reservation = Reservation(self._sending, ahead.size_bytes)
        self._reservations = [one for one in self._reservations if one.size] + [reservation]
        return _FrameTask(frames, job, reservation, *ahead.reserved, ahead.layout.body_bytes)

    async def _write(self, frames: list[bytes], write: Write, reservation: Reservation) -> None:
        """Writes frames and releases the bytes of each one."""
        left = sum(len(frame) for frame in frames)
        reservation.resize(left)
        frames.reverse()
        while frames:
            left -= len(frames[-1])
            await write(frames.pop())
            reservation.resize(left)

    # Batches in a ring

    async def _serve_by_ring(self, opening: pb.SampleStreamOpen, write: Write, wake: asyncio.Event) -> bool:
        """Serves the whole session by a ring; returns False if there can be none, and messages have to do."""
        if not await self._can_send(wake) or (layout := self._framer.sampler.layout()) is None:
            return False
        rows_refused = ""
        if opening.HasField("rows"):
            try:
                rows_refused = await self._serve_slots(self._row_content(opening.rows), opening, write, wake)
            except RingError as error:
                rows_refused = str(error)
                self._parts.rings.log_once(rows_refused, rows=True)
            if not rows_refused:
                return True
        try:
            return not await self._serve_slots(BodyContent(layout), opening, write, wake, rows_refused=rows_refused)
        except RingError as error:
            self._learner.ring_refused = str(error)
            refused = pb.RingSetup(refused=str(error), rows_refused=rows_refused)
            await write(pb.SampleStreamResponse(ring=refused).SerializeToString())
            return False

    def _row_content(self, request: pb.RowsRequest) -> RowContent:
        """Returns what slots hold for a learner that gathers by itself.

        Raises:
            RingError: it cannot; the text says why.
        """
        if not self._parts.rings.offers_rows:
            raise RingError("ring.device is false: learners do not gather by themselves")
        source = self._framer.sampler.source()
        if source is None:
            raise RingError("the table was cleared a moment ago")
        return RowContent(source, request)

    async def _serve_slots(
        self, content: SlotContent, opening: pb.SampleStreamOpen, write: Write, wake: asyncio.Event, *, rows_refused: str = ""
    ) -> str:
        """Serves the whole session by a ring; returns why not, if the learner declines it.

        Raises:
            RingError: there is no such ring; the text says why.
        """
        if self._requests is not _Requests.OPEN:
            return "the learner has left"
        sampler = self._framer.sampler
        transitions = sampler.horizon if sampler.remembers_slices else 0
        ring = self._parts.rings.open(opening.shared_memory_id, content, self._credits, transitions=transitions)
        try:
            declined = await self._offer(ring, ring_offer(ring, content, rows_refused=rows_refused), write, wake)
            if not declined:
                await self._fill(ring, content, write, wake)
            elif self._attachment is not None:
                what = "ring" if content.setup() is None else "columns"
                self._parts.rings.log_once(f"the learner could not use the {what}, and says {declined!r}", rows=what == "columns")
                declined = self._learner.ring_refused = f"the learner could not use it: {declined}"
            return declined
        finally:
            self._parts.rings.close(ring)

    async def _offer(self, ring: RingWriter, offer: bytes, write: Write, wake: asyncio.Event) -> str:
        """Offers a ring; returns why the learner does not use it, and an empty text if it has mapped the ring."""
        loop = asyncio.get_running_loop()
        loop.add_reader(ring.handover, ring.handover.serve)
        self._attachment = None
        try:
            await write(offer)
            while self._attachment is None and self._requests is _Requests.OPEN:
                wake.clear()
                self._framer.sampler.check_not_dropped()
                await wake.wait()
            self._raise_error()
        finally:
            loop.remove_reader(ring.handover)
            ring.handover.close()
        if self._attachment is None:
            return "the learner has left"
        return "" if self._attachment.attached else self._attachment.reason[:MAX_REASON_CHARS] or "nothing"

    async def _fill(self, ring: RingWriter, content: SlotContent, write: Write, wake: asyncio.Event) -> None:
        """Keeps a ring full until the learner closes its side; the stream itself only carries actors' names."""
        loop = asyncio.get_running_loop()
        messages: list[bytes] = []
        ends: list[Exception | None] = []

        def pass_on(target: list[Exception | None] | list[bytes], item: Exception | bytes | None) -> None:
            target.append(item)  # type: ignore[arg-type]
            with suppress(RuntimeError):  # the loop is closed, so no coroutine waits any more
                loop.call_soon_threadsafe(wake.set)

        producer = RingProducer(
            self._framer,
            ring,
            content.filler(ring),
            content.layout,
            self._parts.throttle,
            self._learner,
            send=lambda message: pass_on(messages, message),
            on_end=lambda error: pass_on(ends, error),
        )
        self._learner.transport = Transport.RING if content.setup() is None else Transport.DEVICE
        self._learner.ring_refused = ""
        producer.start()
        try:
            while self._requests is _Requests.OPEN:
                wake.clear()
                self._framer.sampler.check_not_dropped()
                while messages:
                    await write(messages.pop(0))
                if ends and ends[0] is not None:
                    raise ends[0]
                await wake.wait()
            self._raise_error()
        finally:
            producer.stop()
            last = self._learner.ahead()
            self._learner.ahead = lambda: last  # the ring's memory goes

    # The learner's requests

    async def _read_requests(self, requests: AsyncIterator[pb.SampleStreamRequest], wake: asyncio.Event) -> None:
        end = _Requests.CLOSED
        try:
            async for request in requests:
                kind = request.WhichOneof("request")
                if kind == "credit":
                    self._grant(request.credit.batches)
                elif kind == "ring":
                    self._attachment = request.ring
                else:
                    raise InvalidArgumentError("a sampling stream was opened twice, expected only credits after its first message")
                wake.set()
        except InvalidArgumentError as error:
            self._error, end = error, _Requests.INVALID
        finally:
            self._requests = end
            wake.set()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _grant(self, credits: int) -> None:
        if not 0 <= credits <= MAX_CREDITS - self._credits:
            raise InvalidArgumentError(
                f"credits: {credits} more on top of {self._credits}, expected 0 or more and at most {MAX_CREDITS} in total"
            )
        self._credits += credits
        if self._credits >= self._first_credits and credits:
            self._clock.want()
