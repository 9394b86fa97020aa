"""The gate that keeps sampling's share of the time, with a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from touchline_server.service import throttle
from touchline_server.service.throttle import MESSAGE_COST_S, STALLED_S, AddThrottle


class Clock:
    """Stands in for the loop's time; sleeping moves it."""

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
def test_gate_with_hungry_learners_leaves_sampling_its_share(clock: Clock, share: float) -> None:
    async def test() -> None:
        gate = AddThrottle(share)
        begin, busy = clock.now, 0.0
        with gate.sampler_waiting():
            for _ in range(50):
                await gate.admit()
                clock.now += 0.01 + MESSAGE_COST_S
                busy += 0.01 + MESSAGE_COST_S
                gate.record_cost(0.01)
            await gate.admit()
        assert 1 - busy / (clock.now - begin) == pytest.approx(share, abs=0.02)

    run(test)


def test_gate_without_hungry_learners_lets_adds_pass_at_once(clock: Clock) -> None:
    async def test() -> None:
        gate = AddThrottle(0.9)
        with gate.sampler_waiting():
            gate.record_cost(10.0)
        await gate.admit()

    run(test)
    assert clock.slept == []


def test_gate_does_not_have_adds_wait_for_what_passed_while_nobody_was_hungry(clock: Clock) -> None:
    async def test() -> None:
        gate = AddThrottle(0.9)
        # Two threads load a data set: more than a second of their time passes in a second.
        for _ in range(1000):
            await gate.admit()
            clock.now += 0.05
            gate.record_cost(0.1)
        with gate.sampler_waiting():
            await gate.admit()

    run(test)
    assert clock.slept == [pytest.approx((0.1 + MESSAGE_COST_S) * 9)]


def test_gate_with_share_zero_never_waits(clock: Clock) -> None:
    async def test() -> None:
        gate = AddThrottle(0.0)
        with gate.sampler_waiting():
            gate.record_cost(10.0)
            await gate.admit()

    run(test)
    assert clock.slept == []


def test_gate_does_not_hold_adds_back_for_a_learner_that_does_not_read(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle.time, "monotonic", lambda: clock.now)

    async def test() -> None:
        gate = AddThrottle(0.9)
        with gate.sampler_waiting():
            gate.record_cost(10.0)
            clock.now += STALLED_S + 0.1
            await gate.admit()
            assert clock.slept == []
            with gate.sampler_waiting():  # another one that does
                await gate.admit()

    run(test)
    assert len(clock.slept) == 1


def test_gate_lets_every_add_pass_however_many_wait_and_however_hungry_learners_are(clock: Clock) -> None:
    passed = []

    async def add(gate: AddThrottle, number: int) -> None:
        await gate.admit()
        clock.now += 0.01
        gate.record_cost(0.01)
        passed.append(number)

    async def test() -> None:
        gate = AddThrottle(0.95)
        with gate.sampler_waiting():
            await asyncio.gather(*(add(gate, number) for number in range(200)))

    run(test)
    assert passed == list(range(200))
    assert sum(clock.slept) <= 200 * (0.01 + MESSAGE_COST_S) * 19 + 1


def test_gate_stays_hungry_until_the_last_learner_is_served(clock: Clock) -> None:
    async def test() -> None:
        gate = AddThrottle(0.5)
        with gate.sampler_waiting():
            with gate.sampler_waiting():
                pass
            gate.record_cost(1.0)
            await gate.admit()

    run(test)
    assert clock.slept == [pytest.approx(1.0 + MESSAGE_COST_S)]
