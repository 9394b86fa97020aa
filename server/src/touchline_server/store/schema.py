"""The schema of a table, fixed by its first episode, and the one validator of episodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from touchline_protos.codec import Episode
from touchline_protos.log_lines import get_logger
from touchline_protos.types import rules
from touchline_protos.types.casting import ROUNDING_HINT, ColumnError
from touchline_protos.types.dtypes import dtype_name
from touchline_server.errors import InvalidEpisodeError

logger = get_logger(__name__)


def is_integer(dtype: np.dtype) -> bool:
    """Returns whether values of a dtype are integers, or booleans."""
    return dtype.kind in "iub"


@dataclass(frozen=True, slots=True)
class ColumnSpec:
    """Name, dtype and row shape of one column."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    """Shape of one row."""

    @property
    def row_bytes(self) -> int:
        """Number of bytes of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {self.shape}"


@dataclass(frozen=True, slots=True)
class Schema:
    """The columns of a table, in the order of the first episode."""

    columns: tuple[ColumnSpec, ...]
    restored_from: str = field(default="", compare=False)
    """The folder whose episodes fixed it; empty if the first episode since the start did."""

    @classmethod
    def of(cls, episode: Mapping[str, np.ndarray]) -> Schema:
        """Returns the schema that an episode fixes.

        Raises:
            InvalidEpisodeError: a column is missing, its name is not allowed, or its dtype or shape is not supported.
        """
        try:
            rules.check_columns(episode)
        except ColumnError as error:
            raise InvalidEpisodeError(str(error)) from None
        return cls(tuple(ColumnSpec(name, array.dtype, array.shape[1:]) for name, array in episode.items()))

    @property
    def row_bytes(self) -> int:
        """Number of bytes of one row of all columns."""
        return sum(spec.row_bytes for spec in self.columns)

    @property
    def has_task_numbers(self) -> bool:
        """Whether there is a column ``task`` with an integer in each row."""
        return any(spec.name == "task" and is_integer(spec.dtype) for spec in self.columns)

    def check(self, episode: Mapping[str, np.ndarray]) -> None:
        """Raises InvalidEpisodeError unless the episode has exactly these columns, dtypes and inner shapes."""
        known = {spec.name for spec in self.columns}
        for name in episode:
            if name not in known:
                raise self._misfit(f"{name}: an unknown column, expected only {', '.join(sorted(known))}")
        for spec in self.columns:
            array = episode.get(spec.name)
            if array is None:
                raise self._misfit(f"{spec.name}: missing, expected {spec}")
            if array.dtype != spec.dtype:
                found, expected = dtype_name(array.dtype), dtype_name(spec.dtype)
                remedy = f"{ROUNDING_HINT}; " if (found, expected) == ("float64", "float32") else ""
                raise self._misfit(f"{spec.name}: dtype {found}, expected {expected}", remedy)
            if array.shape[1:] != spec.shape:
                raise self._misfit(f"{spec.name}: shape {array.shape[1:]} a step, expected {spec.shape}")

    def _misfit(self, what: str, remedy: str = "") -> InvalidEpisodeError:
        origin = f"the episodes restored from {self.restored_from}" if self.restored_from else "the first episode"
        other = ", or start on another storage.data_dir" if self.restored_from else ""
        empty = f"empty the buffer (`touchline clear`, client.clear()){other}"
        return InvalidEpisodeError(f"{what} as in {origin}; {remedy}to change the columns, {empty}")


@dataclass(frozen=True, slots=True)
class EpisodeValidator:
    """Checks whether an episode may be stored. Immutable, so thread-safe."""

    capacity: int
    """Number of rows of the ring."""
    incoming: bool
    """The row convention: True if the first row's action, reward and done are undefined, False if the last row's are."""
    allow_non_finite: bool
    """Whether NaN and infinity are allowed in defined values."""

    def check(self, episode: Mapping[str, np.ndarray], schema: Schema | None, *, values_checked: bool = False) -> Schema:
        """Returns the schema that the episode fits: the given one, or the one that it fixes as the first episode.

        Args:
            episode: columns [T+1, ...] by dotted name.
            schema: the table's schema; None before the first episode.
            values_checked: whether values are known to be finite where they must be.

        Raises:
            InvalidEpisodeError: with the column, what was found and what was expected.
        """
        try:
            length = rules.check_episode(episode)
            if schema is None:
                schema = Schema.of(episode)
                rules.check_done_name(episode)
            else:
                schema.check(episode)
            if length > self.capacity:
                raise InvalidEpisodeError(f"{length} rows, expected at most the buffer's capacity of {self.capacity}; store it in pieces")
            if not (self.allow_non_finite or values_checked):
                rules.check_finite(episode, incoming=self.incoming)
        except ColumnError as error:
            raise InvalidEpisodeError(str(error)) from None
        return schema


class FirstRowCheck:
    """Warns once of an action in row 0, which is never drawn under the row convention ``incoming``. For the holder of the write lock.

    Args:
        incoming: the row convention.
    """

    def __init__(self, *, incoming: bool) -> None:
        self._incoming = incoming
        self.reset()

    def reset(self) -> None:
        """Makes the next such episode warn again: the table was emptied."""
        self._done = not self._incoming

    def check(self, episode: Episode) -> None:
        """Checks an episode that is about to be stored."""
        if not self._done and rules.has_action_in_row_0(episode.columns):
            self._done = True
            logger.warning("an episode of actor %r: %s", episode.actor, rules.ACTION_IN_ROW_0)
