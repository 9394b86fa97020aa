"""What environments give and take, as the arrays of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from touchline.errors import InvalidArgumentError
from touchline_protos.columns import to_array

Convert = Callable[[Any], Any]


def array_of(name: str, dtype: np.dtype[Any] | type | None) -> Convert:
    """Returns what makes an array, [*shape] and never shared, of one value; None keeps the value's own dtype."""

    def convert(value: Any) -> np.ndarray:
        return np.array(to_array(name, value), dtype=dtype)

    return convert


def converter(name: str, space: Any) -> Convert:
    """Returns what makes (nested) arrays of the values of a Gymnasium space: a dict of a Dict, a dict ``0``, ``1``, ... of a Tuple.

    Args:
        name: for messages: ``obs`` or ``action``.
        space: of Box, Discrete, MultiBinary, MultiDiscrete, or Dict and Tuple of these. Its dtype is the one that is stored.

    Raises:
        InvalidArgumentError: a space whose values have no fixed shape.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        parts = {str(key): (key, converter(f"{name}.{key}", part)) for key, part in space.spaces.items()}
        return lambda value: {label: convert(value[key]) for label, (key, convert) in parts.items()}
    if isinstance(space, spaces.Tuple):
        converts = [converter(f"{name}.{number}", part) for number, part in enumerate(space.spaces)]
        return lambda value: {str(number): convert(part) for number, (convert, part) in enumerate(zip(converts, value, strict=True))}
    if isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiBinary | spaces.MultiDiscrete):
        return array_of(name, space.dtype)
    raise InvalidArgumentError(
        f"{name}: a space of type {type(space).__name__}, expected Box, Discrete, MultiBinary or MultiDiscrete, or Dict and Tuple of these"
    )


def action_converter(space: Any) -> Convert:
    """Returns what makes an array of an action of a Gymnasium space.

    Raises:
        InvalidArgumentError: a space whose actions are not one array.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        raise InvalidArgumentError(f"action: a space of type {type(space).__name__}, expected one array; flatten it by a wrapper")
    return converter("action", space)


def part_of(value: Any, number: int) -> Any:
    """Returns one environment's part of a batched value: dicts and tuples of arrays [n, ...]."""
    if isinstance(value, Mapping):
        return {key: part_of(part, number) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(part_of(part, number) for part in value)
    return value[number]
