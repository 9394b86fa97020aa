"""The Gymnasium recorder on real tasks and a real server: it stores exactly what the environment returned."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from support.recorder_cases import Account, TransformAction, TransformObservation, check_episodes, serve
from support.serving import ServerThread, stored_episodes
from touchline import InvalidArgumentError, InvalidEpisodeError, ReplayClient, UnacknowledgedError
from touchline.recorders import GymnasiumRecorder

BEFORE_1 = gymnasium.__version__.startswith("0.")
AUTORESET = gymnasium.wrappers.AutoResetWrapper if BEFORE_1 else gymnasium.wrappers.Autoreset


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address, actor="gym") as client:
        yield client


def _account(name: str, **options: Any) -> Account:
    env = Account(gymnasium.make(name, **options))
    env.action_space.seed(3)
    return env


def _play(env: gymnasium.Env[Any, Any], *, episodes: int) -> None:
    for number in range(episodes):
        env.reset(seed=number)
        over = False
        while not over:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            over = terminated or truncated


def _columns(server: ServerThread) -> list[dict[str, np.ndarray]]:
    return [columns for _, columns in stored_episodes(server)]


def test_terminated_episodes_are_stored_as_played(server: ServerThread, client: ReplayClient) -> None:
    account = _account("CartPole-v1")

    with GymnasiumRecorder(account, client, policy_version=4) as env:
        _play(env, episodes=6)

    check_episodes(_columns(server), account.played)
    assert [columns["done"][-1] for columns in _columns(server)] == [1.0] * 6
    assert {actor for actor, _ in stored_episodes(server)} == {"gym"}
    assert client.sample(batch_size=4).policy_version.tolist() == [4] * 4
    assert env.recording.counters.acknowledged == 6


def test_truncated_episodes_end_without_done(server: ServerThread, client: ReplayClient) -> None:
    account = _account("Pendulum-v1", max_episode_steps=12)

    with GymnasiumRecorder(account, client) as env:
        _play(env, episodes=3)

    stored = _columns(server)
    check_episodes(stored, account.played)
    assert [len(columns["done"]) for columns in stored] == [13] * 3
    assert not any(columns["done"][1:].any() for columns in stored)


def test_reset_and_close_before_the_end_truncate(server: ServerThread, client: ReplayClient) -> None:
    account = _account("CartPole-v1")
    env = GymnasiumRecorder(account, client)

    for steps in (3, 0, 2):  # a reset that follows a reset leaves no transition
        env.reset(seed=steps)
        for _ in range(steps):
            env.step(env.action_space.sample())
    env.close()
    env.close()

    check_episodes(_columns(server), account.played)
    assert [len(columns["done"]) for columns in _columns(server)] == [4, 3]
    assert env.recording.counters.discarded == 1


def test_autoreset_wrapper_inside_makes_no_transition_of_its_reset(server: ServerThread, client: ReplayClient) -> None:
    account = _account("CartPole-v1", max_episode_steps=15)

    with GymnasiumRecorder(AUTORESET(account), client) as env:
        env.reset(seed=5)
        for _ in range(100):
            env.step(env.action_space.sample())

    assert len(account.played) > 5
    check_episodes(_columns(server), account.played)


@pytest.mark.skipif(not BEFORE_1, reason="Autoreset resets in the next step from Gymnasium 1.0 on: every observation passes through")
def test_wrapper_around_a_reset_in_the_same_step_is_refused(client: ReplayClient) -> None:
    account = _account("CartPole-v1")
    halved = TransformObservation(AUTORESET(account), lambda obs: obs / 2, account.observation_space)

    with pytest.raises(
        InvalidArgumentError, match=r"TransformObservation around AutoResetWrapper: .* put AutoResetWrapper directly inside"
    ):
        GymnasiumRecorder(halved, client)


def test_step_without_a_reset_is_refused(client: ReplayClient) -> None:
    with GymnasiumRecorder(_account("CartPole-v1"), client) as env:
        with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
            env.step(0)
        _play(env, episodes=1)
        with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
            env.step(0)


def test_dict_and_tuple_observations_nest(server: ServerThread, client: ReplayClient) -> None:
    account = _account("CartPole-v1")
    space = spaces.Dict(
        {
            "cart": spaces.Box(-np.inf, np.inf, (2,), np.float32),
            "pole": spaces.Tuple((spaces.Box(-np.inf, np.inf, (), np.float64), spaces.Discrete(2))),
        }
    )
    nested = TransformObservation(account, lambda obs: {"cart": obs[:2], "pole": (float(obs[2]), int(obs[3] > 0))}, space)

    with GymnasiumRecorder(nested, client) as env:
        _play(env, episodes=2)

    stored = _columns(server)
    for columns, played in zip(stored, account.played, strict=True):
        obs = np.stack(played.obs)
        assert np.array_equal(columns["obs.cart"], obs[:, :2])
        assert np.array_equal(columns["obs.pole.0"], obs[:, 2].astype(np.float64))
        assert np.array_equal(columns["obs.pole.1"], (obs[:, 3] > 0).astype(np.int64))
        assert columns["obs.pole.0"].dtype == np.float64
        assert "obs" not in columns


def test_spaces_that_are_no_columns_are_refused(client: ReplayClient) -> None:
    env = gymnasium.make("CartPole-v1")

    with pytest.raises(InvalidArgumentError, match=r"obs\.word: space Text, expected Box"):
        GymnasiumRecorder(TransformObservation(env, lambda obs: {"word": "a"}, spaces.Dict({"word": spaces.Text(4)})), client)
    with pytest.raises(InvalidArgumentError, match="action: space Dict, expected a single array"):
        GymnasiumRecorder(TransformAction(env, lambda action: action["a"], spaces.Dict({"a": env.action_space})), client)


def test_transform_changes_what_is_stored_and_not_what_is_played(server: ServerThread, client: ReplayClient) -> None:
    account = _account("CartPole-v1")

    with GymnasiumRecorder(account, client, actor="other", transform=lambda row: row | {"task": np.int64(3)}) as env:
        _play(env, episodes=2)

    check_episodes(_columns(server), account.played)
    assert all((columns["task"] == 3).all() for columns in _columns(server))
    assert {actor for actor, _ in stored_episodes(server)} == {"other"}
    assert client.sample().task.tolist() == [3] * 8


def test_endless_episode_is_cut_with_one_common_row(server: ServerThread, client: ReplayClient) -> None:
    account = _account("Pendulum-v1", max_episode_steps=25)

    with GymnasiumRecorder(account, client, max_steps=10) as env:
        _play(env, episodes=1)

    stored = _columns(server)
    assert [len(columns["obs"]) for columns in stored] == [11, 11, 6]
    assert np.array_equal(np.concatenate([columns["obs"][:-1] for columns in stored]), np.stack(account.played[0].obs)[:-1])


def test_refused_episode_is_reported_once_and_no_later_row_is_missing(server: ServerThread, client: ReplayClient) -> None:
    account = _account("CartPole-v1")
    client.add({"obs": np.zeros((3, 4), np.float32), "action": np.zeros(3, np.int64), "reward": np.zeros(3), "done": np.zeros(3)})
    reports: list[UnacknowledgedError] = []
    env = GymnasiumRecorder(
        account, client, transform=lambda row: {name: value if name == "obs" else np.float64(value) for name, value in row.items()}
    )

    def play_on(call: Any) -> None:
        try:
            call()
        except UnacknowledgedError as error:
            reports.append(error)

    play_on(lambda: env.reset(seed=1))
    for number in range(200):
        play_on(lambda: env.step(env.action_space.sample()))
        if not env._track.recording:
            play_on(lambda number=number: env.reset(seed=number))
    play_on(env.close)

    refused = [result for report in reports for result in report.results]
    played = [episode for episode in account.played if episode.transitions]
    assert len(refused) == len(played) == len({result.key for result in refused})  # action is float64 here, int64 in the schema
    assert all(isinstance(result.error, InvalidEpisodeError) for result in refused)
    assert env.recording.counters.steps_appended == sum(episode.transitions + 1 for episode in played)


def test_row_that_cannot_be_added_ends_the_episode_before_it(server: ServerThread, client: ReplayClient) -> None:
    account = _account("CartPole-v1")
    rows = 0

    def widen_fourth_row(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal rows
        rows += 1
        return row | {"obs": np.zeros(9, np.float32)} if rows == 4 else row

    with GymnasiumRecorder(account, client, transform=widen_fourth_row) as env:
        env.reset(seed=0)
        env.step(0)
        env.step(1)
        with pytest.raises(InvalidEpisodeError, match=r"obs: shape \(9,\) in row 3"):
            env.step(0)
        env.step(1)
        env.step(0)

    (stored,) = _columns(server)
    assert np.array_equal(stored["obs"], np.stack(account.played[0].obs[:3]))
    assert not stored["done"][1:].any()


def test_failing_body_discards_the_unfinished_episode_only(server: ServerThread, client: ReplayClient) -> None:
    account = _account("CartPole-v1")

    with pytest.raises(ZeroDivisionError), GymnasiumRecorder(account, client) as env:
        _play(env, episodes=2)
        env.reset()
        env.step(0)
        raise ZeroDivisionError

    check_episodes(_columns(server), account.played[:2])


def test_policy_version_counts_from_the_next_episode(server: ServerThread, client: ReplayClient) -> None:
    with GymnasiumRecorder(_account("CartPole-v1"), client) as env:
        _play(env, episodes=1)
        env.recording.policy_version = 9
        _play(env, episodes=1)
        env.recording.flush(60)
        assert env.recording.counters.acknowledged == 2

    assert [episode.policy_version for episode in client.episodes()] == [0, 9]


def test_importing_the_recorders_loads_no_environment_library() -> None:
    code = "import sys, touchline.recorders; print({'gymnasium', 'dm_env', 'pettingzoo', 'torch'} & set(sys.modules))"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "set()"
