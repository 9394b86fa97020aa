"""Episodes of a vector simulator, stored together: [envs, T, ...], of equal or of unequal lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.store_cases import as_bits, make_config, traced_columns
from touchline_protos.codec import EpisodeKey
from touchline_protos.types.dtypes import DType, to_numpy
from touchline_server import InvalidEpisodeError, KeyConflictError, OverLimitError, ReplayBuffer
from touchline_server.store.device_block import device_block
from touchline_server.store.episode_block import Origin, host_block
from touchline_server.store.tensors import as_tensor

NAN = float("nan")


def batch_of(first: int, envs: int, rows: int) -> dict[str, np.ndarray]:
    """Traced episodes ``first`` and on, all of the same length."""
    episodes = [traced_columns(first + number, rows) for number in range(envs)]
    return {name: np.stack([episode[name] for episode in episodes]) for name in episodes[0]}


def plain(envs: int = 3, rows: int = 5) -> dict[str, np.ndarray]:
    action, reward = np.zeros((envs, rows, 2), np.float32), np.zeros((envs, rows), np.float32)
    action[:, 0], reward[:, 0] = NAN, NAN
    return {"obs": np.zeros((envs, rows, 4), np.float32), "action": action, "reward": reward}


def contents(buffer: ReplayBuffer) -> list[tuple[Any, ...]]:
    return [
        (stored.id, stored.actor, stored.policy_version, {name: as_bits(column) for name, column in stored.columns.items()})
        for stored in buffer.episodes()
    ]


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9), st.booleans()), min_size=1, max_size=6),
    capacity=st.integers(9, 40),
    tensors=st.booleans(),
    durable=st.booleans(),
    seed=st.integers(0, 999),
)
def test_batches_hold_the_episodes_that_adds_of_each_would_hold(
    tmp_path_factory: pytest.TempPathFactory,
    batches: list[tuple[int, int, bool]],
    capacity: int,
    tensors: bool,
    durable: bool,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    storage = {"data_dir": str(tmp_path_factory.mktemp("data"))} if durable and seed % 10 == 0 else {}
    together, singly = ReplayBuffer(make_config(capacity, storage=storage, seed=1)), ReplayBuffer(make_config(capacity, seed=1))
    written: list[np.ndarray] = []
    together.store.follow_writes(lambda columns, rows: written.append(rows), lambda: None)
    first = 0
    for version, (envs, rows, ragged) in enumerate(batches):
        batch = batch_of(first, envs, rows)
        lengths = random.integers(1, rows + 1, envs) if ragged else np.full(envs, rows)
        names = [f"env-{number}" for number in range(envs)]
        given = {name: as_tensor(column) for name, column in batch.items()} if tensors else batch
        before = {name: column.copy() for name, column in batch.items()}

        count = together.add_batch(given, lengths=lengths if ragged else None, actor=names, policy_version=version)

        for number, length in enumerate(lengths):
            columns = {name: column[number, :length] for name, column in batch.items()}
            singly.add(columns, actor=names[number], policy_version=version)
        assert count == singly.num_eps
        assert all(as_bits(batch[name]) == as_bits(column) for name, column in before.items())
        first += envs

    assert contents(together) == contents(singly)
    assert together.counts() == singly.counts()
    assert sum(map(len, written)) == together.counts().steps_added
    if singly.ready():
        assert as_bits(together.sample(seed=3).extra["stamp"]) == as_bits(singly.sample(seed=3).extra["stamp"])
    together.close()


DEFINED = st.sampled_from(["obs.a", "action", "reward", "done", "extra"])


@settings(max_examples=80, deadline=None)
@given(
    envs=st.integers(1, 4),
    rows=st.integers(1, 5),
    ragged=st.booleans(),
    incoming=st.booleans(),
    faults=st.lists(st.tuples(DEFINED, st.integers(0, 99), st.integers(0, 99), st.sampled_from([NAN, float("inf")])), max_size=2),
    seed=st.integers(0, 999),
)
def test_a_block_of_device_tensors_is_checked_and_stored_as_one_of_arrays(
    envs: int, rows: int, ragged: bool, incoming: bool, faults: list[tuple[str, int, int, float]], seed: int
) -> None:
    """The tensors are on the CPU here: what differs on a device is the copy into the columns."""
    random = np.random.default_rng(seed)
    batch: dict[str, np.ndarray] = {"obs.a": random.random((envs, rows, 2), np.float32), "action": random.random((envs, rows, 2))}
    batch |= {"reward": random.random((envs, rows), np.float32), "done": np.zeros((envs, rows, 1), np.float16)}
    batch |= {"task": random.integers(0, 5, (envs, rows)), "extra": random.random((envs, rows, 3), np.float32)}
    for wire in DType:
        raw = np.frombuffer(bytearray(random.bytes(envs * rows * 2 * to_numpy(wire).itemsize)), np.uint8)
        batch[wire.name.lower()] = (raw & 1 if wire.name == "DTYPE_BOOL" else raw).view(to_numpy(wire)).reshape(envs, rows, 2)
    for name, env, row, value in faults:
        batch[name][env % envs, row % rows] = value
    lengths = random.integers(1, rows + 1, envs).tolist() if ragged else [rows] * envs
    origins = [Origin(f"env-{number}", 3, None) for number in range(envs)]
    buffers = [ReplayBuffer(make_config(100, law="task", row_convention="incoming" if incoming else "outgoing")) for _ in range(2)]
    tensors = {name: as_tensor(column) for name, column in batch.items()}

    refused: list[str] = []
    for buffer, is_device in zip(buffers, (False, True), strict=True):
        try:
            if is_device:
                block = device_block(tensors, lengths, origins, incoming=incoming, allow_non_finite=False)
            else:
                block = host_block(batch, lengths, origins)
            buffer.store.writes.add_block(block)
        except InvalidEpisodeError as error:
            refused.append(str(error))

    assert len(refused) in (0, 2)
    if refused:
        # Which of several faults is named first differs: the host looks episode by episode, the device column by column.
        assert refused[0] == refused[1] or len(faults) == 2
        assert buffers[0].num_eps == buffers[1].num_eps == 0
    else:
        assert contents(buffers[0]) == contents(buffers[1])
        assert (buffers[0].store.entries() == buffers[1].store.entries()).all()  # tasks among them


def test_batch_for_the_device_warns_of_actions_in_row_0(caplog: pytest.LogCaptureFixture) -> None:
    batch = plain()
    for in_row_0, warned in ((NAN, False), (1.0, True)):
        batch["action"][1, 0] = in_row_0
        buffer = ReplayBuffer(make_config(100))
        tensors = {name: as_tensor(column) for name, column in batch.items()}
        block = device_block(tensors, [5] * 3, [Origin("", 0, None)] * 3, incoming=True, allow_non_finite=False)
        buffer.store.writes.add_block(block)
        assert ("row 0 has an action" in caplog.text) == warned


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"reward": np.zeros(3)}, {}, r"reward: shape \(3,\), expected \(episodes, rows, ...\)"),
        ({"reward": np.zeros((2, 5))}, {}, r"reward: shape \(2, 5\), expected \(3, 5\) to match obs"),
        ({"action": np.zeros((3, 4, 2))}, {}, r"action: shape \(3, 4, 2\), expected \(3, 5, 2\) to match obs"),
        ({"action": torch.zeros(3, 5, 2, dtype=torch.complex64)}, {}, "action: complex64, expected real numbers"),
        ({"obs": np.full((3, 5, 4), "x")}, {}, "obs: text"),
        ({"obs": np.stack([np.full((5, 4), value, np.float32) for value in (0, 0, NAN)])}, {}, "episode 2: obs: .* not finite in row 0"),
        ({}, {"lengths": [5, 5]}, r"lengths: shape \(2,\), expected \(3,\)"),
        ({}, {"lengths": [5, 0, 5]}, r"lengths\[1\]: 0, expected 1 to 5"),
        ({}, {"lengths": torch.tensor([5, 5, 6])}, r"lengths\[2\]: 6, expected 1 to 5"),
        ({}, {"lengths": [1.0, 2.0, 3.0]}, "lengths: dtype float64, expected integers"),
        ({}, {"actor": ["a", "b"]}, "actor: 2, expected 3, one for each episode"),
        ({}, {"keys": [EpisodeKey("a", 1, 1)]}, "keys: 1, expected 3, one for each episode"),
        ({}, {"actor": "a" * 200}, "actor: "),
        ({}, {"policy_version": 1 << 63}, "policy_version: "),
        ({"stray": np.zeros((3, 5))}, {}, "episode 0: stray: an unknown column"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_by_name_and_nothing_is_stored(
    change: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    buffer = ReplayBuffer(make_config(100))
    buffer.add_batch(plain())

    with pytest.raises(InvalidEpisodeError, match=message):
        buffer.add_batch(plain() | change, **arguments)

    assert (buffer.num_eps, buffer.counts().episodes_refused) == (3, 1)


def test_a_batch_that_is_no_mapping_or_has_no_rows_is_refused() -> None:
    buffer = ReplayBuffer(make_config(20))
    for batch, message in (
        (5, "expected a mapping"),
        ({}, "no columns"),
        (plain(0), "at least one episode"),
        (plain(2, 21), "capacity of 20"),
    ):
        with pytest.raises(InvalidEpisodeError, match=message):
            buffer.add_batch(batch)  # type: ignore[arg-type]
    assert buffer.store.columns is None


def test_a_batch_with_keys_stores_each_once() -> None:
    buffer = ReplayBuffer(make_config(100))
    keys = [EpisodeKey("sim", 1, number) for number in range(3)]

    buffer.add_batch(plain(), keys=keys)
    buffer.add_batch(plain(), keys=keys)
    changed = plain()
    changed["obs"][1] = 1
    with pytest.raises(KeyConflictError):
        buffer.add_batch(changed, keys=keys)

    assert (buffer.num_eps, buffer.counts().episodes_duplicate) == (3, 5)


def test_a_batch_in_a_durable_store_is_there_after_a_restart(tmp_path: Path) -> None:
    config = make_config(100, storage={"data_dir": str(tmp_path)})
    buffer = ReplayBuffer(config)
    buffer.add_batch(batch_of(0, 3, 5), lengths=[5, 2, 4])
    bad = batch_of(3, 2, 5)
    bad["reward"][1, 3] = NAN
    with pytest.raises(InvalidEpisodeError, match="episode 1: reward: a value that is not finite in row 3"):
        buffer.add_batch(bad)  # episode 0 is stored: each by itself
    before = contents(buffer)
    buffer.close()

    again = ReplayBuffer(config)

    assert contents(again) == before and len(before) == 4
    again.close()


def test_a_batch_is_reserved_with_the_rate_limit_as_a_whole() -> None:
    config = make_config(1000).override(rate={"samples_per_insert": 1.0, "tolerance": 100.0})
    buffer = ReplayBuffer(config)
    buffer.add_batch(plain(4, 20))
    with pytest.raises(InvalidEpisodeError):
        buffer.add_batch(plain(4, 20) | {"reward": np.full((4, 20), NAN, np.float32)})
    buffer.add_batch(plain(4, 20))

    with pytest.raises(OverLimitError):
        buffer.add_batch(plain(4, 20))
    assert buffer.num_eps == 8


def test_a_batch_whose_copy_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = ReplayBuffer(make_config(100))

    def fail(*_: object) -> None:
        raise OSError("the copy fails")

    with monkeypatch.context() as patch:
        patch.setattr("touchline_server.store.columns.Columns.write", fail)
        with pytest.raises(OSError, match="the copy fails"):
            buffer.add_batch(plain())
    assert buffer.num_eps == 0
    buffer.add_batch(plain())

    assert [stored.length for stored in buffer.episodes()] == [5, 5, 5]
