"""Loading data sets made by Minari."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
from minari.data_collector.episode_buffer import EpisodeBuffer

from support.dataset_cases import serve, stored
from support.serving import ServerThread
from touchline import ReplayClient, datasets
from touchline.datasets import ColumnTransforms, DatasetError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address) as client:
        yield client


@pytest.fixture
def minari_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def _play(env: gymnasium.Env[Any, Any], episodes: int, **last: Any) -> list[EpisodeBuffer]:
    """Plays at random and returns the episode as Minari expects it."""
    env.action_space.seed(0)
    played = []
    for number in range(episodes):
        obs, info = env.reset(seed=number)
        buffer: dict[str, list[Any]] = {"obs": [obs], "action": [], "reward": [], "terminated": [], "truncated": [], "info": [info]}
        over = False
        while not over:
            action = env.action_space.sample()
            obs, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            for name, value in {"obs": obs, "action": action, "reward": reward, "terminated": terminated, "truncated": truncated}.items():
                buffer[name].append(value)
        steps = len(buffer["action"])
        played.append(
            EpisodeBuffer(
                observations=np.stack(buffer["obs"]),
                actions=np.stack(buffer["action"]),
                rewards=buffer["reward"],
                terminations=buffer["terminated"],
                truncations=buffer["truncated"] if not last else [False] * (steps - 1) + [last["truncated"]],
                infos={"clock": np.arange(steps + 1), "name": ["x"] * (steps + 1)},
            )
        )
    return played


@pytest.mark.filterwarnings("ignore")
def _create(name: str, played: list[EpisodeBuffer], env: gymnasium.Env[Any, Any], **options: Any) -> None:
    minari.create_dataset_from_buffers(name, played, observation_space=env.observation_space, action_space=env.action_space, **options)


@pytest.mark.filterwarnings("ignore")
def test_minari_dataset_is_stored_in_rows_as_recorders_write_them(server: ServerThread, client: ReplayClient, minari_folder: Path) -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    played = _play(env, 3)
    _create("pendulum/random-v0", played, env)

    report = datasets.load(client, "minari:pendulum/random-v0", actor="left")

    found = stored(server)
    assert (report.stored, report.steps) == (3, 63)
    assert list(found[0]) == ["obs", "action", "reward", "done"]
    for episode, buffer in zip(found, played, strict=True):
        assert episode["obs"].tobytes() == buffer.observations.tobytes()
        assert episode["action"][1:].tobytes() == buffer.actions.tobytes()
        assert episode["reward"][1:].tolist() == buffer.rewards
        assert episode["done"].dtype == np.float32 and not episode["done"][1:].any()
        assert all(np.isnan(episode[name][0]).all() for name in ("action", "reward", "done"))
    assert set(client.sample().actor_names.values()) == {"left"}


@pytest.mark.filterwarnings("ignore")
def test_minari_termination_is_done_and_discrete_actions_are_kept(server: ServerThread, client: ReplayClient, minari_folder: Path) -> None:
    env = gymnasium.make("CartPole-v1")
    played = _play(env, 4)
    _create("cartpole/random-v0", played, env)

    datasets.load(client, str(minari_folder / "cartpole" / "random-v0"), infos=True, transforms=ColumnTransforms(float32=True, task=7))

    for episode, buffer in zip(stored(server), played, strict=True):
        assert set(episode) == {"obs", "action", "reward", "done", "info.clock", "task"}
        assert episode["done"][1:].astype(bool).tolist() == buffer.terminations
        assert episode["action"].dtype == np.int64 and episode["action"][1:].tolist() == buffer.actions.tolist()
        assert episode["reward"].dtype == np.float32
        assert episode["info.clock"].tolist() == list(range(len(episode["obs"])))
        assert episode["task"].tolist() == [7] * len(episode["obs"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("truncated", [True, False])
def test_minari_truncations_that_the_end_does_not_tell_become_a_column(
    server: ServerThread, client: ReplayClient, minari_folder: Path, truncated: bool
) -> None:
    """CartPole terminates; told by that is that it was not truncated."""
    env = gymnasium.make("CartPole-v1")
    _create("cartpole/both-v0", _play(env, 2, truncated=truncated), env)

    datasets.load(client, "minari:cartpole/both-v0")

    for episode in stored(server):
        assert ("truncated" in episode) == truncated
        if truncated:
            assert episode["truncated"].tolist() == [False] * (len(episode["obs"]) - 1) + [True]


class Arm(gymnasium.Env[Any, Any]):
    """An environment with a Tuple within Dict observations."""

    observation_space = gymnasium.spaces.Dict(
        {
            "image": gymnasium.spaces.Box(0, 255, (2, 2, 3), np.uint8),
            "joints": gymnasium.spaces.Tuple([gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(3)]),
        }
    )
    action_space = gymnasium.spaces.Box(-1, 1, (2,))


@pytest.mark.filterwarnings("ignore")
def test_minari_nested_observations_are_flattened_with_dots(server: ServerThread, client: ReplayClient, minari_folder: Path) -> None:
    rng = np.random.default_rng(0)
    image, angle, mode = rng.integers(0, 255, (4, 2, 2, 3), np.uint8), rng.random((4, 2), np.float32), rng.integers(0, 3, 4)
    buffer = EpisodeBuffer(
        observations={"image": image, "joints": (angle, mode)},
        actions=rng.random((3, 2), np.float32),
        rewards=[0.0, 1.0, 2.0],
        terminations=[False] * 3,
        truncations=[False, False, True],
    )
    _create("arm-v0", [buffer], Arm())

    datasets.load(client, "minari:arm-v0")

    episode = stored(server)[0]
    assert np.array_equal(episode["obs.image"], image)
    assert np.array_equal(episode["obs.joints.0"], angle)
    assert np.array_equal(episode["obs.joints.1"], mode)


def test_missing_minari_dataset_is_refused_with_the_folder_searched(client: ReplayClient, minari_folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"minari:D4RL/door/human-v2: not in Minari's folder .*minari download D4RL/door/human-v2"):
        datasets.load(client, "minari:D4RL/door/human-v2")


@pytest.mark.filterwarnings("ignore")
def test_minari_rows_are_made_in_the_servers_convention(minari_folder: Path) -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=5)
    played = _play(env, 1)
    _create("pendulum/random-v0", played, env)

    with serve(row_convention="outgoing") as server, ReplayClient(server.address) as client:
        datasets.load(client, "minari:pendulum/random-v0")

        episode = stored(server)[0]
    assert episode["action"][:-1].tobytes() == played[0].actions.tobytes()
    assert np.isnan(episode["action"][-1]).all()


@pytest.mark.filterwarnings("ignore")
def test_example_stores_a_minari_dataset_once(server: ServerThread, minari_folder: Path) -> None:
    env = gymnasium.make("CartPole-v1")
    _create("cartpole/random-v0", _play(env, 3), env)
    command = [sys.executable, str(EXAMPLES / "load_minari.py"), "cartpole/random-v0", "--address", server.address]

    told = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2)]

    assert told == [
        {"stored": 3, "duplicates": 0, "episodes_on_the_server": 3},
        {"stored": 0, "duplicates": 3, "episodes_on_the_server": 3},
    ]
