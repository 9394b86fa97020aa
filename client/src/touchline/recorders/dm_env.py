"""dm_env: DeepMind's interface, of dm_control among others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import dm_env
import numpy as np

from touchline.client import ReplayClient
from touchline.errors import InvalidArgumentError
from touchline.recorders.converters import Convert, array_converter, mapping_converter, tuple_converter
from touchline.recorders.recording import Recording, RecordingOptions, float64_dtype
from touchline.recorders.track import Step

if TYPE_CHECKING:
    from typing_extensions import Unpack  # the standard library's from Python 3.11 on


class DmEnvRecorder(dm_env.Environment):  # type: ignore[misc]
    """Records what a dm_env environment plays.

    An environment of several players (specs, observations, actions and rewards are lists, as in dm_control's soccer) gives one episode a
    player, each on a line of its own (``<actor>/<number>``). An episode is terminated where its last discount is 0, else truncated.
    Observations are stored in the dtypes of the spec; float64, which dm_control has, as float32 if ``dtype="float32"`` asks for it.

    Everything else that the environment has is there too (``physics``, ``task``, ...). ``close`` returns once everything is acknowledged.
    For one thread.

    Args:
        environment: its observations are arrays or mappings of arrays, an action is one array.
        client: sends the episodes; close this environment before it.
        options: see :class:`~touchline.recorders.RecordingOptions`.

    Raises:
        InvalidArgumentError: an action that is not one array.
    """

    def __init__(self, environment: dm_env.Environment, client: ReplayClient, **options: Unpack[RecordingOptions]) -> None:
        self._environment = environment
        observation_spec, action_spec = environment.observation_spec(), environment.action_spec()
        self._several = isinstance(observation_spec, list | tuple) and isinstance(action_spec, list | tuple)
        observation_specs = observation_spec if self._several else [observation_spec]
        action_specs = action_spec if self._several else [action_spec]
        float64_as = float64_dtype(client, options)
        converters = [_converter("obs", spec, float64_as) for spec in observation_specs]
        self._actions = [_action_converter(spec, float64_as) for spec in action_specs]
        self.recording = Recording(client, **options)
        """The sending side: counters, flush, policy_version."""
        self._tracks = [self.recording.new_track(observe, number if self._several else None) for number, observe in enumerate(converters)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self._environment, name)

    def reset(self) -> dm_env.TimeStep:
        """Resets the environment and begins episodes; those under way are truncated."""
        step = self._environment.reset()
        self._begin(step)
        return step

    def step(self, action: Any) -> dm_env.TimeStep:
        """Steps the environment and records the transition; after the last step of an episode, resets it as dm_env says.

        Raises:
            UnacknowledgedError: earlier episodes were refused by the server; this transition is recorded.
            InvalidEpisodeError: the action, or what the environment gave, cannot be stored as it is. An action is refused before the step;
                otherwise the episode ends before this transition, and what is left of it is not recorded.
        """
        # Before the step, which may change an action in place. The action of a step that resets is ignored and may be anything.
        taken = [
            convert(self._part(action, number)) if track.recording else None
            for number, (convert, track) in enumerate(zip(self._actions, self._tracks, strict=True))
        ]
        in_progress = [track.in_progress for track in self._tracks]
        step = self._environment.step(action)
        if step.first():
            self._begin(step)
            return step
        failure: Exception | None = None
        for number, track in enumerate(self._tracks):
            try:
                if in_progress[number]:
                    track.add(partial(self._step, number, taken[number], step), ended=step.last())
                else:
                    self._begin_one(number, step)
            except Exception as error:  # the other players have made their step too
                failure = error
        if failure is not None:
            raise failure
        return step

    def observation_spec(self) -> Any:
        """Of the environment."""
        return self._environment.observation_spec()

    def action_spec(self) -> Any:
        """Of the environment."""
        return self._environment.action_spec()

    def reward_spec(self) -> Any:
        """Of the environment."""
        return self._environment.reward_spec()

    def discount_spec(self) -> Any:
        """Of the environment."""
        return self._environment.discount_spec()

    def close(self) -> None:
        """Truncates the unfinished episodes, returns once everything is acknowledged, and closes the environment.

        Raises:
            UnacknowledgedError: some episodes were refused.
        """
        try:
            self.recording.close()
        finally:
            self._environment.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.recording.close_on_exit(kind, error, trace)
        finally:
            self._environment.close()

    def _begin(self, step: dm_env.TimeStep) -> None:
        for number in range(len(self._tracks)):
            self._begin_one(number, step)

    def _begin_one(self, number: int, step: dm_env.TimeStep) -> None:
        self._tracks[number].begin(lambda: self._part(step.observation, number), lambda: self._info(number, step))

    def _step(self, number: int, action: Any, step: dm_env.TimeStep) -> Step:
        terminated = step.last() and float(self._discount(step.discount, number)) == 0.0
        reward = self._part(step.reward, number)
        return Step(self._part(step.observation, number), action, reward, terminated, step.last(), self._info(number, step))

    def _info(self, number: int, step: dm_env.TimeStep) -> dict[str, Any]:
        discount = None if step.discount is None else self._discount(step.discount, number)
        return {"discount": discount, "step_type": step.step_type}

    def _part(self, value: Any, number: int) -> Any:
        return value[number] if self._several else value

    def _discount(self, discount: Any, number: int) -> Any:
        """Players share a discount, or have one each."""
        return np.ravel(discount)[number] if np.size(discount) > 1 else np.ravel(discount)[0]


def _converter(name: str, spec: Any, float64_as: np.dtype[Any] | None) -> Convert:
    if isinstance(spec, Mapping):
        return mapping_converter(name, {key: _converter(f"{name}.{key}", part, float64_as) for key, part in spec.items()})
    if isinstance(spec, list | tuple):
        return tuple_converter(name, [_converter(f"{name}.{number}", part, float64_as) for number, part in enumerate(spec)])
    return array_converter(name, spec.dtype, float64_as=float64_as)


def _action_converter(spec: Any, float64_as: np.dtype[Any] | None) -> Convert:
    if isinstance(spec, Mapping | list | tuple):
        raise InvalidArgumentError(f"action: a spec of type {type(spec).__name__}, expected one array; wrap the environment to flatten it")
    return array_converter("action", spec.dtype, float64_as=float64_as, rounding=True)
