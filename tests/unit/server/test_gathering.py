"""Batches against a plain model, for any schema, both row conventions, both laws, and every way of gathering."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.store_cases import as_bits, make_config
from touchline_protos.codec import Episode
from touchline_protos.types.batch import PROVENANCE
from touchline_protos.types.dtypes import DType, to_numpy
from touchline_server import Batch, ReplayBuffer
from touchline_server.store.gather import GatherPlan

DTYPES = st.sampled_from(DType).map(to_numpy)
INNER = st.lists(st.integers(0, 3), max_size=3).map(tuple)
SCALAR = st.sampled_from([(), (1,)])
EXTRA_NAMES = ["gain", "info.lives", "info.map.tiles", "observation", "actions"]


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and inner shape by column, in any order."""
    observations = draw(st.sampled_from([["obs"], ["obs.a"], ["obs.a", "obs.b.c", "obs.b.d"]]))
    columns = {name: (draw(DTYPES), draw(INNER)) for name in observations}
    columns["action"] = (draw(DTYPES), draw(INNER))
    columns["reward"] = (draw(DTYPES), draw(SCALAR))
    for name in ("done", "task"):
        if draw(st.booleans()):
            columns[name] = (draw(DTYPES), draw(SCALAR))
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
    """What the slices that the batch says it has must hold."""
    slices = list(zip(batch.episode_id.tolist(), batch.start.tolist(), strict=True))
    transition = slice(1, None) if incoming else slice(None, -1)
    expected = {"done": np.zeros((horizon, len(slices), 1), np.float32)}
    for name in next(iter(model.values())):
        rows = np.stack([model[number][name][start : start + horizon + 1] for number, start in slices], axis=1)
        if name == "task":
            rows = rows[0].reshape(len(slices))
        elif name in ("action", "reward", "done"):
            rows = rows[transition]
            if name != "action":
                rows = rows.reshape(horizon, len(slices), 1)
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


@settings(max_examples=40, deadline=None)
@given(
    schema=schemas(),
    horizon=st.integers(1, 4),
    batch_size=st.integers(1, 9),
    incoming=st.booleans(),
    chunk_bytes=st.integers(64, 400),
    seed=st.integers(0, 999),
)
def test_every_way_of_gathering_gives_the_same_batch(
    schema: dict[str, tuple[np.dtype, tuple[int, ...]]], horizon: int, batch_size: int, incoming: bool, chunk_bytes: int, seed: int
) -> None:
    """Whole into host arrays; piece by piece, as for big batches; as tensors or as one body, the ways of CUDA, here on the CPU."""
    buffer = ReplayBuffer(make_config(20, storage={"allow_non_finite": True}, horizon=horizon))
    random = np.random.default_rng(seed)
    for _ in range(4):
        buffer.add_episode(Episode(random_episode(schema, 6, random)))
    ring = buffer.store.columns
    assert ring is not None
    plan = GatherPlan.of(ring.schema, batch_size=batch_size, horizon=horizon, incoming=incoming)
    whole = {spec.name: np.full(spec.shape, 7, np.uint8).astype(spec.dtype) for spec in plan.layout.specs if spec.dtype.names is None}
    whole |= {spec.name: np.empty(spec.shape, spec.dtype) for spec in plan.layout.specs if spec.dtype.names is not None}

    with buffer.store.select(batch_size, horizon, buffer.spec().law, random) as (selection,):
        plan.fill(selection, whole)
        tensors = plan.gather_tensors(selection)
        body = plan.layout.body_views(plan.host_bodies([selection])[0])
        pieces = []
        for piece in plan.layout.chunk_plan(chunk_bytes):
            _, out = plan.layout.chunk(piece, {})
            plan.fill_piece(selection, piece, out)
            pieces.append((piece, out))

    assert {name: as_bits(tensor) for name, tensor in tensors.items()} == {name: as_bits(array) for name, array in whole.items()}
    assert {name: array.tobytes() for name, array in body.items()} == {name: array.tobytes() for name, array in whole.items()}
    seen = {spec.name: b"" for spec in plan.layout.specs}
    for piece, out in pieces:
        for (name, _, _, _), array in zip(piece.segments, out, strict=True):
            seen[name] += array.tobytes()
    assert seen == {name: array.tobytes() for name, array in whole.items()}
    assert set(tensors) >= {f"provenance.{name}" for name, _ in PROVENANCE}


def test_gather_tensors_are_fresh_memory() -> None:
    buffer = ReplayBuffer(make_config(20))
    columns = {"obs": np.ones((20, 2)), "action": np.ones((20, 2)), "reward": np.ones(20)}
    buffer.add(columns)

    with buffer.select(buffer.spec(), np.random.default_rng(0)) as ((selection,), plan):
        tensors = plan.gather_tensors(selection)
    buffer.add({name: 2 * array for name, array in columns.items()})

    assert (tensors["obs"] == 1).all()
    assert tensors["done"].dtype == torch.float32
