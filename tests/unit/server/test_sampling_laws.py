"""Both laws by chi-square on episodes of unequal length, and the sources of randomness. All seeds are fixed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SliceSampler
from torchrl.data import ReplayBuffer as TorchRLBuffer

from support.store_cases import chi_square, chi_square_limit, chi_square_two_samples, count_cells, make_config, traced
from touchline_server import InvalidArgumentError, ReplayBuffer
from touchline_server.selectors.seeds import SeedSource

HORIZON = 3
LENGTHS = (4, 25, 9, 3, 6, 14)
"""Lengths of six episodes; the fourth is too short."""
DRAWS = 40_000


def filled(lengths: tuple[int, ...] = LENGTHS, *, capacity: int = 100, **sampling: object) -> ReplayBuffer:
    buffer = ReplayBuffer(make_config(capacity, horizon=HORIZON, batch_size=2_000, **sampling))
    for number, length in enumerate(lengths):
        buffer.add_episode(traced(number, length))
    return buffer


def cells_of(lengths: dict[int, int]) -> list[tuple[int, int]]:
    return [(number, start) for number, length in lengths.items() for start in range(length - HORIZON)]


def drawn(buffer: ReplayBuffer, law: str, cells: list[tuple[int, int]]) -> np.ndarray:
    """Returns the counts [cells] of DRAWS slices."""
    counts = np.zeros(len(cells))
    for _ in range(DRAWS // buffer.config.batch_size):
        batch = buffer.sample(law=law)
        counts += count_cells(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True), cells)
    return counts


def episode_law(lengths: dict[int, int]) -> np.ndarray:
    """Returns the expected counts of a uniform episode, then a uniform start in it."""
    starts = [length - HORIZON for length in lengths.values() if length > HORIZON]
    return np.concatenate([np.full(count, DRAWS / len(starts) / count) for count in starts])


def step_law(lengths: dict[int, int]) -> np.ndarray:
    """Returns the expected counts of equally likely starts."""
    cells = len(cells_of(lengths))
    return np.full(cells, DRAWS / cells)


def torchrl_draws(cells: list[tuple[int, int]]) -> np.ndarray:
    """Returns the counts [cells] of DRAWS slices that TorchRL's own sampler draws from the same episodes."""
    slices = 2_000
    buffer = TorchRLBuffer(
        storage=LazyTensorStorage(100),
        sampler=SliceSampler(slice_len=HORIZON + 1, traj_key="episode"),
        batch_size=slices * (HORIZON + 1),
        generator=torch.Generator().manual_seed(11),
    )
    episode = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    step = torch.cat([torch.arange(length) for length in LENGTHS])
    buffer.extend(TensorDict({"episode": episode, "step": step}, batch_size=[sum(LENGTHS)]))
    counts = np.zeros(len(cells))
    for _ in range(DRAWS // slices):
        first = buffer.sample().reshape(slices, HORIZON + 1)[:, 0]
        counts += count_cells(zip(first["episode"].tolist(), first["step"].tolist(), strict=True), cells)
    return counts


def test_episode_law_before_eviction_is_that_of_torchrls_slice_sampler() -> None:
    cells = cells_of(dict(enumerate(LENGTHS)))

    ours, theirs = drawn(filled(seed=1), "episode", cells), torchrl_draws(cells)

    assert chi_square_two_samples(ours, theirs) < chi_square_limit(len(cells) - 1)


def test_step_law_is_not_that_of_torchrls_slice_sampler() -> None:
    """The test above can tell laws apart."""
    cells = cells_of(dict(enumerate(LENGTHS)))

    ours, theirs = drawn(filled(seed=1), "step", cells), torchrl_draws(cells)

    assert chi_square_two_samples(ours, theirs) > 10 * chi_square_limit(len(cells) - 1)


@pytest.mark.parametrize("law", ["episode", "step"])
def test_law_before_eviction_fits_its_own_expectation_only(law: str) -> None:
    lengths = dict(enumerate(LENGTHS))
    cells = cells_of(lengths)

    counts = drawn(filled(seed=2), law, cells)

    fits = {fit.__name__: chi_square(counts, fit(lengths)) < chi_square_limit(len(cells) - 1) for fit in (episode_law, step_law)}
    assert fits == {"episode_law": law == "episode", "step_law": law == "step"}


@pytest.mark.parametrize(("law", "expected"), [("episode", episode_law), ("step", step_law)])
def test_law_after_evictions_fits_the_episodes_that_are_left(law: str, expected: Callable[[dict[int, int]], np.ndarray]) -> None:
    buffer = filled((4, 25, 9, 3, 6, 14, 20, 5, 11), capacity=60, seed=3)
    lengths = {number: length for number, length in enumerate((4, 25, 9, 3, 6, 14, 20, 5, 11)) if number >= 3}  # 59 rows
    cells = cells_of(lengths)
    assert buffer.num_eps == len(lengths)

    counts = drawn(buffer, law, cells)

    assert chi_square(counts, expected(lengths)) < chi_square_limit(len(cells) - 1)


@pytest.mark.parametrize(("law", "expected"), [("episode", episode_law), ("step", step_law)])
def test_probability_of_a_draw_is_that_of_its_law(law: str, expected: Callable[[dict[int, int]], np.ndarray]) -> None:
    buffer = filled(seed=4)
    lengths = dict(enumerate(LENGTHS))
    chance = dict(zip(cells_of(lengths), expected(lengths) / DRAWS, strict=True))

    batch = buffer.sample(law=law)

    wanted = [chance[cell] for cell in zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True)]
    assert batch.probability.dtype == torch.float64
    np.testing.assert_allclose(batch.probability, wanted, rtol=1e-12)


def play(buffer: ReplayBuffer) -> list[tuple[list[int], list[int]]]:
    """Returns the slices of a fixed sequence of adds and draws."""
    slices = []
    for number in range(30):
        buffer.add_episode(traced(number, 4 + number * 7 % 11))
        batch = buffer.sample(batch_size=16, law=("episode", "step")[number % 2])
        slices.append((batch.episode_id.tolist(), batch.start.tolist()))
    return slices


def test_seed_same_adds_and_draws_give_the_same_batches() -> None:
    one, other, third = (play(ReplayBuffer(make_config(50, seed=seed))) for seed in (5, 5, 6))

    assert one == other
    assert one != third


def test_seed_none_gives_fresh_entropy() -> None:
    assert play(ReplayBuffer(make_config(50))) != play(ReplayBuffer(make_config(50)))


def test_seed_source_streams_of_one_seed_differ_and_repeat() -> None:
    one, other = ([source.stream().random(4).tolist() for _ in range(3)] for source in (SeedSource(7), SeedSource(7)))

    assert one == other
    assert len({tuple(stream) for stream in one}) == 3


def test_seed_source_without_a_seed_gives_streams_that_differ() -> None:
    source = SeedSource(None)

    assert source.stream().random(4).tolist() != source.stream().random(4).tolist()


@pytest.mark.parametrize("configured", [None, 9])
def test_request_seed_decides_the_batch(configured: int | None) -> None:
    fresh, used = filled(seed=configured), filled(seed=8)
    for _ in range(3):
        used.sample()

    one, other, third = fresh.sample(seed=42), used.sample(seed=42), used.sample(seed=43)

    assert torch.equal(one.extra["stamp"], other.extra["stamp"])
    assert not torch.equal(one.extra["stamp"], third.extra["stamp"])


def test_request_seed_does_not_advance_the_buffers_own_stream() -> None:
    one, other = filled(seed=1), filled(seed=1)

    one.sample(seed=5)

    assert torch.equal(one.sample().start, other.sample().start)


def test_request_seed_negative_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="seed: -1, expected 0 or more"):
        filled().sample(seed=-1)
