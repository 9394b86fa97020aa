"""Mixed batches: drawn together they are those of draws in sequence, and the rate limit of each table counts its own slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.recording_limiter import RecordingLimiter
from support.store_cases import as_bits, make_config, traced
from touchline_server import ReplayBuffer
from touchline_server.tables.mix_sampler import MixSampler, MixSpec
from touchline_server.tables.sampler import Reserved


def make_buffer() -> ReplayBuffer:
    buffer = ReplayBuffer(make_config(200).override(tables={"a": {}, "b": {"buffer_size": 90, "law": "step"}, "c": {"buffer_size": 50}}))
    for position, name in enumerate(("a", "b", "c")):
        for number in range(12):  # the rings wrap around
            buffer.tables[name].add_episode(traced(position * 100 + number, 5 + number, actor=f"{name}{number % 2}"))
    return buffer


BUFFER = make_buffer()


def sampler_of(mix: dict[str, int], batch_size: int, seed: int, buffer: ReplayBuffer, pad: str | None = None) -> MixSampler:
    tables = [buffer.registry.get(name) for name in mix]
    return MixSampler(MixSpec.of(mix), tables, np.random.default_rng(seed), batch_size=batch_size, pad=pad)


mixes = st.dictionaries(st.sampled_from("abc"), st.integers(0, 4), min_size=1).filter(lambda mix: any(mix.values()))


@settings(max_examples=40, deadline=None)
@given(mixes, st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**32), st.sampled_from(["none", "end"]))
def test_mixed_batches_of_one_draw_are_those_of_draws_in_sequence(
    mix: dict[str, int], batch_size: int, batches: int, seed: int, pad: str
) -> None:
    gathered: list[list[dict[str, Any]]] = []
    for counts in ([batches], [1] * batches):
        sampler = sampler_of(mix, batch_size, seed, BUFFER, pad)
        found = []
        for count in counts:
            reserved = sampler.reserve(count, waits=False)
            assert reserved is not None
            with sampler.draw(reserved) as drawn:
                assert len(drawn) == count
                bodies = [drawn.layout.body_views(bytearray(b"\7" * drawn.layout.body_bytes)) for _ in range(count)]
                drawn.gather_into(bodies)
                assert drawn.actors() == {actor for body in bodies for actor in body["provenance.actor"].tolist()}
            found += bodies
        gathered.append(found)

    for together, alone in zip(*gathered, strict=True):
        assert all(as_bits(together[name]) == as_bits(alone[name]) for name in alone)
    split = sampler.reserve(1, waits=False).split  # type: ignore[union-attr]
    for body in together, alone:
        assert body["provenance.table"].tolist() == [position for position, count in enumerate(split) for _ in range(count)]


@pytest.mark.parametrize(("allowed", "granted"), [((9, 9), 5), ((3, 9), 3), ((9, 2), 2), ((9, 0), 0)])
def test_each_rate_limit_is_asked_for_its_slices_and_gets_back_what_the_other_holds(allowed: tuple[int, int], granted: int) -> None:
    buffer = make_buffer()
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
