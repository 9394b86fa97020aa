"""The deadline of one message of a stream: a session is ended when its time is over, whatever came between."""

from __future__ import annotations

import threading
import time

import pytest

from support.client_faults import refuse_threads
from touchline._rpc.deadline import Watchdog


class Session:
    """Records that it was ended, after ``failures`` attempts that failed."""

    def __init__(self, failures: int = 0) -> None:
        self.ended = threading.Event()
        self.failures = failures

    def end(self) -> None:
        if self.failures:
            self.failures -= 1
            raise ValueError("as the test wants")
        self.ended.set()


def test_session_that_failed_to_end_is_ended_after_all_and_so_is_the_next(caplog: pytest.LogCaptureFixture) -> None:
    watchdog = Watchdog(0.1)
    first, second = Session(failures=2), Session()

    watchdog.arm(first, 0.0)
    assert first.ended.wait(30)
    watchdog.arm(second, 0.0)
    assert second.ended.wait(30)

    watchdog.stop()
    assert caplog.text.count("cannot be ended") == 2


def test_session_that_is_set_while_another_is_being_ended_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = Watchdog(0.1)
    looked, go_on = threading.Event(), threading.Event()

    def monotonic() -> float:
        looked.set()
        assert go_on.wait(30)
        return 1.0

    with monkeypatch.context() as patch:
        patch.setattr("touchline._rpc.deadline.time", type("Clock", (), {"monotonic": staticmethod(monotonic)}))
        first, second = Session(), Session()
        watchdog.arm(first, 0.0)
        assert looked.wait(30)  # the first one's time is over, and it is about to be ended
        watchdog.disarm()
        watchdog.arm(second, 0.0)
        go_on.set()

        assert second.ended.wait(30)
    watchdog.stop()


def test_disarmed_watchdog_ends_nothing() -> None:
    watchdog = Watchdog(0.1)
    resting, watched = Session(), Session()

    watchdog.arm(resting, time.monotonic() + 3600)
    watchdog.disarm()
    watchdog.arm(watched, 0.0)

    assert watched.ended.wait(30) and not resting.ended.is_set()
    watchdog.stop()


def test_arm_without_a_thread_raises_and_the_next_one_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog, session = Watchdog(0.1), Session()
    with monkeypatch.context() as patch:
        refuse_threads(patch, "touchline-watchdog")
        with pytest.raises(RuntimeError, match="can't start new thread"):
            watchdog.arm(session, 0.0)

    watchdog.arm(session, 0.0)

    assert session.ended.wait(30)
    watchdog.stop()
