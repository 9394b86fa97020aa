"""Totals, windows, histograms and the bounded lists of actors, learners and refusals, with a clock of the test's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from touchline_protos.types.status import LATENCY_BOUNDS_S, MAX_NAMED, Verdict, WaitCause, WaitStatus
from touchline_server.metrics.actors import IDLE_S, MAX_ACTORS, Actors, Played
from touchline_server.metrics.histogram import Histogram, percentile
from touchline_server.metrics.learners import MAX_CALLERS, RECENT_S, Learner, Learners
from touchline_server.metrics.refusals import MAX_REFUSALS, Refusals
from touchline_server.metrics.waits import WaitSum
from touchline_server.metrics.windows import Window
from touchline_server.service.verdict import verdict_of

STEPS = st.lists(st.tuples(st.integers(1, 160).map(lambda eighths: eighths / 8), st.integers(0, 9)), max_size=80)
"""Pauses, exact in binary, and what happens after each."""


@given(STEPS, st.sampled_from([10.0, 60.0]))
@settings(max_examples=60)
def test_window_marked_again_and_again_counts_what_came_within_it(steps: list[tuple[float, int]], span_s: float) -> None:
    window, now, total, events = Window(span_s, marks=10), 0.0, 0, []
    window.mark(now, (total,))
    for pause, count in steps:
        now, total = now + pause, total + count
        events.append((now, count))
        window.mark(now, (total,))

        covered_s, (recent,) = window.recent(now, (total,))

        # A mark lies at most an interval behind the window's beginning, and counts what came after it.
        assert 0 <= covered_s <= span_s
        assert recent == sum(count for at, count in events if at > now - covered_s)


@given(STEPS)
@settings(max_examples=60)
def test_window_marked_before_each_change_counts_all_within_it_and_no_more_than_an_interval_else(steps: list[tuple[float, int]]) -> None:
    window, now, total, events = Window(60.0), 0.0, 0, []
    for pause, count in steps:
        now += pause
        window.mark(now, (total,))
        total += count
        events.append((now, count))

        recent = window.recent(now, (total,)).counts[0]

        assert sum(count for at, count in events if at > now - 59) <= recent <= sum(count for at, count in events if at > now - 60)


@given(st.lists(st.floats(0, 40), min_size=1, max_size=200), st.sampled_from([0.5, 0.99]))
@settings(max_examples=60)
def test_percentile_lies_in_the_bucket_of_the_exact_one(durations: list[float], share: float) -> None:
    histogram = Histogram()
    for duration in durations:
        histogram.observe(duration)

    found = percentile(histogram.buckets, share)

    exact = sorted(durations)[max(-(-int(share * len(durations) * 1000) // 1000) - 1, 0)]
    bounds = (0.0, *LATENCY_BOUNDS_S, float("inf"))
    number = next(number for number in range(len(bounds)) if exact <= bounds[number + 1])
    assert min(bounds[number], LATENCY_BOUNDS_S[-1]) <= found <= bounds[min(number + 2, len(bounds) - 1)]
    assert sum(histogram.buckets) == len(durations)


def test_wait_sum_counts_waits_in_progress_and_over() -> None:
    waits = WaitSum()
    waits.begin(10.0)
    waits.begin(12.0)
    waits.end(10.0, 15.0)

    assert (waits.waiting, waits.total_s(20.0)) == (1, 5.0 + 8.0)
    waits.end(12.0, 21.0)
    assert (waits.waiting, waits.total_s(99.0)) == (0, 14.0)


def played(rows: int = 10) -> Played:
    return Played("x", rows, 1, 2.0)


def test_actor_that_is_silent_for_an_hour_is_forgotten() -> None:
    actors = Actors("")
    actors.of("old", 0.0).stored(played(), 0.0)
    actors.of("new", 3000.0).stored(played(), 3000.0)

    actors.tick(IDLE_S)
    both = [one.name for one in actors.status(IDLE_S)]
    actors.tick(IDLE_S + 1)

    assert both == ["new", "old"]
    assert [one.name for one in actors.status(IDLE_S + 1)] == ["new"]
    actors.tick(3000.0 + IDLE_S + 1)
    assert len(actors) == 0


def test_actor_that_waits_is_not_forgotten() -> None:
    actors = Actors("")
    actors.of("patient", 0.0).waits.begin(0.0)

    actors.tick(2 * IDLE_S)

    assert [one.name for one in actors.status(2 * IDLE_S)] == ["patient"]


def test_actors_are_bounded_and_the_sums_stay_whole() -> None:
    actors = Actors("")
    count = MAX_ACTORS + 50
    for number in range(count):
        actors.of(f"actor {number}", float(number) / 100).stored(played(), float(number) / 100)

    status = list(actors.status(50.0))

    assert (len(actors), len(status)) == (MAX_ACTORS, MAX_NAMED + 1)
    sums = sum(one.episodes for one in status), sum(one.rows for one in status)
    assert (status[-1].others, *sums) == (count - MAX_NAMED, count, 10 * count)
    actors.tick(50.0 + IDLE_S + 1)
    assert list(actors.status(50.0 + IDLE_S + 1)) == []


def test_rows_a_second_are_of_the_last_minute() -> None:
    actors = Actors("")
    for second in range(200):
        actors.of("x", float(second)).stored(played(6), float(second))
        actors.tick(float(second))
    for second in range(200, 300):
        actors.tick(float(second))

    (early,), (late,) = list(actors.status(199.0)), list(actors.status(299.0))

    assert late.rows_per_s == 0.0
    assert late.rows == early.rows == 1200


def learner(table: str = "") -> Learner:
    return Learner((table,), address="x", metadata=(), batch_size=8, horizon=3)


def test_callers_of_sample_are_bounded_and_forgotten_after_a_minute() -> None:
    learners = Learners()
    for number in range(MAX_CALLERS):
        assert learners.caller(str(number), learner)[1] is None

    one, dropped = learners.caller("one more", learner)

    assert dropped is not None
    assert len(list(learners)) == MAX_CALLERS
    assert len(list(learners.status(one.began))) == MAX_NAMED + 1
    assert len(learners.tick(one.seen_at + RECENT_S + 1)) == MAX_CALLERS


def test_refusals_are_bounded_and_those_of_dropped_tables_go() -> None:
    refusals = Refusals()
    for number in range(MAX_REFUSALS + 5):
        refusals.count("too-large", f"t{number}", "x" * 10_000, "who")

    assert len(refusals.status()) == MAX_REFUSALS
    assert len(refusals.status()[0].last_message) < 1000
    refusals.keep({"t100"})
    assert [one.table for one in refusals.status()] == ["t100"]


@pytest.mark.parametrize(
    ("learned_s", "acted_s", "learners", "actors", "expected"),
    [
        (0.0, 0.0, 1, 1, Verdict.BALANCED),
        (5.9, 5.9, 1, 1, Verdict.BALANCED),
        (6.1, 0.0, 1, 1, Verdict.LEARNERS_WAIT),
        (6.1, 0.0, 2, 1, Verdict.BALANCED),
        (6.1, 30.0, 1, 1, Verdict.ACTORS_WAIT),
        (0.0, 30.0, 1, 10, Verdict.BALANCED),
        (30.0, 0.0, 0, 1, Verdict.BALANCED),
    ],
)
def test_verdict_is_about_each_callers_share_of_the_time(
    learned_s: float, acted_s: float, learners: int, actors: int, expected: Verdict
) -> None:
    waits = [
        WaitStatus(learners=True, cause=WaitCause.DATA, waited_s=learned_s),
        WaitStatus(learners=False, cause=WaitCause.STORING, waited_s=acted_s),
    ]

    verdict, text = verdict_of(waits, span_s=60.0, actors=actors, learners=learners, moved=True)

    assert verdict == expected
    assert text
