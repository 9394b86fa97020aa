"""Receiving messages whose reserved bytes other calls may wait for."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from touchline_server.errors import InvalidArgumentError, OverLimitError
from touchline_server.service import receiver as receiver_module
from touchline_server.service.budgets import ByteBudget, PerConnectionBudget
from touchline_server.service.receiver import MessageReader, receive_timeout_s

SIZE = 100


class Requests:
    """A call's messages, sent by the test. Counts the reads in progress."""

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
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message is overdue immediately, and checks in each turn of the loop whether others wait for its bytes."""
    monkeypatch.setattr(receiver_module, "RECEIVE_TIMEOUT_S", 0.0)
    monkeypatch.setattr(receiver_module, "SLOWEST_UPLOAD_BYTES_PER_S", 1 << 50)
    monkeypatch.setattr(receiver_module, "POLL_INTERVAL_S", 0.0)


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(30.0):
            return await test()

    return asyncio.run(main())


def budget_of(messages: int) -> ByteBudget:
    return ByteBudget(messages * SIZE, key="limits.max_receive_bytes")


async def settle() -> None:
    """Runs every task and timer until it waits."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_message_reserves_bytes_for_the_largest_until_its_size_is_known() -> None:
    async def test() -> None:
        budget, requests = budget_of(2), Requests()
        receiving = asyncio.ensure_future(MessageReader(budget, SIZE).receive(aiter(requests), "ipv4:1"))
        await settle()
        assert budget.used == SIZE
        requests.send(b"seven b")
        message, reservation = await receiving
        assert (message, reservation.size, budget.used) == (b"seven b", 7, 7)
        reservation.resize(0)
        assert budget.used == 0

    run(test)


class Message(bytearray):
    """A message that can be weakly referenced."""


@pytest.mark.parametrize("late", [False, True])
def test_message_is_freed_once_its_receiver_drops_it(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector."""
    monkeypatch.setattr(receiver_module, "POLL_INTERVAL_S", 0.0)
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
        reader = MessageReader(budget_of(1), SIZE)
        receiving = asyncio.ensure_future(reader.receive(call, "ipv4:1", timeout_s=0.0 if late else 30.0))
        if late:
            with pytest.raises(InvalidArgumentError, match="no message within 0 s"):
                await receiving
        else:
            await settle()
        come.set()
        await settle()
        if not late:
            message, reservation = receiving.result()
            assert message == bytes(SIZE)
            reservation.resize(0)
            del message
        del receiving
        await settle()
        await call.aclose()  # drops the other reference to it

    gc.disable()
    try:
        run(test)
        assert [message() for message in kept] == [None]
    finally:
        gc.enable()


@pytest.mark.usefixtures("no_patience")
def test_overdue_message_is_awaited_only_while_no_call_waits_for_its_bytes() -> None:
    async def test() -> None:
        budget, silent, other = budget_of(1), Requests(), Requests()
        reader = MessageReader(budget, SIZE)
        late = asyncio.ensure_future(reader.receive(aiter(silent), "ipv4:1"))
        await settle()
        assert not late.done()

        other.send(b"here")
        other_call = asyncio.ensure_future(reader.receive(aiter(other), "ipv4:2"))
        with pytest.raises(OverLimitError, match="did not arrive in time"):
            await late

        # Until its call has ended, gRPC may still write into its memory, so its bytes stay reserved.
        await settle()
        assert silent.reading == 1
        assert not other_call.done()
        assert budget.used == SIZE
        silent.send(None)
        message, reservation = await other_call
        assert message == b"here"
        reservation.resize(0)
        assert budget.used == 0

    run(test)


@pytest.mark.usefixtures("no_patience")
def test_overdue_messages_are_evicted_one_at_a_time() -> None:
    async def test() -> None:
        budget = budget_of(3)
        reader = MessageReader(budget, SIZE)
        silent = [Requests() for _ in range(3)]
        late = [asyncio.ensure_future(reader.receive(aiter(requests), f"ipv4:{at}")) for at, requests in enumerate(silent)]
        await settle()
        other = Requests()
        other_call = asyncio.ensure_future(reader.receive(aiter(other), "ipv4:4"))
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
        for one in (*(one for one in late if one.done() is False), other_call):
            assert (await one)[0] is None
        assert budget.used == 0

    run(test)


def test_bytes_of_a_cancelled_call_stay_reserved_until_its_read_ends() -> None:
    async def test() -> None:
        budget, requests = budget_of(1), Requests()
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


def test_connection_above_its_part_waits_and_blocks_no_other() -> None:
    async def test() -> None:
        budget = budget_of(8)
        connections = PerConnectionBudget(budget, largest=SIZE)
        one, other = connections.of("ipv4:1"), connections.of("ipv4:2")
        assert connections.of("ipv4:1") is one
        assert connections.of("unix:") is budget
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


def test_part_that_waits_for_the_whole_releases_both_when_cancelled() -> None:
    async def test() -> None:
        budget = budget_of(8)
        part = PerConnectionBudget(budget, largest=SIZE).of("ipv4:1")
        assert budget.try_reserve(8 * SIZE)
        waiting = asyncio.ensure_future(part.reserve(SIZE))
        await settle()
        assert part.has_waiters
        waiting.cancel()
        await settle()
        assert (part.used, budget.used) == (0, 8 * SIZE)
        assert not part.has_waiters

    run(test)


def test_receive_timeout_allows_for_a_slow_link() -> None:
    assert receive_timeout_s(64 << 20) == 21.0
