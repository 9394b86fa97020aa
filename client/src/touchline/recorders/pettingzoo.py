"""PettingZoo, parallel environments."""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pettingzoo import ParallelEnv
from pettingzoo.utils import BaseParallelWrapper

from touchline.client import ReplayClient
from touchline.recorders.recording import EpisodeLine, Recording, RecordingOptions
from touchline.recorders.values import Convert, action_converter, converter

if TYPE_CHECKING:
    from typing_extensions import Unpack  # the standard library's from Python 3.11 on


class PettingZooRecorder(BaseParallelWrapper[Any, Any, Any]):  # type: ignore[misc]
    """Records what the agents of a PettingZoo parallel environment play: one episode an agent, on lines of their own (``<actor>/<agent>``).

    An agent's episode begins with its first observation, be it at the reset or later, and ends where it is terminated or truncated, or
    where the environment has no more observations of it (truncated). Agents whose spaces differ do not fit one table: record some of them
    (``agents``), or make their rows alike (``transform``). ``close`` returns once everything is acknowledged. For one thread.

    Args:
        env: its agents' observations have fixed shapes; an action is one array.
        client: sends the episodes; close this environment before it.
        agents: names of those to record; None records all.
        options: see :class:`~touchline.recorders.RecordingOptions`.
    """

    def __init__(
        self,
        env: ParallelEnv[Any, Any, Any],
        client: ReplayClient,
        *,
        agents: Collection[Any] | None = None,
        **options: Unpack[RecordingOptions],
    ) -> None:
        super().__init__(env)
        self._recorded = None if agents is None else frozenset(agents)
        self.recording = Recording(client, **options)
        """The sending side: counters, flush, policy_version."""
        self._lines: dict[Any, EpisodeLine] = {}
        self._actions: dict[Any, Convert] = {}

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[Any, Any], dict[Any, dict[str, Any]]]:
        """Resets the environment and begins the agents' episodes; those under way are truncated.

        Raises:
            InvalidArgumentError: a space of an agent whose values cannot be columns.
        """
        obs, infos = self.env.reset(seed=seed, options=options)
        for line in self._lines.values():
            line.end()
        for agent, observation in obs.items():
            if self._is_recorded(agent):
                self._begin(agent, observation)
        return obs, infos

    def step(
        self, actions: dict[Any, Any]
    ) -> tuple[dict[Any, Any], dict[Any, float], dict[Any, bool], dict[Any, bool], dict[Any, dict[str, Any]]]:
        """Steps the environment and records each agent's transition.

        Raises:
            UnacknowledgedError: earlier episodes were refused by the server; the transitions are recorded.
            InvalidArgumentError: a space of a new agent whose values cannot be columns.
        """
        # Before the step, which may change an action in place.
        taken = {
            agent: self._actions[agent](actions[agent])
            for agent, line in self._lines.items()
            if line.recording and actions.get(agent) is not None
        }
        answer = self.env.step(actions)
        observations, rewards, terminations, truncations, _ = answer
        failure: Exception | None = None
        for agent, observation in observations.items():
            if not self._is_recorded(agent):
                continue
            terminated, truncated = terminations.get(agent, False), truncations.get(agent, False)
            try:
                if agent in taken:
                    self._lines[agent].add(observation, taken[agent], reward=rewards[agent], terminated=terminated, truncated=truncated)
                elif not (terminated or truncated):
                    self._begin(agent, observation)
            except Exception as error:  # the other agents have made their step too
                failure = error
        for agent, line in self._lines.items():
            if agent not in observations:
                line.end()
        if failure is not None:
            raise failure
        return answer

    def close(self) -> None:
        """Truncates the unfinished episodes, returns once everything is acknowledged, and closes the environment.

        Raises:
            UnacknowledgedError: some episodes were refused.
        """
        try:
            self.recording.close()
        finally:
            super().close()

    def __enter__(self) -> PettingZooRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.recording.leave(kind, error, trace)
        finally:
            super().close()

    def _is_recorded(self, agent: Any) -> bool:
        return self._recorded is None or agent in self._recorded

    def _begin(self, agent: Any, observation: Any) -> None:
        # Anew for each episode: an environment may change an agent's spaces at a reset.
        observe = converter("obs", self.observation_space(agent))
        self._actions[agent] = action_converter(self.action_space(agent))
        if agent in self._lines:
            self._lines[agent].observe = observe
        else:
            self._lines[agent] = self.recording.line(observe, agent)
        self._lines[agent].begin(observation)
