"""TD-MPC2's column names and Touchline's."""

from __future__ import annotations

import math
from collections.abc import Mapping
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


def check_one_reward(columns: Mapping[str, Any], *, leading: int) -> None:
    """Checks that there is one reward per step, as TD-MPC2 trains one agent. The backend checks everything else.

    Args:
        columns: columns of one episode or of several.
        leading: number of axes before a step's values: 1 for an episode [rows], 2 for several [episodes, rows].

    Raises:
        InvalidEpisodeError: there are several rewards per step.
    """
    shape = tuple(getattr(columns.get("reward"), "shape", ()))
    if math.prod(shape[leading:]) > 1:
        raise InvalidEpisodeError(
            f"reward: shape {shape}, expected one value per step: {shape[:leading]}, because TD-MPC2 trains one agent; add each agent's "
            "episode by itself"
        )
