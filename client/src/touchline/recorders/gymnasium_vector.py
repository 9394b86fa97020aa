"""Gymnasium, vector environments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium
from gymnasium.vector import VectorEnv

from touchline.client import ReplayClient
from touchline.recorders.gymnasium_versions import AutoresetMode, VectorBase, final_obs, vector_autoreset_mode
from touchline.recorders.recording import Recording, RecordingOptions
from touchline.recorders.values import action_converter, converter, part_of

if TYPE_CHECKING:
    from typing_extensions import Unpack  # the standard library's from Python 3.11 on


class GymnasiumVectorRecorder(VectorBase):
    """Records what each environment of a Gymnasium vector environment plays, one line of episodes each (``<actor>/<number>``).

    The borders of episodes follow the environment's autoreset mode: ``NEXT_STEP``: the step after the last is a reset, its action and
    reward belong to no episode. ``SAME_STEP``: the last observation is ``infos["final_obs"]`` (before Gymnasium 1.1:
    ``"final_observation"``), what the step returned begins the next episode. ``DISABLED``: the caller resets, perhaps some environments
    only (``options={"reset_mask": ...}``). For one thread.

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
        observe = converter("obs", env.single_observation_space)
        self._action = action_converter(env.single_action_space)
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
                line.begin(part_of(obs, number))
        return obs, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Steps all environments and records their transitions.

        Raises:
            gymnasium.error.ResetNeeded: an episode is over, or none has begun, and the environment does not reset itself.
            UnacknowledgedError: earlier episodes were refused by the server; the transitions are recorded.
        """
        under_way = [line.recording for line in self._lines]
        if not self._was_reset or (self._mode is AutoresetMode.DISABLED and not all(under_way)):
            raise gymnasium.error.ResetNeeded("an episode is over or has not begun: call reset() before step()")
        # Before the step, which may change the actions in place.
        taken = [self._action(part_of(actions, number)) for number in range(len(self._lines))]
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        refused: Exception | None = None
        for number, line in enumerate(self._lines):
            try:
                if under_way[number]:
                    self._add(number, taken[number], obs, rewards, (terminated[number], truncated[number]), infos)
                else:
                    line.begin(part_of(obs, number))
            except Exception as error:  # the other environments have made their step too
                refused = error
        if refused is not None:
            raise refused
        return obs, rewards, terminated, truncated, infos

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

    def _add(self, number: int, action: Any, obs: Any, rewards: Any, ends: tuple[Any, Any], infos: dict[str, Any]) -> None:
        """Adds one environment's transition, and begins its next episode where the same step has reset it."""
        line = self._lines[number]
        terminated, truncated = ends
        arrived = part_of(obs, number)
        resets = self._mode is AutoresetMode.SAME_STEP and (terminated or truncated)
        last = part_of(final_obs(infos), number) if resets else arrived
        try:
            line.add(last, action, reward=rewards[number], terminated=terminated, truncated=truncated)
        finally:
            if resets:
                line.begin(arrived)
