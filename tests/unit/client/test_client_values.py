"""Callers' episodes into columns, batches into tensors."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from touchline import Batch, InvalidEpisodeError
from touchline._actor.episode_factory import make_episode, split_load
from touchline._learner.torch_batch import as_tensor, to_tensors
from touchline_protos.codec import EpisodeKey
from touchline_protos.types.dtypes import BFLOAT16

KEY = EpisodeKey("me", 1, 0)


def _make(episode: Any) -> Any:
    return make_episode(episode, key=KEY, actor="a", policy_version=2)


def _episode(rows: int = 4) -> dict[str, Any]:
    return {"obs": np.ones((rows, 2), np.float32), "action": np.ones((rows, 1), np.float32), "reward": np.ones(rows, np.float32)}


def test_episode_shares_the_callers_memory_and_changes_nothing() -> None:
    given = _episode()
    before = {name: value.copy() for name, value in given.items()}

    made = _make(given)

    assert np.shares_memory(made.columns["obs"], given["obs"])
    assert all(np.array_equal(given[name], before[name]) for name in before)
    assert (made.key, made.actor, made.policy_version, made.length) == (KEY, "a", 2, 4)


def test_nested_observations_flatten_with_dots() -> None:
    made = _make(_episode() | {"obs": {"rgb": np.zeros((4, 3), np.uint8), "body": {"joint": np.zeros(4)}}})

    assert set(made.columns) == {"obs.rgb", "obs.body.joint", "action", "reward"}


def test_tensors_and_tensordict_become_arrays() -> None:
    tensordict = pytest.importorskip("tensordict")
    columns = {"obs": {"rgb": torch.ones(4, 2).to(torch.bfloat16)}, "action": torch.ones(4, 1), "reward": torch.ones(4)}

    plain = _make(columns)
    td = _make(tensordict.TensorDict(columns, batch_size=[4]))

    assert plain.columns["obs.rgb"].dtype == td.columns["obs.rgb"].dtype == BFLOAT16
    assert plain.columns["obs.rgb"].view(np.uint16).tolist() == [[0x3F80] * 2] * 4
    assert td.columns["action"].tolist() == [[1.0]] * 4


def test_bfloat16_of_jax_is_that_of_torch() -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3).astype(ml_dtypes.bfloat16)[:, ::2]

    made = _make(_episode() | {"obs": values})

    assert made.columns["obs"].dtype == BFLOAT16
    assert made.columns["obs"].shape == (4, 2)
    assert made.columns["obs"].view(np.uint16).tolist() == torch.tensor(values.astype(np.float32)).bfloat16().view(torch.uint16).tolist()


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(4, 2).to_sparse(),
        torch.zeros(4, 2, dtype=torch.float8_e4m3fn),
        torch.zeros(4, 2, device="meta"),
        np.zeros((4, 2), ml_dtypes.float8_e4m3fn),
    ],
    ids=["sparse", "float8", "meta", "float8 of JAX"],
)
def test_tensor_that_cannot_be_a_column_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidEpisodeError, match=r"^obs: .*(is not an array|is not supported)"):
        _make(_episode() | {"obs": value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": np.zeros(3, np.float32)}, r"^reward: 3 rows, expected 4 to match obs$"),
        ({"reward": np.float32(1)}, r"^reward: a scalar, expected one value a row$"),
        ({"reward": np.zeros(4, np.complex64)}, r"^reward: complex64, expected real numbers"),
        ({"reward": np.array(["a"] * 4, object)}, r"^reward: objects \(of type str first\), expected numbers$"),
        ({"obs": {5: np.zeros(4)}}, r"^obs\.5: a name of type int, expected str$"),
    ],
)
def test_episode_that_cannot_be_sent_is_refused_with_the_column(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidEpisodeError, match=message):
        _make(_episode() | change)


@pytest.mark.parametrize("episode", [None, 5, [1, 2], np.zeros(4), {}])
def test_value_that_cannot_be_an_episode_is_refused(episode: Any) -> None:
    with pytest.raises(InvalidEpisodeError, match=r"^episode: .*expected"):
        _make(episode)


def test_mapping_of_stacked_arrays_splits_into_episodes() -> None:
    stacked = {"obs": {"rgb": np.arange(24).reshape(2, 4, 3)}, "reward": np.arange(8).reshape(2, 4)}

    first, second = split_load(stacked)

    assert first["obs.rgb"].tolist() == np.arange(12).reshape(4, 3).tolist()
    assert second["reward"].tolist() == [4, 5, 6, 7]


def test_tensordict_of_stacked_tensors_splits_into_episodes() -> None:
    tensordict = pytest.importorskip("tensordict")

    episodes = list(split_load(tensordict.TensorDict({"obs": torch.zeros(3, 5, 2)}, batch_size=[3, 5])))

    assert [episode["obs"].shape for episode in episodes] == [(5, 2)] * 3


@pytest.mark.parametrize(
    ("stacked", "message"),
    [
        ({"obs": np.zeros((2, 4)), "reward": np.zeros((3, 4))}, r"^reward: 3 episodes, expected 2 to match obs$"),
        ({"obs": np.zeros((2, 4)), "reward": np.zeros(2)}, r"^reward: shape \(2,\), expected \(num_episodes, episode_length, \.\.\.\)$"),
        (7, r"^episodes: int, expected a mapping of arrays or an iterable"),
    ],
)
def test_load_that_cannot_be_split_is_refused(stacked: Any, message: str) -> None:
    with pytest.raises(InvalidEpisodeError, match=message):
        list(split_load(stacked))


def _batch(**change: Any) -> Batch:
    numbers = np.arange(3)
    values: dict[str, Any] = {
        "obs": {"rgb": np.zeros((2, 3, 4), np.uint8), "body": {"joint": np.zeros((2, 3), np.float64)}},
        "action": np.zeros((1, 3, 2), np.float32),
        "reward": np.zeros((1, 3, 1), np.float32),
        "done": np.zeros((1, 3, 1), np.bool_),
        "task": None,
        "extra": {"aux": np.zeros((2, 3), np.int16)},
        "probability": np.ones(3),
        "actor_names": {0: "keeper"},
    }
    values |= dict.fromkeys(("episode_id", "start", "actor", "policy_version"), numbers)
    return Batch(**values | change)


def test_tensors_share_the_arrays_memory_and_structure() -> None:
    arrays = _batch()

    tensors = to_tensors(torch, arrays)

    arrays.action[0, 0, 0] = 5
    arrays.obs["body"]["joint"][1, 2] = 7
    assert tensors.action[0, 0, 0] == 5
    assert tensors.obs["body"]["joint"][1, 2] == 7
    assert tensors.obs["rgb"].dtype == torch.uint8
    assert tensors.done.dtype == torch.bool
    assert tensors.extra["aux"].dtype == torch.int16
    assert tensors.probability.dtype == torch.float64
    assert tensors.task is None
    assert tensors.actor_names == {0: "keeper"}


def test_bits_of_bfloat16_become_that_dtype() -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16).view(BFLOAT16)

    tensor = as_tensor(torch, bits)

    assert tensor.dtype == torch.bfloat16
    assert tensor.tolist() == [1.0, -2.0]
