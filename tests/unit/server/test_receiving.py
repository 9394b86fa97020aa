"""Receiving messages in room that others may want."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from touchline_server.errors import InvalidArgumentError, OverLimitError
from touchline_server.service import receiver as receiving
from touchline_server.service.budgets import ByteBudget, PerConnectionBudget
from touchline_server.service.receiver import MessageReader, receive_timeout_s

SIZE = 100


class Requests:
    """A call's messages; one comes when the test says so. Counts who reads."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.reading = 0

    def send(self, message: bytes | None) -> None:
        self._messages.put_nowait(message)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.reading += 1
            message = await self._messages.get()
            self.reading -= 1
            if message is None:
                return
            yield message


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message is late at once, and looks whether its room is wanted in each turn of the loop."""
    monkeypatch.setattr(receiving, "RECEIVE_TIMEOUT_S", 0.0)
    monkeypatch.setattr(receiving, "SLOWEST_UPLOAD_BYTES_PER_S", 1 << 50)
    monkeypatch.setattr(receiving, "POLL_INTERVAL_S", 0.0)


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(30.0):
            return await test()

    return asyncio.run(main())


def lender(messages: int) -> ByteBudget:
    return ByteBudget(messages * SIZE, key="limits.max_receive_bytes")


async def settle() -> None:
    """Lets every task and timer go on as far as it can."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_message_takes_the_room_of_the_largest_until_its_own_size_is_known() -> None:
    async def test() -> None:
        budget, requests = lender(2), Requests()
        receiving = asyncio.ensure_future(MessageReader(budget, SIZE).receive(aiter(requests), "ipv4:1"))
        await settle()
        assert budget.used == SIZE
        requests.send(b"seven b")
        message, room = await receiving
        assert (message, room.size, budget.used) == (b"seven b", 7, 7)
        room.resize(0)
        assert budget.used == 0

    run(test)


class Message(bytearray):
    """A message of which one can tell whether it is still in memory."""


@pytest.mark.parametrize("late", [False, True])
def test_message_is_gone_once_who_received_it_lets_go_of_it(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector."""
    monkeypatch.setattr(receiving, "POLL_INTERVAL_S", 0.0)
    kept: list[weakref.ref[Message]] = []
    come = asyncio.Event()

    async def requests() -> AsyncIterator[Any]:
        await come.wait()
        message = Message(SIZE)
        kept.append(weakref.ref(message))
        yield message
        await asyncio.Event().wait()

    async def test() -> None:
        call = requests()
        reception = MessageReader(lender(1), SIZE)
        receiving = asyncio.ensure_future(reception.receive(call, "ipv4:1", timeout_s=0.0 if late else 30.0))
        if late:
            with pytest.raises(InvalidArgumentError, match="no message within 0 s"):
                await receiving
        else:
            await settle()
        come.set()
        await settle()
        if not late:
            message, room = receiving.result()
            assert message == bytes(SIZE)
            room.resize(0)
            del message
        del receiving
        await settle()
        await call.aclose()  # what holds it besides

    gc.disable()
    try:
        run(test)
        assert [message() for message in kept] == [None]
    finally:
        gc.enable()


@pytest.mark.usefixtures("impatience")
def test_late_message_is_waited_for_while_nobody_wants_its_room_and_no_longer() -> None:
    async def test() -> None:
        budget, silent, other = lender(1), Requests(), Requests()
        reception = MessageReader(budget, SIZE)
        late = asyncio.ensure_future(reception.receive(aiter(silent), "ipv4:1"))
        await settle()
        assert not late.done()

        other.send(b"here")
        wanting = asyncio.ensure_future(reception.receive(aiter(other), "ipv4:2"))
        with pytest.raises(OverLimitError, match="did not arrive in time"):
            await late

        # Until its call has ended, what it is to be written into may be written into: its room is not another's.
        await settle()
        assert silent.reading == 1
        assert not wanting.done()
        assert budget.used == SIZE
        silent.send(None)
        message, room = await wanting
        assert message == b"here"
        room.resize(0)
        assert budget.used == 0

    run(test)


@pytest.mark.usefixtures("impatience")
def test_late_messages_are_given_up_one_at_a_time() -> None:
    async def test() -> None:
        budget = lender(3)
        reception = MessageReader(budget, SIZE)
        silent = [Requests() for _ in range(3)]
        late = [asyncio.ensure_future(reception.receive(aiter(requests), f"ipv4:{at}")) for at, requests in enumerate(silent)]
        await settle()
        other = Requests()
        wanting = asyncio.ensure_future(reception.receive(aiter(other), "ipv4:4"))
        await settle()
        assert [one.done() for one in late].count(True) == 1
        for requests, one in zip(silent, late, strict=True):
            if one.done():
                assert isinstance(one.exception(), OverLimitError)
                requests.send(None)
        await settle()
        assert other.reading == 1
        assert [one.done() for one in late].count(True) == 1
        for requests in (*silent, other):
            requests.send(None)
        for one in (*(one for one in late if one.done() is False), wanting):
            assert (await one)[0] is None
        assert budget.used == 0

    run(test)


def test_room_of_a_call_that_is_cancelled_is_taken_until_nothing_is_read_for_it() -> None:
    async def test() -> None:
        budget, requests = lender(1), Requests()
        receiving = asyncio.ensure_future(MessageReader(budget, SIZE).receive(aiter(requests), "ipv4:1"))
        await settle()
        receiving.cancel()
        await settle()
        assert receiving.cancelled()
        assert budget.used == SIZE
        requests.send(b"too late")
        await settle()
        assert budget.used == 0

    run(test)


def test_connection_gets_its_share_and_what_it_wants_more_waits_for_itself_alone() -> None:
    async def test() -> None:
        budget = lender(8)
        shares = PerConnectionBudget(budget, largest=SIZE)
        one, other = shares.of("ipv4:1"), shares.of("ipv4:2")
        assert shares.of("ipv4:1") is one
        assert shares.of("unix:") is budget
        assert one.total == 2 * SIZE
        await one.reserve(2 * SIZE)
        waiting = asyncio.ensure_future(one.reserve(SIZE))
        await settle()
        assert one.has_waiters
        assert not other.has_waiters
        assert other.try_reserve(2 * SIZE)
        assert budget.used == 4 * SIZE
        one.release(SIZE)
        await waiting
        assert (one.used, budget.used) == (2 * SIZE, 4 * SIZE)
        one.release(2 * SIZE)
        other.release(2 * SIZE)
        assert budget.used == 0

    run(test)


def test_share_that_waits_for_the_whole_gives_up_both_when_it_is_cancelled() -> None:
    async def test() -> None:
        budget = lender(8)
        share = PerConnectionBudget(budget, largest=SIZE).of("ipv4:1")
        assert budget.try_reserve(8 * SIZE)
        waiting = asyncio.ensure_future(share.reserve(SIZE))
        await settle()
        assert share.has_waiters
        waiting.cancel()
        await settle()
        assert (share.used, budget.used) == (0, 8 * SIZE)
        assert not share.has_waiters

    run(test)


def test_patience_allows_for_a_slow_link() -> None:
    assert receive_timeout_s(64 << 20) == 21.0
