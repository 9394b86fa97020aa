"""The budgets that bound the server's memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from touchline_server.errors import OverLimitError, TooLargeError
from touchline_server.service.budgets import ByteBudget, Reservation


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await test()

    return asyncio.run(main())


def budget(total: int = 100, *, wait_s: float = 30.0) -> ByteBudget:
    return ByteBudget(total, key="limits.max_receive_bytes", wait_s=wait_s)


async def settle() -> None:
    """Lets every task go on as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_budget_lends_what_it_has_and_no_more() -> None:
    async def test() -> None:
        lender = budget()
        await lender.reserve(60)
        assert not lender.try_reserve(41)
        assert lender.try_reserve(40)
        assert lender.used == 100
        lender.release(60)
        lender.release(40)
        assert lender.used == 0

    run(test)


def test_budget_serves_who_came_first_and_lets_nobody_overtake() -> None:
    async def test() -> None:
        lender, served = budget(), []

        async def take(name: str, size: int) -> None:
            await lender.reserve(size)
            served.append(name)

        await lender.reserve(90)
        tasks = [asyncio.ensure_future(take(name, size)) for name, size in (("big", 50), ("small", 5), ("medium", 20))]
        await settle()
        assert served == []
        assert not lender.try_reserve(1)

        lender.release(40)
        await settle()
        assert served == ["big"]
        lender.release(50)
        await asyncio.gather(*tasks)
        assert served == ["big", "small", "medium"]
        assert lender.used == 75

    run(test)


def test_budget_without_room_in_time_says_so_with_a_delay_and_takes_nothing() -> None:
    async def test() -> OverLimitError:
        lender = budget(wait_s=0.01)
        await lender.reserve(90)
        with pytest.raises(
            OverLimitError, match=r"90 of the 100 bytes that limits.max_receive_bytes allows are in use, and 11 did"
        ) as caught:
            await lender.reserve(11)
        lender.release(90)
        assert lender.used == 0
        assert lender.try_reserve(100)
        return caught.value

    assert run(test).retry_after_s == 1.0


def test_budget_is_never_enough_for_more_than_it_has() -> None:
    async def test() -> None:
        with pytest.raises(TooLargeError, match=r"101 bytes, expected at most 100; see limits\.max_receive_bytes"):
            await budget().reserve(101)

    run(test)


def test_waiter_that_leaves_is_forgotten_and_those_behind_it_go_on() -> None:
    async def test() -> None:
        lender = budget()
        await lender.reserve(60)
        first = asyncio.ensure_future(lender.reserve(90))
        second = asyncio.ensure_future(lender.reserve(30))
        await settle()
        first.cancel()
        await second
        assert lender.used == 90

    run(test)


def test_waiter_that_leaves_in_the_moment_it_is_served_gives_back() -> None:
    async def test() -> None:
        lender = budget()
        await lender.reserve(60)
        waiter = asyncio.ensure_future(lender.reserve(90))
        await settle()
        lender.release(60)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert lender.used == 0

    run(test)


def test_waiter_that_left_but_had_no_turn_yet_is_passed_over() -> None:
    async def test() -> None:
        lender = budget()
        await lender.reserve(60)
        first = asyncio.ensure_future(lender.reserve(90))
        second = asyncio.ensure_future(lender.reserve(30))
        await settle()
        first.cancel()
        lender.release(60)
        with pytest.raises(asyncio.CancelledError):
            await first
        await second
        assert lender.used == 30
        assert not lender.has_waiters

    run(test)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from([1, 20, 40, 60])),
        st.tuples(st.just("leave"), st.integers(0, 1 << 10)),
        st.tuples(st.just("release"), st.integers(0, 1 << 10)),
        st.tuples(st.just("turn"), st.integers(1, 3)),
    ),
    max_size=40,
)


@given(steps=STEPS, share=st.sampled_from([100, 60]))
def test_whatever_comes_and_goes_nothing_is_lent_twice_or_kept(steps: list[tuple[str, int]], share: int) -> None:
    async def test() -> None:
        total = budget()
        lender = total.sub_budget(share) if share < total.total else total
        held: list[int] = []
        waiting: list[asyncio.Task[None]] = []

        async def take(size: int) -> None:
            await lender.reserve(size)
            held.append(size)

        for step, number in steps:
            if step == "ask":
                waiting.append(asyncio.ensure_future(take(number)))
                await settle()
            elif step == "turn":
                for _ in range(number):
                    await asyncio.sleep(0)
            elif step == "leave" and waiting:
                waiting.pop(number % len(waiting)).cancel()
            elif step == "release" and held:
                lender.release(held.pop(number % len(held)))
            assert sum(held) <= lender.used <= lender.total

        while held or not all(task.done() for task in waiting):
            await settle()
            assert held, "somebody waits for room that nobody has"
            lender.release(held.pop())
        await asyncio.gather(*waiting)
        await settle()
        for size in held:
            lender.release(size)
        assert lender.used == total.used == 0
        assert not lender.has_waiters

    run(test)


def test_loan_becomes_what_was_needed() -> None:
    async def test() -> None:
        lender = budget()
        await lender.reserve(80)
        loan = Reservation(lender, 80)
        loan.resize(30)
        assert (lender.used, loan.size) == (30, 30)
        loan.resize(0)
        assert lender.used == 0

    run(test)
