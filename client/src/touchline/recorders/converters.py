"""What environments give and take, as the arrays of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from touchline.errors import InvalidArgumentError, InvalidEpisodeError
from touchline_protos.types.casting import ColumnError, cast
from touchline_protos.types.flatten import to_array

Convert = Callable[[Any], Any]
"""Makes (nested) arrays of a value. Raises InvalidEpisodeError for one that cannot be stored as it is."""


def array_converter(
    name: str, dtype: np.dtype[Any] | type | None, *, float64_as: np.dtype[Any] | None = None, rounding: bool = False
) -> Convert:
    """Returns what makes an array, [*shape] and never shared, of one value.

    Args:
        name: for messages.
        dtype: that the environment declares; None keeps the value's own. A value that would be another one in it is refused.
        asked: that float64 is stored as instead; None leaves it.
        rounding: a float may lose digits to the declared dtype. Without it only one that has no dtype of its own, a Python float.
    """
    target = None if dtype is None else np.dtype(dtype)
    if float64_as is not None and target == np.float64:
        target = float64_as

    def convert(value: Any) -> np.ndarray:
        try:
            array = to_array(name, value)
            if target is not None:
                rounds = rounding or float64_as is not None or not hasattr(value, "dtype")
                array = cast(name, array, target, rounding=rounds, why="that the environment declares")
        except ColumnError as error:
            raise InvalidEpisodeError(str(error)) from None
        return np.array(array)

    return convert


def mapping_converter(name: str, converters: Mapping[Any, Convert]) -> Convert:
    """Returns what makes a dict of arrays of a dict of values, in the order of the value, under the keys' names.

    Args:
        name: for messages.
        converters: by key; a value with other keys is refused.

    Raises:
        InvalidArgumentError: keys that are no names of columns, or the same one.
    """
    labels = {key: str(key) for key in converters}
    for key, label in labels.items():
        if "." in label or not label:
            raise InvalidArgumentError(f"{name}: the key {key!r}, expected a name without a dot; rename it by a wrapper")
    if len(set(labels.values())) < len(labels):
        raise InvalidArgumentError(f"{name}: the keys {list(labels)}, of which two have the same name; rename them by a wrapper")

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or value.keys() != labels.keys():
            found = f"the keys {list(value)}" if isinstance(value, Mapping) else f"of type {type(value).__name__}"
            raise InvalidEpisodeError(f"{name}: {found}, expected the keys {list(labels)} that the environment declares")
        return {labels[key]: converters[key](part) for key, part in value.items()}

    return convert


def tuple_converter(name: str, converters: list[Convert]) -> Convert:
    """Returns what makes a dict ``0``, ``1``, ... of arrays of a tuple of values; one of another length is refused."""

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, list | tuple) or len(value) != len(converters):
            found = f"{len(value)} parts" if isinstance(value, list | tuple) else f"of type {type(value).__name__}"
            raise InvalidEpisodeError(f"{name}: {found}, expected the {len(converters)} parts that the environment declares")
        return {str(number): part(value[number]) for number, part in enumerate(converters)}

    return convert


def space_converter(name: str, space: Any, *, float64_as: np.dtype[Any] | None = None, rounding: bool = False) -> Convert:
    """Returns what makes (nested) arrays of the values of a Gymnasium space: a dict of a Dict, a dict ``0``, ``1``, ... of a Tuple.

    Args:
        name: for messages: ``obs`` or ``action``.
        space: of Box, Discrete, MultiBinary, MultiDiscrete, or Dict and Tuple of these. Its dtype is the one that is stored.
        asked: that float64 is stored as instead; None leaves it.
        rounding: floats may lose digits to the space's dtype.

    Raises:
        InvalidArgumentError: a space whose values have no fixed shape, or keys that are no names of columns.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return mapping_converter(
            name, {key: space_converter(f"{name}.{key}", part, float64_as=float64_as) for key, part in space.spaces.items()}
        )
    if isinstance(space, spaces.Tuple):
        return tuple_converter(
            name, [space_converter(f"{name}.{number}", part, float64_as=float64_as) for number, part in enumerate(space.spaces)]
        )
    if isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiBinary | spaces.MultiDiscrete):
        return array_converter(name, space.dtype, float64_as=float64_as, rounding=rounding)
    raise InvalidArgumentError(
        f"{name}: a space of type {type(space).__name__}, expected Box, Discrete, MultiBinary or MultiDiscrete, or Dict and Tuple of these"
    )


def action_converter(space: Any, *, float64_as: np.dtype[Any] | None = None) -> Convert:
    """Returns what makes an array of an action of a Gymnasium space, in the space's dtype: floats are rounded to it.

    Raises:
        InvalidArgumentError: a space whose actions are not one array.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        raise InvalidArgumentError(f"action: a space of type {type(space).__name__}, expected one array; flatten it by a wrapper")
    return space_converter("action", space, float64_as=float64_as, rounding=True)


def env_value(value: Any, number: int) -> Any:
    """Returns one environment's part of a batched value: dicts and tuples of arrays [n, ...]."""
    if isinstance(value, Mapping):
        return {key: env_value(part, number) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(env_value(part, number) for part in value)
    return value[number]


def env_info(infos: Mapping[str, Any], number: int, count: int) -> dict[str, Any]:
    """Returns one environment's info of a vector environment's, where ``_key`` says which environments have ``key``.

    Args:
        infos: of all environments; what is not there for each of them is handed on as it is.
        number: of the environment.
        count: of all environments.
    """
    info: dict[str, Any] = {}
    for key, value in infos.items():
        if isinstance(key, str) and key.startswith("_") and key[1:] in infos:
            continue
        mask = infos.get(f"_{key}")
        if mask is not None and not mask[number]:
            continue
        if isinstance(value, Mapping):
            info[key] = env_info(value, number, count)
        else:
            info[key] = value[number] if hasattr(value, "__getitem__") and hasattr(value, "__len__") and len(value) == count else value
    return info
