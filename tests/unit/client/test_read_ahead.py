"""Reading ahead on a thread: at the same time, bounded, in order, and over when it is left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from touchline.datasets.read_ahead import ReadAhead

WAIT_S = 60.0
"""Longest wait for what must come; nothing waits for it to pass."""


class Numbers:
    """0, 1, 2, ..., with a count of how many were taken, and whether that was ended."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.taken = 0
        self.ended = threading.Event()
        self._more = threading.Condition()
        self._count = count
        self._error = error

    def __iter__(self) -> Iterator[int]:
        try:
            for number in range(self._count):
                with self._more:
                    self.taken += 1
                    self._more.notify_all()
                yield number
            if self._error is not None:
                raise self._error
        finally:
            self.ended.set()

    def wait_for(self, taken: int) -> None:
        with self._more:
            assert self._more.wait_for(lambda: self.taken >= taken, WAIT_S)


def ahead_of(numbers: Numbers, max_bytes: int) -> ReadAhead[int]:
    """Each number is ten bytes."""
    return ReadAhead(numbers, size_of=lambda _: 10, max_bytes=max_bytes)


def test_items_come_in_their_order() -> None:
    with ahead_of(Numbers(100), 25) as ahead:
        assert list(ahead) == list(range(100))


def test_next_items_are_read_while_one_is_used() -> None:
    numbers = Numbers(10)
    with ahead_of(numbers, 25) as ahead:
        assert next(iter(ahead)) == 0

        numbers.wait_for(4)  # none of which was asked for, but the first


def test_no_more_is_read_than_may_wait() -> None:
    numbers = Numbers(100)
    with ahead_of(numbers, 25) as ahead:
        for number in ahead:
            numbers.wait_for(min(number + 4, 100))
            assert numbers.taken <= number + 1 + 3


def test_item_larger_than_what_may_wait_is_read() -> None:
    with ahead_of(Numbers(3), 1) as ahead:
        assert list(ahead) == [0, 1, 2]


def test_error_comes_behind_the_items_before_it() -> None:
    found = []
    with ahead_of(Numbers(3, OSError("gone")), 1000) as ahead, pytest.raises(OSError, match="gone"):
        for number in ahead:
            found.append(number)

    assert found == [0, 1, 2]


@pytest.mark.parametrize("max_bytes", [1, 25, 10**9])
def test_leaving_early_ends_the_reading(max_bytes: int) -> None:
    numbers = Numbers(10**9)

    with ahead_of(numbers, max_bytes) as ahead, pytest.raises(KeyboardInterrupt):
        for number in ahead:
            if number == 5:
                raise KeyboardInterrupt

    assert numbers.ended.wait(WAIT_S)
    assert not any(thread.name == "touchline-read-ahead" for thread in threading.enumerate())
