"""Draws on the device, in Triton's interpreter on columns in host memory; on a card in tests/gpu."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from weakref import ref

import numpy as np
import pytest
from scipy import stats

from support.device_draws import DRAWN_BY_KEY_7, check_drawn, fill, on_host
from support.store_cases import make_config, traced
from touchline_server import InvalidArgumentError, NotReadyError, ReplayBuffer, SchemaChangedError
from touchline_server.selectors.entries import ID, LENGTH
from touchline_server.tables.device_sampler import DeviceSampler

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="this machine may have a card, see tests/gpu")
pytestmark = interpreted
LAWS = pytest.mark.parametrize("law", ["episode", "step"])


def make_sampler(buffer: ReplayBuffer, key: int = 1, **request: object) -> DeviceSampler:
    return DeviceSampler(buffer.table, buffer.spec(**request), key)  # type: ignore[arg-type]


@LAWS
@pytest.mark.parametrize("pad", ["none", "end"])
@pytest.mark.parametrize("convention", ["incoming", "outgoing"])
def test_device_batches_hold_the_rows_that_their_provenance_names(law: str, pad: str, convention: str) -> None:
    buffer = ReplayBuffer(make_config(150, row_convention=convention))
    fill(buffer, 30)
    sampler = make_sampler(buffer, batch_size=64, horizon=3, law=law, pad=pad)

    for begin in range(30, 45, 5):  # evicts, and goes over the ring's seam
        check_drawn(buffer, sampler.sample(), 3)
        fill(buffer, 5, begin=begin)
        check_drawn(buffer, sampler.sample(), 3)


@LAWS
@pytest.mark.parametrize("pad", ["none", "end"])
def test_device_draws_follow_their_law_after_evictions_and_around_the_seam(law: str, pad: str) -> None:
    buffer = ReplayBuffer(make_config(120))
    fill(buffer, 7)
    sampler = make_sampler(buffer, batch_size=4096, horizon=3, law=law, pad=pad)
    sampler.sample()
    fill(buffer, 40, begin=7)

    batches = [sampler.sample_fresh() for _ in range(5)]

    reach = 1 if pad == "end" else 3
    chances = {}
    entries = [entry for entry in buffer.store.entries() if entry[LENGTH] > reach]
    starts = sum(entry[LENGTH] - reach for entry in entries)
    for entry in entries:
        for start in range(entry[LENGTH] - reach):
            chances[int(entry[ID]), start] = 1 / starts if law == "step" else 1 / len(entries) / (entry[LENGTH] - reach)
    counts = dict.fromkeys(chances, 0)
    for batch in batches:
        drawn = [*zip(on_host(batch.episode_id).tolist(), on_host(batch.start).tolist(), strict=True)]
        np.testing.assert_allclose(on_host(batch.probability), [chances[one] for one in drawn], rtol=1e-12)
        for one in drawn:
            counts[one] += 1
    assert len(chances) > 40
    assert stats.chisquare([*counts.values()], [5 * 4096 * chance for chance in chances.values()]).pvalue > 1e-3


@LAWS
def test_device_draws_of_one_key_are_the_same_and_of_another_are_not(law: str) -> None:
    buffer = ReplayBuffer(make_config(150))
    fill(buffer, 30)

    found = []
    for key in (5, 5, 6):
        sampler = make_sampler(buffer, key, batch_size=32, law=law)
        found.append([on_host(sampler.sample().start).tolist() for _ in range(3)])

    assert found[0] == found[1]
    assert found[0] != found[2]
    assert found[0][0] != found[0][1] != found[0][2]


def test_device_draws_of_a_key_stay_the_same_from_version_to_version() -> None:
    buffer = ReplayBuffer(make_config(150))
    fill(buffer, 30)

    found = buffer.sample(draw="device", seed=7, batch_size=4)

    assert (on_host(found.episode_id).tolist(), on_host(found.start).tolist()) == DRAWN_BY_KEY_7


def test_device_sampler_fills_the_same_memory_and_fresh_batches_are_others() -> None:
    buffer = ReplayBuffer(make_config(150))
    fill(buffer, 30)
    sampler = make_sampler(buffer, batch_size=16)

    first = sampler.sample()
    kept = on_host(first.action).copy()
    fresh = sampler.sample_fresh()
    assert (on_host(first.action) == kept).all()
    second = sampler.sample()

    assert second.action.data_ptr() == first.action.data_ptr() != fresh.action.data_ptr()
    assert not (on_host(first.action) == kept).all()


def test_device_sampler_follows_more_episodes_than_its_memory_took_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("touchline_server.store.device_episodes.MIN_ENTRIES", 4)
    buffer = ReplayBuffer(make_config(600))
    fill(buffer, 5)
    sampler = make_sampler(buffer, batch_size=256, law="step")

    seen = set()
    for begin in range(5, 150, 5):
        check_drawn(buffer, sampler.sample(), 3)
        fill(buffer, 5, begin=begin)
    for _ in range(5):
        batch = sampler.sample()
        check_drawn(buffer, batch, 3)
        seen |= set(on_host(batch.episode_id).tolist())

    assert seen == {int(entry[ID]) for entry in buffer.store.entries() if entry[LENGTH] > 3}


def test_device_sampler_names_the_actors_of_its_batches() -> None:
    buffer = ReplayBuffer(make_config(150, batch_size=16))
    columns = {"obs": np.ones((9, 2)), "action": np.ones((9, 2)), "reward": np.ones(9)}
    for actor in ("one", "two"):
        buffer.add(columns, actor=actor)

    batch = make_sampler(buffer).sample()

    assert {batch.actor_names[number] for number in batch.actor.tolist()} == {"one", "two"} == set(batch.actor_names.values())


def test_device_sampler_after_clear_asks_for_another_one() -> None:
    buffer = ReplayBuffer(make_config(150))
    fill(buffer, 5)
    sampler = make_sampler(buffer)
    sampler.sample()

    buffer.clear()
    with pytest.raises(NotReadyError):
        sampler.sample()
    fill(buffer, 5)

    with pytest.raises(SchemaChangedError, match="make another sampler"):
        sampler.sample()
    check_drawn(buffer, make_sampler(buffer).sample(), 3)


def test_device_sampler_does_not_keep_the_memory_of_a_cleared_table() -> None:
    buffer = make_buffer()
    columns = ref(buffer.store.columns)
    sampler = buffer.device_sampler(seed=1)
    sampler.sample()
    buffer.sample(draw="device")

    buffer.clear()
    gc.collect()

    assert columns() is None


def test_device_sampler_keeps_an_add_waiting_only_while_it_holds() -> None:
    buffer = ReplayBuffer(make_config(60))
    fill(buffer, 30)
    sampler = make_sampler(buffer)

    with sampler.hold():
        assert buffer.store.try_add(traced(99, 60)) is None
    assert buffer.store.try_add(traced(99, 60)) is not None


@pytest.mark.parametrize("law", ["prioritized", "fresh_first"])
def test_device_draw_by_another_law_is_refused_by_its_name(law: str) -> None:
    buffer = ReplayBuffer(make_config(150))
    fill(buffer, 5)

    with pytest.raises(InvalidArgumentError, match=f"'{law}', expected one of episode, step"):
        make_sampler(buffer, law=law)


def test_device_draw_of_columns_in_host_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    buffer = ReplayBuffer(make_config(150))
    fill(buffer, 5)

    with pytest.raises(InvalidArgumentError, match="columns are in host memory"):
        make_sampler(buffer)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from touchline_server.store.draw_kernel import draw_slices

pointers = dict(state="*i64", random="*i64", rows="*i64", provenance="*i64", probability="*fp64", valid="*u8")
numbers = dict(batch_size="i32", horizon="i32", reach="i32")
for law in (0, 1):
    for pad in (False, True):
        chosen = dict(LAW=law, PAD=pad, BLOCK=256)
        signature = pointers | numbers | dict.fromkeys(chosen, "constexpr")
        source = ASTSource(fn=draw_slices, signature=signature, constexprs=chosen)
        assert len(triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["cubin"]) > 1000
"""
"""Needs ptxas, which Triton brings along, and no card."""


@pytest.mark.parametrize("capability", ["80", "90"])
def test_draw_kernel_compiles_for_a_card(capability: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, capability], env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


def make_buffer(capacity: int = 150, **keys: object) -> ReplayBuffer:
    buffer = ReplayBuffer(make_config(capacity, **keys))  # type: ignore[arg-type]
    fill(buffer, 20)
    return buffer


def test_buffer_draws_on_the_device_into_fresh_batches_that_a_seed_repeats() -> None:
    buffers = [make_buffer(seed=3, batch_size=32) for _ in range(2)]

    found = [[buffer.sample(draw="device", seed=seed) for seed in (None, 7, None, 7)] for buffer in buffers]

    for batches in found:
        assert len({batch.action.data_ptr() for batch in batches}) == 4
        for batch in batches:
            check_drawn(buffers[0], batch, 3)
    starts = [[on_host(batch.start).tolist() for batch in batches] for batches in found]
    assert starts[0] == starts[1]
    assert starts[0][1] == starts[0][3]
    assert len({tuple(drawn) for drawn in starts[0]}) == 3


def test_buffer_makes_another_device_sampler_after_clear() -> None:
    buffer = make_buffer()
    buffer.sample(draw="device")
    buffer.clear()
    buffer.add({"obs": np.arange(9.0), "action": np.ones((9, 2)), "reward": np.ones(9)})

    batch = buffer.sample(draw="device")

    assert (batch.obs[1:] - batch.obs[:-1] == 1).all()


def test_device_sampler_asks_the_rate_limit() -> None:
    config = make_config(150).model_copy()
    buffer = ReplayBuffer(config)
    fill(buffer, 20)
    buffer.set_rate(samples_per_insert=1.0, tolerance=100, min_steps=1)
    sampler = buffer.device_sampler(batch_size=64, seed=1)

    with pytest.raises(NotReadyError, match="rate limit"):
        for _ in range(100):
            sampler.sample()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draw": "gpu"}, "expected 'host' or 'device'"),
        ({"draw": "device", "mix": {"": 1.0}}, "'device' with a mix"),
        ({"draw": "device", "seed": -1}, "seed: -1"),
        ({"draw": "device", "law": "prioritized"}, "'prioritized', expected one of"),
    ],
)
def test_buffer_refuses_draws_that_a_device_cannot_make(arguments: dict[str, object], message: str) -> None:
    buffer = make_buffer()

    with pytest.raises(InvalidArgumentError, match=message):
        buffer.sample(**arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="device_sampler"):
        buffer.sample(draw="device", out=buffer.sample())
