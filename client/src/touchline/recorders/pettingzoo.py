"""PettingZoo, parallel environments."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pettingzoo import ParallelEnv
from pettingzoo.utils import BaseParallelWrapper

from touchline.client import ReplayClient
from touchline.errors import InvalidEpisodeError
from touchline.recorders.converters import Convert, action_converter, space_converter
from touchline.recorders.recording import Recording, RecordingOptions, float64_dtype
from touchline.recorders.track import EpisodeTrack, Step, any_set

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
        self._float64_as = float64_dtype(client, options)
        self._recorded = None if agents is None else frozenset(agents)
        self.recording = Recording(client, **options)
        """The sending side: counters, flush, policy_version."""
        self._tracks: dict[Any, EpisodeTrack] = {}
        self._actions: dict[Any, Convert] = {}

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[Any, Any], dict[Any, dict[str, Any]]]:
        """Resets the environment and begins the agents' episodes; those under way are truncated.

        Raises:
            InvalidArgumentError: a space of an agent whose values cannot be columns.
        """
        obs, infos = self.env.reset(seed=seed, options=options)
        for track in self._tracks.values():
            track.end()
        for agent, observation in obs.items():
            if self._is_recorded(agent):
                self._begin(agent, observation, infos)
        return obs, infos

    def step(
        self, actions: dict[Any, Any]
    ) -> tuple[dict[Any, Any], dict[Any, float], dict[Any, bool], dict[Any, bool], dict[Any, dict[str, Any]]]:
        """Steps the environment and records each agent's transition.

        Raises:
            UnacknowledgedError: earlier episodes were refused by the server; the transitions are recorded.
            InvalidArgumentError: a space of a new agent whose values cannot be columns.
            InvalidEpisodeError: what the actions or the environment gave for an agent cannot be stored as it is, or is not there. Actions
                are refused before the step; otherwise the agent's episode ends before this transition, and what is left of it is not
                recorded.
        """
        # Before the step, which may change an action in place.
        taken = {
            agent: self._actions[agent](actions[agent])
            for agent, track in self._tracks.items()
            if track.recording and actions.get(agent) is not None
        }
        answer = self.env.step(actions)
        observations, rewards, terminations, truncations, infos = answer
        failure: Exception | None = None
        for agent, observation in observations.items():
            if not self._is_recorded(agent):
                continue
            track = self._tracks.get(agent)
            ended = any_set(terminations.get(agent, False), truncations.get(agent, False))
            try:
                if track is not None and track.in_progress:
                    track.add(partial(_step, agent, taken.get(agent), answer), ended=ended)
                elif not ended:
                    self._begin(agent, observation, infos)
            except Exception as error:  # the other agents have made their step too
                failure = error
        for agent, track in self._tracks.items():
            if agent in observations:
                continue
            try:
                if agent in taken and agent in {**rewards, **terminations, **truncations}:
                    track.add(partial(_step, agent, taken[agent], answer), ended=True)
                else:
                    track.end()
            except Exception as error:
                failure = error
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
            self.recording.close_on_exit(kind, error, trace)
        finally:
            super().close()

    def _is_recorded(self, agent: Any) -> bool:
        return self._recorded is None or agent in self._recorded

    def _begin(self, agent: Any, observation: Any, infos: dict[Any, dict[str, Any]]) -> None:
        # Anew for each episode: an environment may change an agent's spaces at a reset.
        observe = space_converter("obs", self.observation_space(agent), float64_as=self._float64_as)
        self._actions[agent] = action_converter(self.action_space(agent), float64_as=self._float64_as)
        if agent in self._tracks:
            self._tracks[agent].observe = observe
        else:
            self._tracks[agent] = self.recording.new_track(observe, agent)
        self._tracks[agent].begin(lambda: observation, lambda: infos.get(agent, {}))


def _step(agent: Any, action: Any, answer: tuple[dict[Any, Any], ...]) -> Step:
    observations, rewards, terminations, truncations, infos = answer
    if action is None:
        raise InvalidEpisodeError(f"action: none for agent {agent!r}, which has an observation; expected one for each agent that plays")
    given = {"obs": observations, "reward": rewards, "terminated": terminations, "truncated": truncations}
    missing = [name for name, values in given.items() if agent not in values]
    if missing:
        raise InvalidEpisodeError(
            f"{missing[0]}: none for agent {agent!r} in a step that it had a part in; expected one of the environment"
        )
    return Step(observations[agent], action, rewards[agent], terminations[agent], truncations[agent], infos.get(agent, {}))
