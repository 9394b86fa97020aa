"""The Gymnasium recorder of vector environments: episode borders in every autoreset mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from support.recorder_cases import Account, TransformObservation, check_episodes, serve
from support.serving import ServerThread, stored_episodes
from touchline import InvalidArgumentError, ReplayClient
from touchline.recorders import GymnasiumVectorRecorder
from touchline.recorders.gymnasium_versions import BEFORE_1, AutoresetMode

ENVS = 3
MAX_STEPS = 18
"""Random play of CartPole ends by itself after about 20 steps: some episodes are terminated, some truncated."""

HAS_MODES = hasattr(gymnasium.vector, "AutoresetMode")
"""Whether Gymnasium has reset modes (from 1.1 on); each earlier version resets in its own single way."""
MODES = [{"autoreset_mode": mode} for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP)] if HAS_MODES else [{}]
"""Keywords of a vector environment that resets itself."""


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address, actor="vec") as client:
        yield client


def _stored_by_line(server: ServerThread) -> list[list[dict[str, np.ndarray]]]:
    episodes = stored_episodes(server)
    assert {actor for actor, _ in episodes} == {f"vec/{number}" for number in range(ENVS)}
    return [[columns for actor, columns in episodes if actor == f"vec/{number}"] for number in range(ENVS)]


def _accounts() -> tuple[list[Account], list[Callable[[], gymnasium.Env[Any, Any]]]]:
    accounts = [Account(gymnasium.make("CartPole-v1", max_episode_steps=MAX_STEPS)) for _ in range(ENVS)]
    return accounts, [lambda account=account: account for account in accounts]


def test_each_environment_has_a_spool_of_its_own_that_the_next_recorder_takes_up(
    server: ServerThread, client: ReplayClient, tmp_path: Path
) -> None:
    accounts, makers = _accounts()
    closed = ReplayClient(server.address, actor="vec")
    closed.close()  # never sends anything
    with GymnasiumVectorRecorder(SyncVectorEnv(makers, copy=False), closed, spool_dir=tmp_path, when_full="drop-newest") as env:
        env.action_space.seed(1)
        env.reset(seed=7)
        for _ in range(60):
            env.step(env.action_space.sample())
    waiting = env.recording.counters
    folders = sorted(path.name for path in tmp_path.iterdir())

    _, again = _accounts()
    with GymnasiumVectorRecorder(SyncVectorEnv(again, copy=False), client, spool_dir=tmp_path) as env:
        env.recording.flush(60)

    assert folders == [f"line-{number}" for number in range(ENVS)]
    assert waiting.acknowledged == 0 < waiting.pending == env.recording.counters.resumed
    for account, episodes in zip(accounts, _stored_by_line(server), strict=True):
        check_episodes(episodes, account.played)


def _check_both_endings(episodes: list[dict[str, np.ndarray]]) -> None:
    ends = {float(columns["done"][-1]) for columns in episodes if len(columns["done"]) > 1}
    assert ends == {0.0, 1.0}


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_autoreset_borders_are_those_of_each_environment(server: ServerThread, client: ReplayClient, mode: dict[str, Any]) -> None:
    accounts, makers = _accounts()

    with GymnasiumVectorRecorder(SyncVectorEnv(makers, **mode, copy=False), client) as env:
        env.action_space.seed(1)
        env.reset(seed=7)
        for _ in range(120):
            env.step(env.action_space.sample())

    for lines, account in zip(_stored_by_line(server), accounts, strict=True):
        assert len(lines) > 4
        check_episodes(lines, account.played)
        _check_both_endings(lines)


@pytest.mark.skipif(not HAS_MODES, reason="before Gymnasium 1.1 vector environments reset themselves")
def test_disabled_autoreset_with_reset_mask(server: ServerThread, client: ReplayClient) -> None:
    accounts, makers = _accounts()

    with GymnasiumVectorRecorder(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED), client) as env:
        env.action_space.seed(2)
        env.reset(seed=7)
        for _ in range(100):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            over = np.logical_or(terminated, truncated)
            if over.any():
                with pytest.raises(gymnasium.error.ResetNeeded):
                    env.step(env.action_space.sample())
                env.reset(options={"reset_mask": over})

    for lines, account in zip(_stored_by_line(server), accounts, strict=True):
        check_episodes(lines, account.played)
        _check_both_endings(lines)


def test_reset_of_all_truncates_what_is_under_way(server: ServerThread, client: ReplayClient) -> None:
    accounts, makers = _accounts()

    with GymnasiumVectorRecorder(SyncVectorEnv(makers), client) as env:
        for _ in range(3):
            env.reset()
            for _ in range(2):
                env.step(env.action_space.sample())

    for lines, account in zip(_stored_by_line(server), accounts, strict=True):
        check_episodes(lines, account.played)
        assert [len(columns["obs"]) for columns in lines] == [3] * 3


def _make_dict_cartpole() -> gymnasium.Env[Any, Any]:
    env = gymnasium.make("CartPole-v1", max_episode_steps=MAX_STEPS)
    parts = spaces.Dict({"cart": spaces.Box(-np.inf, np.inf, (2,), np.float32), "pole": spaces.Box(-np.inf, np.inf, (2,), np.float32)})
    return TransformObservation(env, lambda obs: {"cart": obs[:2], "pole": obs[2:]}, parts)


def _check_physics(obs: np.ndarray, action: np.ndarray) -> None:
    """Asserts that each row's observation follows by CartPole's physics from the previous row and the action."""
    pole = gymnasium.make("CartPole-v1").unwrapped
    for before, taken, after in zip(obs[:-1], action[1:], obs[1:], strict=True):
        pole.reset()
        pole.state = before.astype(np.float64)
        arrived, *_ = pole.step(int(taken))
        np.testing.assert_allclose(arrived, after, atol=1e-5)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_processes_with_dict_observations(mode: dict[str, Any]) -> None:
    processes = AsyncVectorEnv([_make_dict_cartpole] * ENVS, **mode)  # before the server and its threads: it forks

    with serve() as server:
        with ReplayClient(server.address, actor="vec") as client, GymnasiumVectorRecorder(processes, client) as env:
            env.action_space.seed(4)
            env.reset(seed=3)
            for _ in range(60):
                env.step(env.action_space.sample())
        episodes = [columns for lines in _stored_by_line(server) for columns in lines]

    _check_both_endings(episodes)
    for columns in episodes:
        assert len(columns["obs.cart"]) <= MAX_STEPS + 1
        _check_physics(np.concatenate([columns["obs.cart"], columns["obs.pole"]], axis=1), columns["action"])


@pytest.mark.skipif(BEFORE_1, reason="Gymnasium 0.29 has none")
def test_native_vector_environment(server: ServerThread, client: ReplayClient) -> None:
    native = gymnasium.make_vec("CartPole-v1", num_envs=ENVS, vectorization_mode="vector_entry_point")
    assert not isinstance(native, SyncVectorEnv | AsyncVectorEnv)

    with GymnasiumVectorRecorder(native, client) as env:
        env.action_space.seed(5)
        env.reset(seed=11)
        for _ in range(80):
            env.step(env.action_space.sample())

    for lines in _stored_by_line(server):
        assert all(columns["done"][-1] == 1.0 for columns in lines[:-1])
        for columns in lines:
            assert (columns["reward"][1:] == 1.0).all()  # the reset's reward of 0 is in no episode
            _check_physics(columns["obs"], columns["action"])


@pytest.mark.skipif(not BEFORE_1, reason="later, wrappers of vector environments see every observation, or say that they do not")
def test_wrapper_that_final_observations_do_not_pass_is_refused(server: ServerThread, client: ReplayClient) -> None:
    accounts, makers = _accounts()
    plain = gymnasium.wrappers.RecordEpisodeStatistics(SyncVectorEnv(makers))  # passes observations on unchanged

    with pytest.raises(InvalidArgumentError, match=r"NormalizeObservation around a vector environment: .* wrap the single environments"):
        GymnasiumVectorRecorder(gymnasium.wrappers.NormalizeObservation(plain), client)
    with GymnasiumVectorRecorder(plain, client) as env:
        env.action_space.seed(1)
        env.reset(seed=7)
        for _ in range(60):
            env.step(env.action_space.sample())

    for lines, account in zip(_stored_by_line(server), accounts, strict=True):
        check_episodes(lines, account.played)


@pytest.mark.skipif(not HAS_MODES, reason="before Gymnasium 1.1 no environment declares its mode")
def test_environment_that_does_not_declare_its_mode_needs_the_argument(client: ReplayClient) -> None:
    class Silent(SyncVectorEnv):
        def __init__(self) -> None:
            super().__init__([lambda: gymnasium.make("CartPole-v1")])
            self.metadata = {}

    with pytest.raises(InvalidArgumentError, match="autoreset_mode: None"):
        GymnasiumVectorRecorder(Silent(), client)
    env: VectorEnv[Any, Any, Any] = GymnasiumVectorRecorder(Silent(), client, autoreset_mode=AutoresetMode.NEXT_STEP)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(env.action_space.sample())
    env.close()
