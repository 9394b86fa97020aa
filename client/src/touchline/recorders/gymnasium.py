"""Recorder for a single Gymnasium environment."""

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
    """Records the episodes of a Gymnasium environment. ::

        import gymnasium

        from touchline import ReplayClient
        from touchline.recorders import GymnasiumRecorder

        client = ReplayClient("127.0.0.1:50051", actor="arm-3")
        with client, GymnasiumRecorder(gymnasium.make("Pendulum-v1"), client) as env:
            obs, info = env.reset(seed=1)
            over = False
            while not over:
                obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
                over = terminated or truncated

    Make it the outermost wrapper, or put it directly around the wrappers whose observations, actions and rewards are to be stored.

    **Values.** Observations keep the dtypes that the space declares. A value that its dtype cannot represent (a fraction in uint8, a
    float64 with more digits than float32 has) is refused, unless ``dtype="float32"`` asks for rounding. Actions are rounded to the space's
    dtype; the reward and ``done`` are float32.

    **Episode ends.** A reset before the end of an episode truncates it. ``gymnasium.wrappers.Autoreset`` may be inside: the step in which
    it resets is not recorded as a transition. (Before Gymnasium 1.0 that is ``AutoResetWrapper``, directly inside; the last observation
    then comes from ``info``.)

    Not thread-safe, except for what :class:`~touchline.recorders.Recording` says.

    Args:
        env: environment whose spaces have fixed shapes, and whose actions are single arrays.
        client: client that sends the episodes; close the recorder first.
        options: see :class:`~touchline.recorders.RecordingOptions`.

    Raises:
        InvalidArgumentError: a space cannot be stored as columns, or another wrapper is around AutoResetWrapper.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], client: ReplayClient, **options: Unpack[RecordingOptions]) -> None:
        super().__init__(env)
        float64_as = float64_dtype(client, options)
        observe = space_converter("obs", env.observation_space, float64_as=float64_as)
        self._action = action_converter(env.action_space, float64_as=float64_as)
        self._mode = autoreset_mode(env)
        self._was_reset = False
        self.recording = Recording(client, **options)
        """Sending side of the recorder: ``counters``, ``flush()``, ``policy_version``."""
        self._track = self.recording.new_track(observe)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the environment and begins an episode; one in progress is truncated."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._was_reset = True
        self._track.begin(lambda: obs, lambda: info)
        return obs, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Steps the environment and records the transition.

        Raises:
            gymnasium.error.ResetNeeded: no episode is in progress.
            UnacknowledgedError: the server refused earlier episodes; this transition is recorded nevertheless.
            InvalidEpisodeError: a value cannot be stored exactly. A bad action is refused before the environment steps. For other values,
                the stored episode ends before this transition, and the rest of the environment's episode is not recorded.
        """
        track = self._track
        in_progress = track.in_progress
        if not in_progress and (self._mode is AutoresetMode.DISABLED or not self._was_reset):
            raise gymnasium.error.ResetNeeded("no episode is in progress: call reset() before step()")
        taken = self._action(action) if track.recording else None  # before the step: the environment may modify the action in place
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
        """Truncates episodes in progress, waits until all episodes are acknowledged, and closes the environment.

        With a spool the wait ends after the client's ``timeout_s``; unacknowledged episodes then stay on the disk.

        Raises:
            UnacknowledgedError: the server refused some episodes.
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
