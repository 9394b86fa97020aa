"""TD-MPC2's column names and Touchline's."""

from __future__ import annotations

from typing import Any

from touchline.errors import InvalidEpisodeError


def columns_of(td: Any) -> dict[str, Any]:
    """Returns TD-MPC2's columns under Touchline's names, without ``episode``, which TD-MPC2's own buffer adds to its argument.

    Args:
        td: TensorDict or mapping of columns. Not modified; the result shares its memory.

    Raises:
        InvalidEpisodeError: ``td`` is not a mapping, or two of its columns would be stored under one name.
    """
    if not hasattr(td, "keys"):
        raise InvalidEpisodeError(f"td: {type(td).__name__}, expected a TensorDict")
    names = set(td.keys())
    if {"done", "terminated"} <= names:
        raise InvalidEpisodeError("done: present together with terminated, which is stored under that name; expected one of the two")
    return {"done" if name == "terminated" else name: td[name] for name in td.keys() if name != "episode"}  # noqa: SIM118  a TensorDict
