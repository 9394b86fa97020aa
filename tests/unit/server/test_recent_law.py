"""The law ``recent`` against its definition: which starts, how probable, and the running sums of weights that halve with age."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.store_cases import append_episode, chi_square, chi_square_limit, count_cells, make_config, traced
from touchline_server import ConfigError, InvalidArgumentError, ReplayBuffer
from touchline_server.selectors import decay
from touchline_server.selectors.decay import DecayingStarts
from touchline_server.selectors.entries import ID, LENGTH
from touchline_server.selectors.options import LawOptions, LawSettings
from touchline_server.store.index import EpisodeIndex

HORIZON = 3
Cells = dict[tuple[int, int], float]


def ages(index: EpisodeIndex) -> dict[tuple[int, int], int]:
    """Returns the number of rows that are newer than each start that can be sampled."""
    rows = [(number, step) for number, length in index.entries[:, [ID, LENGTH]].tolist() for step in range(length)]
    lengths = dict(index.entries[:, [ID, LENGTH]].tolist())
    return {(number, step): age for age, (number, step) in enumerate(reversed(rows)) if step < lengths[number] - HORIZON}


def window_law(index: EpisodeIndex, steps: int) -> Cells:
    """Returns the probability of each start in the newest rows."""
    inside = [cell for cell, age in ages(index).items() if age < steps]
    if not inside:
        newest = max(number for number, _ in ages(index))
        inside = [cell for cell in ages(index) if cell[0] == newest]
    return {cell: 1 / len(inside) for cell in inside}


def half_life_law(index: EpisodeIndex, half_life: float) -> Cells:
    """Returns the probability of each start by its age, summed over all rows: what the selector must never do."""
    weights = {cell: 0.5 ** (age / half_life) for cell, age in ages(index).items()}
    total = sum(weights.values())
    return {cell: weight / total for cell, weight in weights.items()}


def check_law(index: EpisodeIndex, law: Cells, options: LawOptions, *, seed: int, draws: int = 20_000) -> None:
    """Asserts the starts, their numbers by chi-square, and the probability of each."""
    draw = index.selectors.of("recent").draw(draws, HORIZON, np.random.default_rng(seed), options=options)
    slices = list(zip(draw.episode_id.tolist(), draw.start.tolist(), strict=True))
    assert set(slices) <= law.keys()
    np.testing.assert_allclose(draw.probability, [law[cell] for cell in slices], rtol=1e-9)
    # Cells that are expected less than 5 times are one: chi-square does not hold for them.
    common = [cell for cell in law if law[cell] * draws >= 5]
    rare = sum(chance for cell, chance in law.items() if law[cell] * draws < 5) * draws
    counts = count_cells([cell for cell in slices if cell in set(common)], common)
    expected = np.array([law[cell] * draws for cell in common])
    if rare >= 5:
        counts, expected = np.append(counts, draws - counts.sum()), np.append(expected, rare)
    if len(expected) > 1:
        assert chi_square(counts, expected) < chi_square_limit(len(expected) - 1)


def evicted_and_wrapped(lengths: tuple[int, ...] = (9, 4, 25, 3, 6, 14, 2, 20, 5, 11)) -> EpisodeIndex:
    """An index whose oldest episodes were evicted and whose ring was closed more than once."""
    index = EpisodeIndex(LawSettings(60))
    for number, length in enumerate(lengths * 3):
        append_episode(index, number, length)
    return index


@pytest.mark.parametrize("steps", [4, 6, 17, 40, 60, 1_000])
def test_recent_steps_after_evictions_and_wrapping_draws_the_newest_rows_only(steps: int) -> None:
    index = evicted_and_wrapped()

    check_law(index, window_law(index, steps), LawOptions(recent_steps=steps), seed=1)


@pytest.mark.parametrize("half_life", [1.0, 3.5, 20.0, 1e6])
def test_half_life_after_evictions_and_wrapping_fits_the_law(half_life: float) -> None:
    index = evicted_and_wrapped()

    check_law(index, half_life_law(index, half_life), LawOptions(recent_half_life=half_life), seed=2)


def test_half_life_is_in_rows_across_episodes() -> None:
    index = EpisodeIndex(LawSettings(1_000))
    for number, length in enumerate([40, 3, 3, 40]):
        append_episode(index, number, length)
    draw = index.selectors.of("recent").draw(5_000, HORIZON, np.random.default_rng(3), options=LawOptions(recent_half_life=10.0))
    chance = dict(zip(zip(draw.episode_id.tolist(), draw.start.tolist(), strict=True), draw.probability, strict=True))

    # Logical rows of episode 3 begin at 46.
    assert chance[3, 30] / chance[3, 20] == pytest.approx(2)
    assert chance[3, 0] / chance[0, 36] == pytest.approx(2)


def test_recent_steps_without_a_long_enough_episode_in_the_window_draws_the_newest_one() -> None:
    index = EpisodeIndex(LawSettings(100))
    for number, length in enumerate([30, 8, 3, 3, 3]):
        append_episode(index, number, length)

    check_law(index, window_law(index, 5), LawOptions(recent_steps=5), seed=4)
    assert {number for number, _ in window_law(index, 5)} == {1}


def test_one_episode_that_fills_the_ring_is_all_recent() -> None:
    index = EpisodeIndex(LawSettings(10))
    append_episode(index, 0, 7)
    append_episode(index, 1, 10)

    check_law(index, window_law(index, 10), LawOptions(recent_steps=10), seed=5)
    check_law(index, window_law(index, 5), LawOptions(recent_steps=5), seed=5)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=60),
    used_after=st.integers(0, 60),
    options=st.one_of(
        st.integers(HORIZON + 1, 70).map(lambda steps: LawOptions(recent_steps=steps)),
        st.floats(1, 1e12).map(lambda half_life: LawOptions(recent_half_life=half_life)),
    ),
)
def test_probability_is_that_of_the_definition_whatever_came_and_went(lengths: list[int], used_after: int, options: LawOptions) -> None:
    index = EpisodeIndex(LawSettings(40))
    for number, length in enumerate([*lengths, 5]):
        append_episode(index, number, length)
        if number >= used_after and len(index.eligible(HORIZON)):
            index.selectors.of("recent").draw(1, HORIZON, np.random.default_rng(number), options=options)

    draw = index.selectors.of("recent").draw(64, HORIZON, np.random.default_rng(0), options=options)

    law = window_law(index, options.recent_steps) if options.recent_steps else half_life_law(index, options.recent_half_life or 0)
    chances = [law[cell] for cell in zip(draw.episode_id.tolist(), draw.start.tolist(), strict=True)]
    np.testing.assert_allclose(draw.probability, chances, rtol=1e-9)


@pytest.mark.parametrize("half_life", [1.0, 64.0, 1e9])
def test_sums_of_weights_stay_right_and_finite_over_many_rows(half_life: float) -> None:
    index = EpisodeIndex(LawSettings(300))
    options = LawOptions(recent_half_life=half_life)
    for number, length in enumerate(itertools.islice(itertools.cycle([30, 7, 3, 90, 12]), 5_000)):
        append_episode(index, number, length)
        if not number:
            index.selectors.of("recent").draw(1, HORIZON, np.random.default_rng(0), options=options)

    check_law(index, half_life_law(index, half_life), options, seed=6)


def test_unit_of_weights_is_set_rarely() -> None:
    """Every reset costs O(episodes), so there may be at most one for many episodes."""
    resets = 0
    reset = DecayingStarts._reset_unit

    def count(self: DecayingStarts, row: int) -> None:
        nonlocal resets
        resets += 1
        reset(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecayingStarts, "_reset_unit", count)
        starts = DecayingStarts(HORIZON, 1_000.0, np.empty((0, 6), np.int64))
        for number in range(10_000):
            starts.append((number, 0, 50, 0, 0, 0))
            if number >= 100:
                starts.evict((number - 100, 0, 50, 0, 0, 0))

    assert resets <= 10_000 // 100 * 1.5
    assert decay.MAX_DOUBLINGS == 512


def test_clear_forgets_every_start() -> None:
    buffer = ReplayBuffer(make_config(60, horizon=HORIZON))
    for number in range(20):
        buffer.add_episode(traced(number, 9))
        buffer.sample(law="recent", recent_half_life=5.0)
    buffer.clear()
    buffer.add_episode(traced(20, 5))

    assert set(buffer.sample(law="recent", recent_half_life=5.0).episode_id.tolist()) == {20}
    assert set(buffer.sample(law="recent", recent_steps=5).episode_id.tolist()) == {20}


def test_batches_drawn_together_are_those_drawn_one_by_one() -> None:
    for options in (LawOptions(recent_steps=20), LawOptions(recent_half_life=8.0)):
        selector = evicted_and_wrapped().selectors.of("recent")
        together = selector.draw(8, HORIZON, np.random.default_rng(7), batches=5, options=options)
        rng = np.random.default_rng(7)
        single = [selector.draw(8, HORIZON, rng, options=options) for _ in range(5)]

        assert together.start.tolist() == [start for draw in single for start in draw.start.tolist()]


def test_window_of_a_request_replaces_that_of_the_table() -> None:
    buffer = ReplayBuffer(make_config(200, horizon=HORIZON, law="recent", recent_steps=10, seed=1))
    for number in range(10):
        buffer.add_episode(traced(number, 10))

    assert set(buffer.sample(batch_size=500).episode_id.tolist()) == {9}
    assert set(buffer.sample(batch_size=500, recent_steps=20).episode_id.tolist()) == {8, 9}
    assert len(set(buffer.sample(batch_size=500, recent_half_life=100.0).episode_id.tolist())) == 10


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"law": "recent"}, "law: 'recent' with neither of recent_steps and recent_half_life, expected one of them"),
        ({"law": "recent", "recent_steps": 9, "recent_half_life": 2.0}, "law: 'recent' with both of recent_steps and recent_half_life"),
        ({"law": "recent", "recent_steps": 3}, "recent_steps: 3, expected at least 4"),
        ({"law": "recent", "recent_steps": 1, "pad": "end"}, "recent_steps: 1, expected at least 2"),
        ({"law": "recent", "recent_half_life": 0.5}, "recent_half_life: 0.5, expected at least 1 row"),
        ({"law": "recent", "recent_half_life": float("nan")}, "recent_half_life: nan, expected at least 1 row"),
        ({"law": "recent", "recent_half_life": float("inf")}, "recent_half_life: inf, expected at least 1 row, and a finite number"),
        ({"recent_steps": 9}, "recent_steps: 9 under the law 'episode', expected it only under 'recent'"),
        ({"law": "step", "recent_half_life": 9.0}, "recent_half_life: 9.0 under the law 'step', expected it only under 'recent'"),
    ],
)
def test_bad_window_of_a_request_is_refused_by_name(request_: dict[str, object], text: str) -> None:
    buffer = ReplayBuffer(make_config(horizon=HORIZON))
    buffer.add_episode(traced(0, 9))

    with pytest.raises(InvalidArgumentError) as caught:
        buffer.sample(**request_)

    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        ({"law": "recent"}, "sampling.recent_steps: unset, expected it or recent_half_life, because sampling.law is 'recent'"),
        ({"recent_steps": 9, "recent_half_life": 3.0}, "sampling.recent_steps: 9 beside recent_half_life, expected only one of them"),
        ({"recent_steps": 3}, "sampling.recent_steps: 3, expected at least 4, the rows of the shortest slice"),
        ({"recent_steps": 0}, "sampling.recent_steps: 0, expected at least 1"),
        ({"recent_half_life": 0.9}, "sampling.recent_half_life: 0.9, expected at least 1"),
        ({"recent_half_life": float("inf")}, "sampling.recent_half_life: inf, expected a finite number"),
        ({"recent_half_life": True}, "sampling.recent_half_life: True, expected a number"),
    ],
)
def test_bad_window_of_a_configuration_is_refused_by_name(sampling: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(horizon=HORIZON, **sampling)

    assert text in str(caught.value)
