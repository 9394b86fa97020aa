"""TD-MPC2's columns and what they are called here."""

from __future__ import annotations

from typing import Any

from touchline.errors import InvalidEpisodeError


def columns_of(td: Any) -> dict[str, Any]:
    """Returns TD-MPC2's columns under Touchline's names, without ``episode``, which TD-MPC2's buffer writes into what it is given.

    Args:
        td: a TensorDict, or a mapping. Not changed; the columns share its memory.

    Raises:
        InvalidEpisodeError: no such thing, or two columns that are stored under one name.
    """
    if not hasattr(td, "keys"):
        raise InvalidEpisodeError(f"td: {type(td).__name__}, expected a TensorDict")
    names = set(td.keys())
    if {"done", "terminated"} <= names:
        raise InvalidEpisodeError("done: given beside terminated, which is stored under that name; expected one of the two")
    return {"done" if name == "terminated" else name: td[name] for name in td.keys() if name != "episode"}  # noqa: SIM118  a TensorDict
