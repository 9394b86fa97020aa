"""What a bad episode gets: a message that names the column, what was found and what was expected, and nothing stored."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from support.store_cases import make_config, plain_columns, read_episode
from touchline_protos.codec import Episode
from touchline_protos.types.dtypes import BFLOAT16
from touchline_server import InvalidEpisodeError, ReplayBuffer
from touchline_server.store.schema import ColumnSpec, EpisodeValidator, Schema

CAPACITY = 64
ROWS = 10


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in plain_columns(ROWS).items() if key != name}


def nan_at(row: int, shape: tuple[int, ...] = (ROWS, 2), dtype: type = np.float32, value: float = np.nan) -> np.ndarray:
    array = np.zeros(shape, dtype)
    array[row] = value
    return array


def bfloat16_nan(row: int) -> torch.Tensor:
    return torch.tensor(nan_at(row)).to(torch.bfloat16)


MALFORMED = {
    "no columns": ({}, "no columns, expected obs, action and reward"),
    "no observation": (without("obs"), "obs: missing, expected the columns obs, action, reward; found action, reward"),
    "no action": (without("action"), "action: missing"),
    "no reward": (without("reward"), "reward: missing"),
    "unequal lengths": (plain_columns(ROWS, reward=np.zeros(9, np.float32)), "reward: shape (9,), expected (10,) to match obs"),
    "unequal lengths of a matrix": (
        plain_columns(ROWS, action=np.zeros((11, 3), np.float32)),
        "action: shape (11, 3), expected (10, 3) to match obs",
    ),
    "a scalar column": (plain_columns(ROWS, gain=np.float32(1)), "gain: a scalar, expected one value per step: shape (rows, ...)"),
    "zero rows": (plain_columns(0), "obs: zero rows, expected at least 1"),
    "more rows than the capacity": (plain_columns(CAPACITY + 1), "65 rows, expected at most the buffer's capacity of 64"),
    "an unknown dtype": (plain_columns(ROWS, c=np.zeros(ROWS, np.complex64)), "c: complex64, expected real numbers"),
    "unsigned of 16 bits": (plain_columns(ROWS, c=np.zeros(ROWS, np.uint16)), "c: dtype uint16 is not supported"),
    "text": (plain_columns(ROWS, c=np.array(["x"] * ROWS)), "c: text ('x'), expected numbers"),
    "objects": (plain_columns(ROWS, c=np.array([object()] * ROWS)), "c: objects (of type object first), expected numbers"),
    "a wide reward": (plain_columns(ROWS, reward=np.zeros((ROWS, 2))), "reward: shape (10, 2), expected one value per step: (10,)"),
    "a reward per agent without agents": (
        plain_columns(ROWS, obs=np.zeros((ROWS, 5)), action=np.zeros((ROWS, 2)), reward=np.zeros((ROWS, 2))),
        "reward: shape (10, 2), expected one value per step: (10,); one per agent needs obs (10, 2, ...), found (10, 5)",
    ),
    "an action of other agents": (
        plain_columns(ROWS, obs=np.zeros((ROWS, 2, 5)), action=np.zeros((ROWS, 3)), reward=np.zeros((ROWS, 2))),
        "one per agent needs action (10, 2, ...), found (10, 3)",
    ),
    "a done of other agents": (
        plain_columns(
            ROWS, obs=np.zeros((ROWS, 2)), action=np.zeros((ROWS, 2)), reward=np.zeros((ROWS, 2)), done=np.zeros((ROWS, 3), np.float32)
        ),
        "done: shape (10, 3), expected one value per step: (10,), or one per agent as the reward: (10, 2)",
    ),
    "no agents": (
        plain_columns(ROWS, obs=np.zeros((ROWS, 0)), action=np.zeros((ROWS, 0)), reward=np.zeros((ROWS, 0))),
        "reward: shape (10, 0), expected one value per step: (10,), or one per agent: (rows, agents)",
    ),
    "a wide done": (plain_columns(ROWS, done=np.zeros((ROWS, 1, 1), np.float32)), "done: shape (10, 1, 1), expected one value per step"),
    "a wide task": (plain_columns(ROWS, task=np.zeros((ROWS, 3), np.int64)), "task: shape (10, 3), expected one value per step"),
    "a reserved name": (plain_columns(ROWS, episode=np.zeros(ROWS)), "episode: a reserved column name"),
    "another reserved name": (plain_columns(ROWS, index=np.zeros(ROWS)), "index: a reserved column name"),
    "a name nested too deep": (plain_columns(ROWS) | {"a" + ".b" * 9: np.zeros(ROWS)}, "nested 9 levels deep, expected at most 8"),
    "a name of the provenance": (plain_columns(ROWS, provenance={"start": np.zeros(ROWS)}), "provenance.start: a reserved column name"),
    "a column that is a group too": (plain_columns(ROWS, **{"obs.x": np.zeros(ROWS)}), "obs.x: obs is a column too"),
    "an empty name": (plain_columns(ROWS, **{"": np.zeros(ROWS)}), "'': not a column name, expected 1 to 256 printable characters"),
    "an empty part of a name": (plain_columns(ROWS, **{"a..b": np.zeros(ROWS)}), "'a..b': not a column name"),
    "a long name": (plain_columns(ROWS, **{"n" * 257: np.zeros(ROWS)}), "not a column name, expected 1 to 256 printable characters"),
    "a name with a line break": (plain_columns(ROWS, **{"a\nb": np.zeros(ROWS)}), "'a\\nb': not a column name"),
    "a name with a zero byte": (plain_columns(ROWS, **{"a\0b": np.zeros(ROWS)}), "'a\\x00b': not a column name"),
    "a name with half a character": (plain_columns(ROWS, **{"\ud800": np.zeros(ROWS)}), "'\\ud800': not a column name"),
    "a name that is a number": (plain_columns(ROWS) | {7: np.zeros(ROWS)}, "7: a name of type int, expected str"),
    "NaN in an observation": (plain_columns(ROWS, obs=nan_at(4)), "obs: a value that is not finite in row 4, expected finite values"),
    "NaN in the first observation": (plain_columns(ROWS, obs=nan_at(0)), "obs: a value that is not finite in row 0"),
    "infinity in a nested observation": (
        without("obs") | {"obs": {"rgb": np.zeros((ROWS, 2), np.uint8), "state": nan_at(3, (ROWS,), np.float64, -np.inf)}},
        "obs.state: a value that is not finite in row 3",
    ),
    "NaN in a half observation": (plain_columns(ROWS, obs=nan_at(2, dtype=np.float16)), "obs: a value that is not finite in row 2"),
    "NaN in a bfloat16 observation": (plain_columns(ROWS, obs=bfloat16_nan(5)), "obs: a value that is not finite in row 5"),
    "NaN in a later action": (plain_columns(ROWS, action=nan_at(1)), "action: a value that is not finite in row 1"),
    "NaN in a later reward": (plain_columns(ROWS, reward=nan_at(9, (ROWS,))), "reward: a value that is not finite in row 9"),
    "NaN in a later done": (plain_columns(ROWS, done=nan_at(9, (ROWS,))), "done: a value that is not finite in row 9"),
}

UNFIT = {
    "a missing column": (without("action"), "action: missing, expected float32 (1,) as in the first episode"),
    "an unknown column": (
        plain_columns(ROWS, extra=np.zeros(ROWS)),
        "extra: an unknown column, expected only action, obs, reward as in the first episode",
    ),
    "another dtype": (
        plain_columns(ROWS, obs=np.zeros((ROWS, 2), np.float64)),
        "obs: dtype float64, expected float32 as in the first episode",
    ),
    "bfloat16 for float32": (
        plain_columns(ROWS, obs=torch.zeros(ROWS, 2, dtype=torch.bfloat16)),
        "obs: dtype bfloat16, expected float32 as in the first episode",
    ),
    "another inner shape": (
        plain_columns(ROWS, obs=np.zeros((ROWS, 3), np.float32)),
        "obs: shape (3,) a step, expected (2,) as in the first episode",
    ),
    "another number of dimensions": (
        plain_columns(ROWS, reward=np.zeros((ROWS, 1), np.float32)),
        "reward: shape (1,) a step, expected () as in the first episode",
    ),
    "an observation that became a group": (without("obs") | {"obs": {"x": np.zeros(ROWS)}}, "obs.x: an unknown column"),
}


ALWAYS_MALFORMED = [
    "no columns",
    "unequal lengths",
    "zero rows",
    "more rows than the capacity",
    "objects",
    "a name with a line break",
    "NaN in an observation",
    "NaN in a later reward",
]
"""Whatever the schema says."""


def refused(buffer: ReplayBuffer, columns: Any, message: str) -> None:
    """Asserts that an episode is refused with this in the message, counted, and that nothing else has changed."""
    before = buffer.counts()
    rows = [read_episode(buffer.store, entry) for entry in buffer.store.entries()]

    with pytest.raises(InvalidEpisodeError, match=re.escape(message)):
        buffer.add(columns)

    changed = {
        name: getattr(buffer.counts(), name) - getattr(before, name)
        for name in before.__dataclass_fields__
        if getattr(buffer.counts(), name) != getattr(before, name)
    }
    assert changed == {"episodes_refused": 1}
    assert all(
        read_episode(buffer.store, entry)[name].tobytes() == array.tobytes()
        for entry, episode in zip(buffer.store.entries(), rows, strict=True)
        for name, array in episode.items()
    )


@pytest.mark.parametrize("name", MALFORMED)
def test_add_malformed_first_episode_is_refused_and_fixes_no_schema(name: str) -> None:
    columns, message = MALFORMED[name]
    buffer = ReplayBuffer(make_config(CAPACITY))

    refused(buffer, columns, message)

    assert buffer.store.schema is None
    assert buffer.add({"obs": np.ones((5, 7)), "action": np.ones((5, 1)), "reward": np.ones(5)}) == 1
    assert buffer.sample().obs.shape == (4, 8, 7)


@pytest.mark.parametrize("name", ALWAYS_MALFORMED)
def test_add_malformed_later_episode_is_refused_and_the_next_is_stored(name: str) -> None:
    columns, message = MALFORMED[name]
    buffer = ReplayBuffer(make_config(CAPACITY))
    buffer.add(plain_columns(ROWS))

    refused(buffer, columns, message)

    assert buffer.add(plain_columns(ROWS)) == 2


@pytest.mark.parametrize("name", UNFIT)
def test_add_episode_of_another_schema_is_refused_and_the_next_is_stored(name: str) -> None:
    columns, message = UNFIT[name]
    buffer = ReplayBuffer(make_config(CAPACITY))
    buffer.add(plain_columns(ROWS))

    refused(buffer, columns, message)

    assert buffer.add(plain_columns(ROWS)) == 2


@pytest.mark.parametrize("columns", [5, [1, 2], None, np.zeros(3)], ids=["number", "list", "None", "array"])
def test_add_no_mapping_is_refused(columns: Any) -> None:
    refused(ReplayBuffer(make_config(CAPACITY)), columns, f"episode: {type(columns).__name__}, expected a mapping of arrays")


@pytest.mark.parametrize("convention", ["incoming", "outgoing"])
def test_add_nan_in_the_undefined_row_is_accepted_and_never_sampled(convention: str) -> None:
    undefined, defined = (0, -1) if convention == "incoming" else (-1, 0)
    buffer = ReplayBuffer(make_config(CAPACITY, row_convention=convention))
    columns = plain_columns(
        4, action=nan_at(undefined, (4, 2)), reward=nan_at(undefined, (4,), np.float64), done=nan_at(undefined, (4, 1), np.float16)
    )

    buffer.add(columns)

    _, action, reward, done = buffer.sample()
    assert all(torch.isfinite(tensor).all() for tensor in (action, reward, done))
    refused(buffer, plain_columns(4) | columns | {"reward": nan_at(defined, (4,), np.float64)}, "reward: a value that is not finite in row")


def test_add_non_finite_values_if_configured_are_stored_exactly() -> None:
    buffer = ReplayBuffer(make_config(CAPACITY, storage={"allow_non_finite": True}))
    columns = plain_columns(ROWS, obs=nan_at(3), reward=nan_at(4, (ROWS,), value=np.inf))

    buffer.add(columns)

    stored = read_episode(buffer.store, buffer.store.entries()[0])
    assert all(stored[name].tobytes() == columns[name].tobytes() for name in columns)


def test_add_non_finite_extra_column_is_accepted() -> None:
    buffer = ReplayBuffer(make_config(CAPACITY))

    assert buffer.add(plain_columns(ROWS, log_prob=nan_at(3, (ROWS,)), task=np.zeros(ROWS))) == 1


def test_add_episode_too_short_for_the_horizon_is_stored_counted_and_not_ready() -> None:
    buffer = ReplayBuffer(make_config(CAPACITY, horizon=3))

    buffer.add(plain_columns(3))

    assert not buffer.ready()
    assert (buffer.num_eps, buffer.size, buffer.counts().episodes_too_short) == (1, 3, 1)
    buffer.add(plain_columns(4))
    assert buffer.ready()
    assert buffer.counts().episodes_too_short == 1
    assert set(buffer.sample().episode_id.tolist()) == {1}


def test_add_episode_of_the_whole_capacity_is_stored() -> None:
    buffer = ReplayBuffer(make_config(CAPACITY))
    buffer.add(plain_columns(ROWS))

    assert buffer.add(plain_columns(CAPACITY)) == 1


def test_add_same_values_in_another_column_order_fits() -> None:
    buffer = ReplayBuffer(make_config(CAPACITY))
    buffer.add(plain_columns(ROWS))

    assert buffer.add(dict(reversed(plain_columns(ROWS).items()))) == 2


def test_add_origin_out_of_range_is_refused() -> None:
    buffer = ReplayBuffer(make_config(CAPACITY))
    columns = plain_columns(ROWS)

    for origin, message in [
        ({"policy_version": 2**63}, "policy_version: 9223372036854775808, expected a 64-bit integer"),
        ({"policy_version": -(2**63) - 1}, "policy_version: -9223372036854775809"),
        ({"actor": "n" * 129}, "actor: 129 characters, expected up to 128"),
    ]:
        with pytest.raises(InvalidEpisodeError, match=re.escape(message)):
            buffer.add(columns, **origin)

    assert buffer.add(columns, policy_version=-(2**63), actor="n" * 128) == 1
    assert set(buffer.sample().policy_version.tolist()) == {-(2**63)}
    assert buffer.counts().episodes_refused == 3


def test_load_stops_at_the_malformed_episode_and_names_it() -> None:
    buffer = ReplayBuffer(make_config(CAPACITY))
    obs = np.zeros((3, 5, 2), np.float32)
    obs[1, 2, 0] = np.nan
    episodes = {"obs": obs, "action": np.zeros((3, 5, 1), np.float32), "reward": np.zeros((3, 5), np.float32)}

    with pytest.raises(InvalidEpisodeError, match="episode 1: obs: a value that is not finite in row 2"):
        buffer.load(episodes)

    assert buffer.num_eps == 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (plain_columns(5), "reward: shape (5,), expected (num_episodes, episode_length, ...)"),
        (
            {"obs": np.zeros((2, 5, 2)), "action": np.zeros((2, 5, 2)), "reward": np.zeros((3, 5))},
            "reward: 3 episodes, expected 2 to match obs",
        ),
    ],
    ids=["one episode", "unequal numbers"],
)
def test_load_of_another_shape_is_refused(columns: dict[str, Any], message: str) -> None:
    buffer = ReplayBuffer(make_config(CAPACITY))

    with pytest.raises(InvalidEpisodeError, match=re.escape(message)):
        buffer.load(columns)

    assert buffer.num_eps == 0


def test_schema_of_an_episode_names_columns_in_its_order_with_bytes_of_a_row() -> None:
    bits = np.zeros(4, np.uint16).view(BFLOAT16)
    episode = Episode(plain_columns(4, half=bits, done=np.zeros((4, 1), bool)))

    schema = EpisodeValidator(capacity=10, incoming=True, allow_non_finite=False).check(episode.columns, None)

    assert schema == Schema(
        (
            ColumnSpec("obs", np.dtype("<f4"), (2,)),
            ColumnSpec("action", np.dtype("<f4"), (1,)),
            ColumnSpec("reward", np.dtype("<f4"), ()),
            ColumnSpec("half", BFLOAT16, ()),
            ColumnSpec("done", np.dtype(bool), (1,)),
        )
    )
    assert schema.row_bytes == 8 + 4 + 4 + 2 + 1
    assert str(schema.columns[3]) == "bfloat16 ()"


def test_add_nested_tensordict_leaves_it_as_it_was() -> None:
    buffer = ReplayBuffer(make_config(CAPACITY))
    episode = TensorDict(
        {"obs": {"a": torch.arange(6.0), "b": {"c": torch.ones(6, 2)}}, "action": torch.ones(6, 2), "reward": torch.ones(6)}, [6]
    )
    before = episode.clone()

    buffer.add(episode)

    assert (episode == before).all()
    assert set(episode.keys(include_nested=True, leaves_only=True)) == set(before.keys(include_nested=True, leaves_only=True))
    obs = buffer.sample().obs
    assert obs["a"].shape == (4, 8)
    assert obs["b"]["c"].shape == (4, 8, 2)
