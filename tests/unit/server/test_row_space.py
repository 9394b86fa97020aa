"""Tables of one schema are ranges of rows of one space: ranges never overlap, and the memory of one is freed with its last view."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from support.store_cases import check_traced, make_config, many_dtypes, traced
from touchline_protos.types.episode import Episode
from touchline_server import ReplayBuffer
from touchline_server.store import row_space
from touchline_server.store.columns import Columns
from touchline_server.store.joined_rows import JoinedTables
from touchline_server.store.memory import resident_bytes
from touchline_server.store.pinned_draw import DrawnPart, physical_rows
from touchline_server.store.row_space import GRAIN_ROWS, RowRange, RowSpace
from touchline_server.store.schema import Schema
from touchline_server.tables.mix_sampler import MixSampler, MixSpec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="address space is reserved on Linux only")

SCHEMA = Schema.of(many_dtypes(1, seed=1))
SMALL = Schema(tuple(spec for spec in SCHEMA.columns if spec.name in ("obs.rgb", "reward", "done", "nothing")))
GRAINS = 8


class Ranges(RuleBasedStateMachine):
    """Claims ranges of a small space, writes to them and drops them, against a list of what is claimed."""

    @initialize()
    def make(self) -> None:
        self.space = RowSpace(SMALL.columns, GRAINS * GRAIN_ROWS)
        self.claimed: list[tuple[dict[str, np.ndarray], int, int]] = []
        self.stamp = 0

    def grains(self) -> list[bool]:
        used = [False] * GRAINS
        for _, begin, grains in self.claimed:
            assert not any(used[begin : begin + grains])
            used[begin : begin + grains] = [True] * grains
        return used

    @rule(rows=st.integers(1, 4 * GRAIN_ROWS))
    def claim(self, rows: int) -> None:
        claimed = self.space.claim(rows)

        grains = -(-rows // GRAIN_ROWS)
        free = "".join("x" if used else "." for used in self.grains())
        assert (claimed is None) == ("." * grains not in free)
        if claimed is None:
            return
        arrays = claimed.arrays()
        assert {name: array.shape for name, array in arrays.items()} == {spec.name: (rows, *spec.shape) for spec in SMALL.columns}
        assert not any(array[at].any() for array in arrays.values() for at in (0, rows // 2, -1))  # what was there before is gone
        self.stamp = self.stamp % 100 + 1
        for array in arrays.values():
            array.view(np.uint8)[...] = self.stamp
        self.claimed.append((arrays, claimed.begin // GRAIN_ROWS, grains))

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.claimed:
            arrays, _, _ = self.claimed.pop(data.draw(st.integers(0, len(self.claimed) - 1)))
            # One view of one column keeps all of the range.
            view = arrays["obs.rgb"][1:]
            arrays.clear()
            assert len(set(view.reshape(-1)[:: max(view.size // 9, 1)].tolist())) <= 1
            del view

    @invariant()
    def contents_stay(self) -> None:
        for arrays, _, _ in getattr(self, "claimed", ()):
            values = {int(array.reshape(-1).view(np.uint8)[at]) for array in arrays.values() if array.size for at in (0, -1)}
            assert len(values) == 1


TestRanges = Ranges.TestCase
TestRanges.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)


def test_columns_of_one_schema_share_a_space_whatever_their_order_and_others_do_not() -> None:
    one = Columns(SCHEMA, 10)
    other_order = Columns(Schema(SCHEMA.columns[::-1]), 10)
    other = Columns(Schema(SCHEMA.columns[:3]), 10)

    assert one.range is not None and other_order.range is not None and other.range is not None
    assert one.range.space is other_order.range.space is not other.range.space


def test_view_outlives_its_columns_and_the_space_outlives_none() -> None:
    columns = Columns(SCHEMA, 10)
    array = columns.tensors["int32"].numpy()
    array[...] = 7
    assert columns.range is not None
    begin = columns.range.begin

    columns.release()
    del columns
    gc.collect()
    others = [Columns(SCHEMA, 10) for _ in range(3)]
    for columns in others:
        columns.write(0, many_dtypes(10, seed=3))

    assert (array == 7).all()
    assert begin not in [columns.range.begin for columns in others if columns.range]
    del array, others, columns
    gc.collect()
    assert not any(set(SCHEMA.columns) == set(key) for key in row_space._SPACES)


@pytest.mark.parametrize("fault", ["no address space", "too many rows"])
def test_columns_without_a_range_lie_in_memory_of_their_own(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(row_space, "_SPACES", weakref.WeakValueDictionary())
    if fault == "no address space":
        monkeypatch.setattr(row_space, "RowSpace", refuse)
    else:
        monkeypatch.setattr(row_space, "SPACE_PER_MEMORY", 0)

    buffer = mixed_buffer()

    assert all(table.store.columns is not None and table.store.columns.range is None for table in buffer.registry if table.name)
    check_traced(buffer.sample(mix={"a": 1, "b": 2}, batch_size=32, seed=1), horizon=3)


def mixed_buffer() -> ReplayBuffer:
    buffer = ReplayBuffer(make_config(200).override(tables={"a": {}, "b": {"buffer_size": 90}, "c": {"buffer_size": 50}}))
    for position, name in enumerate("abc"):
        for number in range(12):  # the rings wrap around
            buffer.tables[name].add_episode(traced(position * 100 + number, 5 + number))
    return buffer


def sampler_of(buffer: ReplayBuffer, seed: int, pad: str = "none") -> MixSampler:
    tables = [buffer.registry.get(name) for name in "abc"]
    return MixSampler(MixSpec.of({"a": 2, "b": 1, "c": 3}), tables, np.random.default_rng(seed), batch_size=24, pad=pad)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["add", "clear", "drop"]), st.integers(5, 50)), max_size=12),
    st.integers(0, 2**32),
    st.sampled_from(["none", "end"]),
)
def test_batches_gathered_from_the_space_are_those_gathered_table_by_table(
    changes: list[tuple[str, str, int]], seed: int, pad: str
) -> None:
    buffer = mixed_buffer()
    number = 500
    for name, change, length in changes:
        if change == "clear":
            buffer.tables[name].clear()
        elif change == "drop":
            buffer.drop_table(name)
            buffer.create_table(name, buffer_size=50 + length)
        for rows in (length, length - 1):
            number += 1
            buffer.tables[name].add_episode(traced(number, rows))
    together, apart = sampler_of(buffer, seed, pad), sampler_of(buffer, seed, pad)

    found = []
    for sampler in (together, apart):
        reserved = sampler.reserve(3, waits=False)
        assert reserved is not None
        with sampler.draw(reserved) as drawn:
            assert drawn._joined is not None
            if sampler is apart:
                drawn._joined = None
            bodies = [drawn.layout.body_views(bytearray(b"\7" * drawn.layout.body_bytes)) for _ in range(3)]
            drawn.gather_into(bodies)
        found.append([{name: array.tobytes() for name, array in body.items()} for body in bodies])

    assert found[0] == found[1]


@pytest.fixture
def parts() -> Iterator[list[DrawnPart]]:
    sampler = sampler_of(mixed_buffer(), 3, "end")
    reserved = sampler.reserve(2, waits=False)
    assert reserved is not None
    with sampler.draw(reserved) as drawn:
        yield list(drawn.parts)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("row", [-1, -(2**62), 2**40, "capacity"])
def test_row_outside_its_table_is_refused(parts: list[DrawnPart], part: int, row: int | str) -> None:
    capacity = parts[part].columns.capacity
    first = parts[part].first.copy()
    first[1, 0] = 2 * capacity if row == "capacity" else row
    joined = JoinedTables(parts)
    assert joined.rows(parts).min() >= 0

    with pytest.raises(IndexError, match=f"of a table of {capacity} rows"):
        joined.rows([replace(one, first=first) if one is parts[part] else one for one in parts])


def test_step_outside_its_table_is_refused(parts: list[DrawnPart]) -> None:
    last = np.full_like(parts[1].first, -1000)

    with pytest.raises(IndexError, match="of tables of"):
        JoinedTables(parts).rows([parts[0], replace(parts[1], last=last), parts[2]])


def test_rows_are_those_of_each_table(parts: list[DrawnPart]) -> None:
    rows = JoinedTables(parts).rows(parts)

    for part in parts:
        assert isinstance(part.columns.range, RowRange)
        expected = physical_rows(part.first, 4, part.columns.capacity, last=part.last) + part.columns.range.begin
        assert np.array_equal(rows[:, :, part.begin : part.end], expected)


def test_tables_of_other_schemas_are_not_joined(parts: list[DrawnPart]) -> None:
    other = Columns(SCHEMA, 50)
    assert JoinedTables.key_of(parts) is not None

    assert JoinedTables.key_of([*parts[:2], replace(parts[2], columns=other)]) is None


def test_split_and_tables_tell_joined_tables_apart(parts: list[DrawnPart]) -> None:
    key = JoinedTables.key_of(parts)

    assert key == JoinedTables.key_of(list(parts)) != JoinedTables.key_of(parts[::-1])
    assert key != JoinedTables.key_of([replace(parts[0], end=parts[0].end - 1), *parts[1:]])


def test_reserved_space_uses_no_memory() -> None:
    buffer = mixed_buffer()
    buffer.add_episode(Episode(traced(1, 20).columns))

    columns = buffer.store.columns
    assert columns is not None and columns.range is not None
    assert sum(array.nbytes for array in columns.range.space.columns.values()) > resident_bytes()


def test_columns_on_a_cuda_device_lie_in_no_space() -> None:
    pytest.importorskip("torch")
    from touchline_server.store.cuda_columns import CudaColumns

    columns = CudaColumns.__new__(CudaColumns)  # its memory needs a device, which is not asked here
    part: Any = SimpleNamespace(columns=columns, steps=2)

    assert JoinedTables.key_of([part, part]) is None
