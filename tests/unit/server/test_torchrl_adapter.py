"""The store as a regular TorchRL buffer."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchrl.data
from tensordict import TensorDict, TensorDictBase

from support.store_cases import STRIDE, check_traced, make_config, plain_columns, read_episode, traced, traced_columns
from touchline_server import InvalidArgumentError, InvalidEpisodeError, NotReadyError, ReplayBuffer

HORIZON = 3

pytestmark = pytest.mark.filterwarnings("ignore:Got conflicting batch_sizes")


def as_td(*numbers_and_lengths: tuple[int, int]) -> TensorDict:
    """Returns traced episodes in sequence, with an ``episode`` column if there are several; nested observations."""
    episodes = [traced_columns(number, length) for number, length in numbers_and_lengths]
    columns = {tuple(name.split(".")): torch.from_numpy(np.concatenate([episode[name] for episode in episodes])) for name in episodes[0]}
    if len(episodes) > 1:
        columns["episode"] = torch.cat([torch.full((length,), number) for number, length in numbers_and_lengths])
    return TensorDict(columns, [sum(length for _, length in numbers_and_lengths)])


def check_slices(sample: TensorDictBase, steps: int = HORIZON + 1) -> list[int]:
    """Asserts that a sample consists of slices of traced episodes, in all columns; returns the slices' episodes."""
    stamp = sample["stamp"].reshape(-1, steps)
    assert (stamp.diff(dim=1) == 1).all()
    assert (stamp // STRIDE == stamp[:, :1] // STRIDE).all()
    for row in sample:
        number, step = divmod(int(row["stamp"]), STRIDE)
        expected = traced_columns(number, step + 1)
        assert all(np.array_equal(row[tuple(name.split("."))], array[step]) for name, array in expected.items())
    return (stamp[:, 0] // STRIDE).tolist()


@pytest.fixture(params=["before", "after"])
def buffer(request: pytest.FixtureRequest) -> ReplayBuffer:
    """A ring of 40 rows with two episodes; the TorchRL adapter was made before or after the first."""
    buffer = ReplayBuffer(make_config(40, horizon=HORIZON, batch_size=16, seed=1))
    if request.param == "before":
        buffer.as_torchrl()
    buffer.add_episode(traced(0, 10))
    buffer.add_episode(traced(1, 7))
    return buffer


def test_as_torchrl_is_one_regular_buffer(buffer: ReplayBuffer) -> None:
    face = buffer.as_torchrl()

    assert isinstance(face, torchrl.data.ReplayBuffer)
    assert buffer.as_torchrl() is face


def test_episodes_added_to_the_buffer_are_seen_by_torchrl(buffer: ReplayBuffer) -> None:
    face = buffer.as_torchrl()

    buffer.add_episode(traced(2, 9))

    assert len(face) == 26
    assert face.write_count == 26
    assert set(check_slices(face.sample(400))) == {0, 1, 2}


def test_extend_one_episode_is_stored_like_an_add(buffer: ReplayBuffer) -> None:
    rows = buffer.as_torchrl().extend(as_td((5, 12)))

    assert rows.tolist() == list(range(17, 29))
    assert (buffer.num_eps, buffer.size) == (3, 29)
    stored = read_episode(buffer.store, buffer.store.entries()[-1])
    assert all(stored[name].tobytes() == array.tobytes() for name, array in traced_columns(5, 12).items())


def test_extend_several_episodes_splits_and_evicts_whole_ones(buffer: ReplayBuffer) -> None:
    """10 + 7 rows are stored; 6 and 20 more evict the first episode; a wrapped episode comes back in order."""
    face = buffer.as_torchrl()

    rows = face.extend(as_td((5, 6), (6, 20)))

    assert rows.tolist() == [*range(17, 40), 0, 1, 2]
    assert buffer.store.entries()[:, 2].tolist() == [7, 6, 20]
    counts = buffer.counts()
    assert (counts.episodes_stored, counts.episodes_evicted, counts.steps_evicted, counts.steps_stored) == (3, 1, 10, 33)
    assert len(face) == 40  # TorchRL counts dead rows too
    assert set(check_slices(face.sample(400))) == {1, 5, 6}
    assert torch.equal(face[rows]["stamp"], as_td((5, 6), (6, 20))["stamp"])


def test_extend_leaves_the_callers_tensordict_alone(buffer: ReplayBuffer) -> None:
    td = as_td((5, 6), (6, 5))
    before = td.clone()

    buffer.as_torchrl().extend(td)

    assert (td == before).all()
    assert "episode" in td.keys()  # noqa: SIM118  a TensorDict iterates over its rows


def test_buffer_samples_what_torchrl_extended(buffer: ReplayBuffer) -> None:
    buffer.clear()

    buffer.as_torchrl().extend(as_td((5, 6)))

    obs, action, reward, done = buffer.sample()
    stamp = buffer.sample().extra["stamp"]
    assert obs["state"].shape == (4, 16, 3)
    assert action.shape == (3, 16, 2)
    assert reward.shape == done.shape == (3, 16, 1)
    assert (stamp // STRIDE == 5).all()


def test_sample_tells_where_its_rows_came_from(buffer: ReplayBuffer) -> None:
    face = buffer.as_torchrl()

    sample, info = face.sample(64, return_info=True)

    check_slices(sample)
    assert torch.equal(face[info["index"]]["stamp"], sample["stamp"])
    assert torch.equal(info["episode"], sample["stamp"] // STRIDE)
    assert info["next", "truncated"].reshape(-1, 4).tolist() == [[False, False, False, True]] * 16
    starts = {0: 7, 1: 4}
    assert torch.allclose(info["probability"], torch.tensor([1 / (2 * starts[int(number)]) for number in info["episode"]]).double())


def test_sample_configured_size_is_slices_of_the_horizon(buffer: ReplayBuffer) -> None:
    assert buffer.as_torchrl().sample().shape == (16 * 4,)


def test_sample_of_a_size_that_is_no_multiple_is_torchrls_error(buffer: ReplayBuffer) -> None:
    with pytest.raises(RuntimeError, match="divisible by the slice length"):
        buffer.as_torchrl().sample(63)


def test_sample_with_a_generator_is_decided_by_it(buffer: ReplayBuffer) -> None:
    face = buffer.as_torchrl()
    samples = []
    for seed in (1, 1, 2):
        face.set_rng(torch.Generator().manual_seed(seed))
        samples.append(face.sample()["stamp"].tolist())

    assert samples[0] == samples[1] != samples[2]


def test_sample_is_a_copy_that_later_writes_leave_alone(buffer: ReplayBuffer) -> None:
    sample = buffer.as_torchrl().sample()

    for number in range(2, 12):
        buffer.add_episode(traced(number, 20))

    assert set(check_slices(sample)) <= {0, 1}


def test_sample_before_anything_is_stored_raises_clearly() -> None:
    face = ReplayBuffer(make_config()).as_torchrl()

    with pytest.raises(NotReadyError, match="0 steps in 0 episodes are stored"):
        face.sample()

    assert not face.can_sample()
    assert len(face) == 0


def test_can_sample_asks_for_an_episode_that_is_long_enough() -> None:
    buffer = ReplayBuffer(make_config())
    face = buffer.as_torchrl()
    seen = []

    for length in (3, 4):
        buffer.add(plain_columns(length))
        seen.append(face.can_sample())

    assert seen == [False, True]


def test_add_of_a_single_step_is_refused_with_what_to_do(buffer: ReplayBuffer) -> None:
    with pytest.raises(InvalidEpisodeError, match=re.escape("give all steps of an episode to extend()")):
        buffer.as_torchrl().add(as_td((5, 6))[0])

    assert buffer.num_eps == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (as_td((5, 6)).exclude("reward"), "reward: missing"),
        (as_td((5, 6)).set("reward", torch.full((6,), torch.nan)), "reward: a value that is not finite in row 1"),
        (as_td((5, 41)), "41 rows, expected at most the buffer's capacity of 40"),
        (as_td((5, 6))[:0], "zero rows"),
        (as_td((5, 6)).set("episode", torch.zeros(6, 2)), "episode: shape (6, 2), expected one number a row"),
        (torch.zeros(5), "extend() takes a TensorDict of shape [rows]"),
    ],
    ids=["missing", "NaN", "too long", "zero rows", "two numbers a row", "a tensor"],
)
def test_extend_malformed_is_refused_and_nothing_is_stored(buffer: ReplayBuffer, data: TensorDict, message: str) -> None:
    face = buffer.as_torchrl()

    with pytest.raises(InvalidEpisodeError, match=re.escape(message)):
        face.extend(data)

    assert (buffer.num_eps, len(face)) == (2, 17)
    face.extend(as_td((5, 6)))
    assert set(check_slices(face.sample(400))) == {0, 1, 5}


def test_extend_stops_at_the_malformed_episode_and_keeps_those_before(buffer: ReplayBuffer) -> None:
    td = as_td((5, 6), (6, 5), (7, 5))
    td["reward"][8] = torch.inf

    with pytest.raises(InvalidEpisodeError, match="reward: a value that is not finite in row 2"):
        buffer.as_torchrl().extend(td)

    assert buffer.num_eps == 3


def test_empty_is_clear_on_both_sides(buffer: ReplayBuffer) -> None:
    face = buffer.as_torchrl()

    face.empty()

    assert (buffer.num_eps, buffer.size, len(face), face.write_count) == (0, 0, 0, 0)
    assert buffer.store.schema is None
    assert buffer.counts().episodes_added == 2
    face.extend(as_td((5, 6)))
    assert set(check_slices(face.sample())) == {5}


def test_clear_and_empty_on_request_keep_torchrls_count_of_written_rows(buffer: ReplayBuffer) -> None:
    face = buffer.as_torchrl()

    buffer.clear()
    assert (len(face), face.write_count) == (0, 17)

    buffer.add_episode(traced(2, 5))
    face.empty(empty_write_count=False)
    assert (len(face), face.write_count) == (0, 22)


def test_clear_then_another_schema_is_what_torchrl_samples(buffer: ReplayBuffer) -> None:
    face = buffer.as_torchrl()
    face.sample()

    buffer.clear()
    buffer.add(plain_columns(9, obs=np.ones((9, 5), np.float16)))

    assert set(face.sample().keys()) == {"obs", "action", "reward"}
    assert face.sample()["obs"].shape == (64, 5)
    assert face.sample()["obs"].dtype == torch.float16


def test_failed_copy_is_not_seen_by_torchrl(buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    face = buffer.as_torchrl()
    columns = buffer.store.columns
    assert columns is not None

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(columns, "write", broken)
        with pytest.raises(RuntimeError, match="broken"):
            face.extend(as_td((5, 30)))

    assert set(check_slices(face.sample(400))) == {1}


def test_adapter_made_after_the_ring_wrapped_samples_only_live_rows() -> None:
    buffer = ReplayBuffer(make_config(40, batch_size=100))
    for number in range(9):
        buffer.add_episode(traced(number, 11 + number % 3))
    live = set(buffer.store.entries()[:, 4].tolist())

    face = buffer.as_torchrl()

    assert set(check_slices(face.sample())) == live
    face.extend(as_td((9, 40)))
    assert set(check_slices(face.sample())) == {9}


def test_stock_behaviours_do_not_crash(buffer: ReplayBuffer) -> None:
    face = buffer.as_torchrl()

    assert face[:].shape == (17,)
    assert face[:]["stamp"][10:].tolist() == traced_columns(1, 7)["stamp"].tolist()
    assert face[3]["stamp"] == 3
    assert face["stamp"].shape == (17,)
    assert face[torch.tensor([0, 16])]["reward"].shape == (2,)
    assert "EpisodeSliceSampler" in repr(face)
    assert "EpisodeRingWriter" in repr(face)
    assert face.stats()["size"] == 17
    assert [batch.shape for _, batch in zip(range(2), face, strict=False)] == [(64,), (64,)]


def test_repr_before_the_first_episode_and_after_clear_does_not_crash(buffer: ReplayBuffer) -> None:
    fresh = ReplayBuffer(make_config()).as_torchrl()
    face = buffer.as_torchrl()
    buffer.clear()

    assert "<empty>" in repr(fresh)
    assert "<empty>" in repr(face)


def test_checkpoint_that_could_not_be_sampled_again_is_refused(buffer: ReplayBuffer, tmp_path: Path) -> None:
    face = buffer.as_torchrl()

    with pytest.raises(InvalidArgumentError, match="checkpoint does not hold the episode index"):
        face.dumps(tmp_path / "checkpoint")
    with pytest.raises(InvalidArgumentError, match="checkpoint does not hold the episode index"):
        face.writer.loads(tmp_path / "checkpoint")


@pytest.mark.parametrize(("step", "act"), [("get", "sample"), ("_empty", "empty")])
def test_no_episode_can_be_stored_in_the_middle_of(buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch, step: str, act: str) -> None:
    """Between TorchRL's draw and its gather, and between the steps of emptying, other threads cannot write."""
    face = buffer.as_torchrl()
    storage = face.storage
    original = getattr(storage, step)
    could_write: list[bool] = []

    with ThreadPoolExecutor(1) as pool:

        def observed(*arguments: object) -> object:
            could_write.append(pool.submit(buffer.store.writes.lock.acquire, blocking=False).result())
            return original(*arguments)

        monkeypatch.setattr(storage, step, observed)
        getattr(face, act)()

    assert could_write == [False]


def test_add_extend_sample_and_empty_from_many_threads_agree() -> None:
    """Samples are whole slices of live episodes during any other work, and both sides have the same counts in the end."""
    buffer = ReplayBuffer(make_config(120, batch_size=8))
    face = buffer.as_torchrl()
    buffer.add_episode(traced(0, 20))
    together = threading.Barrier(5)

    def add() -> None:
        together.wait()
        for number in range(1, 150):
            buffer.add_episode(traced(number, 5 + number % 17))

    def extend() -> None:
        together.wait()
        for number in range(1000, 1050):
            face.extend(as_td((number, 5 + number % 9), (number + 500, 6)))

    def empty() -> None:
        together.wait()
        for _ in range(20):
            face.empty()

    def sample_face() -> None:
        together.wait()
        for _ in range(60):
            try:
                check_slices(face.sample())
            except NotReadyError:
                continue

    def sample_buffer() -> None:
        together.wait()
        for _ in range(300):
            try:
                check_traced_stamps(buffer)
            except NotReadyError:
                continue

    with ThreadPoolExecutor(5) as pool:
        for job in [pool.submit(task) for task in (add, extend, empty, sample_face, sample_buffer)]:
            job.result()

    counts = buffer.counts()
    assert counts.episodes_added == 1 + 149 + 100
    buffer.add_episode(traced(5000, 120))
    assert set(check_slices(face.sample())) == {5000}
    assert len(face) == buffer.size == 120


def check_traced_stamps(buffer: ReplayBuffer) -> None:
    """Asserts that a batch of traced episodes, some without their number as policy version, is whole slices of them."""
    stamp = buffer.sample().extra["stamp"]
    assert (stamp.diff(dim=0) == 1).all()
    assert (stamp // STRIDE == stamp[0] // STRIDE).all()


def test_traced_batches_of_both_sides_hold_the_same_rows(buffer: ReplayBuffer) -> None:
    batch = buffer.sample(batch_size=400, law="step")
    check_traced(batch, horizon=HORIZON)

    rows = set(batch.extra["stamp"].flatten().tolist())

    assert rows == set(buffer.as_torchrl().sample(4 * 400)["stamp"].tolist())


def test_torchrl_buffer_of_shared_columns_wraps_behind_the_spare_rows() -> None:
    buffer = ReplayBuffer(make_config(40, horizon=HORIZON, batch_size=16, seed=1, storage={"share_columns": "on"}))
    face = buffer.as_torchrl()

    rows = [face.extend(as_td((number, 12))).tolist() for number in range(7)]

    assert rows[-1] == [*range(72, 80), *range(4)]
    assert buffer.store.entries()[:, 0].tolist() == [4, 5, 6]
    assert len(face) == 80  # TorchRL counts the spare rows too
    assert set(check_slices(face.sample(400))) == {4, 5, 6}
    assert torch.equal(face[torch.tensor(rows[-1])]["stamp"], as_td((6, 12))["stamp"])
