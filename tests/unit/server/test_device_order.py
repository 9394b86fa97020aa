"""Writes and gathers on the streams of a device, run in any order that the events between them allow."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from touchline_server.store.device_order import DeviceOrder

ROWS = 4


class Event:
    done = False


class Streams:
    """A device whose streams do a queued step at a time, a random one next."""

    def __init__(self, seed: int) -> None:
        self.current = "learner"
        self.choose: Callable[[list[Any]], Any] = random.Random(seed).choice
        self._queues: dict[str, list[tuple[Event | None, Callable[[], None] | None, Event | None]]] = {}
        """Steps by stream: an event to wait for, what to do, an event to set."""

    def queue(self, stream: str, step: Callable[[], None]) -> None:
        self._queues.setdefault(stream, []).append((None, step, None))

    def step(self) -> bool:
        ready = [queue for queue in self._queues.values() if queue and (queue[0][0] is None or queue[0][0].done)]
        if not ready:
            assert not any(self._queues.values()), "streams wait for each other"
            return False
        _, work, event = self.choose(ready).pop(0)
        if work is not None:
            work()
        if event is not None:
            event.done = True
        return True

    def current_stream(self) -> str:
        return self.current

    def record(self, stream: str) -> Event:
        event = Event()
        self._queues.setdefault(stream, []).append((None, None, event))
        return event

    def wait(self, stream: str, event: Event) -> None:
        self._queues.setdefault(stream, []).append((event, None, None))

    def is_done(self, event: Event) -> bool:
        return event.done

    def synchronize(self, event: Event | None = None) -> None:
        while not (event is not None and event.done) and self.step():
            pass


class Store:
    """Rows that all hold one value, if nothing is torn; written and gathered a row at a time."""

    def __init__(self, device: Streams) -> None:
        self.device = device
        self.order = DeviceOrder(device, "writes")
        self.rows = [0] * ROWS
        self.published = 0
        self.gathered: list[tuple[int, list[int]]] = []
        """The value that was published when a gather was queued, and the rows that it read."""
        self.wrong: list[tuple[Any, Any]] = []

    def add(self) -> None:
        value = self.published + 1
        with self.order.writing():
            for row in range(ROWS):
                self.device.queue("writes", lambda row=row: self.rows.__setitem__(row, value))
        self.published = value

    def add_from_device(self) -> None:
        """The value lies in memory of the current stream, which fills it before and clears it afterwards."""
        value, source = self.published + 1, [0]
        self.device.queue(self.device.current, lambda: source.__setitem__(0, value))
        with self.order.writing(with_current=True):
            for row in range(ROWS):
                self.device.queue("writes", lambda row=row: self.rows.__setitem__(row, source[0]))
        self.device.queue(self.device.current, lambda: source.__setitem__(0, -1))
        self.published = value

    def sample(self) -> None:
        self.order.follow_writes()
        self._gather()
        self.order.note_reads()

    def sample_by_other_code(self) -> None:
        self.order.note_foreign_reads()
        self.order.follow_writes()
        self._gather()

    def read_by_another_process(self) -> None:
        self.order.wait_written()
        if self.rows != [self.published] * ROWS:
            self.wrong.append((self.published, list(self.rows)))

    def _gather(self) -> None:
        read: list[int] = []
        self.gathered.append((self.published, read))
        for row in range(ROWS):
            self.device.queue(self.device.current, lambda row=row: read.append(self.rows[row]))


ACTIONS = ["add", "add_from_device", "sample", "sample_by_other_code", "read_by_another_process"]


@settings(max_examples=300, deadline=None)
@given(
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.sampled_from(["learner", "other"]), st.integers(0, 6)), max_size=12),
    seed=st.integers(0, 1 << 16),
)
def test_every_gather_sees_exactly_what_was_published_when_it_was_queued(actions: list[tuple[str, str, int]], seed: int) -> None:
    device = Streams(seed)
    store = Store(device)

    for name, stream, steps in actions:
        device.current = stream
        getattr(store, name)()
        for _ in range(steps):
            device.step()
    device.synchronize()

    assert not store.wrong
    for published, read in store.gathered:
        assert read == [published] * ROWS


def test_a_write_waits_on_the_device_and_not_on_the_host() -> None:
    device = Streams(0)
    store = Store(device)

    store.add()
    store.sample()
    store.add()

    assert store.rows == [0] * ROWS  # nothing was run


def test_gathers_of_two_threads_on_one_stream_are_noted_in_their_order() -> None:
    """The first thread is in the middle of noting its gather when the second one gathers and notes: the write follows both."""
    device = Streams(0)
    device.choose = lambda ready: ready[-1]  # the write as early as it may
    order = DeviceOrder(device, "writes")
    record = device.record
    others: list[threading.Thread] = []

    def record_slowly(stream: str) -> Event:
        event = record(stream)
        if not others:
            others.append(threading.Thread(target=note_after_another_gather))
            others[0].start()
            if not order._lock.locked():
                others[0].join()  # it overtakes
        return event

    def note_after_another_gather() -> None:
        device.queue("learner", lambda: read.append(1))
        order.note_reads()

    read: list[int] = []
    device.record = record_slowly  # type: ignore[method-assign]
    order.note_reads()
    others[0].join()
    with order.writing():
        device.queue("writes", lambda: read.append(2))
    device.synchronize()

    assert read == [1, 2]


def test_a_failed_write_is_followed_as_well() -> None:
    device = Streams(0)
    store = Store(device)

    with pytest.raises(RuntimeError), store.order.writing():
        device.queue("writes", lambda: store.rows.__setitem__(0, 5))
        raise RuntimeError("the second copy could not be queued")
    store.order.wait_written()

    assert store.rows[0] == 5
