"""The PettingZoo recorder: a particle world in which all agents play to the end, and PettingZoo's own, in which agents come and go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pettingzoo.test.example_envs import generated_agents_parallel_v0

from support.recorder_cases import Played, check_episodes, serve
from support.serving import ServerThread, stored_episodes
from touchline import ReplayClient
from touchline.recorders import PettingZooRecorder

try:
    from mpe2 import simple_spread_v3
except ImportError:  # PettingZoo before 1.25, which has it itself
    from pettingzoo.mpe import simple_spread_v3

WIDEST = 50
"""Observations of the generated agents are shorter than this."""


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with serve() as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[ReplayClient]:
    with ReplayClient(server.address, actor="zoo") as client:
        yield client


def _by_agent(server: ServerThread) -> dict[str, list[dict[str, np.ndarray]]]:
    lines: dict[str, list[dict[str, np.ndarray]]] = {}
    for actor, columns in stored_episodes(server):
        lines.setdefault(actor.removeprefix("zoo/"), []).append(columns)
    return lines


def _play(env: PettingZooRecorder, *, seed: int, played: dict[str, list[Played]], widen: bool = False, time_limit: int = 0) -> list[bool]:
    """Plays an episode into ``played`` and returns how each agent's ended: terminated or not.

    Args:
        time_limit: time limit for the generated agents' world, which reads its clock but never advances it.
    """
    endings = []
    obs, _ = env.reset(seed=seed)
    for agent, observation in obs.items():
        played.setdefault(agent, []).append(Played([_wide(observation) if widen else observation]))
    steps = 0
    while env.agents:
        steps += 1
        if steps == time_limit:
            env.unwrapped.num_steps = env.unwrapped.max_cycles
        actions = {agent: env.action_space(agent).sample() for agent in env.agents}
        obs, rewards, terminated, truncated, _ = env.step(actions)
        for agent, observation in obs.items():
            arrived = _wide(observation) if widen else observation
            if agent in actions:
                played[agent][-1].add(arrived, actions[agent], rewards[agent], terminated[agent])
                if terminated[agent] or truncated[agent]:
                    endings.append(terminated[agent])
            else:
                played.setdefault(agent, []).append(Played([arrived]))
    return endings


def _wide(observation: np.ndarray) -> np.ndarray:
    return np.pad(observation, (0, WIDEST - len(observation)))


def test_one_episode_an_agent(server: ServerThread, client: ReplayClient) -> None:
    played: dict[str, list[Played]] = {}

    with PettingZooRecorder(simple_spread_v3.parallel_env(N=3, max_cycles=12, continuous_actions=True), client) as env:
        for seed in range(3):
            _play(env, seed=seed, played=played)

    stored = _by_agent(server)
    assert set(stored) == set(played) == {"agent_0", "agent_1", "agent_2"}
    for agent, lines in stored.items():
        check_episodes(lines, played[agent])
        assert [len(columns["done"]) for columns in lines] == [13] * 3
        assert not any(columns["done"][1:].any() for columns in lines)  # the time limit is a truncation


def test_agents_that_come_and_go_have_their_own_borders(server: ServerThread, client: ReplayClient) -> None:
    played: dict[str, list[Played]] = {}

    with PettingZooRecorder(
        generated_agents_parallel_v0.parallel_env(), client, transform=lambda row: row | {"obs": _wide(row["obs"])}
    ) as env:
        endings = [ending for seed in (1, 2) for ending in _play(env, seed=seed, played=played, widen=True, time_limit=60)]

    stored = _by_agent(server)
    assert {True, False} == set(endings)  # some were terminated, some truncated
    lengths = {len(columns["done"]) for lines in stored.values() for columns in lines}
    assert len(lengths) > 5  # some came late, some went early
    assert set(stored) == {agent for agent, episodes in played.items() if any(episode.transitions for episode in episodes)}
    for agent, lines in stored.items():
        check_episodes(lines, played[agent])


def test_agents_that_are_not_chosen_are_not_recorded(server: ServerThread, client: ReplayClient) -> None:
    played: dict[str, list[Played]] = {}

    with PettingZooRecorder(simple_spread_v3.parallel_env(N=3, max_cycles=5), client, agents=["agent_1"]) as env:
        _play(env, seed=4, played=played)
        _play(env, seed=5, played=played)

    stored = _by_agent(server)
    assert set(stored) == {"agent_1"}
    check_episodes(stored["agent_1"], played["agent_1"])


def test_reset_in_the_middle_truncates_every_agent(server: ServerThread, client: ReplayClient) -> None:
    env = PettingZooRecorder(simple_spread_v3.parallel_env(N=2, max_cycles=20), client)

    for _ in range(2):
        env.reset(seed=1)
        for _ in range(3):
            env.step({agent: np.int64(0) for agent in env.agents})
    env.close()

    lines: Any = _by_agent(server)
    assert {agent: [len(columns["done"]) for columns in episodes] for agent, episodes in lines.items()} == {
        "agent_0": [4, 4],
        "agent_1": [4, 4],
    }
