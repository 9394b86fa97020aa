"""The log of waits, by a clock that the test moves."""

from __future__ import annotations

import logging
import os
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fresh_process import run_in_fresh_process
from touchline._rpc.waits import FIRST_LINE_S, LINE_INTERVAL_S, SILENT_S, WaitLog


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Lines(logging.Handler):
    """Collects (seconds since the test began, level, text)."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.found: list[tuple[float, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append((self._clock.now - 1000.0, record.levelno, record.getMessage()))

    def __enter__(self) -> Lines:
        logging.getLogger("touchline._rpc.waits").addHandler(self)
        logging.getLogger("touchline._rpc.waits").setLevel(logging.INFO)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("touchline._rpc.waits").removeHandler(self)
        logging.getLogger("touchline._rpc.waits").setLevel(logging.NOTSET)

    @property
    def warnings(self) -> list[float]:
        return [at for at, level, _ in self.found if level == logging.WARNING]


@given(pauses=st.lists(st.floats(0.01, 100), min_size=1, max_size=40))
def test_wait_is_logged_after_ten_seconds_and_then_each_minute_however_often_it_is_checked(pauses: list[float]) -> None:
    clock = Clock()
    log = WaitLog(clock=clock, threaded=False)
    with Lines(clock) as lines, log.wait("add()", "HOST:1", lambda: "because"):
        for pause in pauses:
            clock.now += pause
            log.log_due()
        total = clock.now - 1000.0
        looked = [sum(pauses[: count + 1]) for count in range(len(pauses))]

    told = lines.warnings
    assert all(at >= FIRST_LINE_S - 1e-6 for at in told)
    assert all(later - earlier >= LINE_INTERVAL_S - 1e-6 for earlier, later in pairwise(told))
    # None is missing either: each look that came late enough after the last line wrote one.
    expected: list[float] = []
    for at in looked:
        if at >= (FIRST_LINE_S if not expected else expected[-1] + LINE_INTERVAL_S) + 1e-6:
            expected.append(at)
    assert len(told) >= len(expected) and len(told) <= 1 + max(0.0, total - FIRST_LINE_S) / LINE_INTERVAL_S + 1e-6


def test_line_names_the_method_the_address_the_time_and_the_reason() -> None:
    clock = Clock()
    log = WaitLog(clock=clock, threaded=False)
    with Lines(clock) as lines:
        with log.wait("add()", "HOST:1", lambda: "nothing known") as wait:
            clock.now += 10
            log.log_due()
            wait.note("connection refused")
            clock.now += 60
            log.log_due()
            clock.now += 5
        with log.wait("add()", "HOST:1", lambda: "nothing known"):
            clock.now += 5
            log.log_due()

    assert lines.found == [
        (10, logging.WARNING, "add() waits for HOST:1, 10 s so far: nothing known"),
        (70, logging.WARNING, "add() waits for HOST:1, 70 s so far: connection refused"),
        (75, logging.INFO, "add() goes on after 75 s"),
    ]


def test_wait_with_first_s_0_is_logged_at_the_first_failure_or_after_a_silence() -> None:
    clock = Clock()
    log = WaitLog(clock=clock, threaded=False)
    with Lines(clock) as lines:
        with log.wait("failing", "HOST:1", lambda: "no answer yet", first_s=0) as wait:
            log.log_due()
            assert not lines.found
            wait.note("refused")
            wait.note("refused again")
            clock.now += 60
            log.log_due()
        with log.wait("silent", "HOST:1", lambda: "no answer yet", first_s=0):
            clock.now += SILENT_S
            log.log_due()
        with log.wait("quick", "HOST:1", lambda: "no answer yet", first_s=0):
            log.log_due()

    assert [(at, text) for at, level, text in lines.found if level == logging.WARNING] == [
        (0, "failing waits for HOST:1, 0 s so far: refused"),
        (60, "failing waits for HOST:1, 60 s so far: refused again"),
        (62, "silent waits for HOST:1, 2 s so far: no answer yet"),
    ]


def test_wait_within_another_of_the_same_thread_only_says_why() -> None:
    clock = Clock()
    log = WaitLog(clock=clock, threaded=False)
    with Lines(clock) as lines, log.wait("writer", "HOST:1", lambda: "no answer yet"):
        for attempt in range(4):
            with log.wait("add()", "HOST:1", lambda: "inner") as inner:
                clock.now += 9
                inner.note(f"attempt {attempt} failed")
                log.log_due()

    assert [text for _, level, text in lines.found if level == logging.WARNING] == [
        "writer waits for HOST:1, 18 s so far: attempt 1 failed",
    ]


def test_waits_of_other_threads_have_lines_of_their_own() -> None:
    clock = Clock()
    log = WaitLog(clock=clock, threaded=False)
    begun, over = threading.Barrier(3), threading.Event()

    def wait(who: str) -> None:
        with log.wait(who, "HOST:1", lambda: f"{who}'s reason"):
            begun.wait()
            over.wait()

    threads = [threading.Thread(target=wait, args=(who,)) for who in ("one", "two")]
    for thread in threads:
        thread.start()
    begun.wait()
    with Lines(clock) as lines:
        clock.now += 10
        log.log_due()
    over.set()
    for thread in threads:
        thread.join()

    assert sorted(text.partition(",")[0] for _, _, text in lines.found) == ["one waits for HOST:1", "two waits for HOST:1"]
    assert not log.log_due()


def test_reason_that_raises_still_gives_a_line() -> None:
    clock = Clock()
    log = WaitLog(clock=clock, threaded=False)
    with Lines(clock) as lines, log.wait("add()", "HOST:1", lambda: str(1 / 0)):
        clock.now += 10
        log.log_due()

    assert "the reason is not known (ZeroDivisionError" in lines.found[0][2]


def test_wait_that_ended_while_its_reason_was_asked_for_is_not_logged() -> None:
    clock = Clock()
    log = WaitLog(clock=clock, threaded=False)

    def reason() -> str:
        ended.__exit__(None, None, None)
        return "too late"

    ended = log.wait("add()", "HOST:1", reason)
    with Lines(clock) as lines:
        ended.__enter__()
        clock.now += 10
        log.log_due()

    assert not lines.found


def test_thread_logs_by_itself_and_ends_once_no_wait_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline._rpc.waits.POLL_INTERVAL_S", 0.001)
    clock, told = Clock(), threading.Event()
    log = WaitLog(clock=clock)

    def reason() -> str:
        told.set()
        return "because"

    with log.wait("add()", "HOST:1", reason):
        thread = log._thread
        assert thread is not None and not told.is_set()
        clock.now += 10
        assert told.wait(60)

    thread.join(60)
    assert not thread.is_alive() and log._thread is None
    with log.wait("add()", "HOST:1", reason):
        assert log._thread is not None


def test_forked_child_has_waits_of_its_own() -> None:
    run_in_fresh_process(__file__, "check_forked_child")


def check_forked_child() -> None:
    log = WaitLog(threaded=False)
    with log.wait("add()", "HOST:1", lambda: ""):
        child = os.fork()
        if not child:
            os._exit(0 if not log.log_due() and log.current() is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert log.log_due()
