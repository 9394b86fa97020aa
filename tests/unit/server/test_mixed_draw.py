"""Mixed batches: the ways to gather one agree to the byte, and the rate limit of each table counts its own slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.recording_limiter import RecordingLimiter
from support.store_cases import make_config, traced_columns
from touchline_protos.codec import Episode
from touchline_server import ReplayBuffer
from touchline_server.tables.mix_sampler import MixSampler, MixSpec
from touchline_server.tables.sampler import Reserved


def make_buffer(*, odd_rows: bool) -> ReplayBuffer:
    buffer = ReplayBuffer(make_config(200).override(tables={"a": {}, "b": {"buffer_size": 90, "law": "step"}, "c": {"buffer_size": 50}}))
    for position, name in enumerate(("a", "b", "c")):
        for number in range(12):  # the rings wrap around
            columns = traced_columns(position * 100 + number, 5 + number)
            if not odd_rows:  # rows of 1, 4, 8 and 16 bytes: any two tables are whole rows apart
                columns = {key: value for key, value in columns.items() if not key.startswith("obs.")} | {"obs": columns["stamp"] * 3}
            buffer.tables[name].add_episode(Episode(columns, actor=f"{name}{number % 2}", policy_version=number))
    return buffer


BUFFERS = {odd_rows: make_buffer(odd_rows=odd_rows) for odd_rows in (False, True)}


def sampler_of(mix: dict[str, int], batch_size: int, seed: int, buffer: ReplayBuffer) -> MixSampler:
    tables = [buffer.registry.get(name) for name in mix]
    return MixSampler(MixSpec.of(mix), tables, np.random.default_rng(seed), batch_size=batch_size)


mixes = st.dictionaries(st.sampled_from("abc"), st.integers(0, 4), min_size=1).filter(lambda mix: any(mix.values()))


@given(mixes, st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**32), st.integers(64, 4_000), st.booleans())
def test_ways_to_gather_a_mixed_batch_agree(
    mix: dict[str, int], batch_size: int, batches: int, seed: int, chunk_bytes: int, odd_rows: bool
) -> None:
    gathered: list[list[dict[str, Any]]] = []
    for way in ("joined", "ranges", "one by one"):
        sampler = sampler_of(mix, batch_size, seed, BUFFERS[odd_rows])
        reserved = sampler.reserve(batches, waits=False)
        assert reserved is not None
        with sampler.draw(reserved) as drawn:
            assert odd_rows or drawn._joined is not None
            if way == "ranges":
                drawn._joined = None
            bodies = [drawn.layout.body_views(np.full(drawn.layout.body_bytes, 171, np.uint8)) for _ in range(batches)]
            if way == "one by one":
                for number, body in enumerate(bodies):
                    drawn.gather_one_into(number, body)
            else:
                drawn.gather_into(bodies)
            gather = drawn.piece_gatherer()
            for piece in drawn.layout.chunk_plan(chunk_bytes):
                targets = [
                    np.empty((end - first, *bodies[0][name].shape[2:]), bodies[0][name].dtype) for name, first, end, _ in piece.segments
                ]
                gather(piece, targets)
                for (name, first, end, _), target in zip(piece.segments, targets, strict=True):
                    assert np.array_equal(bodies[0][name].reshape(-1, *target.shape[1:])[first:end], target)
        gathered.append(bodies)

    for bodies in gathered[1:]:
        for body, reference in zip(bodies, gathered[0], strict=True):
            assert all(np.array_equal(body[name], reference[name]) for name in reference)


@pytest.mark.parametrize(("allowed", "granted"), [((9, 9), 5), ((3, 9), 3), ((9, 2), 2), ((9, 0), 0)])
def test_each_rate_limit_is_asked_for_its_slices_and_gets_back_what_the_other_holds(allowed: tuple[int, int], granted: int) -> None:
    buffer = make_buffer(odd_rows=True)
    limiters = [RecordingLimiter(batches=batches) for batches in allowed]
    for name, limiter in zip("ab", limiters, strict=True):
        buffer.registry.get(name).limiter = limiter  # type: ignore[assignment]
    sampler = sampler_of({"a": 1, "b": 3}, 8, 1, buffer)

    reserved = sampler.reserve(5, waits=False)

    assert reserved == (Reserved(granted, (2, 6)) if granted else None)
    assert [limiter.open_slices for limiter in limiters] == [2 * granted, 6 * granted]
    if reserved is not None:
        sampler.delivered(1, reserved.split)
        sampler.cancel(granted - 1, reserved.split)
    assert [limiter.open_slices for limiter in limiters] == [0, 0]
    assert [limiter.slices["delivered"] for limiter in limiters] == ([2, 6] if granted else [0, 0])
