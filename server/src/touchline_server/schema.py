"""The schema of a table, fixed by its first episode, and the one validator of episodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from touchline_protos.columns import MAX_NESTING
from touchline_protos.dtypes import BFLOAT16, dtype_name, is_floating, to_wire
from touchline_server.errors import InvalidEpisodeError

REQUIRED = ("obs", "action", "reward")
SCALAR = ("reward", "done", "task")
"""Columns that hold one value a step: [T+1] or [T+1, 1]."""
RESERVED = ("episode", "index")
"""Names that TorchRL gives to its own columns."""
RESERVED_PREFIX = "provenance."
MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True)
class ColumnSpec:
    """What one column holds."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    """Of one row."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
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
        _check_groups(episode)
        specs = []
        for name, array in episode.items():
            try:
                to_wire(array.dtype)
            except ValueError as error:
                raise InvalidEpisodeError(f"{name}: {error}") from None
            spec = ColumnSpec(name, array.dtype, array.shape[1:])
            if name in SCALAR and spec.shape not in ((), (1,)):
                raise InvalidEpisodeError(f"{name}: shape {array.shape}, expected one value a step: ({array.shape[0]},)")
            specs.append(spec)
        return cls(tuple(specs))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all columns."""
        return sum(spec.row_bytes for spec in self.columns)

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
                raise self._misfit(f"{spec.name}: dtype {found}, expected {expected}", f'cast it (dtype="{expected}"), or ')
            if array.shape[1:] != spec.shape:
                raise self._misfit(f"{spec.name}: shape {array.shape[1:]} a step, expected {spec.shape}")

    def _misfit(self, what: str, remedy: str = "") -> InvalidEpisodeError:
        origin = f"the episodes restored from {self.restored_from}" if self.restored_from else "the first episode"
        other = ", or start on another storage.data_dir" if self.restored_from else ""
        return InvalidEpisodeError(f"{what} as in {origin}; {remedy}to change the columns, empty the buffer (`touchline clear`){other}")


@dataclass(frozen=True, slots=True)
class EpisodeValidator:
    """Decides whether an episode may be stored. Immutable, so thread-safe."""

    capacity: int
    """Rows of the ring."""
    incoming: bool
    """Row convention: which row's action, reward and done are undefined (the first if incoming, else the last)."""
    allow_non_finite: bool

    def check(self, episode: Mapping[str, np.ndarray], schema: Schema | None) -> Schema:
        """Returns the schema that the episode fits: the given one, or the one that it fixes as the first episode.

        Args:
            episode: columns [T+1, ...] by dotted name.
            schema: of the table; None before the first episode.

        Raises:
            InvalidEpisodeError: with the column, what was found and what was expected.
        """
        if not episode:
            raise InvalidEpisodeError("no columns, expected obs, action and reward")
        _check_names(episode)
        length = self._common_length(episode)
        if schema is None:
            schema = Schema.of(episode)
        else:
            schema.check(episode)
        if length > self.capacity:
            raise InvalidEpisodeError(f"{length} rows, expected at most the buffer's capacity of {self.capacity}; store it in pieces")
        if not self.allow_non_finite:
            self._check_finite(episode)
        return schema

    @staticmethod
    def _common_length(episode: Mapping[str, np.ndarray]) -> int:
        for name, array in episode.items():
            if array.ndim == 0:
                raise InvalidEpisodeError(f"{name}: a scalar, expected one value a step: shape (rows, ...)")
        leader = next((name for name in episode if _is_observation(name)), next(iter(episode)))
        length = len(episode[leader])
        for name, array in episode.items():
            if len(array) != length:
                raise InvalidEpisodeError(
                    f"{name}: shape {array.shape}, expected ({', '.join(map(str, (length, *array.shape[1:])))}{',' * (array.ndim == 1)}) "
                    f"to match {leader}"
                )
        if length == 0:
            raise InvalidEpisodeError(f"{leader}: zero rows, expected at least 1")
        return length

    def _check_finite(self, episode: Mapping[str, np.ndarray]) -> None:
        defined = slice(1, None) if self.incoming else slice(None, -1)
        for name, array in episode.items():
            if _is_observation(name):
                rows, first = array, 0
            elif name in ("action", "reward", "done"):
                rows, first = array[defined], defined.start or 0
            else:
                continue
            bad = _first_non_finite(rows)
            if bad is not None:
                raise InvalidEpisodeError(
                    f"{name}: a value that is not finite in row {bad + first}, expected finite values "
                    "(storage.allow_non_finite = true accepts them)"
                )


def _first_non_finite(rows: np.ndarray) -> int | None:
    """Returns the first row with a NaN or an infinity, or None."""
    if not is_floating(rows.dtype):
        return None
    # numpy knows nothing of bfloat16: all bits of its exponent are set in NaN and in infinities.
    finite = (rows.view(np.uint16) & 0x7F80) != 0x7F80 if rows.dtype == BFLOAT16 else np.isfinite(rows)
    if finite.all():
        return None
    return int(np.argmin(finite.reshape(len(rows), -1).all(axis=1)))


def _is_observation(name: str) -> bool:
    return name == "obs" or name.startswith("obs.")


def _check_names(names: Iterable[str]) -> None:
    """Raises InvalidEpisodeError where a name could not be a column's. Comes first: other messages print names as they are."""
    for name in names:
        if not (0 < len(name) <= MAX_NAME_CHARS and name.isprintable() and all(name.split("."))):
            raise InvalidEpisodeError(
                f"{name[:MAX_NAME_CHARS]!r}: not a column name, expected 1 to {MAX_NAME_CHARS} printable characters and no empty part "
                "between dots"
            )
        if name.count(".") > MAX_NESTING:
            raise InvalidEpisodeError(f"{name}: nested {name.count('.')} levels deep, expected at most {MAX_NESTING}")


def _check_groups(names: Iterable[str]) -> None:
    """Raises InvalidEpisodeError unless the required columns are there, and no reserved one or one that is a group too."""
    known = set(names)
    for required in REQUIRED:
        if required not in known and not (required == "obs" and any(map(_is_observation, known))):
            raise InvalidEpisodeError(f"{required}: missing, expected the columns {', '.join(REQUIRED)}; found {', '.join(sorted(known))}")
    for name in sorted(known):
        if name in RESERVED or name.startswith(RESERVED_PREFIX):
            raise InvalidEpisodeError(
                f"{name}: a reserved column name ({', '.join(RESERVED)}, {RESERVED_PREFIX}*); give the column another name"
            )
        parent = name
        while "." in parent:
            parent = parent.rpartition(".")[0]
            if parent in known:
                raise InvalidEpisodeError(f"{name}: {parent} is a column too, expected either a column or a group of columns")
