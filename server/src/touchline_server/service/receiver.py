"""Receiving messages: bytes are reserved before the first one is read, and a message that is overdue gives way to others.

gRPC reveals a message's size only once the whole message is there. So each message that is awaited has bytes for the largest one reserved,
and a peer that sends nothing would hold them indefinitely. If other calls wait for those bytes, a message gets the time that a slow link
needs; after that its call ends with an error that asks the peer to try again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from touchline_protos.types.limits import SLOWEST_UPLOAD_BYTES_PER_S
from touchline_server.errors import InvalidArgumentError, OverLimitError
from touchline_server.metrics.waits import WaitSum
from touchline_server.service.budgets import ByteBudget, PerConnectionBudget, Reservation

if TYPE_CHECKING:
    from types import TracebackType

    from touchline_protos.codec import LoadDecoder
    from touchline_server.config.sections import LimitsConfig
    from touchline_server.service.budgets import Budgets

RECEIVE_TIMEOUT_S = 5.0
"""Time for a message to arrive while others wait for its bytes, in addition to the time for the bytes themselves."""

FIRST_MESSAGE_S = 60.0
"""Time for a call to send its first message: until then it only occupies a place among the calls."""

POLL_INTERVAL_S = 1.0
"""Interval at which an overdue message checks whether others wait for its bytes."""


class MessageReader:
    """Receives messages, each with bytes for the largest one reserved. Lives in the event loop.

    Args:
        budget: budget of which the bytes are reserved.
        max_bytes: size of the largest message.
    """

    def __init__(self, budget: ByteBudget, max_bytes: int) -> None:
        self._connections = PerConnectionBudget(budget, largest=max_bytes)
        self.max_bytes = max_bytes
        """Size of the largest message."""
        self.waits = WaitSum()
        """Waits for the bytes."""
        self.evictions = 0
        """Calls that were ended because others wait for their bytes, and whose bytes are not free yet."""

    async def receive(
        self, requests: AsyncIterator[bytes], peer: str, *, upload: PendingUpload | None = None, timeout_s: float = math.inf
    ) -> tuple[bytes | None, Reservation]:
        """Returns a call's next message (None at the end) and the reservation of its bytes, which the caller releases.

        Args:
            requests: the call's messages.
            peer: gRPC's name of the connection.
            upload: episode of which the message may bring a chunk.
            timeout_s: time after which the call is ended even if no other call waits for its bytes.

        Raises:
            InvalidArgumentError: the message did not arrive within ``timeout_s``.
            OverLimitError: no bytes became free, or the message is overdue and others wait for its bytes.
        """
        budget = self._connections.of(peer)
        if not budget.try_reserve(self.max_bytes):
            with self.waits.counting():
                await budget.reserve(self.max_bytes)
        reservation = Reservation(budget, self.max_bytes)
        # Never cancelled: gRPC writes into the memory that it reads to until the call has ended, so the bytes stay reserved until then.
        reading = asyncio.ensure_future(anext(aiter(requests), None))
        wait = _MessageWait(self, reading, budget, upload=upload, timeout_s=timeout_s)
        try:
            await wait.over
            message = reading.result()
        except BaseException:
            reading.add_done_callback(lambda ended: _release(ended, reservation))
            raise
        finally:
            wait.end()
            # An exception in one of them has a traceback, whose frame refers to these names: a cycle that would keep the message.
            del wait, reading
        reservation.resize(len(message) if message is not None else 0)
        return message, reservation

    def finish_eviction(self, _: asyncio.Future[bytes | None]) -> None:
        """Records that the bytes of a call that was ended for others are free."""
        self.evictions -= 1


class _MessageWait:
    """The wait for one message.

    Once it is over it is part of no reference cycle. In a cycle, the message would stay in memory until the garbage collector runs,
    although its bytes are no longer reserved.

    Args:
        reader: the reader that waits.
        reading: the message.
        budget: budget of which its bytes are reserved.
        upload: episode of which the message may bring a chunk.
        timeout_s: time after which the call is ended even if no other call waits for its bytes.
    """

    def __init__(
        self,
        reader: MessageReader,
        reading: asyncio.Future[bytes | None],
        budget: ByteBudget,
        *,
        upload: PendingUpload | None,
        timeout_s: float,
    ) -> None:
        self._reader = reader
        self._reading = reading
        self._budget = budget
        self._upload = upload
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        self._ends_at, self._overdue_at = now + timeout_s, now + receive_timeout_s(reader.max_bytes)
        self.over: asyncio.Future[None] = self._loop.create_future()
        """Done once the message is there, or with the error that ends the call."""
        reading.add_done_callback(self._arrive)
        first_at = min(self._ends_at, self._overdue_at, math.inf if upload is None else upload.overdue_at)
        self._timer = self._loop.call_at(first_at, self._check)

    def end(self) -> None:
        """Stops the timer."""
        self._timer.cancel()

    def _arrive(self, _: asyncio.Future[bytes | None]) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def _check(self) -> None:
        now = self._loop.time()
        if self.over.done():
            return
        if now >= self._ends_at:
            self.over.set_exception(InvalidArgumentError(f"no message within {self._timeout_s:g} s, expected one"))
        elif not self._reader.evictions and self._must_give_way(now):
            # One at a time: most waiting calls need the bytes only for a moment, so one eviction usually serves them all.
            self._reader.evictions += 1
            self._reading.add_done_callback(self._reader.finish_eviction)
            self.over.set_exception(OverLimitError("a message did not arrive in time, and other calls wait for its bytes; try again later"))
        else:
            self._timer = self._loop.call_at(min(now + POLL_INTERVAL_S, self._ends_at), self._check)

    def _must_give_way(self, now: float) -> bool:
        message_must = now >= self._overdue_at and self._budget.has_waiters
        return message_must or (self._upload is not None and self._upload.must_give_way(now))


class PendingUpload:
    """An episode whose chunks are arriving, and the bytes reserved for it.

    Args:
        reservation: bytes reserved for it.
        budget: budget of which they are reserved.
        now: the event loop's time.
    """

    def __init__(self, reservation: Reservation, budget: ByteBudget, now: float) -> None:
        self.reservation = reservation
        self._budget = budget
        self.overdue_at = now + receive_timeout_s(reservation.size)
        """Time of the event loop at which the episode should be complete."""

    def must_give_way(self, now: float) -> bool:
        """Returns whether the episode is overdue and others wait for its bytes."""
        return now >= self.overdue_at and self._budget.has_waiters


class MessageReaders:
    """The message readers of a server.

    Args:
        budgets: budgets of which bytes are reserved.
        limits: limits of the server, among them the size of the largest episode.
    """

    def __init__(self, budgets: Budgets, limits: LimitsConfig) -> None:
        self.messages = MessageReader(budgets.messages, budgets.request_bytes)
        """Reader of messages with episodes."""
        self.uploads = PerConnectionBudget(budgets.uploads, largest=limits.max_episode_bytes)
        """Budget of each connection for episodes in chunks."""
        self.control = MessageReader(budgets.control, budgets.request_bytes)
        """Reader of all other requests to ``touchline.v1.Replay``."""
        self.health = MessageReader(budgets.health, budgets.request_bytes)
        """Reader of requests to the health service."""
        self.reflection = MessageReader(budgets.reflection, budgets.request_bytes)
        """Reader of requests to the reflection service."""


class UploadReservation:
    """What one LoadEpisodes call has reserved: bytes for its next message, and for the episode whose chunks are arriving.

    An asynchronous context manager that releases both at its end.

    Args:
        readers: the server's message readers.
        decoder: the call's decoder.
        peer: gRPC's name of the connection.
    """

    def __init__(self, readers: MessageReaders, decoder: LoadDecoder, peer: str) -> None:
        self._reader = readers.messages
        self._budget = readers.uploads.of(peer)
        self._decoder = decoder
        self._peer = peer
        self._message: Reservation | None = None
        self._upload: PendingUpload | None = None
        self._timeout_s = FIRST_MESSAGE_S

    async def receive(self, requests: AsyncIterator[bytes]) -> bytes | None:
        """Returns the next message, once there are bytes for it; None at the end.

        Raises:
            InvalidArgumentError: the first message did not arrive within :data:`FIRST_MESSAGE_S`.
            OverLimitError: no bytes became free, or a message or an episode is overdue and others wait for its bytes.
        """
        self._release_message()
        if self._upload is not None and self._upload.must_give_way(asyncio.get_running_loop().time()):
            raise OverLimitError("an episode did not arrive in time, and other calls wait for its bytes; try again later")
        message, self._message = await self._reader.receive(requests, self._peer, upload=self._upload, timeout_s=self._timeout_s)
        self._timeout_s = math.inf
        return message

    async def settle(self) -> None:
        """Reserves bytes for an episode that a header announced, before its first chunk, and releases those of a complete episode.

        Raises:
            OverLimitError: no bytes became free.
        """
        # Lock order: the message's bytes are released before the episode's are waited for; an episode's bytes are only ever held while
        # waiting for the next message's.
        self._release_message()
        needed = self._decoder.announced_bytes
        if self._upload is not None and self._upload.reservation.size != needed:
            self._upload.reservation.resize(0)
            self._upload = None
        if needed and self._upload is None:
            if not self._budget.try_reserve(needed):
                with self._reader.waits.counting():
                    await self._budget.reserve(needed)
            self._upload = PendingUpload(Reservation(self._budget, needed), self._budget, asyncio.get_running_loop().time())

    async def __aenter__(self) -> UploadReservation:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._release_message()
        if self._upload is not None:
            self._upload.reservation.resize(0)

    def _release_message(self) -> None:
        if self._message is not None:
            self._message.resize(0)
            self._message = None


def receive_timeout_s(size: int) -> float:
    """Returns the time in seconds that ``size`` bytes may take to arrive while others wait for them."""
    return RECEIVE_TIMEOUT_S + size / SLOWEST_UPLOAD_BYTES_PER_S


def _release(ended: asyncio.Future[bytes | None], reservation: Reservation) -> None:
    if not ended.cancelled():
        ended.exception()  # marks it as retrieved: it ended with its call
    reservation.resize(0)
