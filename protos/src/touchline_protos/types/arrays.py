"""Convert one value of a caller to an array without changing it. Torch objects are recognised by their type; torch is never imported.

A value that cannot be stored unchanged raises a ColumnError: masked values, text, objects, dates, complex numbers, and lists or tuples
whose elements would have to be changed or joined to form one array.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from touchline_protos.types.casting import ColumnError, cast
from touchline_protos.types.dtypes import BFLOAT16

_EXACT_IN_FLOAT64 = 1 << 53
"""Largest integer below which float64 represents every integer."""


def to_array(name: str, value: Any) -> np.ndarray:
    """Returns a value as a C-contiguous, little-endian numpy array, which shares the value's memory if possible.

    Args:
        name: name of the column, for messages.
        value: an array, a tensor on any device, a number, or nested lists of numbers. bfloat16 of torch and of JAX becomes
            :data:`~touchline_protos.types.dtypes.BFLOAT16`.

    Raises:
        ColumnError: the value is not an array of numbers, has masked values, or is a tensor that numpy cannot represent (sparse, quantised,
            float8).
    """
    # While another thread imports torch, the module is in sys.modules before it has the attribute Tensor.
    tensor_type = getattr(sys.modules.get("torch"), "Tensor", None)
    try:
        if tensor_type is not None and isinstance(value, tensor_type):
            array = _of_tensor(value)
        elif isinstance(value, list | tuple):
            array = _of_sequence(name, value)
        else:
            array = _of_any(name, value)
    except ColumnError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise ColumnError(f"{name}: {type(value).__name__} is not an array ({error})") from None
    if array.dtype.name == "bfloat16":
        array = array.view(BFLOAT16)  # the dtype of the package ml_dtypes, which JAX's arrays have in numpy
    _check_numbers(name, value, array)
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    # ascontiguousarray would turn a scalar into one dimension.
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _of_tensor(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":
        return np.asarray(tensor.view(sys.modules["torch"].int16).numpy()).view(BFLOAT16)
    return np.asarray(tensor.numpy())


def _of_any(name: str, value: Any) -> np.ndarray:
    if isinstance(value, np.ma.MaskedArray):
        masked = np.count_nonzero(np.ma.getmaskarray(value))
        if masked:
            raise ColumnError(f"{name}: {masked} masked values, expected none; fill them (numpy.ma.filled) or leave the column out")
        return np.asarray(np.ma.getdata(value))
    return np.asarray(value)


def _of_sequence(name: str, values: Sequence[Any]) -> np.ndarray:
    """Returns a list or tuple as an array that contains each element unchanged."""
    if all(type(part) is float for part in values) or not values:
        return np.asarray(values)
    if all(isinstance(part, bool | int | float) and not isinstance(part, np.generic) for part in values):
        array = np.asarray(values)
        if array.dtype.kind == "f":
            for part in values:
                if not isinstance(part, float) and abs(part) > _EXACT_IN_FLOAT64:
                    raise ColumnError(
                        f"{name}: {part} among floats, expected a number that float64 represents exactly; pass an array of one dtype"
                    )
        return array
    parts = [to_array(name, part) for part in values]
    if isinstance(values, tuple) and any(hasattr(part, "dtype") and array.ndim for part, array in zip(values, parts, strict=True)):
        raise ColumnError(
            f"{name}: a tuple of {len(values)} arrays, expected one array: numpy.stack makes rows of them; pass several observations as a "
            'mapping, {"0": ..., "1": ...}'
        )
    shapes = list({part.shape: None for part in parts})
    if len(shapes) > 1:
        raise ColumnError(
            f"{name}: a {type(values).__name__} of elements of the shapes {', '.join(map(str, shapes[:3]))}, expected one shape; "
            "pass several observations as a mapping, which makes a column of each"
        )
    if len({part.dtype for part in parts}) > 1:
        try:
            dtype = np.result_type(*(part.dtype for part in parts))
        except TypeError:
            raise ColumnError(f"{name}: a {type(values).__name__} of elements of different dtypes, expected one dtype") from None
        parts = [cast(name, part, dtype, rounding=False, why="of the other elements") for part in parts]
    return np.stack(parts)


def _check_numbers(name: str, value: Any, array: np.ndarray) -> None:
    """Raises ColumnError if the values are not numbers that a column can hold."""
    kind, dtype = array.dtype.kind, array.dtype
    if dtype.hasobject:
        found = _described(value) if not array.ndim else f"objects ({_described(array.reshape(-1)[0])} first)" if array.size else "objects"
        raise ColumnError(f"{name}: {found}, expected numbers")
    if kind in "US":
        shown = repr(array.reshape(-1)[0].item())[:40] if array.size else "none"
        raise ColumnError(f"{name}: text ({shown}), expected numbers; store a number for each text")
    if kind in "Mm":
        raise ColumnError(f'{name}: {dtype.name}, expected numbers; convert them with .astype("int64")')
    if kind == "c":
        raise ColumnError(f"{name}: {dtype.name}, expected real numbers; store the real and the imaginary part as two columns")
    if dtype.names is not None and dtype != BFLOAT16:
        fields = ", ".join(dtype.names)
        raise ColumnError(f"{name}: a structured array with the fields {fields}, expected plain numbers; store a column for each field")


def _described(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
