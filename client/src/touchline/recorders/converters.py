"""Converters: from what environments return and accept to the arrays of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from touchline.errors import InvalidArgumentError, InvalidEpisodeError
from touchline_protos.types.casting import ColumnError, cast
from touchline_protos.types.flatten import to_array

Convert = Callable[[Any], Any]
"""Converts a value to (nested) arrays. Raises InvalidEpisodeError if the value cannot be stored exactly."""


def array_converter(
    name: str, dtype: np.dtype[Any] | type | None, *, float64_as: np.dtype[Any] | None = None, rounding: bool = False
) -> Convert:
    """Returns a converter to one array, [*shape], that shares no memory with the value.

    Args:
        name: column name for error messages.
        dtype: dtype that the environment declares; None keeps the value's own. A value that this dtype cannot represent is refused.
        float64_as: dtype that replaces a declared float64; None keeps float64.
        rounding: whether floats may lose digits in the conversion. A Python float, which has no dtype of its own, always may.
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
    """Returns a converter from a mapping to a dict of arrays. It keeps the value's order, and its keys are the keys' names.

    Args:
        name: column name for error messages.
        converters: converter of each key; a value with other keys is refused.

    Raises:
        InvalidArgumentError: a key is not a valid column name, or two keys have the same name.
    """
    labels = {key: str(key) for key in converters}
    for key, label in labels.items():
        if "." in label or not label:
            raise InvalidArgumentError(f"{name}: key {key!r}, expected a name without a dot; rename it with a wrapper")
    if len(set(labels.values())) < len(labels):
        raise InvalidArgumentError(f"{name}: keys {list(labels)}, expected distinct names; rename them with a wrapper")

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or value.keys() != labels.keys():
            found = f"keys {list(value)}" if isinstance(value, Mapping) else f"type {type(value).__name__}"
            raise InvalidEpisodeError(f"{name}: {found}, expected the keys {list(labels)} that the environment declares")
        return {labels[key]: converters[key](item) for key, item in value.items()}

    return convert


def tuple_converter(name: str, converters: list[Convert]) -> Convert:
    """Returns a converter from a tuple to a dict ``0``, ``1``, ... of arrays; a tuple of another length is refused."""

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, list | tuple) or len(value) != len(converters):
            found = f"{len(value)} items" if isinstance(value, list | tuple) else f"type {type(value).__name__}"
            raise InvalidEpisodeError(f"{name}: {found}, expected the {len(converters)} items that the environment declares")
        return {str(index): item(value[index]) for index, item in enumerate(converters)}

    return convert


def space_converter(name: str, space: Any, *, float64_as: np.dtype[Any] | None = None, rounding: bool = False) -> Convert:
    """Returns a converter for the values of a Gymnasium space: a Dict becomes a dict, a Tuple a dict ``0``, ``1``, ...

    Args:
        name: ``obs`` or ``action``, for error messages.
        space: Box, Discrete, MultiBinary, MultiDiscrete, or Dict and Tuple of these. Values are stored in its dtype.
        float64_as: dtype that replaces float64; None keeps float64.
        rounding: whether floats may lose digits in the conversion to the space's dtype.

    Raises:
        InvalidArgumentError: the space's values have no fixed shape, or a key is not a valid column name.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        fields = {key: space_converter(f"{name}.{key}", item, float64_as=float64_as) for key, item in space.spaces.items()}
        return mapping_converter(name, fields)
    if isinstance(space, spaces.Tuple):
        items = [space_converter(f"{name}.{index}", item, float64_as=float64_as) for index, item in enumerate(space.spaces)]
        return tuple_converter(name, items)
    if isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiBinary | spaces.MultiDiscrete):
        return array_converter(name, space.dtype, float64_as=float64_as, rounding=rounding)
    raise InvalidArgumentError(
        f"{name}: space {type(space).__name__}, expected Box, Discrete, MultiBinary or MultiDiscrete, or Dict and Tuple of these"
    )


def action_converter(space: Any, *, float64_as: np.dtype[Any] | None = None) -> Convert:
    """Returns a converter for the actions of a Gymnasium space to one array; floats are rounded to the space's dtype.

    Raises:
        InvalidArgumentError: an action of this space is not a single array.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        raise InvalidArgumentError(f"action: space {type(space).__name__}, expected a single array; flatten it with a wrapper")
    return space_converter("action", space, float64_as=float64_as, rounding=True)


def space_layout(name: str, space: Any) -> dict[str, str]:
    """Returns a description of each array of a Gymnasium space, by its dotted name: its shape and dtype, and how many values it may have.

    Bounds of floats are left out: they do not change what is stored.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        parts = {str(key): part for key, part in space.spaces.items()}
    elif isinstance(space, spaces.Tuple):
        parts = {str(index): part for index, part in enumerate(space.spaces)}
    else:
        return {name: f"{space.dtype} {space.shape}" if isinstance(space, spaces.Box) else repr(space)}
    return {key: text for part_name, part in parts.items() for key, text in space_layout(f"{name}.{part_name}", part).items()}


def env_value(value: Any, index: int) -> Any:
    """Returns one environment's value out of a vector environment's: arrays [num_envs, ...], or dicts and tuples of them."""
    if isinstance(value, Mapping):
        return {key: env_value(item, index) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(env_value(item, index) for item in value)
    return value[index]


def env_info(infos: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
    """Returns one environment's info out of a vector environment's, in which ``_key`` [num_envs] masks the environments that have ``key``.

    Args:
        infos: info of the vector environment. A value that is not [num_envs, ...] is passed on as it is.
        index: index of the environment.
        count: number of environments.
    """
    info: dict[str, Any] = {}
    for key, value in infos.items():
        if isinstance(key, str) and key.startswith("_") and key[1:] in infos:
            continue
        mask = infos.get(f"_{key}")
        if mask is not None and not mask[index]:
            continue
        if isinstance(value, Mapping):
            info[key] = env_info(value, index, count)
        else:
            info[key] = value[index] if hasattr(value, "__getitem__") and hasattr(value, "__len__") and len(value) == count else value
    return info
