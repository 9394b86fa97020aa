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
from touchline_server.store import columns, gather, gather_threads
from touchline_server.store.gather import GatherPlan, SpacedBodies
from touchline_server.store.gather_threads import GatherThreads
from touchline_server.store.joined_rows import JoinedTables
from touchline_server.store.pinned_draw import DrawnPart, locate

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


def with_optional(part: DrawnPart, optional: Collection[str], horizon: int, random: np.random.Generator) -> DrawnPart:
    """Returns the part with random values in these optional fields of its provenance."""
    size = len(part.draw.start)
    values = {
        "weight": random.random(size, dtype=np.float32),
        "table": random.integers(0, 3, size),
        "valid": random.random((horizon, size, 1)) < 0.5,
    }
    return replace(part, draw=replace(part.draw, **{name: values[name] for name in optional}))


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

    with buffer.store.draw(batch_size, horizon, buffer.spec().law, random) as pinned:
        part = with_optional(locate(pinned.draw, pinned.columns, batches=1, horizon=horizon), optional, horizon, random)
        plan.gather_into([part], [whole])
        tensors = plan.gather_tensors([part], layout)
        body = layout.body_views(plan.host_bodies(part, 1)[0])
        pieces = []
        for piece in layout.chunk_plan(chunk_bytes):
            _, out = layout.chunk(piece, {})
            plan.piece_gatherer([part], layout)(piece, out)
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
    batches=st.integers(1, 3),
    incoming=st.booleans(),
    chunk_bytes=st.integers(64, 400),
    small_below=st.sampled_from([0, 40, 1 << 13]),
    optional=OPTIONAL,
    seed=st.integers(0, 999),
)
def test_batches_that_several_stores_provide_parts_of_hold_the_batches_of_each(
    data: st.DataObject,
    schema: dict[str, tuple[np.dtype, tuple[int, ...]]],
    horizon: int,
    shares: list[int],
    batches: int,
    incoming: bool,
    chunk_bytes: int,
    small_below: int,
    optional: set[str],
    seed: int,
) -> None:
    """Each part is drawn from one of two stores of equal schema and different capacity, and gathered in every way there is."""
    stores = [ReplayBuffer(make_config(rows, storage={"allow_non_finite": True}, horizon=horizon)).store for rows in (20, 28)]
    random = np.random.default_rng(seed)
    for store in stores:
        for _ in range(5):
            store.add(Episode(random_episode(schema, 6, random)))
    assert stores[0].schema == stores[1].schema and stores[0].schema is not None
    plan = GatherPlan(stores[0].schema, horizon=horizon, incoming=incoming, threads=GatherThreads(data.draw(st.integers(1, 3), "threads")))
    layout = plan.layout(sum(shares), wire_order(optional))
    spaced = SpacedBodies(
        layout, bytearray(b"\7" * (5 * layout.body_bytes + 500)), offset_bytes=48, spacing_bytes=layout.body_bytes + 64, count=5
    )
    chosen = data.draw(st.permutations(range(5)), "bodies")[:batches]
    with ExitStack() as pins, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "BULK_STEP_BYTES", small_below)
        patch.setattr(gather_threads, "MIN_SHARED_BYTES", 0)
        patch.setattr(gather_threads, "PIECE_BYTES", data.draw(st.sampled_from([1, 50, 1 << 20]), "piece"))
        patch.setattr(columns, "MIN_STEP_BYTES", data.draw(st.sampled_from([1, 1 << 12]), "least step"))
        parts: list[DrawnPart] = []
        expected = [blank_body(layout) for _ in range(batches)]
        for number, (begin, size) in enumerate(zip(np.cumsum([0, *shares])[:-1].tolist(), shares, strict=True)):
            store = stores[data.draw(st.integers(0, 1), f"store of part {number}")]
            pinned = pins.enter_context(store.draw(size, horizon, "episode", random, batches=batches))
            part = locate(pinned.draw, pinned.columns, batches=batches, horizon=horizon, begin=begin)
            parts.append(with_optional(part, optional, horizon, random))
            alone = [blank_body(plan.layout(size, wire_order(optional))) for _ in range(batches)]
            plan.gather_into([replace(parts[-1], begin=0, end=size)], alone)
            for whole, body in zip(expected, alone, strict=True):
                for name, array in body.items():
                    (whole[name][:, begin : begin + size] if array.ndim > 1 else whole[name][begin : begin + size])[...] = array

        bodies = [blank_body(layout) for _ in range(batches)]
        plan.gather_into(data.draw(st.permutations(parts), "order of gathering"), bodies)
        each = []
        for position, _ in zip(chosen, plan.gather_each_into(parts, spaced, chosen), strict=True):
            each.append({name: array.copy() for name, array in spaced.each[position].items()})
        joined = JoinedTables(parts)
        joined_bodies = [blank_body(layout) for _ in range(batches)]
        plan.gather_into(parts, joined_bodies, joined)
        joined_each = []
        for position in chosen:
            for array in spaced.each[position].values():
                array.fill(7)
        for position, _ in zip(chosen, plan.gather_each_into(parts, spaced, chosen, joined), strict=True):
            joined_each.append({name: array.copy() for name, array in spaced.each[position].items()})
        tensors = plan.gather_tensors(parts, layout)
        seen = {spec.name: b"" for spec in layout.specs}
        gather_piece = plan.piece_gatherer(parts, layout)
        for piece in layout.chunk_plan(chunk_bytes):
            _, targets = layout.chunk(piece, {})
            gather_piece(piece, targets)
            for (name, *_), target in zip(piece.segments, targets, strict=True):
                seen[name] += target.tobytes()

    wanted = [{name: array.tobytes() for name, array in body.items()} for body in expected]
    blank = {name: array.tobytes() for name, array in blank_body(layout).items()}
    for gathered in (bodies, each, joined_bodies, joined_each):
        assert [{name: array.tobytes() for name, array in body.items()} for body in gathered] == wanted
    assert seen == wanted[0]
    assert {name: as_bits(tensor)[2] for name, tensor in tensors.items()} == wanted[0]
    for position in set(range(5)) - set(chosen):
        assert {name: array.tobytes() for name, array in spaced.each[position].items()} == blank


def test_gather_of_a_part_writes_nothing_else() -> None:
    buffer = ReplayBuffer(make_config(40))
    buffer.add_episode(traced(0, 20))
    assert buffer.store.schema is not None
    plan = GatherPlan(buffer.store.schema, horizon=3, incoming=True)
    layout = plan.layout(9)
    spaced = SpacedBodies(layout, bytearray(b"\7" * layout.body_bytes), offset_bytes=0, spacing_bytes=layout.body_bytes, count=1)
    body = blank_body(layout)

    with buffer.store.draw(4, 3, "episode", np.random.default_rng(0)) as pinned:
        part = locate(pinned.draw, pinned.columns, batches=1, horizon=3, begin=2)
        plan.gather_into([part], [body])
        assert list(plan.gather_each_into([part], spaced, [0])) == [None]

    blank = blank_body(layout)
    for written in (body, spaced.each[0]):
        for name, array in written.items():
            batch_axis = min(array.ndim, 2) - 1
            for outside in (range(2), range(6, 9)):
                assert array.take(outside, batch_axis).tobytes() == blank[name].take(outside, batch_axis).tobytes(), name
            assert array.take(range(2, 6), batch_axis).tobytes() != blank[name].take(range(2, 6), batch_axis).tobytes(), name
