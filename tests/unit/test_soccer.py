"""The examples' environment, policy and world model, on real matches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import dm_env
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from soccer import ACTIONS, GOAL_REWARD, PLAYERS, MatchRows, NoisyChaser, TeamRows, flat_observation, make_match, play_match, shaped_reward
from touchline import ReplayClient
from touchline.recorders import DmEnvRecorder
from touchline_server import Config
from touchline_server.service.app import ServerThread
from world_model import Normalizer, WorldModel

OBS_SIZE = 113
CONTROL_STEPS_PER_S = 40


@cache
def played_match(*, seed: int, seconds: float = 1.0, number: int = 3) -> tuple[dict[str, np.ndarray], ...]:
    """Returns the four episodes of a match; not to be changed."""
    return recorded(make_match(seed=seed, match_seconds=seconds), policies_of(seed), number=number)


def policies_of(seed: int) -> list[NoisyChaser]:
    return [NoisyChaser(seed=(seed, player)) for player in range(PLAYERS)]


def recorded(environment: dm_env.Environment, policies: list[NoisyChaser], *, number: int) -> tuple[dict[str, np.ndarray], ...]:
    """Plays a match as the actor does, and returns what a server stored of it: a player's columns each."""
    config = Config(config={"buffer_size": 10_000, "min_history": 0}, storage={"device": "cpu"}, server={"port": 0})
    with ServerThread(config) as server, ReplayClient(server.address, actor="arm") as client:
        with DmEnvRecorder(environment, client, transform=MatchRows(number)) as match:
            for _ in play_match(match, policies):
                pass
        episodes = {episode.actor: episode.columns for episode in client.episodes()}
    assert sorted(episodes) == [f"arm/{player}" for player in range(PLAYERS)]
    return tuple(episodes[f"arm/{player}"] for player in range(PLAYERS))


def rows_by_hand(seed: int, *, seconds: float, number: int) -> tuple[dict[str, np.ndarray], ...]:
    """The same match without a recorder: every row put together from what the environment gave and took."""
    match, policies = make_match(seed=seed, match_seconds=seconds), policies_of(seed)
    for policy in policies:
        policy.reset()
    step = match.reset()
    rows = [[(flat_observation(observation), np.full(ACTIONS, np.nan), np.nan, np.nan) for observation in step.observation]]
    while not step.last():
        actions = [policy(observation) for policy, observation in zip(policies, step.observation, strict=True)]
        step = match.step(actions)
        done = float(step.last() and step.discount == 0.0)
        rows.append(
            [
                (flat_observation(observation), action, shaped_reward(float(goal), observation), done)
                for observation, action, goal in zip(step.observation, actions, step.reward, strict=True)
            ]
        )
    names = ("obs", "action", "reward", "done")
    return tuple(
        {name: np.stack([np.float32(row[player][place]) for row in rows]) for place, name in enumerate(names)}
        | {"match": np.full(len(rows), number, np.int32)}
        for player in range(PLAYERS)
    )


def test_match_gives_an_episode_a_player_of_one_row_more_than_steps() -> None:
    episodes = played_match(seed=0)

    rows = CONTROL_STEPS_PER_S + 1
    assert len(episodes) == PLAYERS
    for episode in episodes:
        shapes = {name: (column.dtype.name, column.shape) for name, column in episode.items()}
        assert shapes == {
            "obs": ("float32", (rows, OBS_SIZE)),
            "action": ("float32", (rows, ACTIONS)),
            "reward": ("float32", (rows,)),
            "done": ("float32", (rows,)),
            "match": ("int32", (rows,)),
        }


def test_match_is_stored_exactly_as_it_was_played() -> None:
    for stored, played in zip(played_match(seed=0), rows_by_hand(0, seconds=1.0, number=3), strict=True):
        assert stored.keys() == played.keys()
        for name, column in played.items():
            assert (stored[name].dtype, stored[name].shape) == (column.dtype, column.shape), name
            assert stored[name].tobytes() == column.tobytes(), name


def test_match_row_0_has_only_an_observation() -> None:
    for episode in played_match(seed=0):
        for name in ("action", "reward", "done"):
            assert np.isnan(episode[name][0]).all()
            assert np.isfinite(episode[name][1:]).all()
        assert np.isfinite(episode["obs"]).all()


def test_match_row_holds_the_action_that_led_to_its_observation() -> None:
    episode = played_match(seed=0)[0]
    match = make_match(seed=0, match_seconds=1.0)
    match.reset()
    policies = [played["action"] for played in played_match(seed=0)]

    seen = [match.step([actions[row] for actions in policies]).observation[0] for row in range(1, 6)]

    rewards = [shaped_reward(0.0, observation) for observation in seen]
    np.testing.assert_allclose(episode["reward"][1:6], rewards, rtol=1e-5, atol=1e-6)


def test_match_that_the_clock_ends_is_not_terminated() -> None:
    for episode in played_match(seed=0):
        assert not episode["done"][1:].any()


def test_match_that_a_goal_ends_is_terminated_and_rewarded() -> None:
    real = make_match(seed=0, match_seconds=1.0)
    observation = real.reset().observation

    class MatchWithAGoal(dm_env.Environment):
        """Home scores with the first step."""

        def observation_spec(self) -> object:
            return real.observation_spec()

        def action_spec(self) -> object:
            return real.action_spec()

        def reset(self) -> dm_env.TimeStep:
            return dm_env.restart(observation)

        def step(self, actions: list[np.ndarray]) -> dm_env.TimeStep:
            return dm_env.termination([1.0, 1.0, -1.0, -1.0], observation)

    episodes = recorded(MatchWithAGoal(), policies_of(0), number=0)

    assert [len(episode["done"]) for episode in episodes] == [2] * PLAYERS
    assert [float(episode["done"][-1]) for episode in episodes] == [1.0] * PLAYERS
    expected = np.array([GOAL_REWARD, GOAL_REWARD, -GOAL_REWARD, -GOAL_REWARD])
    np.testing.assert_allclose([float(episode["reward"][-1]) for episode in episodes], expected, atol=1e-6)


def test_team_rows_are_those_of_the_players_side_by_side() -> None:
    alone = recorded(make_match(seed=4, match_seconds=0.5), policies_of(4), number=6)
    config = Config(config={"buffer_size": 10_000, "min_history": 0}, storage={"device": "cpu"}, server={"port": 0})
    with ServerThread(config) as server, ReplayClient(server.address, actor="arm") as client:
        environment = make_match(seed=4, match_seconds=0.5)
        with DmEnvRecorder(environment, client, lockstep=True, transform=TeamRows(6)) as match:
            for _ in play_match(match, policies_of(4)):
                pass
        (team,) = client.episodes()

    assert team.actor == "arm" and team.columns["alive"].all()
    assert set(team.columns) == {"obs", "action", "reward", "done", "match", "alive"}
    for name in ("obs", "action", "reward", "done"):
        assert team.columns[name].dtype == alone[0][name].dtype
        np.testing.assert_array_equal(team.columns[name], np.stack([episode[name] for episode in alone], axis=1))
    np.testing.assert_array_equal(team.columns["match"], alone[0]["match"])


def test_match_of_the_same_seed_is_the_same_and_of_another_is_not() -> None:
    first, other = played_match(seed=1, seconds=0.5), played_match(seed=2, seconds=0.5)
    played_match.cache_clear()
    again = played_match(seed=1, seconds=0.5)

    for mine, same in zip(first, again, strict=True):
        for name, column in mine.items():
            np.testing.assert_array_equal(column, same[name])
    assert not np.array_equal(first[0]["obs"], other[0]["obs"])


def test_policy_is_within_the_controls() -> None:
    for episode in played_match(seed=0):
        assert np.abs(episode["action"][1:]).max() <= 1.0


def test_policy_noise_keeps_its_direction_for_its_memory() -> None:
    observation = make_match(seed=0, match_seconds=1.0).reset().observation[0]
    policy = NoisyChaser(seed=0, memory_steps=20.0, pull=(0.0, 0.0))

    kick = np.array([policy(observation)[2] for _ in range(5000)])

    assert np.corrcoef(kick[1:], kick[:-1])[0, 1] == pytest.approx(np.exp(-1 / 20), abs=0.02)
    assert abs(np.corrcoef(kick[100:], kick[:-100])[0, 1]) < 0.15


def test_policy_with_full_pull_runs_to_the_ball() -> None:
    match = make_match(seed=0, match_seconds=3.0)
    policy = NoisyChaser(seed=0, pull=(1.0, 1.0))
    step = match.reset()
    distance = [float(np.linalg.norm(step.observation[0]["ball_ego_position"]))]

    while not step.last():
        step = match.step([policy(step.observation[0])] + [np.zeros(ACTIONS)] * (PLAYERS - 1))
        distance.append(float(np.linalg.norm(step.observation[0]["ball_ego_position"])))

    assert min(distance) < 0.5 * distance[0]


def test_policies_of_two_players_differ() -> None:
    first, second, *_ = played_match(seed=0)

    assert not np.array_equal(first["action"][1:], second["action"][1:])


def slices_of(episodes: tuple[dict[str, np.ndarray], ...], *, horizon: int, seed: int, size: int) -> tuple[torch.Tensor, ...]:
    """Returns obs [H+1, B, obs_size], action [H, B, 3] and reward [H, B, 1], as the service would."""
    rng = np.random.default_rng(seed)
    chosen = [episodes[i] for i in rng.integers(len(episodes), size=size)]
    drawn = [(episode, rng.integers(len(episode["obs"]) - horizon)) for episode in chosen]
    columns = [("obs", 0), ("action", 1), ("reward", 1)]
    obs, action, reward = (
        torch.tensor(np.stack([episode[name][start + first : start + horizon + 1] for episode, start in drawn], axis=1))
        for name, first in columns
    )
    return obs, action, reward.unsqueeze(-1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads on matrices this small, on a busy machine, take twenty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_world_model_learns_from_real_matches() -> None:
    torch.manual_seed(0)
    episodes = played_match(seed=0, seconds=4.0)
    model = WorldModel(OBS_SIZE, ACTIONS)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)

    losses = []
    for update in range(120):
        loss = model.loss(*slices_of(episodes, horizon=3, seed=update, size=64))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        model.follow()
        losses.append((float(loss.reward), float(loss.consistency)))

    first, last = np.mean(losses[:10], axis=0), np.mean(losses[-10:], axis=0)
    assert (last < 0.5 * first).all(), (first, last)
    obs, action, reward = slices_of(episodes, horizon=3, seed=1000, size=512)
    error = (model.predict_rewards(obs[0], action) - reward).square().mean()
    assert error < 0.5 * reward.var(correction=0)


def test_team_model_sees_the_other_players(one_thread: None) -> None:
    torch.manual_seed(0)
    model = WorldModel(6, 2, team=True)
    obs, action, reward = torch.randn(4, 5, 3, 6), torch.randn(3, 5, 3, 2), torch.randn(3, 5, 3, 1)
    model.loss(obs, action, reward)

    predicted = model.predict_rewards(obs[0], action)
    swapped = model.predict_rewards(obs[0].flip(1), action.flip(2))
    action[:, :, 2] += 1.0
    changed = model.predict_rewards(obs[0], action)

    assert predicted.shape == reward.shape
    torch.testing.assert_close(swapped, predicted.flip(2))  # the players' order does not matter
    assert not torch.equal(changed[:, :, 0], predicted[:, :, 0])  # another's action does


def test_world_model_target_follows_and_is_not_trained() -> None:
    model = WorldModel(OBS_SIZE, ACTIONS, target_follows=0.25)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in model.target_encoder.parameters()]

    model.follow()

    for old, new in zip(before, model.target_encoder.parameters(), strict=True):
        assert not new.requires_grad
        torch.testing.assert_close(new, old + 0.25)


def test_world_model_predicts_a_reward_a_step() -> None:
    model = WorldModel(6, 2)

    rewards = model.predict_rewards(torch.randn(5, 6), torch.randn(4, 5, 2))

    assert rewards.shape == (4, 5, 1)


def test_normalizer_in_parts_knows_mean_and_deviation_of_the_whole() -> None:
    torch.manual_seed(0)
    data = torch.randn(100, 3) * torch.tensor([1.0, 10.0, 0.1]) + torch.tensor([5.0, -2.0, 0.0])
    normalizer = Normalizer(3)

    for part in (data[:7], data[7:60], data[60:]):
        normalizer.update(part)

    torch.testing.assert_close(normalizer.mean.float(), data.mean(0))
    torch.testing.assert_close(normalizer.std.float(), data.std(0, correction=0))
    torch.testing.assert_close(normalizer.inverse(normalizer(data)), data, rtol=1e-4, atol=1e-4)
