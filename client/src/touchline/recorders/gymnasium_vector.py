"""Gymnasium, vector environments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium
from gymnasium.vector import VectorEnv

from touchline.client import ReplayClient
from touchline.recorders.converters import action_converter, env_info, env_value, space_converter
from touchline.recorders.gymnasium_versions import AutoresetMode, VectorBase, final_obs, vector_autoreset_mode
from touchline.recorders.recording import Recording, RecordingOptions, float64_dtype
from touchline.recorders.track import EpisodeTrack, Step, any_set

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
        float64_as = float64_dtype(client, options)
        observe = space_converter("obs", env.single_observation_space, float64_as=float64_as)
        self._action = action_converter(env.single_action_space, float64_as=float64_as)
        self._was_reset = False
        self.recording = Recording(client, **options)
        """The sending side: counters, flush, policy_version."""
        self._tracks = [self.recording.new_track(observe, number) for number in range(env.num_envs)]

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets all environments, or those of ``options["reset_mask"]``, and begins their episodes."""
        mask = None if options is None else options.get("reset_mask")  # the environment takes it out of the options
        obs, infos = self.env.reset(seed=seed, options=options)
        self._was_reset = True
        for number, track in enumerate(self._tracks):
            if mask is None or mask[number]:
                self._begin(track, number, obs, infos)
        return obs, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Steps all environments and records their transitions.

        Raises:
            gymnasium.error.ResetNeeded: an episode is over, or none has begun, and the environment does not reset itself.
            UnacknowledgedError: earlier episodes were refused by the server; the transitions are recorded.
            InvalidEpisodeError: what the actions or an environment gave cannot be stored as it is. Actions are refused before the step;
                otherwise the environment's episode ends before this transition, and what is left of it is not recorded.
        """
        in_progress = [track.in_progress for track in self._tracks]
        if not self._was_reset or (self._mode is AutoresetMode.DISABLED and not all(in_progress)):
            raise gymnasium.error.ResetNeeded("an episode is over or has not begun: call reset() before step()")
        # Before the step, which may change the actions in place.
        taken = [self._action(env_value(actions, number)) if track.recording else None for number, track in enumerate(self._tracks)]
        answer = self.env.step(actions)
        refused: Exception | None = None
        for number, track in enumerate(self._tracks):
            try:
                if in_progress[number]:
                    self._add(track, number, taken[number], answer)
                else:
                    self._begin(track, number, answer[0], answer[4])
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
            self.recording.close_on_exit(*exc)
        finally:
            self.env.close()

    def _begin(self, track: EpisodeTrack, number: int, obs: Any, infos: dict[str, Any]) -> None:
        track.begin(lambda: env_value(obs, number), lambda: env_info(infos, number, len(self._tracks)))

    def _add(self, track: EpisodeTrack, number: int, action: Any, answer: tuple[Any, Any, Any, Any, dict[str, Any]]) -> None:
        """Adds one environment's transition, and begins its next episode where the same step has reset it."""
        obs, rewards, terminated, truncated, infos = answer
        ended = any_set(terminated[number], truncated[number])
        resets = self._mode is AutoresetMode.SAME_STEP and ended

        def step() -> Step:
            last = env_value(final_obs(infos), number) if resets else env_value(obs, number)
            info = env_info(infos, number, len(self._tracks)) if track.takes_info else {}
            info = info.get("final_info", {}) if resets else info
            return Step(last, action, rewards[number], terminated[number], truncated[number], info)

        try:
            track.add(step, ended=ended)
        finally:
            if resets:
                self._begin(track, number, obs, infos)
