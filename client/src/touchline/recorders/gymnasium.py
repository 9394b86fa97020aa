"""Gymnasium, one environment."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

import gymnasium

from touchline.client import ReplayClient
from touchline.recorders.converters import action_converter, space_converter
from touchline.recorders.gymnasium_versions import AutoresetMode, autoreset_mode, final_obs
from touchline.recorders.recording import Recording, RecordingOptions, float64_dtype
from touchline.recorders.track import Step, any_set

if TYPE_CHECKING:
    from typing_extensions import Unpack  # the standard library's from Python 3.11 on


class GymnasiumRecorder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Records what a Gymnasium environment plays. Put it outside of the wrappers whose observations, actions and rewards are meant.

    Observations are stored in the dtypes that the space declares; a value that would be another one in them (a fraction in uint8, a float64
    that is no float32) is refused, unless ``dtype="float32"`` asks for rounding. Actions and rewards are rounded to their float dtype.
    A reset before the end of an episode truncates it. ``gymnasium.wrappers.Autoreset`` may be inside: its resetting step is no transition.
    (Before Gymnasium 1.0: ``AutoResetWrapper``, directly inside; its last observation is the one in ``info``.)
    ``close`` returns once everything is acknowledged. For one thread.

    Args:
        env: of observation and action spaces with fixed shapes; the action is one array.
        client: sends the episodes; close this environment before it.
        options: see :class:`~touchline.recorders.RecordingOptions`.

    Raises:
        InvalidArgumentError: a space whose values cannot be columns, or a wrapper around AutoResetWrapper.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], client: ReplayClient, **options: Unpack[RecordingOptions]) -> None:
        super().__init__(env)
        float64_as = float64_dtype(client, options)
        observe = space_converter("obs", env.observation_space, float64_as=float64_as)
        self._action = action_converter(env.action_space, float64_as=float64_as)
        self._mode = autoreset_mode(env)
        self._was_reset = False
        self.recording = Recording(client, **options)
        """The sending side: counters, flush, policy_version."""
        self._track = self.recording.new_track(observe)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the environment and begins an episode."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._was_reset = True
        self._track.begin(lambda: obs, lambda: info)
        return obs, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Steps the environment and records the transition.

        Raises:
            gymnasium.error.ResetNeeded: no episode is under way.
            UnacknowledgedError: earlier episodes were refused by the server; this transition is recorded.
            InvalidEpisodeError: the action, or what the environment gave, cannot be stored as it is. An action is refused before the step;
                otherwise the episode ends before this transition, and what is left of it is not recorded.
        """
        track = self._track
        if not track.in_progress and not (self._mode is not AutoresetMode.DISABLED and self._was_reset):
            raise gymnasium.error.ResetNeeded("no episode is under way: call reset() before step()")
        in_progress = track.in_progress
        taken = self._action(action) if track.recording else None  # before the step, which may change the action in place
        obs, reward, terminated, truncated, info = self.env.step(action)
        if not in_progress:
            track.begin(lambda: obs, lambda: info)
            return obs, reward, terminated, truncated, info
        ended = any_set(terminated, truncated)
        resets = self._mode is AutoresetMode.SAME_STEP and ended
        try:
            track.add(lambda: Step(final_obs(info) if resets else obs, taken, reward, terminated, truncated, info), ended=ended)
        finally:
            if resets:
                track.begin(lambda: obs, lambda: info)
        return obs, reward, terminated, truncated, info

    def close(self) -> None:
        """Truncates the unfinished episode, returns once everything is acknowledged, and closes the environment.

        Raises:
            UnacknowledgedError: some episodes were refused.
        """
        try:
            self.recording.close()
        finally:
            super().close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:  # type: ignore[override]
        try:
            self.recording.close_on_exit(kind, error, trace)
        finally:
            super().close()
