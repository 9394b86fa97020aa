"""Learners by rank: the parts of the ranks are one global batch, whatever the law, their order, and what happens between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.store_cases import STRIDE, as_bits, make_config, traced
from touchline_server import InvalidArgumentError, NotReadyError, ReplayBuffer
from touchline_server.selectors.options import LawOptions
from touchline_server.selectors.registry import LAWS
from touchline_server.tables import ranks as ranks_module
from touchline_server.tables.mix_sampler import MixSampler, MixSpec
from touchline_server.tables.ranks import Rank, RankJobs, RankShare
from touchline_server.tables.sampler import Sampler, TableSampler

WORLD, BATCH, HORIZON = 4, 6, 3
SEED = 11
OPTIONS = {"recent": LawOptions(recent_steps=60)}


def _buffer(episodes: int = 14, capacity: int = 300) -> ReplayBuffer:
    buffer = ReplayBuffer(make_config(capacity, horizon=HORIZON, batch_size=BATCH).override(tables={"demos": {"buffer_size": capacity}}))
    for name in ("", "demos"):
        for number in range(episodes):
            buffer.registry.get(name).add(_episode(number))
    return buffer


def _episode(number: int) -> Any:
    episode = traced(number, 5 + 7 * number % 20)
    columns = {**episode.columns, "task": np.full(len(episode.columns["stamp"]), number % 3, np.int64)}
    return type(episode)(columns, episode.key, episode.actor, episode.policy_version)


def _spec(buffer: ReplayBuffer, law: str, batch_size: int = BATCH, pad: str = "none") -> Any:
    return buffer.registry.get("").spec(batch_size=batch_size, law=law, options=OPTIONS.get(law, LawOptions()), pad=pad)


def _share(jobs: RankJobs, stack: ExitStack, buffer: ReplayBuffer, rank: int, *, first: int | None = None, job: str = "") -> RankShare:
    tables = (buffer.registry.get(""),)
    joined = jobs.join(Rank.of(rank, WORLD, job, first), tables, {"world_size": WORLD}, lambda: np.random.default_rng(SEED))
    return stack.enter_context(joined)


class Ranks:
    """The samplers of a job's ranks, and a learner of all its slices. All on one table."""

    def __init__(self, buffer: ReplayBuffer, law: str, pad: str = "none") -> None:
        self.buffer, self.law, self.pad = buffer, law, pad
        self.jobs, self.stack = RankJobs(), ExitStack()
        self.samplers = [self.join(rank) for rank in range(WORLD)]

    def join(self, rank: int, first: int | None = None) -> Sampler:
        share = _share(self.jobs, self.stack, self.buffer, rank, first=first)
        return TableSampler(self.buffer.registry.get(""), _spec(self.buffer, self.law, pad=self.pad), share.rng, share=share)


def _take(sampler: Sampler, batches: int = 1) -> list[dict[str, np.ndarray]]:
    reserved = sampler.reserve(batches, waits=False)
    assert reserved is not None and reserved.batches == batches
    with sampler.draw(reserved) as drawn:
        bodies = [drawn.layout.body_views(bytearray(drawn.layout.body_bytes)) for _ in range(batches)]
        drawn.gather_into(bodies)
    sampler.delivered(batches, reserved.split)
    return bodies


def _union(parts: list[dict[str, np.ndarray]]) -> dict[str, bytes]:
    """Returns the bits of the ranks' parts, one behind the other along the axis of slices: the first if there is one only."""
    return {name: as_bits(np.concatenate([part[name] for part in parts], axis=min(array.ndim - 1, 1))) for name, array in parts[0].items()}


def _whole(buffer: ReplayBuffer, law: str, pad: str = "none") -> Sampler:
    """A single learner of all slices, by the same seed."""
    return TableSampler(buffer.registry.get(""), _spec(buffer, law, WORLD * BATCH, pad), np.random.default_rng(SEED))


@pytest.mark.parametrize("pad", ["none", "end"])
@pytest.mark.parametrize("law", LAWS)
def test_union_of_the_ranks_is_the_batch_of_one_learner_to_the_bit(law: str, pad: str) -> None:
    ranks, whole = Ranks(_buffer(), law, pad), _whole(_buffer(), law, pad)
    expected = [{name: as_bits(array) for name, array in body.items()} for body in _take(whole, 6)]

    # In groups of different sizes, and each time another rank first: who draws does not matter.
    taken: list[list[dict[str, np.ndarray]]] = [[] for _ in range(WORLD)]
    for rank, groups in ((2, (1, 3, 2)), (0, (6,)), (3, (2, 2, 2)), (1, (1, 1, 1, 1, 2))):
        for batches in groups:
            taken[rank] += _take(ranks.samplers[rank], batches)
    for number, body in enumerate(expected):
        assert _union([taken[rank][number] for rank in range(WORLD)]) == body


def test_rank_goes_on_with_its_own_batch_while_its_broken_stream_still_draws() -> None:
    ranks = Ranks(_buffer(), "episode")
    broken = ranks.samplers[1]
    expected = [_union([body]) for body in _take(broken, 5)]
    again = ranks.join(1, first=2)

    assert _union(_take(again)) == expected[2]
    _take(broken)  # its thread does not know yet that the stream has ended
    assert _union(_take(again)) == expected[3]


@pytest.mark.parametrize("law", LAWS)
def test_law_takes_as_many_random_numbers_as_it_says(law: str) -> None:
    buffer = _buffer()
    store = buffer.registry.get("").store
    for options in [LawOptions(recent_steps=60), LawOptions(recent_half_life=30.0)] if law == "recent" else [LawOptions()]:
        used, skipped = np.random.default_rng(5), np.random.default_rng(5)
        store.draw(7, HORIZON, law, used, batches=3, options=options).release()
        skipped.bit_generator.advance(3 * 7 * store.numbers_of(law, options))
        assert used.bit_generator.state == skipped.bit_generator.state


def test_global_batch_is_one_draw_even_if_episodes_come_between_the_ranks() -> None:
    ranks, other = Ranks(_buffer(), "step"), _buffer()
    expected = _take(_whole(other, "step"))[0]["stamp"]

    parts = []
    for rank in (1, 3, 0, 2):
        parts.append((rank, _take(ranks.samplers[rank])[0]["stamp"]))
        ranks.buffer.registry.get("").add(_episode(100 + rank))
    assert as_bits(np.concatenate([part for _, part in sorted(parts, key=lambda item: item[0])], axis=1)) == as_bits(expected)


def test_priorities_that_come_between_the_ranks_change_the_next_global_batch_only() -> None:
    ranks, other = Ranks(_buffer(), "prioritized"), _buffer()
    whole = _whole(other, "prioritized")
    for _ in range(4):
        expected = _take(whole)[0]
        parts = []
        for rank in range(WORLD):
            part = _take(ranks.samplers[rank])[0]
            parts.append(part)
        assert as_bits(np.concatenate([part["provenance.weight"] for part in parts])) == as_bits(expected["provenance.weight"])
        priorities = np.abs(np.random.default_rng(3).normal(size=(HORIZON, WORLD * BATCH))).astype(np.float32)
        for buffer, body in ((other, [expected]), (ranks.buffer, parts)):
            ids, starts = (np.concatenate([part[f"provenance.{name}"] for part in body]) for name in ("episode_id", "start"))
            selector = buffer.registry.get("").store
            with selector._ring.lock:
                selector._ring.index.selectors.of("prioritized").update(ids, starts, priorities)


def test_fresh_starts_are_each_drawn_once_by_all_ranks_together() -> None:
    ranks = Ranks(_buffer(), "fresh_first")
    starts = sum(5 + 7 * number % 20 - HORIZON for number in range(14))

    seen: list[int] = []
    for _ in range(starts // (WORLD * BATCH)):
        for rank in range(WORLD):
            seen += _take(ranks.samplers[rank])[0]["stamp"][0].ravel().tolist()

    assert len(seen) == len(set(seen)) > 100


def test_rank_that_is_late_holds_no_rows_and_gets_slices_that_are_stored() -> None:
    ranks = Ranks(_buffer(), "episode")
    first = _take(ranks.samplers[0], 3)
    table = ranks.buffer.registry.get("")
    for number in range(100, 140):
        table.add(_episode(number))  # would wait forever for rows that are still pinned

    late = _take(ranks.samplers[1], 3)

    assert all(body["stamp"].min() // STRIDE < 14 for body in first)
    stored = {entry[0] for entry in table.store._ring.index.entries.tolist()}
    for body in late:
        assert set(body["provenance.episode_id"].tolist()) <= stored
        assert body["stamp"].min() // STRIDE >= 100
        steps = body["stamp"].reshape(HORIZON + 1, BATCH)
        assert (np.diff(steps, axis=0) == 1).all()
    assert _redrawn(ranks) == 3 * BATCH


def _redrawn(ranks: Ranks) -> int:
    (job,) = ranks.jobs._jobs.values()
    return sum(draws.redrawn for draws in job.draws.values())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, WORLD - 1), st.integers(1, 3), st.booleans()), max_size=25))
def test_ranks_in_any_order_with_adds_between_get_whole_slices_and_parts_that_fit(plan: list[tuple[int, int, bool]]) -> None:
    ranks = Ranks(_buffer(), "step")
    table = ranks.buffer.registry.get("")
    number = 200
    for rank, batches, adds in plan:
        if adds:
            number += 1
            table.add(_episode(number))
        for body in _take(ranks.samplers[rank], batches):
            steps = body["stamp"].reshape(HORIZON + 1, BATCH)
            assert (np.diff(steps, axis=0) == 1).all()
            assert np.array_equal(steps[0] // STRIDE, body["provenance.policy_version"])


def test_kept_global_batches_are_bounded_however_late_a_rank_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "MAX_KEPT_BYTES", 10 * WORLD * BATCH * ranks_module.BYTES_PER_SLICE)
    ranks = Ranks(_buffer(), "episode")
    whole = _take(_whole(_buffer(), "episode"), 50)
    for _ in range(50):
        _take(ranks.samplers[0])
    (job,) = ranks.jobs._jobs.values()
    assert sorted(job.draws[0]._kept) == list(range(40, 50))

    late = _take(ranks.samplers[1], 41)

    assert _redrawn(ranks) == 40 * BATCH
    assert as_bits(late[40]["stamp"]) == as_bits(whole[40]["stamp"][:, BATCH : 2 * BATCH])
    assert as_bits(late[39]["stamp"]) != as_bits(whole[39]["stamp"][:, BATCH : 2 * BATCH])


def test_rank_that_comes_back_goes_on_where_it_says() -> None:
    ranks, whole = Ranks(_buffer(), "step"), _take(_whole(_buffer(), "step"), 80)
    for rank in range(WORLD):
        _take(ranks.samplers[rank], 70)

    for rank in (0, 1, 3):
        _take(ranks.samplers[rank], 5)
    again = ranks.join(2, first=65)  # it had drawn ahead

    for number, body in enumerate(_take(again, 10), start=65):
        assert as_bits(body["stamp"]) == as_bits(whole[number]["stamp"][:, 2 * BATCH : 3 * BATCH])
    assert not _redrawn(ranks)


def test_job_that_begins_in_the_middle_has_the_batches_of_the_middle() -> None:
    buffer, jobs = _buffer(), RankJobs()
    whole = _take(_whole(_buffer(), "task"), 12)
    with ExitStack() as stack:
        for rank, first in ((1, 10), (0, 9)):
            share = _share(jobs, stack, buffer, rank, first=first)
            sampler = TableSampler(buffer.registry.get(""), _spec(buffer, "task"), share.rng, share=share)
            for number, body in enumerate(_take(sampler, 2), start=first):
                assert as_bits(body["stamp"]) == as_bits(whole[number]["stamp"][:, rank * BATCH : (rank + 1) * BATCH])


def test_mix_gives_each_rank_its_exact_shares_of_the_global_batch() -> None:
    buffer, jobs = _buffer(), RankJobs()
    mix = MixSpec.of({"": 1, "demos": 2})
    tables = [buffer.registry.get(name) for name in mix.names]
    whole = _take(MixSampler(mix, tables, np.random.default_rng(SEED), batch_size=WORLD * BATCH), 3)
    with ExitStack() as stack:
        shares = [_share(jobs, stack, buffer, rank) for rank in range(WORLD)]
        parts = [_take(MixSampler(mix, tables, share.rng, batch_size=BATCH, share=share), 3) for share in shares]

    for number, body in enumerate(whole):
        for part in parts:
            assert part[number]["provenance.table"].tolist() == [0] * 2 + [1] * 4
        for table, (begin, end) in enumerate(((0, 2), (2, 6))):
            stamps = np.concatenate([part[number]["stamp"][:, begin:end] for part in parts], axis=1)
            assert as_bits(stamps) == as_bits(body["stamp"][:, body["provenance.table"] == table])


def test_rank_cannot_draw_while_nothing_is_stored() -> None:
    ranks = Ranks(ReplayBuffer(make_config(300, horizon=HORIZON, batch_size=BATCH)), "episode")
    reserved = ranks.samplers[0].reserve(1, waits=False)
    assert reserved is not None
    with pytest.raises(NotReadyError):
        ranks.samplers[0].draw(reserved)
    ranks.buffer.registry.get("").add(_episode(4))

    assert len(_take(ranks.samplers[0])) == 1


def test_jobs_of_other_names_are_others_and_a_job_ends_with_its_last_stream() -> None:
    buffer, jobs = _buffer(), RankJobs()
    with ExitStack() as outer:
        with ExitStack() as inner:
            _share(jobs, inner, buffer, 0)
            _share(jobs, outer, buffer, 0, job="other")
            assert len(jobs._jobs) == 2
        assert len(jobs._jobs) == 1
        _share(jobs, outer, buffer, 0)  # it may begin again
    assert not jobs._jobs


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_rank_that_was_here_before_must_say_where_it_goes_on(stack: ExitStack) -> None:
    buffer, jobs = _buffer(), RankJobs()
    _share(jobs, stack, buffer, 0)
    with ExitStack() as gone:
        _share(jobs, gone, buffer, 3, job="")
    with pytest.raises(InvalidArgumentError, match=r"rank: 3 of the job '' has a stream, or had one .*first_batch=N"):
        _share(jobs, stack, buffer, 3)
    with pytest.raises(InvalidArgumentError, match="rank: 0 of the job"):
        _share(jobs, stack, buffer, 0)

    _share(jobs, stack, buffer, 3, first=0)


@pytest.mark.parametrize(
    ("rank", "world_size", "job", "first_batch", "fault"),
    [
        (4, 4, "", None, "rank: 4, expected 0 to 3 with world_size=4"),
        (-1, 4, "", None, "rank: -1, expected 0 to 3"),
        (0, 0, "", None, "world_size: 0, expected 1 to 4096"),
        (0, 4097, "", None, "world_size: 4097"),
        (0, 1, "x" * 129, None, "job: "),
        (0, 1, "", -1, "first_batch: -1, expected 0 or more"),
    ],
)
def test_rank_out_of_range_is_refused_by_name(rank: int, world_size: int, job: str, first_batch: int | None, fault: str) -> None:
    with pytest.raises(InvalidArgumentError, match=fault):
        Rank.of(rank, world_size, job, first_batch)
