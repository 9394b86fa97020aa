"""An environment's values are stored exactly or refused at that step: by every recorder, also in the middle of episodes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import dm_env
import gymnasium
import numpy as np
import pettingzoo
import pytest
import torch
from dm_env import specs
from gymnasium import spaces
from gymnasium.vector import VectorEnv

from support.recorder_cases import serve
from support.serving import ServerThread
from touchline import InvalidArgumentError, InvalidEpisodeError, ReplayClient
from touchline.recorders import DmEnvRecorder, GymnasiumRecorder, GymnasiumVectorRecorder, PettingZooRecorder
from touchline.recorders.gymnasium_versions import BEFORE_1, AutoresetMode

LENGTH = 6
"""Number of transitions in an episode of these environments."""
ACTION = np.zeros(1, np.float32)


@pytest.fixture(scope="module")
def shared() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


@pytest.fixture
def client(shared: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(shared.address, actor="a") as client:
        client.clear()
        yield client


def stored(client: ReplayClient, actor: str = "a") -> list[dict[str, np.ndarray]]:
    return [episode.columns for episode in client.episodes(actor=actor)]


class Script(gymnasium.Env[Any, Any]):
    """Counts its steps: observation t is [t], its reward t. ``bad`` is what it returns instead in a step of its first episode."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, bad: dict[int, dict[str, Any]] | None = None, space: spaces.Space[Any] | None = None) -> None:
        self.observation_space = space or spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.bad = bad or {}
        self.episode = -1
        self.steps = 0

    def _given(self) -> dict[str, Any]:
        given = {
            "obs": np.full(1, self.steps, np.float32),
            "reward": float(self.steps),
            "terminated": self.steps == LENGTH,
            "truncated": False,
        }
        return given | (self.bad.get(self.steps, {}) if self.episode == 0 else {})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.episode += 1
        self.steps = 0
        return self._given()["obs"], {"step": 0}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.steps += 1
        given = self._given()
        return given["obs"], given["reward"], given["terminated"], given["truncated"], {"step": self.steps, "intervened": self.steps == 2}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "float64 that is no float32": (
        {"obs": np.full(1, 0.1)},
        r'obs: 0.1, which is .* as float32; .* declares; dtype="float32" on the client',
    ),
    "NaN reward as None": ({"reward": None}, "reward: None, expected numbers"),
    "text reward": ({"reward": "1.5"}, r"reward: text \('1.5'\)"),
    "infinite as float32": ({"reward": 1e300}, r"reward: 1e\+300, which is inf"),
    "a whole number that float32 lacks": ({"reward": 2**24 + 1}, r"reward: 16777217, which is 16777216.0 as float32"),
    "masked": ({"obs": np.ma.array([1.0], mask=[True])}, "obs: 1 masked values"),
    "another shape": ({"obs": np.zeros(2, np.float32)}, r"obs: shape \(2,\) in row 3"),
    "NaN as terminated": ({"terminated": np.nan}, "terminated: nan, which is True as bool"),
    "text as truncated": ({"truncated": "False"}, "truncated: text"),
    "flags of several": ({"terminated": np.zeros(2, bool)}, r"terminated: shape \(2,\), expected one value"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=list(BAD))
def test_step_that_cannot_be_stored_ends_the_episode_and_the_next_begins_at_a_reset(
    client: ReplayClient, given: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    ended = ("terminated" in given and bool(np.any(np.isnan(given["terminated"])))) or given.get("truncated") == "False"
    with GymnasiumRecorder(Script({3: given}), client) as env, caplog.at_level(logging.WARNING):
        env.reset()
        for step in range(1, LENGTH + 1):
            if step == 3:
                with pytest.raises(InvalidEpisodeError, match=f"^{message}"):
                    env.step(ACTION)
                if ended:
                    break
            else:
                env.step(ACTION)
        env.reset()
        for _ in range(LENGTH):
            env.step(ACTION)

    first, second = stored(client)
    assert first["obs"].tolist() == [[0], [1], [2]] and not first["done"][1:].any()
    assert second["obs"][:, 0].tolist() == list(range(LENGTH + 1)) and second["done"].tolist()[1:] == [0] * (LENGTH - 1) + [1]
    assert ended or "3 steps after a refused row were not recorded" in caplog.text


@pytest.mark.parametrize(
    ("space", "value", "message"),
    [
        (spaces.Box(0, 255, (1,), np.uint8), np.array([0.5]), "obs: 0.5, which is 0 as uint8"),
        (spaces.Box(0, 255, (1,), np.uint8), np.array([np.nan]), "obs: nan, which is .* as uint8"),
        (spaces.Box(-128, 127, (1,), np.int8), np.array([300]), "obs: 300, which is 44 as int8"),
        (spaces.Discrete(5), 2.5, "obs: 2.5, which is 2 as int64"),
        (spaces.MultiBinary(1), np.array([-129]), "obs: -129, which is 127 as int8"),
        (spaces.Box(-1, 1, (1,), np.float16), np.array([0.1], np.float32), "obs: 0.1.*, which is .* as float16"),
        (spaces.Box(-1, 1, (1,), np.float32), np.array([2**24 + 1]), "obs: 16777217, which is 16777216.0 as float32"),
        (spaces.Dict(a=spaces.Discrete(2)), {"a": 1, "b": 2}, r"obs: keys \['a', 'b'\], expected the keys \['a'\]"),
        (spaces.Dict(a=spaces.Discrete(2)), {}, r"obs: keys \[\], expected the keys \['a'\]"),
        (spaces.Dict(a=spaces.Discrete(2)), 1, "obs: type int, expected the keys"),
        (spaces.Tuple([spaces.Discrete(2)]), (1, 0), "obs: 2 items, expected the 1 items"),
    ],
)
def test_first_observation_that_is_none_of_the_space_is_refused(
    client: ReplayClient, space: spaces.Space[Any], value: Any, message: str
) -> None:
    with GymnasiumRecorder(Script({0: {"obs": value}}, space), client) as env:
        with pytest.raises(InvalidEpisodeError, match=f"^{message}"):
            env.reset()
        for _ in range(LENGTH):
            env.step(ACTION)  # belongs to no episode

    assert stored(client) == []


@pytest.mark.parametrize("space", [spaces.Dict({"a.b": spaces.Discrete(2)}), spaces.Dict({"": spaces.Discrete(2)})])
def test_space_whose_keys_are_no_names_is_refused(client: ReplayClient, space: spaces.Space[Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^obs: key '.*', expected a name without a dot"):
        GymnasiumRecorder(Script(space=space), client)


def test_observation_keeps_the_order_of_its_keys(client: ReplayClient) -> None:
    value = {"z": np.zeros(1, np.float32), "a": np.ones(1, np.float32)}
    env = Script({number: {"obs": value} for number in range(3)}, spaces.Dict(a=spaces.Box(0, 1, (1,)), z=spaces.Box(0, 1, (1,))))
    with GymnasiumRecorder(env, client) as recorder:
        recorder.reset()
        recorder.step(ACTION)
        recorder.step(ACTION)

    assert [name for name in stored(client)[0] if name.startswith("obs")] == ["obs.z", "obs.a"]
    assert list(client.sample(batch_size=1, horizon=1, as_numpy=True).obs) == ["z", "a"]


@pytest.mark.parametrize("action", ["left", None, np.array([np.nan + 1j]), np.ma.array([0.0], mask=[True]), [[1], [2, 3]]], ids=str)
def test_action_that_cannot_be_stored_is_refused_before_the_step(client: ReplayClient, action: Any) -> None:
    script = Script()
    with GymnasiumRecorder(script, client) as env:
        env.reset()
        with pytest.raises(InvalidEpisodeError, match=r"^action: "):
            env.step(action)
        for _ in range(LENGTH):
            env.step(ACTION)

    (episode,) = stored(client)
    assert script.steps == LENGTH and len(episode["obs"]) == LENGTH + 1


@pytest.mark.parametrize(
    "action", [np.array([0.1]), [0.1], (0.1,), torch.tensor([0.1]), torch.tensor([0.1]).bfloat16(), np.array([1], np.int8)], ids=str
)
def test_action_is_rounded_to_the_dtype_of_the_space(client: ReplayClient, action: Any) -> None:
    with GymnasiumRecorder(Script(), client) as env:
        env.reset()
        env.step(action)

    column = stored(client)[0]["action"]
    assert column.dtype == np.float32 and column[1] == np.float32(float(action[0]))


def test_dtype_rounds_float64_observations(client: ReplayClient) -> None:
    script = Script({number: {"obs": np.full(1, 0.1)} for number in range(3)}, spaces.Box(-1, 1, (1,), np.float64))
    with GymnasiumRecorder(script, client, dtype="float32") as env:
        env.reset()
        env.step(ACTION)

    assert stored(client)[0]["obs"].tolist() == [[np.float32(0.1)]] * 2


def test_transform_with_info_gets_that_of_its_row_and_one_without_is_called_as_ever(client: ReplayClient) -> None:
    def with_info(row: dict[str, Any], *, info: dict[str, Any]) -> dict[str, Any]:
        return row | {"step": info["step"], "intervened": info.get("intervened", False)}

    with GymnasiumRecorder(Script(), client, transform=with_info) as env:
        env.reset()
        for _ in range(LENGTH):
            env.step(ACTION)
    (episode,) = stored(client)
    assert episode["step"].tolist() == list(range(LENGTH + 1))
    assert episode["intervened"].tolist() == [number == 2 for number in range(LENGTH + 1)]

    client.clear()
    with GymnasiumRecorder(Script(), client, transform=lambda row, scale=2.0: row | {"scale": scale}) as env:
        env.reset()
        env.step(ACTION)
    assert stored(client)[0]["scale"].tolist() == [2.0, 2.0]


class Vector(VectorEnv):
    """Two scripts that reset themselves in the same step; ``final`` changes the infos that are returned."""

    num_envs = 2

    def __init__(self, mode: AutoresetMode, final: Callable[[dict[str, Any]], None] = lambda infos: None, **bad: Any) -> None:
        self.scripts = [Script(bad.get("bad")), Script()]
        if BEFORE_1:
            super().__init__(2, self.scripts[0].observation_space, self.scripts[0].action_space)
        self.single_observation_space = self.scripts[0].observation_space
        self.single_action_space = self.scripts[0].action_space
        self.metadata = {"autoreset_mode": mode}
        self.mode, self.final = mode, final
        self.over = [False, False]

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return np.stack([script.reset()[0] for script in self.scripts]), {"step": np.zeros(2, int), "_step": np.ones(2, bool)}

    def step(self, actions: Any) -> Any:
        infos: dict[str, Any] = {"step": np.zeros(2, int), "_step": np.ones(2, bool)}
        obs, rewards, ends = [], [], []
        for number, script in enumerate(self.scripts):
            if self.mode is AutoresetMode.NEXT_STEP and self.over[number]:
                arrived, reward, end, info = script.reset()[0], 0.0, False, {"step": 0}
            else:
                arrived, reward, end, _, info = script.step(actions[number])
            self.over[number] = end
            if end and self.mode is AutoresetMode.SAME_STEP:
                for name, value, dtype in (
                    ("final_obs", arrived, object),
                    ("final_info", {"step": np.array([script.steps] * 2), "_step": np.ones(2, bool)}, None),
                ):
                    if dtype is None:
                        infos[name] = value
                    else:
                        infos.setdefault(name, np.full(2, None, dtype))[number] = value
                    infos.setdefault(f"_{name}", np.zeros(2, bool))[number] = True
                arrived, info = script.reset()
            infos["step"][number] = info["step"]
            obs.append(arrived)
            rewards.append(reward)
            ends.append(end)
        self.final(infos)
        return obs, rewards, np.array(ends), np.zeros(2, bool), infos


def play(env: GymnasiumVectorRecorder, steps: int) -> list[str]:
    """Returns the refusals."""
    refused = []
    env.reset()
    for _ in range(steps):
        try:
            env.step(np.zeros((2, 1), np.float32))
        except InvalidEpisodeError as error:
            refused.append(str(error))
    return refused


def drop_all(infos: dict[str, Any]) -> None:
    infos.pop("final_obs", None)
    infos.pop("_final_obs", None)


def drop_first(infos: dict[str, Any]) -> None:
    if "final_obs" in infos:
        infos["final_obs"][0] = None


def shorten(infos: dict[str, Any]) -> None:
    if "final_obs" in infos:
        infos["final_obs"] = infos["final_obs"][:0]


@pytest.mark.parametrize(("final", "whole"), [(drop_all, []), (drop_first, [1]), (shorten, [])])
def test_last_observation_that_a_vector_environment_does_not_give_joins_no_episodes(
    client: ReplayClient, final: Callable[[dict[str, Any]], None], whole: list[int]
) -> None:
    with GymnasiumVectorRecorder(Vector(AutoresetMode.SAME_STEP, final), client) as env:
        refused = play(env, 2 * LENGTH)

    assert refused
    for number in (0, 1):
        episodes = stored(client, f"a/{number}")
        rows = LENGTH + 1 if number in whole else LENGTH
        assert [episode["obs"][:, 0].tolist() for episode in episodes] == [list(range(rows))] * 2
        assert [bool(episode["done"][-1]) for episode in episodes] == [number in whole] * 2


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_refused_row_of_one_environment_leaves_the_other_whole(client: ReplayClient, mode: AutoresetMode) -> None:
    with GymnasiumVectorRecorder(Vector(mode, bad={3: {"reward": None}}), client) as env:
        refused = play(env, 2 * LENGTH + 1)

    assert len(refused) == 1 and refused[0].startswith("reward: None")
    broken, other = stored(client, "a/0"), stored(client, "a/1")
    assert [len(episode["obs"]) for episode in broken[:2]] == [3, LENGTH + 1]
    assert [len(episode["obs"]) for episode in other[:2]] == [LENGTH + 1] * 2


def test_transform_of_a_vector_environment_gets_the_info_of_each(client: ReplayClient) -> None:
    def with_step(row: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        return row | {"step": info["step"]}

    with GymnasiumVectorRecorder(Vector(AutoresetMode.SAME_STEP), client, transform=with_step) as env:
        assert play(env, 2 * LENGTH) == []

    for episode in stored(client, "a/1"):
        assert episode["step"].tolist() == episode["obs"][:, 0].tolist()


class Players(dm_env.Environment):
    """Two players; ``bad`` holds the parts of a step that it returns instead."""

    def __init__(self, bad: dict[str, Any]) -> None:
        self.bad, self.steps, self.episode = bad, 0, 0

    def observation_spec(self) -> Any:
        return [{"x": specs.Array((1,), np.float64)}] * 2

    def action_spec(self) -> Any:
        return [specs.BoundedArray((1,), np.float32, -1, 1)] * 2

    def reset(self) -> dm_env.TimeStep:
        self.steps, self.episode = 0, self.episode + 1
        return dm_env.restart([{"x": np.zeros(1)}] * 2)._replace(reward=[None, None])

    def step(self, action: Any) -> dm_env.TimeStep:
        self.steps += 1
        obs = [{"x": np.full(1, self.steps / 10)}] * 2
        made = (dm_env.termination if self.steps == LENGTH else dm_env.transition)([1.0, 1.0], obs)
        return made._replace(**self.bad) if self.steps == 3 and self.episode == 1 else made


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"reward": [1.0, None]}, "reward: None, expected numbers"),
        ({"observation": [{"x": np.zeros(1)}, {"x": np.zeros(1), "y": 1}]}, r"obs: keys \['x', 'y'\]"),
        ({"observation": [{"x": np.zeros(1)}]}, "cannot read what the environment returned: IndexError"),
    ],
)
def test_player_of_dm_env_whose_step_cannot_be_stored_leaves_the_other_whole(
    client: ReplayClient, bad: dict[str, Any], message: str
) -> None:
    kinds: list[int] = []

    def discounted(row: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        kinds.append(int(info["step_type"]))
        return row | {"discount": np.float32(np.nan if info["discount"] is None else info["discount"])}

    with DmEnvRecorder(Players(bad), client, dtype="float32", transform=discounted) as env:
        for _ in range(2):
            env.reset()
            for step in range(1, LENGTH + 1):
                if step == 3 and not stored(client, "a/1") and env.episode == 1:
                    with pytest.raises(InvalidEpisodeError, match=message):
                        env.step([ACTION, ACTION])
                else:
                    env.step([ACTION, ACTION])

    assert [len(episode["obs.x"]) for episode in stored(client, "a/0")] == [LENGTH + 1] * 2
    assert [len(episode["obs.x"]) for episode in stored(client, "a/1")] == [3, LENGTH + 1]
    whole = stored(client, "a/0")[0]
    assert whole["obs.x"].dtype == np.float32 and whole["discount"].tolist()[1:] == [1.0] * (LENGTH - 1) + [0.0]
    assert set(kinds) == {0, 1, 2}


class Arena(pettingzoo.ParallelEnv):
    """Two agents; ``bad`` changes the result of a step of the first episode."""

    def __init__(self, bad: Callable[[tuple[dict[str, Any], ...]], None]) -> None:
        self.metadata = {"name": "arena"}
        self.possible_agents = self.agents = ["x", "y"]
        self.bad, self.steps, self.episode = bad, 0, 0

    def observation_space(self, agent: str) -> Any:
        return spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def action_space(self, agent: str) -> Any:
        return spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.steps, self.episode = 0, self.episode + 1
        return {agent: np.zeros(1, np.float32) for agent in self.agents}, {agent: {"at": 0} for agent in self.agents}

    def step(self, actions: Any) -> Any:
        self.steps += 1
        answer: tuple[dict[str, Any], ...] = (
            {agent: np.full(1, self.steps, np.float32) for agent in self.agents},
            dict.fromkeys(self.agents, 1.0),
            dict.fromkeys(self.agents, self.steps == LENGTH),
            dict.fromkeys(self.agents, False),
            {agent: {"at": self.steps} for agent in self.agents},
        )
        if self.steps == 3 and self.episode == 1:
            self.bad(answer)
        return answer


@pytest.mark.parametrize(
    ("bad", "message", "ended"),
    [
        (lambda answer: answer[1].pop("x"), "reward: the environment returned none for agent 'x'", False),
        (lambda answer: answer[2].pop("x"), "terminated: the environment returned none for agent 'x'", False),
        (lambda answer: answer[3].pop("x"), "truncated: the environment returned none for agent 'x'", False),
        (lambda answer: answer[0].update(x=np.full(1, 0.1)), "obs: 0.1, which is", False),
        (lambda answer: answer[0].pop("x"), "obs: the environment returned none for agent 'x'", True),
    ],
)
def test_agent_whose_step_cannot_be_stored_leaves_the_other_whole(
    client: ReplayClient, bad: Callable[[Any], None], message: str, ended: bool
) -> None:
    def at(row: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        return row | {"at": info["at"]}

    with PettingZooRecorder(Arena(bad), client, transform=at) as env:
        for episode in range(2):
            env.reset()
            for step in range(1, LENGTH + 1):
                if step == 3 and not episode:
                    with pytest.raises(InvalidEpisodeError, match=f"^{message}"):
                        env.step({"x": ACTION, "y": ACTION})
                    if ended:
                        break
                else:
                    env.step({"x": ACTION, "y": ACTION})

    x, y = stored(client, "a/x"), stored(client, "a/y")
    assert [episode["obs"][:, 0].tolist() for episode in x] == [[0, 1, 2], list(range(LENGTH + 1))]
    assert len(y[-1]["obs"]) == LENGTH + 1 and y[-1]["at"].tolist() == list(range(LENGTH + 1))


def test_agent_that_is_given_no_action_is_refused(client: ReplayClient) -> None:
    with PettingZooRecorder(Arena(lambda answer: None), client) as env:
        env.reset()
        env.step({"x": ACTION, "y": ACTION})
        with pytest.raises(InvalidEpisodeError, match=r"^action: none for agent 'x', expected one for each"):
            env.step({"y": ACTION})
        for _ in range(LENGTH - 2):
            env.step({"x": ACTION, "y": ACTION})

    assert [len(episode["obs"]) for episode in stored(client, "a/x")] == [2]
    assert [len(episode["obs"]) for episode in stored(client, "a/y")] == [LENGTH + 1]
