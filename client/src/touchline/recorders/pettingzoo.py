"""Recorder for PettingZoo parallel environments."""

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
from touchline.recorders.pettingzoo_match import PettingZooMatch
from touchline.recorders.recording import Recording, RecordingOptions, float64_dtype
from touchline.recorders.track import EpisodeTrack, Step, any_set

if TYPE_CHECKING:
    from typing_extensions import Unpack  # the standard library's from Python 3.11 on


class PettingZooRecorder(BaseParallelWrapper[Any, Any, Any]):  # type: ignore[misc]
    """Records the episodes of each agent in a PettingZoo parallel environment, on a track of its own (actor ``<actor>/<agent>``). ::

        from mpe2 import simple_spread_v3

        from touchline import ReplayClient
        from touchline.recorders import PettingZooRecorder

        client = ReplayClient("127.0.0.1:50051", actor="spread")
        with client, PettingZooRecorder(simple_spread_v3.parallel_env(), client) as env:
            observations, infos = env.reset(seed=1)
            while env.agents:
                actions = {agent: env.action_space(agent).sample() for agent in env.agents}
                observations, rewards, terminations, truncations, infos = env.step(actions)

    **Episode ends.** An agent's episode begins with its first observation, at the reset or later. It ends when the agent is terminated or
    truncated, or when the environment returns no further observation of it (truncated).

    **Values** are stored as by :class:`~touchline.recorders.GymnasiumRecorder`. Agents whose spaces differ do not fit into one table:
    record some of them (``agents``), or give them the same columns (``transform``).

    **Lockstep.** With ``lockstep=True`` an episode is a whole match with the agents as second axis, in the order of ``possible_agents``
    (``recording.agents``): ``obs`` and ``action`` [rows, agents, ...], ``reward``, ``done`` and ``alive`` [rows, agents]. ``done`` is 1
    where an agent terminated. ``alive`` says whether an agent took part in the step to this row (in row 0: whether it was there at the
    reset); all other values of a step in which it did not are zeros, except the observation of an agent that arrives. The episode ends when
    no recorded agent is left. All agents have the same spaces.

    Each track has a writer with a sending thread. Not thread-safe, except for what :class:`~touchline.recorders.Recording` says.

    Args:
        env: environment whose agents' observations have fixed shapes, and whose actions are single arrays.
        client: client that sends the episodes; close the recorder first.
        agents: agents to record; None records all.
        lockstep: whether an episode is a whole match instead of one agent's. The actor's name then stays as it is, and a transform's info
            is that of all agents.
        options: see :class:`~touchline.recorders.RecordingOptions`.

    Raises:
        InvalidArgumentError: in lockstep, the spaces of two agents differ, or the environment does not name its ``possible_agents``.
    """

    def __init__(
        self,
        env: ParallelEnv[Any, Any, Any],
        client: ReplayClient,
        *,
        agents: Collection[Any] | None = None,
        lockstep: bool = False,
        **options: Unpack[RecordingOptions],
    ) -> None:
        super().__init__(env)
        self._float64_as = float64_dtype(client, options)
        self._recorded = None if agents is None else frozenset(agents)
        self.recording = Recording(client, **options)
        """Sending side of the recorder: ``counters``, ``flush()``, ``policy_version``."""
        self._tracks: dict[Any, EpisodeTrack] = {}
        self._actions: dict[Any, Convert] = {}
        self._match: PettingZooMatch | None = None
        if lockstep:
            self._match = PettingZooMatch(env, self.recording, agents, float64_as=self._float64_as, read_step=_step)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[Any, Any], dict[Any, dict[str, Any]]]:
        """Resets the environment and begins the agents' episodes; those in progress are truncated.

        Raises:
            InvalidArgumentError: an agent's space cannot be stored as columns.
        """
        obs, infos = self.env.reset(seed=seed, options=options)
        if self._match is not None:
            self._match.begin(obs, infos)
            return obs, infos
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
            UnacknowledgedError: the server refused earlier episodes; the transitions are recorded nevertheless.
            InvalidArgumentError: the space of a new agent cannot be stored as columns.
            InvalidEpisodeError: an agent's value is missing or cannot be stored exactly. Bad actions are refused before the environment
                steps. For any other value, the agent's stored episode ends before this transition, and the rest of its episode is not
                recorded; the other agents' transitions are. In lockstep the match's episode ends before this row, for all agents.
        """
        if self._match is not None:
            actions_taken = self._match.convert_actions(actions)
            answer = self.env.step(actions)
            self._match.add(actions_taken, answer)
            return answer
        # Before the step: the environment may modify an action in place.
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
            except Exception as error:  # the other agents have made their step, too: record it first
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
        """Truncates episodes in progress, waits until all episodes are acknowledged, and closes the environment.

        With a spool the wait ends after the client's ``timeout_s``; unacknowledged episodes then stay on the disk.

        Raises:
            UnacknowledgedError: the server refused some episodes.
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
        # New converters for each episode: an environment may change an agent's spaces at a reset.
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
        raise InvalidEpisodeError(f"action: none for agent {agent!r}, expected one for each agent in the episode")
    given = {"obs": observations, "reward": rewards, "terminated": terminations, "truncated": truncations}
    missing = [name for name, values in given.items() if agent not in values]
    if missing:
        raise InvalidEpisodeError(f"{missing[0]}: the environment returned none for agent {agent!r}, which took part in this step")
    return Step(observations[agent], action, rewards[agent], terminations[agent], truncations[agent], infos.get(agent, {}))
