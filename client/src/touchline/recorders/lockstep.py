"""Lockstep: all agents of a match in one episode, so that the slices of a team come at the same steps.

Each column has an axis of agents after that of the rows, in a fixed order. The values of an agent that is absent at a step are zeros; which
agents take part is the column ``alive``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from touchline.errors import InvalidArgumentError, InvalidEpisodeError
from touchline.recorders.converters import Convert
from touchline.recorders.track import EpisodeTrack, Info, Row, Step, convert_reward, read_flag

Layout = Mapping[str, str]
"""Description of each array of an observation or action, by its dotted name."""


class AgentSpaces(NamedTuple):
    """The spaces that the agents of a match share."""

    observe: Convert
    """Converts an agent's observation to (nested) arrays."""
    act: Convert
    """Converts an agent's action to an array."""
    no_action: np.ndarray
    """Zeros in the form of a converted action: stored for an agent that does not act."""


def check_same_spaces(layouts: Mapping[Any, Layout], *, remedy: str) -> None:
    """Checks that all agents have the same spaces.

    Args:
        layouts: layout of each agent's observations and actions.
        remedy: what to do if they differ, for the error.

    Raises:
        InvalidArgumentError: two agents differ.
    """
    (first, expected), *others = layouts.items()
    for agent, layout in others:
        for name in dict.fromkeys((*expected, *layout)):
            found, wanted = layout.get(name, "missing"), expected.get(name, "missing")
            if found != wanted:
                raise InvalidArgumentError(
                    f"lockstep: {name} of agent {agent!r} is {found}, expected {wanted} as of agent {first!r}; agents in lockstep have the "
                    f"same spaces: {remedy}"
                )


class LockstepTrack:
    """The episodes of whole matches. Not thread-safe.

    A row has ``obs`` and ``action`` [agents, ...], ``reward``, ``done`` and ``alive`` [agents]; row 0 has only ``obs`` and ``alive``.

    Args:
        track: track of the matches.
        agents: all agents, in the order of their axis.
        spaces: spaces of all agents.
    """

    def __init__(self, track: EpisodeTrack, agents: Sequence[Any], spaces: AgentSpaces) -> None:
        self.agents = tuple(agents)
        """All agents, in the order of their axis."""
        self.spaces = spaces
        """Spaces of all agents. A new value applies from the next row on."""
        self.track = track
        """Track of the matches."""

    def convert_action(self, agent: Any, action: Any) -> np.ndarray:
        """Returns an agent's action as an array.

        Raises:
            InvalidEpisodeError: it cannot be stored.
        """
        array: np.ndarray = self.spaces.act(action)
        if array.shape != self.spaces.no_action.shape:
            raise InvalidEpisodeError(f"action: shape {array.shape} of agent {agent!r}, expected {self.spaces.no_action.shape}")
        return array

    def begin(self, obs: Callable[[], Mapping[Any, Any]], info: Callable[[], Info]) -> None:
        """Begins a match; one that is still in progress ends here, truncated.

        Args:
            obs: function that returns the first observation of each agent that is present, at least one.
            info: function that returns the info of the reset.

        Raises:
            UnacknowledgedError: earlier episodes were refused. The match has begun nevertheless.
            InvalidEpisodeError: an observation cannot be stored. The match is not recorded.
        """

        def make_row() -> tuple[Row, Info]:
            observed = obs()
            return {"obs": self._stack_observations(observed), "alive": self._flags(observed)}, info()

        self.track.begin_row(make_row)

    def add(self, steps: Callable[[], Mapping[Any, Step]], info: Callable[[], Info], *, arrived: Mapping[Any, Any], ended: bool) -> None:
        """Adds the row of one step, and ends the match if this was its last.

        Args:
            steps: function that returns the step of each agent that took part.
            info: function that returns the info of the step.
            arrived: first observations of agents that did not take part, and are present from this row on.
            ended: whether no agent is left.

        Raises:
            UnacknowledgedError: earlier episodes were refused. The row is added nevertheless.
            InvalidEpisodeError: an agent's value cannot be stored. The episode ends before this row, and nothing is recorded until the
                match is over.
        """

        def make_row() -> tuple[Row, Info]:
            made = steps()
            for step in made.values():
                read_flag("truncated", step.truncated)
            return {
                "obs": self._stack_observations({agent: step.obs for agent, step in made.items()} | dict(arrived)),
                "action": self._stack("action", {agent: step.action for agent, step in made.items()}, self.spaces.no_action),
                "reward": self._numbers("reward", {agent: convert_reward(step.reward) for agent, step in made.items()}),
                "done": self._numbers("done", {agent: read_flag("terminated", step.terminated) for agent, step in made.items()}),
                "alive": self._flags(made),
            }, info()

        self.track.add_row(make_row, ended=ended)

    def _stack_observations(self, observed: Mapping[Any, Any]) -> Any:
        values = {agent: self.spaces.observe(value) for agent, value in observed.items()}
        return self._stack("obs", values, _zeros_like(next(iter(values.values()))))

    def _stack(self, name: str, values: Mapping[Any, Any], absent: Any) -> Any:
        """Returns (nested) arrays [agents, ...].

        Args:
            name: dotted name for error messages.
            values: value of each agent that has one.
            absent: value of every other agent.
        """
        if isinstance(absent, dict):
            parts = {key: {agent: value[key] for agent, value in values.items()} for key in absent}
            return {key: self._stack(f"{name}.{key}", parts[key], part) for key, part in absent.items()}
        for agent, value in values.items():
            if value.shape != absent.shape or value.dtype != absent.dtype:
                raise InvalidEpisodeError(
                    f"{name}: {value.dtype} {value.shape} of agent {agent!r}, expected {absent.dtype} {absent.shape} as of the others"
                )
        return np.stack([values.get(agent, absent) for agent in self.agents])

    def _numbers(self, name: str, values: Mapping[Any, Any]) -> np.ndarray:
        """Returns a number of each agent, [agents] float32; 0 of those without one."""
        for agent, value in values.items():
            if np.size(value) != 1:
                raise InvalidEpisodeError(f"{name}: shape {np.shape(value)} of agent {agent!r}, expected one value")
        return np.array([np.reshape(values.get(agent, 0.0), ()) for agent in self.agents], np.float32)

    def _flags(self, present: Mapping[Any, Any]) -> np.ndarray:
        return np.array([agent in present for agent in self.agents], np.bool_)


def _zeros_like(value: Any) -> Any:
    return {key: _zeros_like(part) for key, part in value.items()} if isinstance(value, dict) else np.zeros_like(value)
