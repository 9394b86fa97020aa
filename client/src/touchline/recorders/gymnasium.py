"""Gymnasium, one environment."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

import gymnasium

from touchline.client import ReplayClient
from touchline.recorders.gymnasium_versions import AutoresetMode, autoreset_mode, final_obs
from touchline.recorders.recording import Recording, RecordingOptions
from touchline.recorders.values import action_converter, converter

if TYPE_CHECKING:
    from typing_extensions import Unpack  # the standard library's from Python 3.11 on


class GymnasiumRecorder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Records what a Gymnasium environment plays. Put it outside of the wrappers whose observations, actions and rewards are meant.

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
        observe = converter("obs", env.observation_space)
        self._action = action_converter(env.action_space)
        self._mode = autoreset_mode(env)
        self._was_reset = False
        self.recording = Recording(client, **options)
        """The sending side: counters, flush, policy_version."""
        self._line = self.recording.line(observe)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the environment and begins an episode."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._was_reset = True
        self._line.begin(obs)
        return obs, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Steps the environment and records the transition.

        Raises:
            gymnasium.error.ResetNeeded: no episode is under way.
            UnacknowledgedError: earlier episodes were refused by the server; this transition is recorded.
        """
        under_way = self._line.recording
        if not under_way and not (self._mode is not AutoresetMode.DISABLED and self._was_reset):
            raise gymnasium.error.ResetNeeded("no episode is under way: call reset() before step()")
        taken = self._action(action) if under_way else None  # before the step, which may change the action in place
        obs, reward, terminated, truncated, info = self.env.step(action)
        if taken is None:
            self._line.begin(obs)
            return obs, reward, terminated, truncated, info
        resets = self._mode is AutoresetMode.SAME_STEP and (terminated or truncated)
        try:
            last = final_obs(info) if resets else obs
            self._line.add(last, taken, reward=reward, terminated=terminated, truncated=truncated)
        finally:
            if resets:
                self._line.begin(obs)
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
            self.recording.leave(kind, error, trace)
        finally:
            super().close()
