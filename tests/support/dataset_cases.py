"""Servers, episodes and comparisons for the tests of data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from hypothesis import strategies as st

from support.codec_cases import DTYPES, bits
from support.service_calls import make_config
from support.serving import ServerThread, stored_episodes
from touchline_protos.types.dtypes import BFLOAT16

Columns = dict[str, np.ndarray]


def serve(buffer_size: int = 50_000, *, allow_non_finite: bool = True, max_episode_bytes: int = 1 << 30, **sampling: Any) -> ServerThread:
    return ServerThread(
        make_config(
            limits={"max_episode_bytes": max_episode_bytes},
            config={"buffer_size": buffer_size, "min_history": 1, "horizon": 1},
            storage={"allow_non_finite": allow_non_finite},
            sampling=sampling,
        )
    )


def stored(server: ServerThread) -> list[Columns]:
    """Returns the columns of every stored episode, oldest first."""
    return [columns for _, columns in stored_episodes(server)]


def assert_same(found: Sequence[Mapping[str, np.ndarray]], expected: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Asserts that these are the same episodes: names, dtypes, shapes and bits."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert {name: bits(value) for name, value in one.items()} == {name: bits(value) for name, value in other.items()}


def make_episode(number: int, rows: int = 11, *, obs: int = 4) -> Columns:
    """Returns an episode as a recorder would store it, different for every number."""
    rng = np.random.default_rng(number)
    columns = {
        "obs": rng.standard_normal((rows, obs), dtype=np.float32),
        "action": rng.standard_normal((rows, 2), dtype=np.float32),
        "reward": rng.standard_normal(rows, dtype=np.float32),
        "done": np.zeros(rows, np.float32),
    }
    for name in ("action", "reward", "done"):
        columns[name][0] = np.nan
    columns["done"][-1] = number % 2
    return columns


def write_hdf5(path: Path, episodes: Sequence[Mapping[str, np.ndarray]], name: str = "episode_{}", **attributes: Any) -> None:
    """Writes an HDF5 file by hand, as docs/datasets.md describes it."""
    with h5py.File(path, "w") as file:
        for number, columns in enumerate(episodes):
            group = file.create_group(f"episodes/{name.format(number)}")
            group.attrs.update(attributes)
            for column, value in columns.items():
                group[column.replace(".", "/")] = value


def write_npz(path: Path, episodes: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Writes an NPZ file with only numpy, as docs/datasets.md describes it."""
    np.savez(path, **{f"{number}/{name}": value for number, columns in enumerate(episodes) for name, value in columns.items()})


@st.composite
def schemas(draw: st.DrawFn, *, dtypes: Sequence[np.dtype] = DTYPES, empty: bool = True) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Draws any columns that a server accepts, with dtype and shape of a row."""
    kind = st.sampled_from(list(dtypes))
    shape = st.lists(st.integers(0 if empty else 1, 3), max_size=3).map(tuple)
    column = st.tuples(kind, shape)
    scalar = st.tuples(kind, st.sampled_from([(), (1,)]))
    names = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="."), min_size=1, max_size=6)
    schema: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    if draw(st.booleans()):
        schema["obs"] = draw(column)
    else:
        schema |= {f"obs.{name}": spec for name, spec in draw(st.dictionaries(names, column, min_size=1, max_size=3)).items()}
    schema |= {"action": draw(column), "reward": draw(scalar)}
    for name in ("done", "task"):
        if draw(st.booleans()):
            schema[name] = draw(scalar)
    for name, spec in draw(st.dictionaries(names, column, max_size=2)).items():
        if name not in {*schema, "obs", "episode", "index", "terminated"} and not name.startswith("provenance"):
            schema[f"{name}.{name}" if draw(st.booleans()) else name] = spec
    return schema


@st.composite
def datasets(draw: st.DrawFn, *, equal: bool = False, least_rows: int = 1, **kinds: Any) -> list[Columns]:
    """Draws episodes of one schema with any bits, including NaN payloads."""
    schema = draw(schemas(**kinds))
    lengths = draw(st.lists(st.integers(least_rows, 5), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return [{name: _any_bits(rng, lengths[0] if equal else rows, *spec) for name, spec in schema.items()} for rows in lengths]


def _any_bits(rng: np.random.Generator, rows: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod((rows, *shape), dtype=np.int64))
    if dtype == np.bool_:
        return rng.integers(0, 2, (rows, *shape)).astype(np.bool_)
    raw = np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).copy()
    if dtype.kind == "f" and count:
        raw[rng.integers(0, count)] = np.nan
    if dtype == BFLOAT16 and count:
        raw.view(np.uint16)[rng.integers(0, count)] = 0x7FC1
    return raw.reshape((rows, *shape))
