"""The rules that every episode must satisfy, whatever the table's schema. The server checks each episode, and a client a file in a dry run.

Every ``check`` raises a ColumnError that names the column, the value found and the one expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from touchline_protos.types.casting import ColumnError
from touchline_protos.types.dtypes import BFLOAT16, is_floating, to_wire
from touchline_protos.types.episode import CodecLimits
from touchline_protos.types.flatten import MAX_NESTING

REQUIRED = ("obs", "action", "reward")
"""Columns that every episode has; ``obs`` may be a group of columns."""
SCALAR = ("reward", "done", "task")
"""Columns with one value per step: [T+1] or [T+1, 1]. In lockstep, ``reward`` and ``done`` may have one per agent: [T+1, agents]."""
RESERVED = ("episode", "index")
"""Names of TorchRL's own columns."""
RESERVED_PREFIX = "provenance."
"""Prefix of the names of a batch's own arrays."""
MAX_COLUMN_NAME_CHARS = CodecLimits().max_name_chars
"""Maximum number of characters in a column's name."""
DONE_ALIASES = ("terminated", "terminateds", "terminal", "terminals", "termination", "terminations", "dones", "is_terminal", "is_done")
"""Names that other libraries use for ``done``.

Together with ``done`` they are ordinary columns. Without it, batches would say that no episode ever terminated. ``truncated`` is not among
them, as a truncation does not end the return of an episode.
"""

ACTION_IN_ROW_0 = (
    "row 0 has an action, which is never drawn: under the row convention 'incoming', row t holds the observation that the action in row t "
    "led to, so row 0 has none (NaN). If row t holds the action that was taken from its observation, set sampling.row_convention = "
    "'outgoing' on the server and load the episodes again (logged once)"
)
"""Warning about episodes for which :func:`has_action_in_row_0` is true under the row convention ``incoming``."""


def check_episode(episode: Mapping[str, np.ndarray]) -> int:
    """Returns the number of rows of an episode.

    Raises:
        ColumnError: there are no columns, a name is invalid, or the columns differ in their numbers of rows.
    """
    if not episode:
        raise ColumnError("no columns, expected obs, action and reward")
    _check_names(episode)
    return _common_length(episode)


def check_columns(episode: Mapping[str, np.ndarray]) -> None:
    """Checks that an episode can define a schema.

    Raises:
        ColumnError: a required column is missing, a name is reserved, or a dtype or shape is not supported.
    """
    _check_groups(episode)
    for name, array in episode.items():
        try:
            to_wire(array.dtype)
        except ValueError as error:
            raise ColumnError(f"{name}: {error}") from None
        if name in SCALAR and array.shape[1:] not in ((), (1,)):
            _check_per_agent(name, episode)


def _check_per_agent(name: str, episode: Mapping[str, np.ndarray]) -> None:
    """Checks a column of :data:`SCALAR` with more than one value per step: in lockstep it has one per agent.

    Raises:
        ColumnError: it is the task, has further axes, or the agents are not the second axis of observations and actions, too.
    """
    shape, reward = episode[name].shape, episode["reward"].shape
    expected = f"expected one value per step: ({shape[0]},)"
    if name == "task":
        raise ColumnError(f"{name}: shape {shape}, {expected}")
    if len(reward) == 2 and reward[1] > 1:
        expected += f", or one per agent as the reward: {reward}"
    elif name == "reward":
        expected += ", or one per agent: (rows, agents)"
    if len(shape) != 2 or shape[1] < 2 or shape != reward:
        raise ColumnError(f"{name}: shape {shape}, {expected}")
    for other, array in episode.items():
        if (other == "action" or _is_observation(other)) and array.shape[:2] != shape:
            raise ColumnError(
                f"{name}: shape {shape}, expected one value per step: ({shape[0]},); one per agent needs {other} "
                f"({shape[0]}, {shape[1]}, ...), found {array.shape}"
            )


def check_finite(episode: Mapping[str, np.ndarray], *, incoming: bool) -> None:
    """Checks that values are finite: observations in every row, and actions, rewards and ``done`` in the rows with a transition.

    Args:
        episode: columns [rows, ...] by name.
        incoming: whether the row without a transition is the first; otherwise it is the last.

    Raises:
        ColumnError: a value is NaN or infinite; the message says in which row.
    """
    defined = slice(1, None) if incoming else slice(None, -1)
    for name, array in episode.items():
        if _is_observation(name):
            rows, first = array, 0
        elif name in ("action", "reward", "done"):
            rows, first = array[defined], defined.start or 0
        else:
            continue
        bad = _first_non_finite(rows)
        if bad is not None:
            raise ColumnError(
                f"{name}: a value that is not finite in row {bad + first}, expected finite values "
                "(storage.allow_non_finite = true accepts them)"
            )


def has_action_in_row_0(episode: Mapping[str, np.ndarray]) -> bool:
    """Returns whether row 0 seems to hold an action that was taken: a finite one or, if the dtype has no NaN, one that is not zero."""
    action = episode.get("action")
    if action is None or len(action) < 2 or not action[0].size:
        return False
    if is_floating(action.dtype):
        return _first_non_finite(action[:1]) is None
    return bool(action[0].any())


def _first_non_finite(rows: np.ndarray) -> int | None:
    """Returns the index of the first row with a NaN or an infinity; None if there is none."""
    if not is_floating(rows.dtype):
        return None
    # numpy has no bfloat16: NaN and infinities are the values whose 8 exponent bits, 7 to 14, are all set.
    finite = (rows.view(np.uint16) & 0x7F80) != 0x7F80 if rows.dtype == BFLOAT16 else np.isfinite(rows)
    if finite.all():
        return None
    return int(np.argmin(finite.reshape(len(rows), -1).all(axis=1)))


def _is_observation(name: str) -> bool:
    return name == "obs" or name.startswith("obs.")


def _common_length(episode: Mapping[str, np.ndarray]) -> int:
    """Returns the number of rows that all columns have; that of the observations decides which column an error names."""
    for name, array in episode.items():
        if array.ndim == 0:
            raise ColumnError(f"{name}: a scalar, expected one value per step: shape (rows, ...)")
    leader = next((name for name in episode if _is_observation(name)), next(iter(episode)))
    length = len(episode[leader])
    for name, array in episode.items():
        if len(array) != length:
            raise ColumnError(
                f"{name}: shape {array.shape}, expected ({', '.join(map(str, (length, *array.shape[1:])))}{',' * (array.ndim == 1)}) "
                f"to match {leader}"
            )
    if length == 0:
        raise ColumnError(f"{leader}: zero rows, expected at least 1")
    return length


def _check_names(names: Iterable[str]) -> None:
    """Checks names. Call it first: other messages print them unescaped."""
    for name in names:
        if not (0 < len(name) <= MAX_COLUMN_NAME_CHARS and name.isprintable() and all(name.split("."))):
            raise ColumnError(
                f"{name[:MAX_COLUMN_NAME_CHARS]!r}: not a column name, expected 1 to {MAX_COLUMN_NAME_CHARS} printable characters and "
                "no empty part between dots"
            )
        if name.count(".") > MAX_NESTING:
            raise ColumnError(f"{name}: nested {name.count('.')} levels deep, expected at most {MAX_NESTING}")


def _check_groups(names: Iterable[str]) -> None:
    """Checks that the required columns exist, that no name is reserved, and that none is both a column and a group."""
    known = set(names)
    for required in REQUIRED:
        if required not in known and not (required == "obs" and any(map(_is_observation, known))):
            raise ColumnError(f"{required}: missing, expected the columns {', '.join(REQUIRED)}; found {', '.join(sorted(known))}")
    for name in sorted(known):
        if name in RESERVED or name.startswith(RESERVED_PREFIX):
            raise ColumnError(f"{name}: a reserved column name ({', '.join(RESERVED)}, {RESERVED_PREFIX}*); give the column another name")
        parent = name
        while "." in parent:
            parent = parent.rpartition(".")[0]
            if parent in known:
                raise ColumnError(f"{name}: {parent} is a column too, expected either a column or a group of columns")


def check_done_name(names: Iterable[str]) -> None:
    """Checks that the column which marks the end of episodes is called ``done``.

    Raises:
        ColumnError: it has one of :data:`DONE_ALIASES`, and there is no ``done``.
    """
    known = set(names)
    for name in DONE_ALIASES:
        if name in known and "done" not in known:
            raise ColumnError(
                f"{name}: given without done, so batches would say that no episode ever terminated; name it done (1 if the episode "
                "terminated), or add a column done"
            )
