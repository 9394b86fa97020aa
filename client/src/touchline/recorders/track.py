"""A track: one sequence of episodes that a recorder passes to a writer, row by row."""

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
Info = Mapping[Any, Any]
MakeRow = Callable[[], tuple[Row, Info]]
"""Returns a row and the environment's info for it. If it raises, the row is refused."""
Transform = Callable[..., Mapping[str, Any]]

logger = get_logger(__name__)

convert_reward = array_converter("reward", np.float32, rounding=True)
"""Converts a reward to float32."""
_convert_flag = {name: array_converter(name, np.bool_) for name in ("terminated", "truncated")}


class Step(NamedTuple):
    """What an environment returned for one action."""

    obs: Any
    """Observation that the action led to."""
    action: Any
    """The action, already converted to an array."""
    reward: Any
    """Reward; stored as float32 []."""
    terminated: Any
    """Whether the episode terminated; stored as ``done``, float32 []."""
    truncated: Any = False
    """Whether the episode was truncated. It ends the episode and is not stored."""
    info: Mapping[str, Any] = {}
    """Info for a transform that takes it."""


class _State(enum.Enum):
    IDLE = enum.auto()
    """No episode is in progress."""
    RECORDING = enum.auto()
    """An episode is in progress, and its rows are stored."""
    REFUSED = enum.auto()
    """A row could not be stored: the stored episode ended before it, and the environment is still playing the remainder."""


class EpisodeTrack:
    """One sequence of episodes, recorded row by row. Not thread-safe.

    By the time a row arrives here, the environment has made its step, so a row cannot simply be skipped: that would join two transitions
    that do not follow each other. If a row cannot be stored, the stored episode ends before it, and nothing is recorded until the
    environment's own episode is over.

    Args:
        writer: writer of the rows.
        observe: converts an observation to (nested) arrays.
        transform: maps each row to the row that is stored; None stores rows as they are.
    """

    def __init__(self, writer: EpisodeWriter, observe: Convert, transform: Transform | None) -> None:
        self.observe = observe
        """Converts an observation to (nested) arrays."""
        self._writer = writer
        self._transform = transform
        self.takes_info = transform is not None and takes_info(transform)
        """Whether the transform takes the environment's info."""
        self._state = _State.IDLE
        self._unrecorded = 0

    @property
    def recording(self) -> bool:
        """Whether an episode is in progress and its rows are stored."""
        return self._state is _State.RECORDING

    @property
    def in_progress(self) -> bool:
        """Whether the environment is playing an episode that began on this track."""
        return self._state is not _State.IDLE

    def begin(self, obs: Callable[[], Any], info: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Begins an episode with the observation of a reset. An episode that is still in progress ends here, truncated.

        Args:
            obs: function that returns the observation. If it raises, the episode is refused as if the observation could not be stored.
            info: function that returns the info of the reset; called only if the transform takes it.

        Raises:
            UnacknowledgedError: earlier episodes were refused. The episode has begun nevertheless.
            InvalidEpisodeError: the observation cannot be stored. The episode is not recorded.
        """
        self.begin_row(lambda: ({"obs": self.observe(obs())}, info() if self.takes_info else {}))

    def begin_row(self, make: MakeRow) -> None:
        """Begins an episode like :meth:`begin`, with a row that ``make`` returns with its info."""
        try:
            self.end()
        finally:
            self._state = _State.RECORDING
            self._append(make)

    def add(self, step: Callable[[], Step], *, ended: bool) -> None:
        """Adds the row of one transition, and ends the episode if this was its last.

        Args:
            step: function that returns the environment's step. If it raises, the row is refused. Not called once an earlier row was
                refused.
            ended: whether the environment's episode is over.

        Raises:
            UnacknowledgedError: earlier episodes were refused. The row is added nevertheless.
            InvalidEpisodeError: the row cannot be stored. The episode ends before it, and nothing is recorded until the environment's
                episode is over.
        """

        def make_row() -> tuple[Row, Info]:
            made = step()
            done = np.float32(read_flag("terminated", made.terminated))
            read_flag("truncated", made.truncated)
            return {"obs": self.observe(made.obs), "action": made.action, "reward": convert_reward(made.reward), "done": done}, made.info

        self.add_row(make_row, ended=ended)

    def add_row(self, make: MakeRow, *, ended: bool) -> None:
        """Adds a row like :meth:`add`: one that ``make`` returns with its info."""
        try:
            if self._state is _State.REFUSED:
                self._unrecorded += 1
            else:
                self._append(make)
        finally:
            if ended:
                self.end()

    def end(self) -> None:
        """Ends the episode in progress; does nothing if there is none."""
        state, self._state = self._state, _State.IDLE
        if state is _State.RECORDING:
            self._retry_after_report(self._writer.end_episode)
        elif state is _State.REFUSED:
            if self._unrecorded:
                logger.warning("actor %r: %d steps after a refused row were not recorded", self._writer.actor, self._unrecorded)
            self._unrecorded = 0

    def _append(self, make: MakeRow) -> None:
        try:
            row = self._stored_row(make)
            self._retry_after_report(lambda: self._writer.append(row))
        except UnacknowledgedError:
            raise
        except Exception:
            try:
                self.end()
            finally:
                self._state = _State.REFUSED
            raise

    def _stored_row(self, make: MakeRow) -> Mapping[str, Any]:
        try:
            row, info = make()
        except TouchlineError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InvalidEpisodeError(f"cannot read what the environment returned: {type(error).__name__}: {error}") from error
        if self._transform is None:
            return row
        return self._transform(row, info=info) if self.takes_info else self._transform(row)

    @staticmethod
    def _retry_after_report(call: Callable[[], object]) -> None:
        """Repeats a writer's call while it only reports earlier refusals, then raises all that it reported.

        A writer reports refused episodes before it does anything else. The environment cannot repeat its step, so the call has to go
        through before the report is passed on.
        """
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
    except (TypeError, ValueError):  # callables written in C may have no signature
        return False


def read_flag(name: str, value: Any) -> bool:
    """Returns an environment's flag, ``terminated`` or ``truncated``, as a bool.

    Raises:
        InvalidEpisodeError: it is not one boolean value.
    """
    made = _convert_flag[name](value)
    if made.size != 1:
        raise InvalidEpisodeError(f"{name}: shape {made.shape}, expected one value")
    return bool(made.reshape(()))


def any_set(*flags: Any) -> bool:
    """Returns whether any of the flags is set; never raises, unlike :func:`read_flag`, so that an episode always ends."""
    return any(bool(np.any(np.asarray(flag, object))) for flag in flags)
