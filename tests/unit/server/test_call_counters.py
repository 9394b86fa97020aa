"""Counting calls in progress, and refusing those above a limit."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from touchline_server.config.sections import LimitsConfig
from touchline_server.errors import OverLimitError
from touchline_server.service.call_counters import MAX_HEALTH_CALLS, CallCounter, CallCounters

PEERS = ("ipv4:127.0.0.1:1", "ipv4:127.0.0.1:2", "unix:")
LIMIT, SHARE = 6, 2


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 1 << 10))))
def test_any_sequence_of_calls_is_counted_and_kept_within_both_limits(steps: list[tuple[bool, int]]) -> None:
    counter = CallCounter(LIMIT, setting="limits.max_calls", per_connection=SHARE)
    calls: list[tuple[str, ExitStack]] = []

    for begins, number in steps:
        peer = PEERS[number % len(PEERS)]
        if not begins:
            if calls:
                calls.pop(number % len(calls))[1].close()
            continue
        by_peer = Counter(name for name, _ in calls)
        is_allowed = len(calls) < LIMIT and (by_peer[peer] < SHARE or peer == "unix:")
        call = ExitStack()
        try:
            call.enter_context(counter.count(peer))
        except OverLimitError:
            assert not is_allowed
        else:
            assert is_allowed
            calls.append((peer, call))
        assert counter.now == len(calls)

    for _, call in calls:
        call.close()
    assert counter.now == 0
    assert not counter._by_connection  # a connection that is gone leaves nothing


def test_refused_call_names_the_limit_and_its_setting() -> None:
    counter = CallCounter(2, what="streams", setting="limits.max_streams", per_connection=1)
    with counter.count("ipv4:1"):
        with pytest.raises(
            OverLimitError, match=r"^1 streams of one connection are in progress, its share of the limit of limits\.max_streams"
        ):
            counter.count("ipv4:1").__enter__()
        with counter.count("ipv4:2"), pytest.raises(OverLimitError, match=r"^2 streams are in progress, the limit of limits\.max_streams"):
            counter.count("ipv4:3").__enter__()


def test_idle_is_reported_once_the_last_call_has_ended_however_it_ended() -> None:
    async def test() -> None:
        counter = CallCounter(3, setting="limits.max_calls")
        assert await counter.wait_idle(0.0)
        with pytest.raises(ZeroDivisionError), counter.count("ipv4:1"):
            with counter.count("ipv4:2"):
                waiting = asyncio.ensure_future(counter.wait_idle(60.0))
                assert not await counter.wait_idle(0.0)
            await asyncio.sleep(0)
            assert not waiting.done()
            raise ZeroDivisionError
        assert await waiting

    asyncio.run(test())


def test_idle_moment_is_not_missed_when_another_call_begins_right_after_it() -> None:
    async def test() -> None:
        counter = CallCounter(3, setting="limits.max_calls")
        with counter.count("ipv4:1"):
            waiting = asyncio.ensure_future(counter.wait_idle(60.0))
            await asyncio.sleep(0)
        with counter.count("ipv4:2"):
            assert await waiting

    asyncio.run(test())


def test_services_have_counters_of_their_own() -> None:
    counters = CallCounters(LimitsConfig(max_calls=1))
    with counters.replay.count("ipv4:1"), ExitStack() as health:
        for number in range(MAX_HEALTH_CALLS):
            health.enter_context(counters.health.count(f"ipv4:{number}"))
        with pytest.raises(OverLimitError, match="the limit of the health service"):
            counters.health.count("ipv4:another").__enter__()
        with counters.health_watches.count("ipv4:1"), counters.reflection.count("ipv4:1"), counters.streams.count("ipv4:1"):
            assert counters.replay.now == 1
