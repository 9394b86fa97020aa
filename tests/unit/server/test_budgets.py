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
    """Runs every task until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_budget_grants_up_to_its_size() -> None:
    async def test() -> None:
        bytes_budget = budget()
        await bytes_budget.reserve(60)
        assert not bytes_budget.try_reserve(41)
        assert bytes_budget.try_reserve(40)
        assert bytes_budget.used == 100
        bytes_budget.release(60)
        bytes_budget.release(40)
        assert bytes_budget.used == 0

    run(test)


def test_budget_grants_first_come_first_served_without_overtaking() -> None:
    async def test() -> None:
        bytes_budget, served = budget(), []

        async def take(name: str, size: int) -> None:
            await bytes_budget.reserve(size)
            served.append(name)

        await bytes_budget.reserve(90)
        tasks = [asyncio.ensure_future(take(name, size)) for name, size in (("big", 50), ("small", 5), ("medium", 20))]
        await settle()
        assert served == []
        assert not bytes_budget.try_reserve(1)

        bytes_budget.release(40)
        await settle()
        assert served == ["big"]
        bytes_budget.release(50)
        await asyncio.gather(*tasks)
        assert served == ["big", "small", "medium"]
        assert bytes_budget.used == 75

    run(test)


def test_budget_that_stays_full_fails_with_a_delay_and_reserves_nothing() -> None:
    async def test() -> OverLimitError:
        bytes_budget = budget(wait_s=0.01)
        await bytes_budget.reserve(90)
        with pytest.raises(
            OverLimitError, match=r"90 of the 100 bytes that limits.max_receive_bytes allows are in use, and 11 did"
        ) as caught:
            await bytes_budget.reserve(11)
        bytes_budget.release(90)
        assert bytes_budget.used == 0
        assert bytes_budget.try_reserve(100)
        return caught.value

    assert run(test).retry_after_s == 1.0


def test_budget_refuses_more_than_its_size() -> None:
    async def test() -> None:
        with pytest.raises(TooLargeError, match=r"101 bytes, expected at most 100; see limits\.max_receive_bytes"):
            await budget().reserve(101)

    run(test)


def test_cancelled_waiter_is_removed_and_the_next_one_is_granted() -> None:
    async def test() -> None:
        bytes_budget = budget()
        await bytes_budget.reserve(60)
        first = asyncio.ensure_future(bytes_budget.reserve(90))
        second = asyncio.ensure_future(bytes_budget.reserve(30))
        await settle()
        first.cancel()
        await second
        assert bytes_budget.used == 90

    run(test)


def test_waiter_cancelled_at_the_moment_of_its_grant_releases_it() -> None:
    async def test() -> None:
        bytes_budget = budget()
        await bytes_budget.reserve(60)
        waiter = asyncio.ensure_future(bytes_budget.reserve(90))
        await settle()
        bytes_budget.release(60)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert bytes_budget.used == 0

    run(test)


def test_cancelled_waiter_that_has_not_run_yet_is_skipped() -> None:
    async def test() -> None:
        bytes_budget = budget()
        await bytes_budget.reserve(60)
        first = asyncio.ensure_future(bytes_budget.reserve(90))
        second = asyncio.ensure_future(bytes_budget.reserve(30))
        await settle()
        first.cancel()
        bytes_budget.release(60)
        with pytest.raises(asyncio.CancelledError):
            await first
        await second
        assert bytes_budget.used == 30
        assert not bytes_budget.has_waiters

    run(test)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.sampled_from([1, 20, 40, 60])),
        st.tuples(st.just("cancel"), st.integers(0, 1 << 10)),
        st.tuples(st.just("release"), st.integers(0, 1 << 10)),
        st.tuples(st.just("turn"), st.integers(1, 3)),
    ),
    max_size=40,
)


@given(steps=STEPS, share=st.sampled_from([100, 60]))
def test_any_sequence_of_steps_reserves_no_byte_twice_and_leaks_none(steps: list[tuple[str, int]], share: int) -> None:
    async def test() -> None:
        total = budget()
        bytes_budget = total.sub_budget(share) if share < total.total else total
        held: list[int] = []
        waiting: list[asyncio.Task[None]] = []

        async def take(size: int) -> None:
            await bytes_budget.reserve(size)
            held.append(size)

        for step, number in steps:
            if step == "reserve":
                waiting.append(asyncio.ensure_future(take(number)))
                await settle()
            elif step == "turn":
                for _ in range(number):
                    await asyncio.sleep(0)
            elif step == "cancel" and waiting:
                waiting.pop(number % len(waiting)).cancel()
            elif step == "release" and held:
                bytes_budget.release(held.pop(number % len(held)))
            assert sum(held) <= bytes_budget.used <= bytes_budget.total

        while held or not all(task.done() for task in waiting):
            await settle()
            assert held, "a task waits for bytes that none holds"
            bytes_budget.release(held.pop())
        await asyncio.gather(*waiting)
        await settle()
        for size in held:
            bytes_budget.release(size)
        assert bytes_budget.used == total.used == 0
        assert not bytes_budget.has_waiters

    run(test)


def test_reservation_is_resized_to_what_was_needed() -> None:
    async def test() -> None:
        bytes_budget = budget()
        await bytes_budget.reserve(80)
        reservation = Reservation(bytes_budget, 80)
        reservation.resize(30)
        assert (bytes_budget.used, reservation.size) == (30, 30)
        reservation.resize(0)
        assert bytes_budget.used == 0

    run(test)
