"""How large a durable store's files get, beside the ring: for episodes of any length, few wide columns or many narrow ones."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.durable_cases import durable_config
from touchline_protos.codec import Episode, EpisodeKey
from touchline_server import ReplayBuffer
from touchline_server.durability.database import FILE_NAME

# What docs/guarantees.md says, section The promises.
RING_FACTOR = 2
EPISODE_BYTES = 300
COLUMN_BYTES = 150
"""Bytes for each column of each episode, in addition to its name."""
LEDGER_BYTES = 2 << 20
LOG_BYTES = 36 << 20
TRANSACTION_FACTOR = 2


def make_episode(number: int, *, length: int, width: int, columns: int) -> Episode:
    obs = {f"obs.column_{column}": np.full((length, width), number, np.float32) for column in range(columns)}
    return Episode(
        obs | {"action": np.zeros((length, 2), np.float32), "reward": np.zeros(length, np.float32)},
        key=EpisodeKey(f"client-{number % 4}", 1, number // 4),
        actor=f"actor-{number % 4}",
    )


def bound_bytes(capacity: int, example_of: Episode, episodes: int) -> int:
    """The largest that the main file may be."""
    row_bytes = example_of.size_bytes // example_of.length
    names = sum(COLUMN_BYTES + len(name) for name in example_of.columns)
    return RING_FACTOR * capacity * row_bytes + episodes * (EPISODE_BYTES + names) + LEDGER_BYTES


def fill(folder: Path, *, capacity: int, lengths: list[int], width: int, columns: int, turns: int) -> None:
    """Fills a ring several times over, and compares the files with the bound after each group."""
    most = number = 0
    with closing(ReplayBuffer(durable_config(folder, capacity=capacity))) as buffer:
        while buffer.counts().steps_added < turns * capacity:
            group = [make_episode(number + more, length=lengths[more % len(lengths)], width=width, columns=columns) for more in range(64)]
            number += len(group)
            for answer in [buffer.table.submit(episode) for episode in group]:
                answer.result()  # type: ignore[union-attr]
            # The group, being one transaction, may have been there beside all that it evicts.
            most = max(most, buffer.counts().episodes_stored + len(group))
            main, log = ((folder / name).stat().st_size for name in (FILE_NAME, f"{FILE_NAME}-wal"))
            assert main <= bound_bytes(capacity, group[0], most)
            assert log <= LOG_BYTES + TRANSACTION_FACTOR * sum(episode.size_bytes + EPISODE_BYTES for episode in group)
        assert buffer.counts().episodes_evicted > 0
    assert (folder / FILE_NAME).stat().st_size <= bound_bytes(capacity, group[0], most)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    width=st.sampled_from([1, 4, 16, 60, 220]),
    columns=st.integers(1, 5),
)
@example(lengths=[1], width=1, columns=1)
@example(lengths=[2], width=16, columns=1)
@example(lengths=[1], width=1, columns=30)
# Columns of a bit more than half a page: each has a page of its own.
@example(lengths=[18], width=60, columns=2)
# Columns of a bit more than a page.
@example(lengths=[20], width=110, columns=2)
@example(lengths=[60, 1], width=220, columns=3)
def test_files_of_any_episodes_stay_within_the_stated_bound(lengths: list[int], width: int, columns: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), capacity=max(150, sum(lengths) * 150 // len(lengths)), lengths=lengths, width=width, columns=columns, turns=3)


@pytest.mark.slow
def test_files_of_a_ring_that_was_filled_often_stay_within_the_stated_bound(tmp_path: Path) -> None:
    # Where bookkeeping is most of it: the ring has 36 bytes a row.
    fill(tmp_path, capacity=8_000, lengths=[2], width=1, columns=6, turns=2)
