"""What the log says about the state of the server: who came and left, who waits for whom, and one line a minute on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from touchline_protos.log_lines import get_logger
from touchline_protos.types.status import ActorStatus, FlowStatus, LearnerStatus, ServerStatus, TableStatus, Verdict

logger = get_logger(__name__)

INTERVAL_S = 5.0
"""Interval at which the state is looked at."""

MAX_LINES = 5
"""Most lines about actors, and about learners, of one look; the others are counted."""

SILENT_S = 300.0
"""Silence after which an actor counts as gone."""

Key = tuple[str, str]
"""Table and name of an actor."""


class StatusLog:
    """Logs what has changed from one snapshot to the next. One thread at a time.

    With more actors or learners than a snapshot names, nothing is logged about single ones: who is named changes then with every look.

    Args:
        summary_s: interval of the summary; 0: none.
    """

    def __init__(self, summary_s: float) -> None:
        self._summary_s = summary_s
        self._next_summary: float | None = None
        self._verdicts: dict[str, Verdict] = {}
        self._actors: dict[Key, ActorStatus] = {}
        self._learners: dict[tuple[str, int, str], LearnerStatus] = {}

    def note(self, status: ServerStatus, now: float) -> None:
        """Logs what has changed since the last call.

        Args:
            status: the snapshot.
            now: monotonic time, in seconds.
        """
        _log_some(self._changes_of_actors(status.actors))
        _log_some(self._changes_of_learners(status.learners))
        for table in status.tables:
            self._note_verdict(table)
        if self._summary_s and (self._next_summary is None or now >= self._next_summary):
            if self._next_summary is not None:
                for table in status.tables:
                    logger.info("%s", summary(table, status))
            self._next_summary = now + self._summary_s

    def _note_verdict(self, table: TableStatus) -> None:
        before = self._verdicts.get(table.table, Verdict.UNSPECIFIED)
        self._verdicts[table.table] = table.verdict
        quiet = {Verdict.UNSPECIFIED, Verdict.IDLE}
        if table.verdict is before or (table.verdict in quiet and before in quiet):
            return
        level = logger.warning if table.verdict is Verdict.STORE_FULL else logger.info
        level("%s%s: %s", _of(table.table), _words(table.verdict), table.verdict_text)

    def _changes_of_actors(self, actors: Sequence[ActorStatus]) -> Iterator[str]:
        before = self._actors
        self._actors = now = {(one.table, one.name): one for one in actors if 0 <= one.last_episode_age_s <= SILENT_S and not one.others}
        if any(one.others for one in actors):
            return
        for key, one in now.items():
            if key not in before:
                client = f" with {one.client_version}" if one.client_version else ""
                yield f"{_of(one.table)}actor {one.name!r} at {one.address}{client} adds episodes"
        for key, one in before.items():
            if key not in now:
                silent = f"has added nothing for {SILENT_S:.0f} s, after {one.episodes} episodes"
                yield f"{_of(one.table)}actor {one.name!r} at {one.address} {silent}"

    def _changes_of_learners(self, learners: Sequence[LearnerStatus]) -> Iterator[str]:
        before = self._learners
        named = (one for one in learners if one.transport.value and not one.others)
        self._learners = now = {(one.transport.value, one.learner_id, one.address): one for one in named}
        if any(one.others for one in learners):
            return
        for key, one in now.items():
            if key not in before:
                ring = f" (no ring: {one.ring_refused})" if one.ring_refused else ""
                what = f"{one.batch_size} slices of {one.horizon} transitions"
                yield f"{_of(*one.tables)}learner {one.address} samples by {one.transport}{ring}: {what}"
        for key, one in before.items():
            if key not in now:
                yield f"{_of(*one.tables)}learner {one.address} has left after {one.batches} batches in {one.connected_s:.0f} s"


def summary(table: TableStatus, status: ServerStatus) -> str:
    """Returns one line about the last minute of a table."""
    minute = next((flow for flow in table.flows if flow.window_s == 60.0), FlowStatus())
    span_s = minute.span_s or 1.0
    actors = sum(one.others or 1 for one in status.actors if one.table == table.table)
    learners = sum(one.others or 1 for one in status.learners if table.table in (one.tables or ("",)))
    batches = sum(one.batches for one in minute.delivered)
    out_bytes = sum(one.bytes for one in minute.delivered)
    ratio = "-" if minute.replay_ratio is None else f"{minute.replay_ratio:.3g}"
    return (
        f"{_of(table.table)}{_words(table.verdict)}; in {minute.episodes_in} episodes, {minute.rows_in} rows, "
        f"{minute.bytes_in / span_s / 1e6:.3g} MB/s from {actors} actors; out {batches} batches, {out_bytes / span_s / 1e6:.3g} MB/s to "
        f"{learners} learners; replay ratio {ratio}; stored {table.counts.steps_stored} of {table.capacity} rows; "
        f"refused {table.counts.episodes_refused}"
    )


def _log_some(lines: Iterator[str]) -> None:
    """Logs the first lines, and the number of the others."""
    every = list(lines)
    for number, line in enumerate(every[:MAX_LINES], 1):
        more = len(every) - MAX_LINES
        logger.info("%s%s", line, f" (and {more} more like it)" if number == MAX_LINES and more > 0 else "")


def _of(*tables: str) -> str:
    """Returns what a line about tables begins with: nothing if it is only about the default one."""
    return "" if tables in ((), ("",)) else "table " + ", ".join(repr(name or "default") for name in tables) + ": "


def _words(verdict: Verdict) -> str:
    return verdict.value.replace("_", " ") or "not known"
