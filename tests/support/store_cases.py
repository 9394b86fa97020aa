"""Buffers, episodes and laws for the tests of the server's core; every value of an episode identifies its episode and step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.types.batch import Batch
from touchline_protos.types.dtypes import BFLOAT16
from touchline_server import Config, ReplayBuffer
from touchline_server.selectors.options import LawOptions, LawSettings
from touchline_server.store.episode_store import EpisodeStore
from touchline_server.store.index import EpisodeIndex
from touchline_server.store.tensors import as_array
from touchline_server.tables.sampler import TableSampler

STRIDE = 1_000_000
"""A traced row's stamp is its episode's number times this, and its step."""


def make_config(
    capacity: int = 64,
    *,
    horizon: int = 3,
    batch_size: int = 8,
    storage: Mapping[str, Any] | None = None,
    server: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> Config:
    """A small buffer on the CPU."""
    return Config(
        config={"buffer_size": capacity, "batch_size": batch_size, "min_history": 0, "horizon": horizon},
        storage={"device": "cpu", **(storage or {})},
        server=server or {},
        sampling=sampling,
    )


def traced_columns(number: int, length: int) -> dict[str, np.ndarray]:
    """Returns an episode's columns: each value is a function of the episode's number and the step, different for each column."""
    stamp = number * STRIDE + np.arange(length, dtype=np.int64)
    return {"stamp": stamp, **_from_stamp(stamp)}


def many_dtypes(length: int, seed: int) -> dict[str, np.ndarray]:
    """Random bits in columns of every kind."""
    random = np.random.default_rng(seed)

    def bits(dtype: Any, *shape: int) -> np.ndarray:
        size = length * int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(random.bytes(size), dtype).reshape(length, *shape).copy()

    return {
        "obs.rgb": bits(np.uint8, 2, 3),
        "obs.deep.state": bits(np.float64, 1, 4),
        "action": bits(BFLOAT16, 2),
        "reward": bits(np.float32),
        "done": bits(np.uint8) > 100,
        "half": bits(np.float16, 1),
        "nothing": np.empty((length, 0), np.int16),
        **{name: bits(name) for name in ("int8", "int16", "int32", "int64")},
    }


def traced(number: int, length: int, *, key: EpisodeKey | None = None, actor: str = "") -> Episode:
    """A traced episode; its number is also its policy version, so that a batch identifies it independently of its rows."""
    return Episode(traced_columns(number, length), key, actor, number)


def _from_stamp(stamp: np.ndarray) -> dict[str, np.ndarray]:
    number, step = np.divmod(stamp, STRIDE)
    image = (stamp[..., None, None] * np.array([[1, 7, 31], [3, 11, 101]]) % 251).astype(np.uint8)
    return {
        "obs.image": image,
        "obs.state": np.stack([number, step, (number * 31 + step * 17) % 1009], axis=-1).astype(np.float32),
        "action": np.stack([step + 0.5, -number.astype(np.float64)], axis=-1),
        "reward": (number * 13 + step).astype(np.float32),
        "done": (number + step) % 3 == 0,
    }


def check_traced(batch: Batch, *, horizon: int, incoming: bool = True) -> None:
    """Asserts that every value of a batch of traced episodes is that of the slice that its provenance names."""
    stamp = np.asarray(batch.extra["stamp"])
    step = np.asarray(batch.start) + np.arange(horizon + 1)[:, None]
    assert np.array_equal(stamp, np.asarray(batch.policy_version) * STRIDE + step)
    expected = _from_stamp(stamp)
    transition = slice(1, None) if incoming else slice(None, -1)
    assert np.array_equal(batch.obs["image"], expected["obs.image"])
    assert np.array_equal(batch.obs["state"], expected["obs.state"])
    assert np.array_equal(batch.action, expected["action"][transition])
    assert np.array_equal(batch.reward, expected["reward"][transition][..., None])
    assert np.array_equal(batch.done, expected["done"][transition][..., None])


def sample_with(buffer: ReplayBuffer, rng: np.random.Generator, **request: Any) -> Batch:
    """A batch of a request, from a generator of the caller's: successive ones are those of a stream with its seed."""
    options = LawOptions(**{name: request.pop(name) for name in LawOptions._fields if name in request})
    return buffer._take(TableSampler(buffer.table, buffer.spec(**request, options=options), rng))


def read_episode(store: EpisodeStore, entry: Sequence[int] | np.ndarray, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """A stored episode's columns as fresh arrays, by its row of ``entries()``. The caller makes sure that no add runs meanwhile."""
    columns = store.columns
    if columns is None:
        return {}
    _, first_row, length, *_ = (int(number) for number in entry)
    rows = np.remainder(np.arange(first_row, first_row + length), store.physical_rows)
    episode = {}
    for spec in columns.schema.columns:
        if names is None or spec.name in names:
            episode[spec.name] = np.empty((length, *spec.shape), spec.dtype)
            columns.gather(spec.name, rows, episode[spec.name])
    return episode


def evict_for(index: EpisodeIndex, length: int) -> tuple[int, int]:
    """Evicts the oldest episodes until this many rows are free; returns how many episodes and steps they were."""
    before = len(index), index.steps
    while index.capacity - index.steps < length:
        index.evict_through(index.oldest_id)
    return before[0] - len(index), before[1] - index.steps


def plain_columns(length: int, **others: Any) -> dict[str, Any]:
    """Returns a smallest valid episode, with further columns if given."""
    return {
        "obs": np.arange(length * 2, dtype=np.float32).reshape(length, 2),
        "action": np.ones((length, 1), np.float32),
        "reward": np.zeros(length, np.float32),
        **others,
    }


def as_bits(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    """Returns a value that is equal for two arrays, or torch tensors on any device, if they are equal bit for bit."""
    if hasattr(array, "detach"):
        array = as_array(array.detach().cpu())
    return "bfloat16" if array.dtype == BFLOAT16 else array.dtype.name, array.shape, array.tobytes()


def filled_index(capacity: int, lengths: list[int]) -> EpisodeIndex:
    """An index to which episodes of these lengths were added, numbered from 0."""
    index = EpisodeIndex(LawSettings(capacity))
    for number, length in enumerate(lengths):
        append_episode(index, number, length)
    return index


def append_episode(index: EpisodeIndex, number: int, length: int) -> tuple[int, int]:
    """Evicts the oldest episodes until an episode fits, and appends it; returns how many episodes and steps were evicted."""
    evicted = evict_for(index, length)
    index.append(Episode({}, actor=str(number % 3), policy_version=10 * number), episode_id=number, length=length)
    return evicted


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Returns Pearson's statistic of counts against expected counts."""
    return float(((observed - expected) ** 2 / expected).sum())


def chi_square_two_samples(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the statistic of two equally large samples against their common law."""
    both = one + other
    return float(((one - other) ** 2 / both)[both > 0].sum())


def chi_square_limit(degrees: int) -> float:
    """Returns the value that the statistic exceeds once in about 10,000 draws of the law itself (Wilson and Hilferty 1931)."""
    ninth = 2 / (9 * degrees)
    return float(degrees * (1 - ninth + 3.719 * ninth**0.5) ** 3)


def count_cells(slices: Iterable[tuple[int, int]], cells: list[tuple[int, int]]) -> np.ndarray:
    """Counts how often each (episode, start) was drawn; a slice outside of the cells is an error."""
    number = {cell: position for position, cell in enumerate(cells)}
    return np.bincount([number[cell] for cell in slices], minlength=len(cells)).astype(np.float64)
