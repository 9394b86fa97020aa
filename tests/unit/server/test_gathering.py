"""Batches against a plain model, for any schema, both row conventions, both laws, and every way of gathering."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.store_cases import as_bits, make_config, traced
from touchline_protos.codec import BatchLayout, Episode
from touchline_protos.types.batch import OPTIONAL_PROVENANCE, PROVENANCE
from touchline_protos.types.dtypes import DType, to_numpy
from touchline_server import Batch, ReplayBuffer
from touchline_server.store.gather import GatherPlan
from touchline_server.store.pinned_draw import DrawnSlices
from touchline_server.store.tensors import as_tensor

DTYPES = st.sampled_from(DType).map(to_numpy)
INNER = st.lists(st.integers(0, 3), max_size=3).map(tuple)
SCALAR = st.sampled_from([(), (1,)])
EXTRA_NAMES = ["gain", "info.lives", "info.map.tiles", "observation", "actions"]


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and inner shape by column, in any order: of one agent, or of several in lockstep."""
    agents = draw(st.sampled_from([(), (), (2,), (3,)]))
    observations = draw(st.sampled_from([["obs"], ["obs.a"], ["obs.a", "obs.b.c", "obs.b.d"]]))
    columns = {name: (draw(DTYPES), agents + draw(INNER)) for name in observations}
    columns["action"] = (draw(DTYPES), agents + draw(INNER))
    columns["reward"] = (draw(DTYPES), agents or draw(SCALAR))
    if draw(st.booleans()):
        columns["done"] = (draw(DTYPES), draw(st.sampled_from([(), (1,), agents])))
    if draw(st.booleans()):
        columns["task"] = (draw(DTYPES), draw(SCALAR))
    for name in draw(st.lists(st.sampled_from(EXTRA_NAMES), unique=True, max_size=3)):
        columns[name] = (draw(DTYPES), draw(INNER))
    return {name: columns[name] for name in draw(st.permutations(list(columns)))}


def random_episode(schema: dict[str, tuple[np.dtype, tuple[int, ...]]], length: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Any bits, NaN and infinities among them."""
    columns = {}
    for name, (dtype, inner) in schema.items():
        size = length * int(np.prod(inner, dtype=int)) * dtype.itemsize
        raw = np.frombuffer(random.bytes(size), np.uint8)
        columns[name] = (raw & 1 if dtype == np.bool_ else raw).tobytes()
        columns[name] = np.frombuffer(columns[name], dtype).reshape(length, *inner)
    return columns


def flat(batch: Batch) -> dict[str, Any]:
    """The tensors of a batch by column name."""
    found = {name: getattr(batch, name) for name in ("action", "reward", "done")} | batch.extra
    if batch.task is not None:
        found["task"] = batch.task

    def walk(prefix: str, level: Any) -> None:
        if isinstance(level, dict):
            for name, inner in level.items():
                walk(f"{prefix}.{name}", inner)
        else:
            found[prefix] = level

    walk("obs", batch.obs)
    return found


def expected_batch(model: dict[int, dict[str, np.ndarray]], batch: Batch, *, horizon: int, incoming: bool) -> dict[str, np.ndarray]:
    """Expected content of the slices that the batch claims to hold."""
    slices = list(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True))
    transition = slice(1, None) if incoming else slice(None, -1)
    columns = next(iter(model.values()))
    agents = columns["reward"].shape[1:] or (1,)
    expected = {"done": np.zeros((horizon, len(slices), *agents), np.float32)}
    for name in columns:
        rows = np.stack([model[number][name][start : start + horizon + 1] for number, start in slices], axis=1)
        if name == "task":
            rows = rows[0].reshape(len(slices))
        elif name in ("action", "reward", "done"):
            rows = rows[transition]
            if name != "action":
                rows = rows.reshape(horizon, len(slices), *(columns[name].shape[1:] or (1,)))
        expected[name] = rows
    return expected


@settings(max_examples=80, deadline=None)
@given(
    schema=schemas(),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    horizon=st.integers(1, 5),
    batch_size=st.integers(1, 9),
    incoming=st.booleans(),
    law=st.sampled_from(["episode", "step"]),
    seed=st.integers(0, 2**32),
)
def test_batch_of_any_schema_holds_the_rows_that_it_names(
    schema: dict[str, tuple[np.dtype, tuple[int, ...]]],
    lengths: list[int],
    horizon: int,
    batch_size: int,
    incoming: bool,
    law: str,
    seed: int,
) -> None:
    convention = "incoming" if incoming else "outgoing"
    config = make_config(24, horizon=horizon, batch_size=batch_size, storage={"allow_non_finite": True}, law=law, row_convention=convention)
    buffer = ReplayBuffer(config)
    random = np.random.default_rng(seed)
    model: dict[int, dict[str, np.ndarray]] = {}
    for number, length in enumerate([*lengths, horizon + 1]):
        columns = random_episode(schema, length, random)
        model[number] = columns
        buffer.add_episode(Episode(columns, actor=f"actor {number % 3}", policy_version=number * 100))
        while sum(len(episode["reward"]) for episode in model.values()) > 24:
            del model[min(model)]

    batch = buffer.sample(seed=seed)

    found = flat(batch)
    expected = expected_batch(model, batch, horizon=horizon, incoming=incoming)
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert as_bits(found[name]) == as_bits(array), name
    starts = {number: len(episode["reward"]) - horizon for number, episode in model.items() if len(episode["reward"]) > horizon}
    for column, number in enumerate(batch.episode_id.tolist()):
        assert 0 <= batch.start[column] < starts[number]
        assert batch.policy_version[column] == number * 100
        assert batch.actor_names[int(batch.actor[column])] == f"actor {number % 3}"
        chance = 1 / (len(starts) * starts[number]) if law == "episode" else 1 / sum(starts.values())
        assert batch.probability[column] == pytest.approx(chance, rel=1e-12)


def with_optional(slices: DrawnSlices, optional: Collection[str], horizon: int, random: np.random.Generator) -> DrawnSlices:
    """Returns the slices with random values in these optional fields of their provenance."""
    size = len(slices)
    values = {
        "weight": random.random(size, dtype=np.float32),
        "table": random.integers(0, 3, size),
        "valid": random.random((horizon, size, 1)) < 0.5,
    }
    return replace(slices, draw=replace(slices.draw, **{name: values[name] for name in optional}))


def blank_body(layout: BatchLayout) -> dict[str, np.ndarray]:
    """A body in which every byte is 7: what a gather did not write shows."""
    return layout.body_views(bytearray(b"\7" * layout.body_bytes))


OPTIONAL = st.sets(st.sampled_from([name for name, _ in OPTIONAL_PROVENANCE]))


def wire_order(optional: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name, _ in OPTIONAL_PROVENANCE if name in optional)


@settings(max_examples=40, deadline=None)
@given(
    schema=schemas(),
    horizon=st.integers(1, 4),
    batch_size=st.integers(1, 9),
    incoming=st.booleans(),
    chunk_bytes=st.integers(64, 400),
    optional=OPTIONAL,
    seed=st.integers(0, 999),
)
def test_every_way_of_gathering_gives_the_same_batch(
    schema: dict[str, tuple[np.dtype, tuple[int, ...]]],
    horizon: int,
    batch_size: int,
    incoming: bool,
    chunk_bytes: int,
    optional: set[str],
    seed: int,
) -> None:
    """Whole into host arrays; piece by piece, as for big batches; as tensors or as one body, the ways of CUDA, here on the CPU."""
    buffer = ReplayBuffer(make_config(20, storage={"allow_non_finite": True}, horizon=horizon))
    random = np.random.default_rng(seed)
    for _ in range(4):
        buffer.add_episode(Episode(random_episode(schema, 6, random)))
    ring = buffer.store.columns
    assert ring is not None
    plan = GatherPlan(ring.schema, horizon=horizon, incoming=incoming)
    layout = plan.layout(batch_size, wire_order(optional))
    whole = blank_body(layout)

    with buffer.store.draw(batch_size, horizon, buffer.spec().law, random) as (drawn,):
        slices = with_optional(drawn, optional, horizon, random)
        plan.gather_into([slices], [whole])
        tensors = plan.gather_tensors(slices)
        body = layout.body_views(plan.host_bodies([slices])[0])
        pieces = []
        for piece in layout.chunk_plan(chunk_bytes):
            _, out = layout.chunk(piece, {})
            plan.piece_gatherer(slices)(piece, out)
            pieces.append((piece, out))

    assert {name: as_bits(tensor) for name, tensor in tensors.items()} == {name: as_bits(array) for name, array in whole.items()}
    assert {name: array.tobytes() for name, array in body.items()} == {name: array.tobytes() for name, array in whole.items()}
    seen = {spec.name: b"" for spec in layout.specs}
    for piece, out in pieces:
        for (name, _, _, _), array in zip(piece.segments, out, strict=True):
            seen[name] += array.tobytes()
    assert seen == {name: array.tobytes() for name, array in whole.items()}
    assert {name for name in tensors if name.startswith("provenance.")} == {f"provenance.{name}" for name, _ in PROVENANCE} | {
        f"provenance.{name}" for name in optional
    }


def test_gather_tensors_are_fresh_memory() -> None:
    buffer = ReplayBuffer(make_config(20))
    columns = {"obs": np.ones((20, 2)), "action": np.ones((20, 2)), "reward": np.ones(20)}
    buffer.add(columns)

    with buffer.table.draw(buffer.spec(), np.random.default_rng(0)) as drawn:
        tensors = drawn.gather_tensors()
    buffer.add({name: 2 * array for name, array in columns.items()})

    assert (tensors["obs"] == 1).all()
    assert tensors["done"].dtype == torch.float32


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    schema=schemas(),
    horizon=st.integers(1, 4),
    shares=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    incoming=st.booleans(),
    chunk_bytes=st.integers(64, 400),
    optional=OPTIONAL,
    seed=st.integers(0, 999),
)
def test_body_that_is_gathered_in_ranges_from_several_stores_is_that_of_one_gather(
    data: st.DataObject,
    schema: dict[str, tuple[np.dtype, tuple[int, ...]]],
    horizon: int,
    shares: list[int],
    incoming: bool,
    chunk_bytes: int,
    optional: set[str],
    seed: int,
) -> None:
    """Each range of slices is drawn from one of two stores of equal schema; the ranges are gathered in any order, and piece by piece."""
    stores = [ReplayBuffer(make_config(20, storage={"allow_non_finite": True}, horizon=horizon)).store for _ in range(2)]
    random = np.random.default_rng(seed)
    for store in stores:
        for _ in range(4):
            store.add(Episode(random_episode(schema, 6, random)))
    assert stores[0].schema == stores[1].schema and stores[0].schema is not None
    plan = GatherPlan(stores[0].schema, horizon=horizon, incoming=incoming)
    firsts = np.cumsum([0, *shares])[:-1].tolist()
    batch_size = sum(shares)
    layout = plan.layout(batch_size, wire_order(optional))
    with ExitStack() as pins:
        parts = []
        for number, (first, size) in enumerate(zip(firsts, shares, strict=True)):
            store = stores[data.draw(st.integers(0, 1), f"store of range {number}")]
            (slices,) = pins.enter_context(store.draw(size, horizon, "episode", random))
            parts.append((first, with_optional(slices, optional, horizon, random)))

        expected = layout.body_views(bytearray(layout.body_bytes))
        for first, slices in parts:
            part = plan.layout(len(slices), wire_order(optional))
            alone = part.body_views(bytearray(part.body_bytes))
            plan.gather_into([slices], [alone])
            for name, array in alone.items():
                axis = array.ndim > 1
                expected[name][(slice(None),) * axis + (slice(first, first + len(slices)),)] = array

        body, tensors = blank_body(layout), {}
        for output in plan.outputs:
            tensors[output.name] = as_tensor(np.ones(output.spec(batch_size).shape, np.uint8).astype(output.dtype))
        for first, slices in data.draw(st.permutations(parts), "order of gathering"):
            plan.gather_into([slices], [body], first=first)
            plan.gather_into_tensors(slices, tensors, first=first)
        seen = {spec.name: b"" for spec in layout.specs}
        for piece in layout.chunk_plan(chunk_bytes):
            _, targets = layout.chunk(piece, {})
            for first, slices in data.draw(st.permutations(parts), "order of gathering a piece"):
                plan.gather_piece_into(slices, piece, targets, batch_size=batch_size, first=first)
            for (name, *_), target in zip(piece.segments, targets, strict=True):
                seen[name] += target.tobytes()

    wanted = {name: array.tobytes() for name, array in expected.items()}
    assert {name: array.tobytes() for name, array in body.items()} == wanted
    assert seen == wanted
    assert {name: as_bits(tensor)[2] for name, tensor in tensors.items()} == {output.name: wanted[output.name] for output in plan.outputs}


def test_gather_of_a_range_writes_nothing_else() -> None:
    buffer = ReplayBuffer(make_config(40))
    buffer.add_episode(traced(0, 20))
    assert buffer.store.schema is not None
    plan = GatherPlan(buffer.store.schema, horizon=3, incoming=True)
    body = blank_body(plan.layout(9))

    with buffer.store.draw(4, 3, "episode", np.random.default_rng(0)) as slices:
        plan.gather_into(slices, [body], first=2)

    blank = blank_body(plan.layout(9))
    for name, array in body.items():
        batch_axis = min(array.ndim, 2) - 1
        for outside in (range(2), range(6, 9)):
            assert array.take(outside, batch_axis).tobytes() == blank[name].take(outside, batch_axis).tobytes(), name
        assert array.take(range(2, 6), batch_axis).tobytes() != blank[name].take(range(2, 6), batch_axis).tobytes(), name
