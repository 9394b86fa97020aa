"""The benchmarks: statistics that mean what they say, and checks that notice wrong data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.bars import Bar, judge
from benchmarks.checks import BatchLog, WrongDataError, check_batch
from benchmarks.compare import compare, table
from benchmarks.local import GatherLimit, LocalSubject, LocalWritingSubject
from benchmarks.pacing import FIRST_TAG, ready_tags
from benchmarks.protocol import REPOSITORY, Worker, WorkerError, cpu_seconds, resident_bytes
from benchmarks.report import write_report
from benchmarks.rounds import Section, Subject
from benchmarks.servers import ServerProcess
from benchmarks.statistics import median_interval, ratio_interval
from benchmarks.tdmpc2 import Tdmpc2Subject, WritingSubject
from benchmarks.timing import BatchSubject, SliceTimer
from benchmarks.workloads import W1, W2, W3, W3_STEP, WORKLOADS, Content, Workload, read_row_ids

SMALL = {name: replace(workload.resized(4000), batch_size=16) for name, workload in WORKLOADS.items()}


def arrays_of(content: Content, tag: int, starts: list[int]) -> dict[str, np.ndarray]:
    """A right batch, made by hand: slices of one episode."""
    workload = content.workload
    episode = content.episode(tag)
    rows = np.array(starts) + np.arange(workload.horizon + 1)[:, None]
    batch = {"obs": episode["obs"][rows]}
    for name in ("action", "reward", "done"):
        batch[name] = episode[name][rows[1:]]
    if workload.task:
        batch["task"] = episode["task"][rows[0]]
    return batch


@pytest.fixture
def content() -> Content:
    return Content(replace(W1.resized(2000), batch_size=3))


# Workloads.


def test_workloads_w1_and_w2_have_the_sizes_that_are_quoted() -> None:
    assert W1.batch_bytes == 292_864
    assert round(W2.batch_bytes / 1e6, 1) == 37.8
    assert (W1.row_bytes, W2.row_bytes) == (296, 36_896)
    assert W3_STEP.law == "step" and W3.law == "episode"


@pytest.mark.parametrize("workload", SMALL.values(), ids=SMALL)
def test_episode_any_workload_rows_tell_tag_and_step(workload: Workload) -> None:
    content = Content(workload)

    episode = content.episode(11)

    length = int(content.length(11))
    ids = episode["obs"].reshape(length, -1)[:, : 8 // episode["obs"].itemsize]
    tags, steps = read_row_ids(ids)
    assert (tags == 11).all() and steps.tolist() == list(range(length))
    assert np.isnan(episode["reward"][0]) and not np.isnan(episode["reward"][1:]).any()
    assert sum(array.nbytes for array in episode.values()) == length * workload.row_bytes


def test_rewards_of_a_million_rows_hardly_ever_collide() -> None:
    content = Content(W1)
    tags, steps = np.divmod(np.arange(1_000_000), 500)

    rewards = content.reward(tags, steps)

    neighbours_differ = (np.diff(rewards) != 0).mean()
    assert rewards.max() < 2**24 and neighbours_differ > 0.99999
    # 24 bits: of a million, about a million squared / 2**25 pairs are the same.
    assert len(np.unique(rewards)) > 960_000


def test_tags_to_fill_unequal_lengths_fill_but_never_overflow() -> None:
    content = Content(W3)

    tags = content.tags_to_fill(5000)

    stored = int(content.length(np.array(tags)).sum())
    assert 5000 - W3.max_length < stored <= 5000


def test_ready_tags_many_actors_share_none() -> None:
    ranges = [ready_tags(number, episode_bytes=148_000) for number in range(8)]

    assert len(set().union(*ranges)) == sum(map(len, ranges))
    assert min(map(min, ranges)) >= FIRST_TAG > max(Content(W1).tags_to_fill(W1.rows))


# Checks.


@pytest.mark.parametrize("workload", SMALL.values(), ids=SMALL)
def test_check_batch_right_batch_passes(workload: Workload) -> None:
    small = Content(replace(workload, batch_size=3))

    check_batch(small, arrays_of(small, 5, [0, 2, 7]))


@pytest.mark.parametrize("name", ["obs", "action", "reward", "done"])
def test_check_batch_one_value_differs_raises(content: Content, name: str) -> None:
    batch = arrays_of(content, 5, [0, 100, 400])
    batch[name][(-1,) * batch[name].ndim] += 1

    with pytest.raises(WrongDataError, match=name):
        check_batch(content, batch)


def test_check_batch_slice_over_two_episodes_raises(content: Content) -> None:
    batch = arrays_of(content, 5, [0, 100, 400])
    batch["obs"][2:, 1] = content.episode(6)["obs"][102:104]

    with pytest.raises(WrongDataError, match="several episodes"):
        check_batch(content, batch)


def test_check_batch_other_row_convention_raises(content: Content) -> None:
    batch = arrays_of(content, 5, [0, 100, 400])
    batch["action"] = content.episode(5)["action"][np.array([0, 100, 400]) + np.arange(3)[:, None]]

    with pytest.raises(WrongDataError, match="action"):
        check_batch(content, batch)


def test_check_batch_provenance_of_another_start_raises(content: Content) -> None:
    batch = arrays_of(content, 5, [0, 100, 400])
    good = {"policy_version": np.full(3, 5), "start": np.array([0, 100, 400])}
    check_batch(content, batch | good)

    with pytest.raises(WrongDataError, match="starts"):
        check_batch(content, batch | good | {"start": np.array([0, 100, 401])})


def test_batch_log_right_batches_counts_them_and_starts_afresh(content: Content) -> None:
    log = BatchLog(content, capacity=4)
    batch = arrays_of(content, 5, [0, 100, 400])

    for _ in range(3):
        log.note(batch["obs"], batch["reward"])

    assert log.verify() == 3
    assert log.verify() == 0


def test_batch_log_a_torn_slice_raises(content: Content) -> None:
    log = BatchLog(content)
    batch = arrays_of(content, 5, [0, 100, 400])
    log.note(batch["obs"], batch["reward"])
    batch["reward"][2, 1] = content.episode(6)["reward"][103]
    log.note(batch["obs"], batch["reward"])

    with pytest.raises(WrongDataError):
        log.verify()


def test_batch_log_is_not_fooled_by_a_buffer_that_is_used_again(content: Content) -> None:
    log = BatchLog(content)
    batch = arrays_of(content, 5, [0, 100, 400])
    batch["reward"][0, 0] += 1
    log.note(batch["obs"], batch["reward"])
    batch["reward"][0, 0] -= 1

    with pytest.raises(WrongDataError):
        log.verify()


# Statistics.


def test_median_interval_fifteen_values_takes_the_fourth_from_each_end() -> None:
    interval = median_interval([float(value) for value in range(15, 0, -1)])

    assert (interval.median, interval.low, interval.high) == (8.0, 4.0, 12.0)
    assert math.isclose(interval.coverage, 0.96484375)


@pytest.mark.parametrize(("count", "coverage"), [(1, 0.0), (2, 0.5), (5, 0.9375), (6, 0.96875)])
def test_median_interval_few_values_says_what_it_covers(count: int, coverage: float) -> None:
    interval = median_interval(list(range(count)))

    assert (interval.low, interval.high, interval.coverage) == (0, count - 1, coverage)


def test_median_interval_skewed_noise_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    samples = rng.exponential(size=(4000, 15))

    hits = np.mean([interval.low <= math.log(2) <= interval.high for interval in map(median_interval, samples.tolist())])

    assert abs(hits - 0.9648) < 0.012  # four standard deviations


def test_median_interval_no_values_raises() -> None:
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_ratio_interval_a_slow_round_for_both_changes_nothing() -> None:
    theirs = [100.0, 100.0, 10.0, 100.0, 100.0, 100.0]

    interval = ratio_interval([3 * value for value in theirs], theirs)

    assert (interval.low, interval.median, interval.high) == (3.0, 3.0, 3.0)


def test_ratio_interval_different_numbers_of_rounds_raises() -> None:
    with pytest.raises(ValueError):
        ratio_interval([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("over", "at_most", "word"),
    [(1.0, False, "not met"), (3.0, False, "clearly met"), (1.0, True, "clearly met"), (3.0, True, "not met")],
)
def test_judge_constant_ratio_is_clearly_met_or_not(over: float, at_most: bool, word: str) -> None:
    bar = Bar("a", "S", "x", "y", 2.0, "", at_most=at_most)
    sections = {"S": {"slices": {"x": [{"batches_per_s": over}] * 6, "y": [{"batches_per_s": 1.0}] * 6}}}

    assert judge(sections, [bar])[0].word == word


def test_judge_interval_across_the_bar_is_met_but_not_clearly() -> None:
    bar = Bar("a", "S", "x", "y", 2.0, "")
    rates = [{"batches_per_s": rate} for rate in (1.0, 1.5, 1.9, 1.9, 2.1, 2.5)]
    sections = {"S": {"slices": {"x": rates, "y": [{"batches_per_s": 1.0}] * 6}}}

    assert judge(sections, [bar])[0].word == "met"
    assert judge({}, [bar])[0].word == "not measured"


# Rounds, processes, report.


def test_section_rounds_every_subject_once_in_changing_order() -> None:
    ran: list[str] = []

    def subject(name: str) -> Subject:
        def run(seconds: float) -> dict[str, float]:
            ran.append(name)
            return {"seconds": seconds}

        return Subject(name, run)

    section = Section("S", [subject(name) for name in "abcd"], rounds=6)
    told: list[str] = []

    section.run(seed=1, advance=told.append)

    rounds = [tuple(ran[first : first + 4]) for first in range(0, 24, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 1
    assert len(told) == section.steps == 24 and len(section.slices["a"]) == 6


def test_worker_that_fails_raises_with_its_traceback() -> None:
    with Worker("benchmarks.learner") as worker:
        with pytest.raises(WorkerError, match="KeyError"):
            worker.call("run", name="nobody", seconds=0.1, server_pid=os.getpid())
        assert resident_bytes(worker.pid) > 1 << 20
        assert cpu_seconds(worker.pid) > 0


def test_write_report_without_results_says_that_there_are_none(tmp_path: Path) -> None:
    text = write_report(tmp_path).read_text()

    assert "There are no results of `make bench` here." in text
    assert text.count("not measured") == 11


# A tiny run of each subject.


@pytest.fixture(scope="module")
def local() -> LocalSubject:
    return LocalSubject(Content(SMALL["W1"]))


def subjects(local: LocalSubject) -> Iterator[tuple[str, BatchSubject]]:
    yield "local", local
    yield "limit", GatherLimit(local)
    yield "limit with provenance", GatherLimit(local, provenance=True)
    yield "limit, step law", GatherLimit(LocalSubject(Content(SMALL["W3-step"])))
    yield "local, unequal", LocalSubject(Content(SMALL["W3"]))
    yield "local, writing", LocalWritingSubject(LocalSubject(Content(SMALL["W1"])))
    yield "local, pixels", LocalSubject(Content(SMALL["W2"].resized(1500)))
    yield "tdmpc2", Tdmpc2Subject(Content(SMALL["W1"]), cache=False)
    yield "tdmpc2, writing", WritingSubject(Tdmpc2Subject(Content(SMALL["W3"]), cache=True))


def test_slice_every_subject_in_process_moves_right_data(local: LocalSubject) -> None:
    for name, subject in subjects(local):
        result = SliceTimer(subject).run(0.02)

        assert result["checked"] >= 1, name
        assert result["batches_per_s"] > 0 and 0 < result["p50_s"] <= result["p99_s"], name


def test_slice_wrong_data_raises(local: LocalSubject) -> None:
    limit = GatherLimit(local)
    limit._columns = {**limit._columns, "reward": np.roll(limit._columns["reward"], 1)}

    with pytest.raises(WrongDataError):
        SliceTimer(limit).run(0.02)


def test_slice_every_path_of_a_server_moves_right_data_under_load() -> None:
    workload, rows = W1.resized(2000), 2000
    with ServerProcess(workload) as server, Worker("benchmarks.learner") as learner, Worker("benchmarks.actor") as actor:
        assert actor.call("fill", address=server.address, workload="W1", rows=rows) == rows
        actor.call("prepare", address=server.address, workload="W1", rows=rows, number=0)
        assert actor.call("insert", seconds=0.05)["steps_per_s"] > 0
        actor.call("start", steps_per_s=5000.0)
        for path in ("unary", "stream", "ring"):
            learner.call("make", name=path, address=server.address, workload="W1", rows=rows, path=path)
            result = learner.call("run", name=path, seconds=0.05, server_pid=server.pid)

            assert result["checked"] >= 1 and result["server_cpu_s"] > 0, path
        actor.call("stop")


# Two checkouts


def test_compare_a_checkout_with_itself_measures_every_round_of_both_sides() -> None:
    slices: list[str] = []

    found = compare(
        REPOSITORY, only=["sample", "W1 ring", "insert batch"], blocks=2, rounds=2, seconds=0.05, seed=1, advance=slices.append, shrink=50
    )

    assert [comparison.name for comparison in found] == ["sample", "W1 ring", "insert batch"]
    assert all(len(comparison.old) == len(comparison.new) == 4 for comparison in found)
    assert all(rate > 0 for comparison in found for rate in comparison.old + comparison.new)
    assert len(slices) == 2 * (1 + 3 * 2 * 2)
    assert len(list(table(found))) == 2 + 3


def test_compare_unknown_run_raises_and_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"only: W9 ring, expected some of sample, add, W1 ring"):
        compare(REPOSITORY, only=["sample", "W9 ring"], blocks=1, rounds=1, seconds=0.05, seed=1, advance=print)


def test_compare_a_folder_that_is_no_checkout_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a checkout of the project"):
        compare(tmp_path, only=["sample"], blocks=1, rounds=1, seconds=0.05, seed=1, advance=print)
