"""A match of a PettingZoo environment in lockstep: which agents are present at each step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from pettingzoo import ParallelEnv

from touchline.errors import InvalidArgumentError, InvalidEpisodeError
from touchline.recorders.converters import action_converter, space_converter, space_layout
from touchline.recorders.lockstep import AgentSpaces, check_same_spaces
from touchline.recorders.recording import Recording
from touchline.recorders.track import Step, any_set

Answer = tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any], dict[Any, Any], dict[Any, Any]]
"""Observations, rewards, terminations, truncations and infos by agent."""

ReadStep = Callable[[Any, Any, Answer], Step]
"""Returns the step of an agent, given its action and the environment's answer."""


class PettingZooMatch:
    """Records the matches of an environment in lockstep. Not thread-safe.

    Args:
        env: the environment.
        recording: sending side.
        agents: agents to record; None records all.
        float64_as: dtype that replaces float64; None keeps float64.
        read_step: reads an agent's step.

    Raises:
        InvalidArgumentError: the agents are not known in advance, or their spaces differ or cannot be stored.
    """

    def __init__(
        self,
        env: ParallelEnv[Any, Any, Any],
        recording: Recording,
        agents: Collection[Any] | None,
        *,
        float64_as: np.dtype[Any] | None,
        read_step: ReadStep,
    ) -> None:
        self._env = env
        self._agents = _ordered_agents(env, agents)
        self._records_all = agents is None
        self._float64_as = float64_as
        self._read_step = read_step
        self._spaces: list[tuple[Any, Any]] = []
        self._lockstep = recording.new_lockstep(self._agents, self._shared_spaces())
        self._playing: frozenset[Any] = frozenset()

    def begin(self, observations: Mapping[Any, Any], infos: Mapping[Any, Any]) -> None:
        """Begins a match with what a reset returned.

        Raises:
            InvalidArgumentError: the agents' spaces have changed, and now differ or cannot be stored.
        """
        self._lockstep.track.end()
        self._lockstep.spaces = self._shared_spaces()
        self._arrive(observations, {agent for agent in self._agents if agent in observations}, infos)

    def convert_actions(self, actions: Mapping[Any, Any]) -> dict[Any, np.ndarray]:
        """Returns the actions of the agents that are recorded.

        Raises:
            InvalidEpisodeError: an action cannot be stored.
        """
        if not self._lockstep.track.recording:
            return {}
        acting = [agent for agent in self._agents if agent in self._playing and actions.get(agent) is not None]
        return {agent: self._lockstep.convert_action(agent, actions[agent]) for agent in acting}

    def add(self, taken: Mapping[Any, np.ndarray], answer: Answer) -> None:
        """Records a step.

        Args:
            taken: the actions, see :meth:`convert_actions`.
            answer: what the environment returned.

        Raises:
            UnacknowledgedError: the server refused earlier episodes; the step is recorded nevertheless.
            InvalidEpisodeError: a value is missing or cannot be stored. The rest of the match is not recorded.
        """
        observations, rewards, terminations, truncations, infos = answer
        ended = {agent for agent in self._agents if any_set(terminations.get(agent, False), truncations.get(agent, False))}
        answered = {**rewards, **terminations, **truncations}
        # An agent without any answer has left before this step.
        left = {agent for agent in self._playing if agent not in observations and not (agent in taken and agent in answered)}
        took_part = [agent for agent in self._agents if agent in self._playing - left]
        arrived = {agent for agent in self._agents if agent in observations and agent not in self._playing and agent not in ended}
        stayed = {agent for agent in took_part if agent in observations and agent not in ended}
        if not took_part:
            # No agent made this step, so the match was over before it.
            self._lockstep.track.end()
            self._arrive(observations, arrived, infos)
            return
        self._playing = frozenset(stayed | arrived)

        def read_steps() -> dict[Any, Step]:
            self._check_known(observations)
            return {agent: self._read_step(agent, taken.get(agent), answer) for agent in took_part}

        self._lockstep.add(read_steps, lambda: infos, arrived={agent: observations[agent] for agent in arrived}, ended=not self._playing)

    def _arrive(self, observations: Mapping[Any, Any], arrived: Collection[Any], infos: Mapping[Any, Any]) -> None:
        self._playing = frozenset(arrived)

        def first_observations() -> dict[Any, Any]:
            self._check_known(observations)
            return {agent: observations[agent] for agent in self._agents if agent in arrived}

        if arrived:
            self._lockstep.begin(first_observations, lambda: infos)

    def _check_known(self, observations: Mapping[Any, Any]) -> None:
        unknown = [agent for agent in observations if agent not in self._agents] if self._records_all else []
        if unknown:
            raise InvalidEpisodeError(
                f"lockstep: agent {unknown[0]!r}, expected the possible_agents {list(self._agents)}; choose some (agents=[...]), or "
                "record without lockstep"
            )

    def _shared_spaces(self) -> AgentSpaces:
        """Returns what the agents share. An environment may change their spaces at a reset."""
        spaces = [(self._env.observation_space(agent), self._env.action_space(agent)) for agent in self._agents]
        if len(spaces) == len(self._spaces) and all(
            one is other for pair, before in zip(spaces, self._spaces, strict=True) for one, other in zip(pair, before, strict=True)
        ):
            return self._lockstep.spaces
        layouts = {
            agent: space_layout("obs", observation) | space_layout("action", action)
            for agent, (observation, action) in zip(self._agents, spaces, strict=True)
        }
        check_same_spaces(layouts, remedy="record those whose spaces are the same (agents=[...]), or record without lockstep")
        observation, action = spaces[0]
        act = action_converter(action, float64_as=self._float64_as)
        observe = space_converter("obs", observation, float64_as=self._float64_as)
        self._spaces = spaces
        return AgentSpaces(observe, act, act(np.zeros(action.shape, action.dtype)))


def _ordered_agents(env: ParallelEnv[Any, Any, Any], agents: Collection[Any] | None) -> tuple[Any, ...]:
    """Returns the agents to record, in the order of ``possible_agents``."""
    possible = getattr(env, "possible_agents", None)
    if not possible:
        raise InvalidArgumentError(
            "lockstep: the environment has no possible_agents, expected all agents in a fixed order; record without lockstep"
        )
    unknown = [agent for agent in agents or () if agent not in possible]
    if unknown:
        raise InvalidArgumentError(f"agents: {unknown[0]!r}, expected some of the possible_agents {list(possible)}")
    chosen = tuple(agent for agent in possible if agents is None or agent in agents)
    if not chosen:
        raise InvalidArgumentError(f"agents: none, expected some of the possible_agents {list(possible)}")
    return chosen
