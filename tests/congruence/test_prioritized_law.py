"""The law ``prioritized`` on every path of a batch: what is drawn, its probabilities and weights, and the priorities sent back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from congruence.test_congruence import HORIZON, PATHS, Subject, draw_many, make_config, make_episode, open_subject
from support.store_cases import chi_square, chi_square_limit, count_cells

LENGTHS = (30, 7, 3, 22, 15, 40, 9)
"""Rows of the episodes, again and again; the third is too short."""

ALPHA, BETA, ETA = 0.7, 0.5, 0.8


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Steps:
    """The priorities of the stored transitions, as plain lists."""

    def __init__(self) -> None:
        self.episodes: dict[int, list[float]] = {}
        self.highest = 1.0

    def keep(self, ids: list[int], lengths: dict[int, int]) -> None:
        """Takes over what is stored: steps that were not there before are new."""
        self.episodes = {number: self.episodes.get(number) or [self.highest] * lengths[number] for number in ids}

    def update(self, ids: np.ndarray, starts: np.ndarray, priorities: np.ndarray) -> None:
        for column, (number, start) in enumerate(zip(ids.tolist(), starts.tolist(), strict=True)):
            if number in self.episodes:
                for step, value in enumerate(priorities[:, column].tolist()):
                    self.episodes[number][start + step] = value
                    self.highest = max(self.highest, value)

    def weights(self) -> dict[tuple[int, int], float]:
        found = {}
        for number, steps in self.episodes.items():
            for start in range(len(steps) - HORIZON):
                values = steps[start : start + HORIZON]
                found[number, start] = (ETA * max(values) + (1 - ETA) * sum(values) / HORIZON) ** ALPHA
        return found


def prioritized_subject(path: str, stack: ExitStack, *, shared: bool = False) -> Subject:
    sampling = {"law": "prioritized", "priority_alpha": ALPHA, "priority_beta": BETA, "priority_eta": ETA, "seed": 5}
    storage = {"share_columns": "on"} if shared else {}
    config = make_config(sampling=sampling, config={"buffer_size": 150, "batch_size": 200}, storage=storage)
    return open_subject(path, stack, config)


def send(subject: Subject, ids: np.ndarray, starts: np.ndarray, priorities: np.ndarray) -> None:
    """Updates priorities by the subject's own verb, and waits until they are set."""
    subject.verbs.update_priorities((ids, starts), priorities)
    if subject.verbs is not subject.buffer:
        subject.verbs.priorities.flush()


def play(subject: Subject, steps: Steps, rng: np.random.Generator, first: int, count: int) -> None:
    """Adds episodes, evicting others, and updates priorities of random slices after each, some of them of episodes that are gone."""
    for number in range(first, first + count):
        subject.verbs.add(make_episode(number, LENGTHS[number % len(LENGTHS)]), actor=f"actor-{number % 3}", policy_version=number)
        stored = subject.buffer.store.entries()
        steps.keep(stored[:, 0].tolist(), dict(zip(stored[:, 0].tolist(), stored[:, 2].tolist(), strict=True)))
        long_enough = stored[stored[:, 2] > HORIZON]
        chosen = long_enough[rng.integers(0, len(long_enough), 6)]
        ids, starts = chosen[:, 0].copy(), (rng.random(6) * (chosen[:, 2] - HORIZON)).astype(np.int64)
        ids[0], starts[0] = max(number - 20, 0), 0  # evicted, unless the play has just begun
        if ids[0] in steps.episodes and len(steps.episodes[int(ids[0])]) <= HORIZON:
            ids[0], starts[0] = ids[1], starts[1]
        priorities = rng.gamma(0.5, 4.0, (HORIZON, 6)).astype(np.float32) + np.float32(0.01)
        send(subject, ids, starts, priorities)
        steps.update(ids, starts, priorities)


def test_prioritized_draws_fit_the_priorities_after_evictions_clears_and_wrap_around(path: str, stack: ExitStack) -> None:
    subject, steps, rng = prioritized_subject(path, stack), Steps(), np.random.default_rng(3)
    play(subject, steps, rng, 0, 25)  # the ring of 150 rows goes round more than three times
    subject.verbs.clear()
    steps = Steps()
    play(subject, steps, rng, 25, 19)
    weights = steps.weights()
    total = sum(weights.values())
    cells = list(weights)
    assert subject.buffer.counts().episodes_evicted > 30

    counts = np.zeros(len(cells))
    drawn = 0
    for batch in draw_many(subject, stack, 100):
        found = list(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True))
        counts += count_cells(found, cells)
        drawn += len(found)
        chances = np.array([weights[cell] / total for cell in found])
        np.testing.assert_allclose(batch.probability, chances, rtol=1e-6)  # weights are float32
        expected = (len(cells) * chances) ** -BETA
        np.testing.assert_allclose(batch.weight, expected / expected.max(), rtol=1e-5)
        assert batch.weight.dtype == torch.float32
        assert torch.equal(batch.extra["value"][0], batch.episode_id * 1000.0 + batch.start)

    # Cells that are expected fewer than five times are counted together.
    expected = np.array([weights[cell] / total for cell in cells]) * drawn
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        counts = np.append(counts[~rare], counts[rare].sum())
    assert chi_square(counts, expected) < chi_square_limit(len(expected) - 1)


def test_prioritized_same_seed_gives_the_same_batch_as_in_process(path: str, stack: ExitStack) -> None:
    # The order of priorities in the tree is that of the rows, of which shared columns have more.
    shared = path == "device"
    subject, reference = prioritized_subject(path, stack), prioritized_subject("in process", stack, shared=shared)
    for side in (subject, reference):
        play(side, Steps(), np.random.default_rng(4), 0, 12)

    count = 1 if path == "unary" else 9
    for one, other in zip(subject.draw(7, count), reference.draw(7, count), strict=True):
        for name in ("episode_id", "start", "probability", "weight", "reward"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
