"""Recorder for Gymnasium vector environments."""

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
    """Records the episodes of each environment in a Gymnasium vector environment, on a track of its own (actor ``<actor>/<index>``). ::

        import gymnasium

        from touchline import ReplayClient
        from touchline.recorders import GymnasiumVectorRecorder

        client = ReplayClient("127.0.0.1:50051", actor="arms")
        with client, GymnasiumVectorRecorder(gymnasium.make_vec("Pendulum-v1", num_envs=2), client) as envs:
            obs, infos = envs.reset(seed=1)
            for _ in range(250):
                obs, rewards, terminated, truncated, infos = envs.step(envs.action_space.sample())

    **Episode ends** follow the environment's autoreset mode:

    - ``NEXT_STEP``: the step after an episode's last is a reset; its action and reward belong to no episode.
    - ``SAME_STEP``: the last observation is ``infos["final_obs"]`` (before Gymnasium 1.1: ``"final_observation"``), and the observation
      that the step returned begins the next episode.
    - ``DISABLED``: the caller resets, all environments or some (``options={"reset_mask": ...}``).

    **Values** are stored as by :class:`GymnasiumRecorder`. Each track has a writer with a sending thread. Not thread-safe, except for what
    :class:`~touchline.recorders.Recording` says.

    Args:
        env: vector environment whose single spaces have fixed shapes, and whose actions are single arrays.
        client: client that sends the episodes; close the recorder first.
        autoreset_mode: mode of an environment whose metadata do not name it; Gymnasium's own environments need none.
        options: see :class:`~touchline.recorders.RecordingOptions`.

    Raises:
        InvalidArgumentError: a space cannot be stored as columns, or the autoreset mode is unknown.
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
        """Sending side of the recorder: ``counters``, ``flush()``, ``policy_version``."""
        self._tracks = [self.recording.new_track(observe, index) for index in range(env.num_envs)]

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets all environments, or those in ``options["reset_mask"]`` [num_envs] bool, and begins their episodes."""
        mask = None if options is None else options.get("reset_mask")  # read before the reset, which removes it from the options
        obs, infos = self.env.reset(seed=seed, options=options)
        self._was_reset = True
        for index, track in enumerate(self._tracks):
            if mask is None or mask[index]:
                self._begin(track, index, obs, infos)
        return obs, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Steps all environments and records their transitions.

        Raises:
            gymnasium.error.ResetNeeded: an episode is over, or none has begun, and the environment does not reset itself.
            UnacknowledgedError: the server refused earlier episodes; the transitions are recorded nevertheless.
            InvalidEpisodeError: a value cannot be stored exactly. Bad actions are refused before the environments step. For other values,
                that environment's stored episode ends before this transition, and the rest of its episode is not recorded; the other
                environments' transitions are.
        """
        in_progress = [track.in_progress for track in self._tracks]
        if not self._was_reset or (self._mode is AutoresetMode.DISABLED and not all(in_progress)):
            raise gymnasium.error.ResetNeeded("an episode is over or has not begun: call reset() before step()")
        # Before the step: the environment may modify the actions in place.
        taken = [self._action(env_value(actions, index)) if track.recording else None for index, track in enumerate(self._tracks)]
        answer = self.env.step(actions)
        failure: Exception | None = None
        for index, track in enumerate(self._tracks):
            try:
                if in_progress[index]:
                    self._add(track, index, taken[index], answer)
                else:
                    self._begin(track, index, answer[0], answer[4])
            except Exception as error:  # the other environments have made their step, too: record it first
                failure = error
        if failure is not None:
            raise failure
        return answer

    def close(self, **kwargs: Any) -> None:
        """Truncates episodes in progress, waits until all episodes are acknowledged, and closes the environment.

        With a spool the wait ends after the client's ``timeout_s``; unacknowledged episodes then stay on the disk.

        Raises:
            UnacknowledgedError: the server refused some episodes.
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

    def _begin(self, track: EpisodeTrack, index: int, obs: Any, infos: dict[str, Any]) -> None:
        track.begin(lambda: env_value(obs, index), lambda: env_info(infos, index, len(self._tracks)))

    def _add(self, track: EpisodeTrack, index: int, action: Any, answer: tuple[Any, Any, Any, Any, dict[str, Any]]) -> None:
        """Adds one environment's transition, and begins its next episode if the same step also reset it."""
        obs, rewards, terminated, truncated, infos = answer
        ended = any_set(terminated[index], truncated[index])
        resets = self._mode is AutoresetMode.SAME_STEP and ended

        def step() -> Step:
            last = env_value(final_obs(infos), index) if resets else env_value(obs, index)
            info = env_info(infos, index, len(self._tracks)) if track.takes_info else {}
            info = info.get("final_info", {}) if resets else info
            return Step(last, action, rewards[index], terminated[index], truncated[index], info)

        try:
            track.add(step, ended=ended)
        finally:
            if resets:
                self._begin(track, index, obs, infos)
