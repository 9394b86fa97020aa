"""One line of episodes: what a recorder hands on to a writer, row by row."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from touchline.errors import EpisodeResult, InvalidEpisodeError, TouchlineError, UnacknowledgedError
from touchline.recorders.converters import Convert, array_converter
from touchline.writer import EpisodeWriter
from touchline_protos.log_lines import get_logger

Row = dict[str, Any]
Transform = Callable[..., Mapping[str, Any]]

logger = get_logger(__name__)

_reward = array_converter("reward", np.float32, rounding=True)


class Step(NamedTuple):
    """What an environment gave for an action."""

    obs: Any
    """That the action led to."""
    action: Any
    """The one that was taken, as an array."""
    reward: Any
    """Stored as float32 []."""
    terminated: Any
    """Stored as ``done``, float32 []."""
    truncated: Any = False
    """Ends the episode too, but is not ``done``."""
    info: Mapping[str, Any] = {}
    """For a transform that takes it."""


class _State(enum.Enum):
    IDLE = enum.auto()
    RECORDING = enum.auto()
    REFUSED = enum.auto()
    """A row could not be stored: the episode ended before it, and the environment is still playing what is left."""


class EpisodeTrack:
    """One episode after the other, row by row. For one thread.

    The environment has made its step when a row comes here, so a row is never left out in the middle of an episode: where one cannot be
    stored, the episode ends before it, and what the environment plays until its own end belongs to no episode.

    Args:
        writer: gets the rows.
        observe: makes (nested) arrays of an observation.
        transform: makes of each row what is stored; None changes nothing.
    """

    def __init__(self, writer: EpisodeWriter, observe: Convert, transform: Transform | None) -> None:
        self.observe = observe
        """Makes (nested) arrays of an observation."""
        self._writer = writer
        self._transform = transform
        self.takes_info = transform is not None and takes_info(transform)
        """Whether the transform takes what the environment gave as info."""
        self._state = _State.IDLE
        self._unrecorded = 0

    @property
    def recording(self) -> bool:
        """An episode is under way whose rows are stored."""
        return self._state is _State.RECORDING

    @property
    def in_progress(self) -> bool:
        """The environment is playing an episode that has begun here."""
        return self._state is not _State.IDLE

    def begin(self, obs: Callable[[], Any], info: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Starts an episode with the observation of a reset. One that is still under way ends here, as truncated.

        Args:
            obs: returns the observation. If it fails, the episode is refused as if the observation could not be stored.
            info: returns the info of the reset; called if the transform takes it.

        Raises:
            UnacknowledgedError: earlier episodes were refused. The episode has begun all the same.
            InvalidEpisodeError: the observation cannot be stored. The episode is not recorded.
        """
        try:
            self.end()
        finally:
            self._state = _State.RECORDING
            self._append(lambda: ({"obs": self.observe(obs())}, info() if self.takes_info else {}))

    def add(self, step: Callable[[], Step], *, ended: bool) -> None:
        """Adds the row of a transition, and ends the episode if that was its last.

        Args:
            step: returns what the environment gave. If it fails, the row cannot be stored. Not called where a row before was refused.
            ended: the environment's episode is over.

        Raises:
            UnacknowledgedError: earlier episodes were refused. The row is added all the same.
            InvalidEpisodeError: the row cannot be stored. It is not added: the episode ends before it, and what follows until the
                environment's episode is over is not recorded.
        """

        def row() -> tuple[Row, Mapping[str, Any]]:
            made = step()
            done = np.float32(read_flag("terminated", made.terminated))
            read_flag("truncated", made.truncated)
            return {"obs": self.observe(made.obs), "action": made.action, "reward": _reward(made.reward), "done": done}, made.info

        try:
            if self._state is _State.REFUSED:
                self._unrecorded += 1
            else:
                self._append(row)
        finally:
            if ended:
                self.end()

    def end(self) -> None:
        """Ends the episode that is under way, if one is."""
        state, self._state = self._state, _State.IDLE
        if state is _State.RECORDING:
            self._retry_after_report(self._writer.end_episode)
        elif state is _State.REFUSED:
            if self._unrecorded:
                logger.warning("actor %r: %d steps behind a row that was refused are not recorded", self._writer.actor, self._unrecorded)
            self._unrecorded = 0

    def _append(self, make: Callable[[], tuple[Row, Mapping[str, Any]]]) -> None:
        try:
            row: Mapping[str, Any]
            try:
                row, info = make()
            except TouchlineError:
                raise
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise InvalidEpisodeError(f"what the environment gave cannot be read: {type(error).__name__}: {error}") from error
            if self._transform is not None:
                row = self._transform(row, info=info) if self.takes_info else self._transform(row)
            self._retry_after_report(lambda: self._writer.append(row))
        except UnacknowledgedError:
            raise
        except Exception:
            try:
                self.end()
            finally:
                self._state = _State.REFUSED
            raise

    @staticmethod
    def _retry_after_report(call: Callable[[], object]) -> None:
        """Makes a writer's call, again if all that it did was to report earlier episodes, and passes the report on afterwards."""
        results: list[EpisodeResult] = []
        report: UnacknowledgedError | None = None
        while True:
            try:
                call()
                break
            except UnacknowledgedError as error:
                report = error
                results += error.results
        if report is not None:
            raise UnacknowledgedError(str(report), results)


def takes_info(transform: Transform) -> bool:
    """Returns whether a transform has a parameter ``info``."""
    try:
        return "info" in inspect.signature(transform).parameters
    except (TypeError, ValueError):  # one without a signature, written in C
        return False


def read_flag(name: str, value: Any) -> bool:
    """Returns whether a flag of an environment is set.

    Raises:
        InvalidEpisodeError: it is neither true nor false.
    """
    made = _flags[name](value)
    if made.size != 1:
        raise InvalidEpisodeError(f"{name}: shape {made.shape}, expected one value")
    return bool(made.reshape(()))


_flags = {name: array_converter(name, np.bool_) for name in ("terminated", "truncated")}


def any_set(*values: Any) -> bool:
    """Returns whether one of some flags says that an episode is over, whatever it is made of."""
    return any(bool(np.any(np.asarray(value, object))) for value in values)
