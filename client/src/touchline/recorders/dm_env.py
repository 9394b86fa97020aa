"""Recorder for dm_env, the interface of dm_control and other DeepMind environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import dm_env
import numpy as np

from touchline.client import ReplayClient
from touchline.errors import InvalidArgumentError
from touchline.recorders.converters import Convert, array_converter, mapping_converter, tuple_converter
from touchline.recorders.lockstep import AgentSpaces, LockstepTrack, check_same_spaces
from touchline.recorders.recording import Recording, RecordingOptions, float64_dtype
from touchline.recorders.track import EpisodeTrack, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack  # the standard library's from Python 3.11 on


class DmEnvRecorder(dm_env.Environment):  # type: ignore[misc]
    """Records the episodes of a dm_env environment. ::

        import numpy as np
        from dm_control import suite

        from touchline import ReplayClient
        from touchline.recorders import DmEnvRecorder

        client = ReplayClient("127.0.0.1:50051", actor="cartpole")
        cartpole = suite.load("cartpole", "swingup", task_kwargs={"time_limit": 1.0})
        with client, DmEnvRecorder(cartpole, client, dtype="float32") as env:
            step = env.reset()
            while not step.last():
                step = env.step(np.random.uniform(-1.0, 1.0, env.action_spec().shape))

    **Players.** If specs, observations, actions and rewards are lists, as in dm_control's soccer, each player has a track of its own (actor
    ``<actor>/<index>``). With ``lockstep=True`` an episode is a whole match instead, with the players as second axis, in the environment's
    order: ``obs`` and ``action`` [rows, players, ...], ``reward``, ``done`` and ``alive`` (all true) [rows, players]. All players have the
    same specs.

    **Episode ends.** An episode whose last discount is 0 has terminated (``done``); any other was truncated.

    **Values.** Observations keep the dtypes of their spec. ``dtype="float32"`` rounds float64, which dm_control returns. Actions are
    rounded to the spec's dtype; the reward and ``done`` are float32.

    All other attributes are those of the environment (``physics``, ``task``, ...). Not thread-safe, except for what
    :class:`~touchline.recorders.Recording` says.

    Args:
        environment: environment whose observations are arrays, mappings or tuples of arrays, and whose actions are single arrays.
        client: client that sends the episodes; close the recorder first.
        lockstep: whether an episode is a whole match instead of one player's. The actor's name then stays as it is.
        options: see :class:`~touchline.recorders.RecordingOptions`.

    Raises:
        InvalidArgumentError: an action is not a single array; in lockstep, there is one player, or the specs of two players differ.
    """

    def __init__(
        self, environment: dm_env.Environment, client: ReplayClient, *, lockstep: bool = False, **options: Unpack[RecordingOptions]
    ) -> None:
        self._environment = environment
        observation_spec, action_spec = environment.observation_spec(), environment.action_spec()
        self._multi_player = isinstance(observation_spec, list | tuple) and isinstance(action_spec, list | tuple)
        observation_specs = observation_spec if self._multi_player else [observation_spec]
        action_specs = action_spec if self._multi_player else [action_spec]
        float64_as = float64_dtype(client, options)
        converters = [_converter("obs", spec, float64_as) for spec in observation_specs]
        self._actions = [_action_converter(spec, float64_as) for spec in action_specs]
        self.recording = Recording(client, **options)
        """Sending side of the recorder: ``counters``, ``flush()``, ``policy_version``."""
        self._players = range(len(converters))
        self._match: LockstepTrack | None = None
        self._tracks: list[EpisodeTrack] = []
        if lockstep:
            if not self._multi_player:
                raise InvalidArgumentError("lockstep: the environment has one player, expected lists of specs; record without lockstep")
            _check_same_specs(observation_specs, action_specs)
            act = self._actions[0]
            spaces = AgentSpaces(converters[0], act, act(np.zeros(action_specs[0].shape, action_specs[0].dtype)))
            self._match = self.recording.new_lockstep(self._players, spaces)
        else:
            self._tracks = [
                self.recording.new_track(observe, player if self._multi_player else None) for player, observe in enumerate(converters)
            ]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self._environment, name)

    def reset(self) -> dm_env.TimeStep:
        """Resets the environment and begins episodes; those in progress are truncated."""
        step = self._environment.reset()
        self._begin(step)
        return step

    def step(self, action: Any) -> dm_env.TimeStep:
        """Steps the environment and records the transition. After an episode's last step it resets instead, as dm_env specifies.

        Raises:
            UnacknowledgedError: the server refused earlier episodes; this transition is recorded nevertheless.
            InvalidEpisodeError: a value cannot be stored exactly. A bad action is refused before the environment steps. For other values,
                the stored episode ends before this transition, and the rest of the environment's episode is not recorded.
        """
        if self._match is not None:
            return self._step_in_lockstep(action, self._match)
        # Before the step: the environment may modify an action in place. A step that resets ignores its action, which may be anything.
        taken = [
            convert(self._player_value(action, player)) if track.recording else None
            for player, (convert, track) in enumerate(zip(self._actions, self._tracks, strict=True))
        ]
        in_progress = [track.in_progress for track in self._tracks]
        step = self._environment.step(action)
        if step.first():
            self._begin(step)
            return step
        failure: Exception | None = None
        for player, track in enumerate(self._tracks):
            try:
                if in_progress[player]:
                    track.add(partial(self._step, player, taken[player], step), ended=step.last())
                else:
                    self._begin_one(player, step)
            except Exception as error:  # the other players have made their step, too: record it first
                failure = error
        if failure is not None:
            raise failure
        return step

    def observation_spec(self) -> Any:
        """Returns the environment's observation spec."""
        return self._environment.observation_spec()

    def action_spec(self) -> Any:
        """Returns the environment's action spec."""
        return self._environment.action_spec()

    def reward_spec(self) -> Any:
        """Returns the environment's reward spec."""
        return self._environment.reward_spec()

    def discount_spec(self) -> Any:
        """Returns the environment's discount spec."""
        return self._environment.discount_spec()

    def close(self) -> None:
        """Truncates episodes in progress, waits until all episodes are acknowledged, and closes the environment.

        With a spool the wait ends after the client's ``timeout_s``; unacknowledged episodes then stay on the disk.

        Raises:
            UnacknowledgedError: the server refused some episodes.
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

    def _step_in_lockstep(self, action: Any, match: LockstepTrack) -> dm_env.TimeStep:
        taken = (
            [match.convert_action(player, self._player_value(action, player)) for player in self._players] if match.track.recording else []
        )
        in_progress = match.track.in_progress
        step = self._environment.step(action)
        if step.first() or not in_progress:
            self._begin(step)
            return step
        match.add(
            lambda: {player: self._step(player, taken[player], step) for player in self._players},
            lambda: {"discount": step.discount, "step_type": step.step_type},
            arrived={},
            ended=step.last(),
        )
        return step

    def _begin(self, step: dm_env.TimeStep) -> None:
        if self._match is not None:
            self._match.begin(
                lambda: {player: self._player_value(step.observation, player) for player in self._players},
                lambda: {"discount": step.discount, "step_type": step.step_type},
            )
        for player in range(len(self._tracks)):
            self._begin_one(player, step)

    def _begin_one(self, player: int, step: dm_env.TimeStep) -> None:
        self._tracks[player].begin(lambda: self._player_value(step.observation, player), lambda: self._info(player, step))

    def _step(self, player: int, action: Any, step: dm_env.TimeStep) -> Step:
        terminated = step.last() and float(self._discount(step.discount, player)) == 0.0
        reward = self._player_value(step.reward, player)
        return Step(self._player_value(step.observation, player), action, reward, terminated, step.last(), self._info(player, step))

    def _info(self, player: int, step: dm_env.TimeStep) -> dict[str, Any]:
        discount = None if step.discount is None else self._discount(step.discount, player)
        return {"discount": discount, "step_type": step.step_type}

    def _player_value(self, value: Any, player: int) -> Any:
        return value[player] if self._multi_player else value

    def _discount(self, discount: Any, player: int) -> Any:
        """Returns a player's discount; players share one, or have one each."""
        return np.ravel(discount)[player] if np.size(discount) > 1 else np.ravel(discount)[0]


def _converter(name: str, spec: Any, float64_as: np.dtype[Any] | None) -> Convert:
    if isinstance(spec, Mapping):
        return mapping_converter(name, {key: _converter(f"{name}.{key}", item, float64_as) for key, item in spec.items()})
    if isinstance(spec, list | tuple):
        return tuple_converter(name, [_converter(f"{name}.{index}", item, float64_as) for index, item in enumerate(spec)])
    return array_converter(name, spec.dtype, float64_as=float64_as)


def _action_converter(spec: Any, float64_as: np.dtype[Any] | None) -> Convert:
    if isinstance(spec, Mapping | list | tuple):
        raise InvalidArgumentError(f"action: spec {type(spec).__name__}, expected a single array; flatten it with a wrapper")
    return array_converter("action", spec.dtype, float64_as=float64_as, rounding=True)


def _check_same_specs(observation_specs: Sequence[Any], action_specs: Sequence[Any]) -> None:
    layouts = {
        player: _layout("obs", observation) | _layout("action", action)
        for player, (observation, action) in enumerate(zip(observation_specs, action_specs, strict=True))
    }
    check_same_spaces(layouts, remedy="record without lockstep")


def _layout(name: str, spec: Any) -> dict[str, str]:
    """Returns a description of each array of a spec, by its dotted name. Bounds of floats do not change what is stored."""
    if isinstance(spec, Mapping | list | tuple):
        items = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
        return {key: text for part_name, part in items for key, text in _layout(f"{name}.{part_name}", part).items()}
    values = getattr(spec, "num_values", None)
    return {name: f"{np.dtype(spec.dtype)} {spec.shape}" + (f" of {values} values" if values is not None else "")}
