"""The dm_env recorder on dm_control's tasks: one player, and soccer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("MUJOCO_GL", "disabled")  # read when dm_control is imported

import dm_env
from dm_control import suite
from dm_control.locomotion import soccer

from support.recorder_cases import Played, check_episode, check_episodes, serve
from support.serving import ServerThread, stored_episodes
from touchline import InvalidArgumentError, ReplayClient
from touchline.recorders import DmEnvRecorder


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address, actor="dm") as client:
        yield client


def _columns(server: ServerThread, actor: str = "dm") -> list[dict[str, np.ndarray]]:
    return [columns for name, columns in stored_episodes(server) if name == actor]


def _flat(observation: Any) -> np.ndarray:
    return np.concatenate([np.ravel(part) for part in observation.values()])


def _check_nested(stored: list[dict[str, np.ndarray]], played: list[Played]) -> None:
    for columns, episode in zip(stored, played, strict=True):
        names = episode.obs[0].keys()
        assert {name for name in columns if name.startswith("obs")} == {f"obs.{name}" for name in names}
        for name in names:
            rows = np.stack([obs[name] for obs in episode.obs])
            assert np.array_equal(columns[f"obs.{name}"], rows)
            assert columns[f"obs.{name}"].dtype == rows.dtype
            check_episode(columns | {"obs": columns[f"obs.{name}"]}, Played(rows, episode.action, episode.reward, episode.terminated))


def test_time_limit_truncates_and_the_next_step_resets(server: ServerThread, client: ReplayClient) -> None:
    rng = np.random.default_rng(1)
    played: list[Played] = []

    with DmEnvRecorder(suite.load("cartpole", "swingup", task_kwargs={"random": 1, "time_limit": 0.1}), client) as env:
        shape, resets = env.action_spec().shape, 0
        step = env.reset()
        played.append(Played([dict(step.observation)]))
        while len(played) < 4 or not step.last():
            action = rng.uniform(-1, 1, shape)
            step = env.step(None if step.last() else action)  # the action of a step that resets may be anything
            if step.first():
                resets += 1
                played.append(Played([dict(step.observation)]))
            else:
                played[-1].add(dict(step.observation), action, step.reward, step.last() and step.discount == 0.0)
        assert env.physics.model.nq == 2  # further attributes of the environment

    assert resets == 3
    stored = _columns(server)
    _check_nested(stored, played)
    assert [len(columns["done"]) for columns in stored] == [11] * 4
    assert not any(columns["done"][1:].any() for columns in stored)


def test_discount_of_zero_terminates(server: ServerThread, client: ReplayClient) -> None:
    with DmEnvRecorder(suite.load("lqr", "lqr_2_1", task_kwargs={"random": 2}), client, transform=_flattened) as env:
        played = Played([_flat(env.reset().observation)])
        for step_number in range(5):
            if step_number == 4:
                with env.physics.reset_context():
                    env.physics.set_state(np.zeros(4))  # at rest in the middle: this task's goal
            step = env.step(np.zeros(1))
            played.add(_flat(step.observation), np.zeros(1), step.reward, step.last() and step.discount == 0.0)
        assert step.last() and step.discount == 0.0

    (stored,) = _columns(server)
    check_episode(stored, played)
    assert stored["done"][1:].tolist() == [0, 0, 0, 0, 1]


def _flattened(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"obs": _flat(row["obs"])}


def test_soccer_gives_one_episode_a_player(server: ServerThread, client: ReplayClient) -> None:
    match = soccer.load(team_size=2, time_limit=0.5, random_state=3, enable_field_box=True, walker_type=soccer.WalkerType.BOXHEAD)
    rng = np.random.default_rng(2)
    played: list[list[Played]] = [[] for _ in range(4)]

    with DmEnvRecorder(match, client, transform=_flattened) as env:
        for _ in range(2):
            step = env.reset()
            for player, observation in enumerate(step.observation):
                played[player].append(Played([_flat(observation)]))
            while not step.last():
                actions = [rng.uniform(-1, 1, 3) for _ in range(4)]
                step = env.step(actions)
                for player, observation in enumerate(step.observation):
                    ended = step.last() and step.discount == 0.0
                    played[player][-1].add(_flat(observation), actions[player], step.reward[player], ended)

    assert len(stored_episodes(server)) == 8
    for player in range(4):
        check_episodes(_columns(server, f"dm/{player}"), played[player])


def test_reset_in_the_middle_truncates(server: ServerThread, client: ReplayClient) -> None:
    with DmEnvRecorder(suite.load("pendulum", "swingup", task_kwargs={"random": 1}), client) as env:
        for steps in (2, 4):
            env.reset()
            for _ in range(steps):
                env.step(np.zeros(1))

    assert [len(columns["done"]) for columns in _columns(server)] == [3, 5]


def test_action_of_several_arrays_is_refused(client: ReplayClient) -> None:
    class TwoArms(dm_env.Environment):
        def reset(self) -> dm_env.TimeStep:
            raise NotImplementedError

        step = reset

        def observation_spec(self) -> Any:
            return dm_env.specs.Array((2,), np.float32)

        def action_spec(self) -> Any:
            return {"left": dm_env.specs.Array((2,), np.float32)}

    with pytest.raises(InvalidArgumentError, match="action: spec dict, expected a single array"):
        DmEnvRecorder(TwoArms(), client)
