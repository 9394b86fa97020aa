"""The element types of the wire, in one table for both directions.

numpy has no bfloat16. An array of dtype :data:`BFLOAT16` holds its bits: a structured dtype with one field, which cannot be mistaken for
uint16, and which is gathered, copied and compared like any other element of 2 bytes.
"""

from __future__ import annotations

import enum

import numpy as np


class DType(enum.IntEnum):
    """Numbers of ``touchline.v1.DType``."""

    BOOL = 1
    UINT8 = 2
    INT8 = 3
    INT16 = 4
    INT32 = 5
    INT64 = 6
    FLOAT16 = 7
    BFLOAT16 = 8
    FLOAT32 = 9
    FLOAT64 = 10


BFLOAT16 = np.dtype([("bfloat16", "<u2")])
"""Element type of bfloat16 arrays; ``array.view(np.uint16)`` returns the bits."""

_NUMPY_OF: dict[DType, np.dtype] = {
    DType.BOOL: np.dtype(np.bool_),
    DType.UINT8: np.dtype("u1"),
    DType.INT8: np.dtype("i1"),
    DType.INT16: np.dtype("<i2"),
    DType.INT32: np.dtype("<i4"),
    DType.INT64: np.dtype("<i8"),
    DType.FLOAT16: np.dtype("<f2"),
    DType.BFLOAT16: BFLOAT16,
    DType.FLOAT32: np.dtype("<f4"),
    DType.FLOAT64: np.dtype("<f8"),
}
_WIRE_OF: dict[np.dtype, DType] = {dtype: wire for wire, dtype in _NUMPY_OF.items()}

SUPPORTED = "bool, uint8, int8, int16, int32, int64, float16, bfloat16, float32, float64"
"""Names of the supported element types, for error messages."""


def to_wire(dtype: np.dtype) -> DType:
    """Returns the wire number of a numpy dtype.

    Raises:
        ValueError: the dtype is not one of :data:`SUPPORTED`.
    """
    try:
        return _WIRE_OF[dtype]
    except KeyError:
        raise ValueError(f"dtype {dtype_name(dtype)} is not supported, expected one of {SUPPORTED}") from None


def to_numpy(wire: int) -> np.dtype:
    """Returns the numpy dtype of a wire number.

    Raises:
        ValueError: this version does not know the number.
    """
    try:
        return _NUMPY_OF[DType(wire)]
    except ValueError:
        raise ValueError(f"dtype number {wire} is unknown, expected one of 1..{max(DType)} ({SUPPORTED})") from None


def dtype_name(dtype: np.dtype) -> str:
    """Returns a dtype's name for messages: ``float32``, ``bfloat16``."""
    return "bfloat16" if dtype == BFLOAT16 else dtype.name


def is_floating(dtype: np.dtype) -> bool:
    """Returns whether values of this dtype can be NaN or infinite."""
    return dtype.kind == "f" or dtype == BFLOAT16
