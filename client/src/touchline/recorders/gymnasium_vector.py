"""Gymnasium, vector environments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium
from gymnasium.vector import VectorEnv

from touchline.client import ReplayClient
from touchline.recorders.gymnasium_versions import AutoresetMode, VectorBase, final_obs, vector_autoreset_mode
from touchline.recorders.line import EpisodeLine, Step, is_set
from touchline.recorders.recording import Recording, RecordingOptions, asked_dtype
from touchline.recorders.values import action_converter, converter, info_of, part_of

if TYPE_CHECKING:
    from typing_extensions import Unpack  # the standard library's from Python 3.11 on


class GymnasiumVectorRecorder(VectorBase):
    """Records what each environment of a Gymnasium vector environment plays, one line of episodes each (``<actor>/<number>``).

    The borders of episodes follow the environment's autoreset mode: ``NEXT_STEP``: the step after the last is a reset, its action and
    reward belong to no episode. ``SAME_STEP``: the last observation is ``infos["final_obs"]`` (before Gymnasium 1.1:
    ``"final_observation"``), what the step returned begins the next episode. ``DISABLED``: the caller resets, perhaps some environments
    only (``options={"reset_mask": ...}``). Values and dtypes as with :class:`GymnasiumRecorder`. For one thread.

    Args:
        env: of single observation and action spaces with fixed shapes; the action is one array.
        client: sends the episodes; close this environment before it.
        autoreset_mode: for an environment whose metadata do not tell; of Gymnasium's own before 1.1 it is known.
        options: see :class:`~touchline.recorders.RecordingOptions`.

    Raises:
        InvalidArgumentError: a space whose values cannot be columns, or an unknown autoreset mode.
    """

    def __init__(
        self, env: VectorEnv[Any, Any, Any], client: ReplayClient, *, autoreset_mode: Any = None, **options: Unpack[RecordingOptions]
    ) -> None:
        super().__init__(env)
        self._mode = vector_autoreset_mode(env, autoreset_mode)
        asked = asked_dtype(client, options)
        observe = converter("obs", env.single_observation_space, asked=asked)
        self._action = action_converter(env.single_action_space, asked=asked)
        self._was_reset = False
        self.recording = Recording(client, **options)
        """The sending side: counters, flush, policy_version."""
        self._lines = [self.recording.line(observe, number) for number in range(env.num_envs)]

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets all environments, or those of ``options["reset_mask"]``, and begins their episodes."""
        mask = None if options is None else options.get("reset_mask")  # the environment takes it out of the options
        obs, infos = self.env.reset(seed=seed, options=options)
        self._was_reset = True
        for number, line in enumerate(self._lines):
            if mask is None or mask[number]:
                self._begin(line, number, obs, infos)
        return obs, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Steps all environments and records their transitions.

        Raises:
            gymnasium.error.ResetNeeded: an episode is over, or none has begun, and the environment does not reset itself.
            UnacknowledgedError: earlier episodes were refused by the server; the transitions are recorded.
            InvalidEpisodeError: what the actions or an environment gave cannot be stored as it is. Actions are refused before the step;
                otherwise the environment's episode ends before this transition, and what is left of it is not recorded.
        """
        under_way = [line.under_way for line in self._lines]
        if not self._was_reset or (self._mode is AutoresetMode.DISABLED and not all(under_way)):
            raise gymnasium.error.ResetNeeded("an episode is over or has not begun: call reset() before step()")
        # Before the step, which may change the actions in place.
        taken = [self._action(part_of(actions, number)) if line.recording else None for number, line in enumerate(self._lines)]
        answer = self.env.step(actions)
        refused: Exception | None = None
        for number, line in enumerate(self._lines):
            try:
                if under_way[number]:
                    self._add(line, number, taken[number], answer)
                else:
                    self._begin(line, number, answer[0], answer[4])
            except Exception as error:  # the other environments have made their step too
                refused = error
        if refused is not None:
            raise refused
        return answer

    def close(self, **kwargs: Any) -> None:
        """Truncates the unfinished episodes, returns once everything is acknowledged, and closes the environments.

        Raises:
            UnacknowledgedError: some episodes were refused.
        """
        try:
            self.recording.close()
        finally:
            self.env.close(**kwargs)

    def __enter__(self) -> GymnasiumVectorRecorder:
        return self

    def __exit__(self, *exc: Any) -> None:
        try:
            self.recording.leave(*exc)
        finally:
            self.env.close()

    def _begin(self, line: EpisodeLine, number: int, obs: Any, infos: dict[str, Any]) -> None:
        line.begin(lambda: part_of(obs, number), lambda: info_of(infos, number, len(self._lines)))

    def _add(self, line: EpisodeLine, number: int, action: Any, answer: tuple[Any, Any, Any, Any, dict[str, Any]]) -> None:
        """Adds one environment's transition, and begins its next episode where the same step has reset it."""
        obs, rewards, terminated, truncated, infos = answer
        ended = is_set(terminated[number], truncated[number])
        resets = self._mode is AutoresetMode.SAME_STEP and ended

        def step() -> Step:
            last = part_of(final_obs(infos), number) if resets else part_of(obs, number)
            info = info_of(infos, number, len(self._lines)) if line.takes_info else {}
            info = info.get("final_info", {}) if resets else info
            return Step(last, action, rewards[number], terminated[number], truncated[number], info)

        try:
            line.add(step, ended=ended)
        finally:
            if resets:
                self._begin(line, number, obs, infos)
