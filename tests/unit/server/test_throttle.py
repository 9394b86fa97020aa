"""The throttle that keeps sampling's share of the time, with the test's own clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from touchline_server.service import throttle
from touchline_server.service.throttle import MESSAGE_COST_S, STALLED_S, AddThrottle


class Clock:
    """A clock that replaces the loop's time; sleeping advances it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def time(self) -> float:
        return self.now

    async def sleep(self, delay: float) -> None:
        self.slept.append(delay)
        self.now += delay


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throttle.asyncio, "get_running_loop", lambda: clock)
    monkeypatch.setattr(throttle.asyncio, "sleep", clock.sleep)
    return clock


def run(test: Callable[[], Awaitable[None]]) -> None:
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(test())
    finally:
        loop.close()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_throttle_with_waiting_samplers_leaves_sampling_its_share(clock: Clock, share: float) -> None:
    async def test() -> None:
        add_throttle = AddThrottle(share)
        begin, busy = clock.now, 0.0
        with add_throttle.sampler_waiting():
            for _ in range(50):
                await add_throttle.admit()
                clock.now += 0.01 + MESSAGE_COST_S
                busy += 0.01 + MESSAGE_COST_S
                add_throttle.record_cost(0.01)
            await add_throttle.admit()
        assert 1 - busy / (clock.now - begin) == pytest.approx(share, abs=0.02)

    run(test)


def test_throttle_without_waiting_samplers_does_not_delay_adds(clock: Clock) -> None:
    async def test() -> None:
        add_throttle = AddThrottle(0.9)
        with add_throttle.sampler_waiting():
            add_throttle.record_cost(10.0)
        await add_throttle.admit()

    run(test)
    assert clock.slept == []


def test_throttle_ignores_adds_made_while_no_sampler_waited(clock: Clock) -> None:
    async def test() -> None:
        add_throttle = AddThrottle(0.9)
        # Two threads load a data set: more than a second of their time passes in a second.
        for _ in range(1000):
            await add_throttle.admit()
            clock.now += 0.05
            add_throttle.record_cost(0.1)
        with add_throttle.sampler_waiting():
            await add_throttle.admit()

    run(test)
    assert clock.slept == [pytest.approx((0.1 + MESSAGE_COST_S) * 9)]


def test_throttle_with_share_zero_never_delays(clock: Clock) -> None:
    async def test() -> None:
        add_throttle = AddThrottle(0.0)
        with add_throttle.sampler_waiting():
            add_throttle.record_cost(10.0)
            await add_throttle.admit()

    run(test)
    assert clock.slept == []


def test_throttle_does_not_delay_adds_for_a_learner_that_does_not_read(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle.time, "monotonic", lambda: clock.now)

    async def test() -> None:
        add_throttle = AddThrottle(0.9)
        with add_throttle.sampler_waiting():
            add_throttle.record_cost(10.0)
            clock.now += STALLED_S + 0.1
            await add_throttle.admit()
            assert clock.slept == []
            with add_throttle.sampler_waiting():  # another one that does
                await add_throttle.admit()

    run(test)
    assert len(clock.slept) == 1


def test_throttle_admits_every_add_in_order_however_many_wait(clock: Clock) -> None:
    passed = []

    async def add(add_throttle: AddThrottle, number: int) -> None:
        await add_throttle.admit()
        clock.now += 0.01
        add_throttle.record_cost(0.01)
        passed.append(number)

    async def test() -> None:
        add_throttle = AddThrottle(0.95)
        with add_throttle.sampler_waiting():
            await asyncio.gather(*(add(add_throttle, number) for number in range(200)))

    run(test)
    assert passed == list(range(200))
    assert sum(clock.slept) <= 200 * (0.01 + MESSAGE_COST_S) * 19 + 1


def test_throttle_counts_samplers_as_waiting_until_the_last_is_served(clock: Clock) -> None:
    async def test() -> None:
        add_throttle = AddThrottle(0.5)
        with add_throttle.sampler_waiting():
            with add_throttle.sampler_waiting():
                pass
            add_throttle.record_cost(1.0)
            await add_throttle.admit()

    run(test)
    assert clock.slept == [pytest.approx(1.0 + MESSAGE_COST_S)]
