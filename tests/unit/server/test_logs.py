"""The server's log: repeats are counted, JSON is a line a record, and states are logged when they change."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from dataclasses import replace

import pytest

from touchline_protos import Counts
from touchline_protos.types.status import (
    ActorStatus,
    DeliveredStatus,
    FlowStatus,
    LearnerStatus,
    ServerStatus,
    TableStatus,
    Transport,
    Verdict,
)
from touchline_server.cli.logs import BURST, MAX_KINDS, JsonFormatter, RepeatingHandler
from touchline_server.service.status_log import MAX_LINES, SILENT_S, StatusLog, summary


class Log:
    """A logger with a handler on a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stream = io.StringIO()
        self.handler = RepeatingHandler(self.stream, clock=lambda: self.now)

    def write(self, message: str, *args: object, level: int = logging.WARNING, line: int = 1) -> None:
        self.handler.handle(logging.LogRecord("touchline_server", level, "module.py", line, message, args, None))

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


def test_warnings_of_one_kind_are_counted_after_the_fifth_and_reported_when_their_minute_is_over() -> None:
    log = Log()
    for number in range(418):
        log.write("refused an episode of %r", f"actor-{number}")
    assert log.lines == [f"refused an episode of 'actor-{number}'" for number in range(BURST)]

    log.now = 59.0
    log.write("another kind", line=2)
    assert log.lines[BURST:] == ["another kind"]

    log.now = 61.0
    log.write("state", level=logging.INFO, line=3)
    assert log.lines[BURST + 1 :] == ["refused an episode of 'actor-417' (and 412 more like it)", "state"]

    log.write("refused an episode of %r", "bob")
    assert log.lines[-1] == "refused an episode of 'bob'"


def test_one_that_was_left_out_is_written_as_it_is_and_closing_reports_what_is_left() -> None:
    log = Log()
    for number in range(BURST + 1):
        log.write("full: %d", number)
    log.handler.close()
    assert log.lines == [f"full: {number}" for number in range(BURST + 1)]


def test_information_is_never_left_out() -> None:
    log = Log()
    for number in range(100):
        log.write("state %d", number, level=logging.INFO)
    assert len(log.lines) == 100


def test_kinds_are_bounded_and_none_is_lost_when_one_is_forgotten() -> None:
    log = Log()
    for _ in range(BURST + 3):
        log.write("first")
    for line in range(2, MAX_KINDS + 2):
        log.write("other", line=line)
    assert log.lines.count("first (and 2 more like it)") == 1
    assert len(log.handler._kinds) == MAX_KINDS


def test_json_is_one_line_a_record_with_its_traceback() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("touchline_server.store", logging.ERROR, "module.py", 1, "failed: %s", ("ü\n",), sys.exc_info())
    line = JsonFormatter().format(record)

    assert "\n" not in line
    fields = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", fields.pop("time"))
    assert "ValueError: two\nlines" in fields.pop("exception")
    assert fields == {"level": "error", "logger": "touchline_server.store", "message": "failed: ü\n"}


# States


def lines_of(caplog: pytest.LogCaptureFixture, log: StatusLog, status: ServerStatus, now: float = 0.0) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        log.note(status, now)
    return caplog.messages


def actor(name: str, **fields: object) -> ActorStatus:
    return replace(ActorStatus(name=name, address="ipv4:10.0.0.7:4242", last_episode_age_s=1.0), **fields)  # type: ignore[arg-type]


def test_actors_and_learners_are_logged_when_they_come_and_when_they_leave(caplog: pytest.LogCaptureFixture) -> None:
    log = StatusLog(0.0)
    learner = LearnerStatus(7, "ipv4:10.0.0.9:1", "", ("",), Transport.RING, "", 256, 3, 12.0, batches=900)
    status = ServerStatus(actors=(actor("anna", client_version="touchline/0.2.0"),), learners=(learner,))

    assert lines_of(caplog, log, status) == [
        "actor 'anna' at ipv4:10.0.0.7:4242 with touchline/0.2.0 adds episodes",
        "learner ipv4:10.0.0.9:1 samples by ring: 256 slices of 3 transitions",
    ]
    assert lines_of(caplog, log, status) == []
    silent = actor("anna", last_episode_age_s=SILENT_S + 1, episodes=12)
    assert lines_of(caplog, log, ServerStatus(actors=(silent,))) == [
        "actor 'anna' at ipv4:10.0.0.7:4242 has added nothing for 300 s, after 0 episodes",
        "learner ipv4:10.0.0.9:1 has left after 900 batches in 12 s",
    ]


def test_many_that_come_together_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    status = ServerStatus(actors=tuple(actor(f"a{number}") for number in range(100)))
    lines = lines_of(caplog, StatusLog(0.0), status)
    assert len(lines) == MAX_LINES and lines[-1].endswith("adds episodes (and 95 more like it)")


def test_actors_that_are_not_always_named_and_those_without_an_episode_leave_no_line(caplog: pytest.LogCaptureFixture) -> None:
    log = StatusLog(0.0)
    others = ActorStatus(others=900, last_episode_age_s=0.0)

    assert lines_of(caplog, log, ServerStatus(actors=(actor("anna"), others))) == []
    assert lines_of(caplog, log, ServerStatus(actors=(actor("bob"), others))) == []
    assert lines_of(caplog, log, ServerStatus(actors=(actor("bob"), actor("refused", last_episode_age_s=-1.0)))) == []


def test_a_verdict_is_logged_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    log = StatusLog(0.0)

    def verdict(one: Verdict, text: str = "because") -> list[str]:
        return lines_of(caplog, log, ServerStatus(tables=(TableStatus(table="demos", verdict=one, verdict_text=text),)))

    assert verdict(Verdict.IDLE) == []
    assert verdict(Verdict.LEARNERS_WAIT) == ["table 'demos': learners wait: because"]
    assert verdict(Verdict.LEARNERS_WAIT, "because of something else") == []
    assert verdict(Verdict.BALANCED) == ["table 'demos': balanced: because"]
    assert verdict(Verdict.STORE_FULL) == ["table 'demos': store full: because"]
    assert caplog.records[0].levelno == logging.WARNING


def test_the_summary_comes_at_its_interval_with_figures_of_the_last_minute(caplog: pytest.LogCaptureFixture) -> None:
    delivered = DeliveredStatus(Transport.RING, batches=600, slices=6000, rows=24_000, bytes=120_000_000)
    minute = FlowStatus(60.0, 60.0, 30, 6000, 6_000_000, 0, 0, (delivered,))
    table = TableStatus(counts=Counts(steps_stored=9000, episodes_refused=2), capacity=10_000, verdict=Verdict.BALANCED, flows=(minute,))
    status = ServerStatus(tables=(table,), actors=(actor("anna"), ActorStatus(others=4)), learners=(LearnerStatus(tables=("",)),))
    log = StatusLog(60.0)

    lines_of(caplog, log, status, now=0.0)
    assert lines_of(caplog, log, status, now=59.0) == []
    assert lines_of(caplog, log, status, now=60.0) == [
        "balanced; in 30 episodes, 6000 rows, 0.1 MB/s from 5 actors; out 600 batches, 2 MB/s to 1 learners; replay ratio 4; "
        "stored 9000 of 10000 rows; refused 2"
    ]
    assert "replay ratio -" in summary(TableStatus(), ServerStatus())
