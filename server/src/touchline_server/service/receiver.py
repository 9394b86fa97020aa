"""Receiving messages: room for each before its first byte, and a limit to how long others wait for one that does not come.

gRPC tells a message's size only once the whole message is there. So each that is awaited has room for the largest, and a peer that
sends nothing would keep it. Where others want that room, a message gets the time that a slow link needs; then its call is ended, and
told to come again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from touchline_protos.types.limits import SLOWEST_UPLOAD_BYTES_PER_S
from touchline_server.errors import InvalidArgumentError, OverLimitError
from touchline_server.service.budgets import ByteBudget, PerConnectionBudget, Reservation

if TYPE_CHECKING:
    from types import TracebackType

    from touchline_protos.codec import LoadDecoder
    from touchline_server.config.sections import LimitsConfig
    from touchline_server.service.budgets import Budgets

RECEIVE_TIMEOUT_S = 5.0
"""Time that a message gets to come in while others wait for its room, beside that for its bytes."""

FIRST_MESSAGE_S = 60.0
"""How long a call may take to send its first message: until then it does nothing but take a place among the calls."""

LOOK_S = 1.0
"""How often a message that is late looks whether its room is wanted."""


class MessageReader:
    """Receives messages, each in room for the largest. Lives in the event loop.

    Args:
        budget: lends the room.
        size: bytes of the largest message.
    """

    def __init__(self, budget: ByteBudget, size: int) -> None:
        self._shares = PerConnectionBudget(budget, largest=size)
        self.size = size
        """Bytes of the largest message."""
        self.leaving = 0
        """Calls that were ended because their room is wanted, and have not left yet."""

    async def receive(
        self, requests: AsyncIterator[bytes], peer: str, *, episode: PendingUpload | None = None, within_s: float = math.inf
    ) -> tuple[bytes | None, Reservation]:
        """Returns a call's next message, None at the end, and the room that it takes, which the caller gives back.

        Args:
            requests: the call's messages.
            peer: the connection's name.
            episode: of which the message may bring a chunk.
            within_s: time after which the call is ended, whether others want the room or not.

        Raises:
            InvalidArgumentError: the message did not come within ``within_s``.
            OverLimitError: there is no room, or the message did not come in time and others want its room.
        """
        budget = self._shares.of(peer)
        await budget.reserve(self.size)
        room = Reservation(budget, self.size)
        # Never cancelled: gRPC goes on writing into what it reads to until the call has ended, and that long the room is taken.
        reading = asyncio.ensure_future(anext(aiter(requests), None))
        wait = _Wait(self, reading, budget, episode=episode, within_s=within_s)
        try:
            await wait.over
            message = reading.result()
        except BaseException:
            reading.add_done_callback(lambda ended: _give_back(ended, room))
            raise
        finally:
            wait.end()
            del wait, reading  # an error that one of them holds has a traceback, which holds what is named here
        room.resize(len(message) if message is not None else 0)
        return message, room

    def left(self, _: asyncio.Future[bytes | None]) -> None:
        """Is told that a call whose room was wanted has ended."""
        self.leaving -= 1


class _Wait:
    """The wait for one message.

    Once it is over, it is part of no circle of references: in one, the message would stay in memory until the garbage collector comes by,
    when its room has long been another's.

    Args:
        reception: for which it waits.
        reading: the message.
        budget: that lent its room.
        episode: of which it may bring a chunk.
        within_s: time after which the call is ended, whether others want the room or not.
    """

    def __init__(
        self,
        reception: MessageReader,
        reading: asyncio.Future[bytes | None],
        budget: ByteBudget,
        *,
        episode: PendingUpload | None,
        within_s: float,
    ) -> None:
        self._reception = reception
        self._reading = reading
        self._budget = budget
        self._episode = episode
        self._within_s = within_s
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        self._ends_at, self._late_at = now + within_s, now + receive_timeout_s(reception.size)
        self.over: asyncio.Future[None] = self._loop.create_future()
        """Done once the message is there, or with the error with which the call ends."""
        reading.add_done_callback(self._arrive)
        first_at = min(self._ends_at, self._late_at, math.inf if episode is None else episode.late_at)
        self._timer = self._loop.call_at(first_at, self._look)

    def end(self) -> None:
        """Looks no more."""
        self._timer.cancel()

    def _arrive(self, _: asyncio.Future[bytes | None]) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def _look(self) -> None:
        now = self._loop.time()
        if self.over.done():
            return
        if now >= self._ends_at:
            self.over.set_exception(InvalidArgumentError(f"no message within {self._within_s:g} s, expected one"))
        elif not self._reception.leaving and self._is_in_the_way(now):
            # One at a time: what waits for room mostly needs it for a moment.
            self._reception.leaving += 1
            self._reading.add_done_callback(self._reception.left)
            self.over.set_exception(OverLimitError("the room for a message that did not come in time is wanted; try again later"))
        else:
            self._timer = self._loop.call_at(min(now + LOOK_S, self._ends_at), self._look)

    def _is_in_the_way(self, now: float) -> bool:
        return (now >= self._late_at and self._budget.wanted) or (self._episode is not None and self._episode.is_late(now))


class PendingUpload:
    """An episode whose chunks are coming in, and the room that it took.

    Args:
        room: that it took.
        budget: that lent it.
        now: the event loop's time.
    """

    def __init__(self, room: Reservation, budget: ByteBudget, now: float) -> None:
        self.room = room
        self._budget = budget
        self.late_at = now + receive_timeout_s(room.size)
        """When it should be there, by the event loop's time."""

    def is_late(self, now: float) -> bool:
        """Returns whether it should be there, and others want its room."""
        return now >= self.late_at and self._budget.wanted


class MessageReaders:
    """How a server's messages are received.

    Args:
        budgets: lend the room.
        limits: says how large an episode may be.
    """

    def __init__(self, budgets: Budgets, limits: LimitsConfig) -> None:
        self.messages = MessageReader(budgets.messages, budgets.request_bytes)
        """Of messages with episodes."""
        self.assembling = PerConnectionBudget(budgets.assembling, largest=limits.max_episode_bytes)
        """Of episodes that come in chunks."""
        self.questions = MessageReader(budgets.questions, budgets.request_bytes)
        """Of all other requests."""
        self.health = MessageReader(budgets.health, budgets.request_bytes)
        """Of requests to the health service."""
        self.reflection = MessageReader(budgets.reflection, budgets.request_bytes)
        """Of requests about the server's methods."""


class UploadReservation:
    """The room of one call that loads episodes: that of its next message, and that of the episode whose chunks are coming in. A context
    manager, which gives it back.

    Args:
        receptions: of the server.
        decoder: of the call.
        peer: the connection's name.
    """

    def __init__(self, receptions: MessageReaders, decoder: LoadDecoder, peer: str) -> None:
        self._reception = receptions.messages
        self._budget = receptions.assembling.of(peer)
        self._decoder = decoder
        self._peer = peer
        self._message: Reservation | None = None
        self._episode: PendingUpload | None = None
        self._within_s = FIRST_MESSAGE_S

    async def receive(self, requests: AsyncIterator[bytes]) -> bytes | None:
        """Returns the next message once there is room for it; None at the end.

        Raises:
            InvalidArgumentError: the first one did not come within FIRST_MESSAGE_S.
            OverLimitError: there is none, or others want it, or the episode's, and what was to come is late.
        """
        self._drop_message()
        if self._episode is not None and self._episode.is_late(asyncio.get_running_loop().time()):
            raise OverLimitError("the room for an episode that did not come in time is wanted; try again later")
        message, self._message = await self._reception.receive(requests, self._peer, episode=self._episode, within_s=self._within_s)
        self._within_s = math.inf
        return message

    async def settle(self) -> None:
        """Takes room for the episode that a header announced, before its first chunk, and gives that of a complete one back.

        Raises:
            OverLimitError: there is none.
        """
        self._drop_message()
        needed = self._decoder.announced_bytes
        if self._episode is not None and self._episode.room.size != needed:
            self._episode.room.resize(0)
            self._episode = None
        if needed and self._episode is None:
            await self._budget.reserve(needed)
            self._episode = PendingUpload(Reservation(self._budget, needed), self._budget, asyncio.get_running_loop().time())

    async def __aenter__(self) -> UploadReservation:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._drop_message()
        if self._episode is not None:
            self._episode.room.resize(0)

    def _drop_message(self) -> None:
        if self._message is not None:
            self._message.resize(0)
            self._message = None


def receive_timeout_s(size: int) -> float:
    """Returns the time that so many bytes may take while others wait for their room, in seconds."""
    return RECEIVE_TIMEOUT_S + size / SLOWEST_UPLOAD_BYTES_PER_S


def _give_back(ended: asyncio.Future[bytes | None], room: Reservation) -> None:
    if not ended.cancelled():
        ended.exception()  # looked at: it ended with its call
    room.resize(0)
