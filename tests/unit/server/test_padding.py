"""``pad="end"``: every transition is a start, rows beyond the episode's end repeat its last one, and ``valid`` says what is real."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.store_cases import STRIDE, chi_square, chi_square_limit, count_cells, make_config, traced
from touchline_protos import Batch
from touchline_server import ConfigError, InvalidArgumentError, NotReadyError, ReplayBuffer

HORIZON = 3
LENGTHS = (4, 25, 2, 9, 1, 3, 14)


def filled(lengths: tuple[int, ...] = LENGTHS, *, capacity: int = 100, **sampling: object) -> ReplayBuffer:
    buffer = ReplayBuffer(make_config(capacity, horizon=HORIZON, batch_size=400, seed=1, **sampling))
    for number, length in enumerate(lengths):
        buffer.add_episode(traced(number, length))
    return buffer


def check_padded(batch: Batch, lengths: dict[int, int], *, incoming: bool = True) -> None:
    """Asserts every row and every flag of a padded batch by its provenance."""
    length = np.array([lengths[number] for number in batch.episode_id.tolist()])
    steps = batch.start.numpy() + np.arange(HORIZON + 1)[:, None]
    rows = np.minimum(steps, length - 1)
    assert batch.valid.dtype == torch.bool
    assert batch.valid.shape == (HORIZON, len(length), 1)
    assert batch.valid[0].all()
    assert np.array_equal(batch.valid[..., 0], steps[1:] <= length - 1)
    assert np.array_equal(batch.extra["stamp"], batch.episode_id.numpy() * STRIDE + rows)
    transitions = rows[1:] if incoming else rows[:-1]
    assert np.array_equal(batch.action[..., 0], transitions + 0.5)
    assert np.array_equal(batch.reward[..., 0], (batch.episode_id.numpy() * 13 + transitions).astype(np.float32))


@pytest.mark.parametrize("incoming", [True, False])
@pytest.mark.parametrize("law", ["episode", "step", "recent", "fresh_first"])
def test_padded_rows_repeat_the_last_one_and_valid_tells_them_apart(law: str, incoming: bool) -> None:
    buffer = filled(row_convention="incoming" if incoming else "outgoing")
    options = {"recent_half_life": 20.0} if law == "recent" else {}

    batch = buffer.sample(law=law, pad="end", **options)

    check_padded(batch, dict(enumerate(LENGTHS)), incoming=incoming)


def test_every_transition_of_every_episode_is_a_start() -> None:
    buffer = filled()
    cells = [(number, start) for number, length in enumerate(LENGTHS) for start in range(length - 1)]

    drawn = buffer.sample(batch_size=40_000, law="step", pad="end")

    slices = list(zip(drawn.episode_id.tolist(), drawn.start.tolist(), strict=True))
    assert chi_square(count_cells(slices, cells), np.full(len(cells), 40_000 / len(cells))) < chi_square_limit(len(cells) - 1)
    np.testing.assert_allclose(drawn.probability, 1 / len(cells), rtol=1e-12)


def test_padded_slices_at_the_seam_of_the_ring_stay_in_their_episode() -> None:
    lengths = (9, 4, 25, 2, 6, 14, 5, 11)
    buffer = filled(lengths * 3, capacity=37)
    stored = {number: length for number, length in enumerate(lengths * 3) if number in set(buffer.store.entries()[:, 0].tolist())}

    for _ in range(5):
        check_padded(buffer.sample(pad="end"), stored)
    buffer.clear()
    buffer.add_episode(traced(24, 2))
    check_padded(buffer.sample(pad="end"), {24: 2})


def test_without_padding_nothing_changes() -> None:
    buffer, other = filled(), filled()

    one, two = buffer.sample(), other.sample(pad="none")

    assert one.valid is None and two.valid is None
    assert torch.equal(one.extra["stamp"], two.extra["stamp"])
    assert one.start.max() <= 25 - 1 - HORIZON


def test_request_overrides_the_configuration() -> None:
    buffer = filled(pad="end")

    assert buffer.sample().valid is not None
    assert buffer.sample(pad="none").valid is None


def test_only_short_episodes_can_be_sampled_with_padding_only() -> None:
    buffer, padded = filled((3, 2)), filled((3, 2), pad="end")

    with pytest.raises(NotReadyError, match="or take a smaller horizon, or pad='end'"):
        buffer.sample()
    assert not buffer.ready() and padded.ready()
    check_padded(buffer.sample(pad="end"), {0: 3, 1: 2})
    assert buffer.counts().episodes_too_short == 2
    assert padded.counts().episodes_too_short == 0


def test_episode_of_one_row_has_no_transition() -> None:
    buffer = filled((1, 1), pad="end")

    assert not buffer.ready()
    with pytest.raises(NotReadyError, match="has the 2 steps that horizon 1 needs, the longest has 1"):
        buffer.sample()


def test_bad_pad_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgumentError, match="pad: 'start', expected 'none' or 'end'"):
        filled().sample(pad="start")
    with pytest.raises(ConfigError, match=r"sampling\.pad: 'start', expected 'none' or 'end'"):
        make_config(pad="start")


def test_torchrls_samples_are_padded_as_configured() -> None:
    buffer = filled(pad="end")

    sample, info = buffer.as_torchrl().sample(return_info=True)

    rows = sample["stamp"].reshape(-1, HORIZON + 1)
    real = info["valid"].reshape(-1, HORIZON + 1)
    truncated = torch.as_tensor(info[("next", "truncated")]).reshape(-1, HORIZON + 1)
    for slice_rows, slice_real, slice_end in zip(rows.tolist(), real.tolist(), truncated.tolist(), strict=True):
        count = sum(slice_real)
        assert slice_real == [True] * count + [False] * (HORIZON + 1 - count)
        assert slice_rows == [*range(slice_rows[0], slice_rows[0] + count), *[slice_rows[0] + count - 1] * (HORIZON + 1 - count)]
        assert slice_end == [row == count - 1 for row in range(HORIZON + 1)]
        if count <= HORIZON:
            number, step = divmod(slice_rows[-1], STRIDE)
            assert step == LENGTHS[number] - 1
