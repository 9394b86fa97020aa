"""Shared code of the recorders' tests: the episodes of a server, and an environment's own record of its play."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

from support.service_calls import make_config
from support.serving import ServerThread


def serve(**config: Any) -> ServerThread:
    return ServerThread(make_config(config={"buffer_size": 20_000, "min_history": 1, "horizon": 2, **config}))


@dataclass
class Played:
    """One episode as the environment produced it."""

    obs: list[Any]
    action: list[Any] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    terminated: list[bool] = field(default_factory=list)

    def add(self, obs: Any, action: Any, reward: float, terminated: bool) -> None:
        self.obs.append(_copied(obs))
        self.action.append(np.array(action))
        self.reward.append(float(reward))
        self.terminated.append(bool(terminated))

    @property
    def transitions(self) -> int:
        return len(self.action)


class Account(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Innermost wrapper that records every episode."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.played: list[Played] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self.played.append(Played([_copied(obs)]))
        return obs, info

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.played[-1].add(obs, action, float(reward), terminated)
        return obs, reward, terminated, truncated, info


class TransformObservation(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Like Gymnasium's wrapper of that name, whose arguments differ between versions."""

    def __init__(self, env: gymnasium.Env[Any, Any], change: Callable[[Any], Any], space: gymnasium.Space[Any]) -> None:
        super().__init__(env)
        self.observation_space = space
        self.observation = change


class TransformAction(gymnasium.ActionWrapper[Any, Any, Any]):
    """Like Gymnasium's wrapper of that name, which not all versions have."""

    def __init__(self, env: gymnasium.Env[Any, Any], change: Callable[[Any], Any], space: gymnasium.Space[Any]) -> None:
        super().__init__(env)
        self.action_space = space
        self.action = change


def check_episode(stored: dict[str, np.ndarray], played: Played, *, obs: str = "obs") -> None:
    """Asserts that the stored episode is the played one, bit for bit: rows, convention, and what row 0 leaves undefined."""
    assert np.array_equal(stored[obs], np.stack(played.obs))
    assert np.array_equal(stored["action"][1:], np.stack(played.action))
    assert np.array_equal(stored["reward"][1:], np.array(played.reward, dtype=np.float32))
    assert np.array_equal(stored["done"][1:], np.array(played.terminated, dtype=np.float32))
    assert stored["reward"].dtype == stored["done"].dtype == np.float32
    assert np.isnan(stored["reward"][0])
    assert np.isnan(stored["done"][0])
    if stored["action"].dtype.kind == "f":
        assert np.isnan(stored["action"][0]).all()


def check_episodes(stored: list[dict[str, np.ndarray]], played: list[Played], *, obs: str = "obs") -> None:
    """Asserts that exactly the played episodes with a transition are stored, in their order."""
    with_transitions = [episode for episode in played if episode.transitions]
    assert len(stored) == len(with_transitions) > 0
    for kept, episode in zip(stored, with_transitions, strict=True):
        check_episode(kept, episode, obs=obs)


def _copied(value: Any) -> Any:
    return {key: _copied(part) for key, part in value.items()} if isinstance(value, dict) else np.array(value)
