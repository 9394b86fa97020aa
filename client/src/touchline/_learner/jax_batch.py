"""Batches as JAX arrays, through DLPack. Importing this does not import JAX; making a converter does.

The columns of a batch become arrays of JAX that share their memory. What says where a slice is from (``episode_id``, ``start``, ``actor``,
``policy_version``, ``probability``, ``table``) stays in numpy arrays: these are int64 and float64, which JAX narrows unless its x64 mode is
on, and they are used on the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from touchline._learner.torch_batch import map_nested
from touchline.errors import InvalidArgumentError
from touchline.installing import install_command
from touchline_protos import Batch
from touchline_protos.log_lines import get_logger
from touchline_protos.types.batch import PROVENANCE
from touchline_protos.types.dtypes import BFLOAT16, dtype_name

logger = get_logger(__name__)

HOST_FIELDS = (*(name for name, _ in PROVENANCE), "table")
"""Fields of a batch that stay in numpy arrays."""

_NARROWED = {"int64": np.int32, "float64": np.float32}
"""What JAX makes of a dtype while its x64 mode is off, as everywhere in JAX."""

_DTYPE_CODE_AT = 20
"""Offset of ``dl_tensor.dtype.code`` in a ``DLManagedTensor``: behind data (8 bytes), device (8) and ndim (4)."""
_BFLOAT_CODE, _BOOL_CODE = 4, 6
"""``kDLBfloat`` and ``kDLBool`` of dlpack.h."""

_pointer_of_capsule = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of_capsule.restype = ctypes.c_void_p
_pointer_of_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]


def load_jax() -> Any:
    """Returns the jax module.

    Raises:
        InvalidArgumentError: it is not installed.
    """
    try:
        import jax
        import jax.dlpack
    except ModuleNotFoundError as error:
        if error.name not in ("jax", "jaxlib", None):  # JAX gives no name if jaxlib is what it lacks
            raise
        raise InvalidArgumentError(f"as_jax: True needs JAX, which is not installed: {install_command('jax')} ({error})") from None
    return jax


def check_jax_device(device: Any) -> None:
    """Checks that JAX has the CUDA device on which batches are to lie.

    Raises:
        InvalidArgumentError: it has none.
    """
    try:
        load_jax().devices("cuda")
    except RuntimeError as error:
        raise InvalidArgumentError(
            f"device: {str(device)!r} with as_jax=True, but JAX finds no CUDA device ({error}): install jax[cuda12] or jax[cuda13], "
            "or leave the device out"
        ) from None


def jax_converter() -> Callable[[Batch], Batch]:
    """Returns the function that turns a batch of numpy arrays, or of tensors on a CUDA device, into one of JAX arrays.

    An array of JAX shares the memory of the one it is made from and keeps it alive. JAX copies what is not aligned to 64 bytes; batches of
    streams and calls that were opened for JAX are.

    Raises:
        InvalidArgumentError: JAX is not installed.
    """
    return _Converter(load_jax())


class _Converter:
    """See :func:`jax_converter`. For one thread.

    Args:
        jax: the jax module.
    """

    def __init__(self, jax: Any) -> None:
        self._jax = jax
        self._narrowed: set[str] = set()
        """Columns whose narrowing was logged."""

    def __call__(self, batch: Batch) -> Batch:
        """Returns the batch with JAX arrays."""
        optional = {name: getattr(batch, name) for name in ("task", "weight", "valid")}
        return replace(
            batch,
            obs=map_nested(batch.obs, self._array_of("obs")),
            action=self._array("action", batch.action),
            reward=self._array("reward", batch.reward),
            done=self._array("done", batch.done),
            extra={name: self._array(name, value) for name, value in batch.extra.items()},
            **{name: self._array(name, value) for name, value in optional.items() if value is not None},
        )

    def _array_of(self, name: str) -> Callable[[Any], Any]:
        return lambda value: self._array(name, value)

    def _array(self, name: str, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = self._exportable(name, value)
        return self._jax.dlpack.from_dlpack(value)

    def _exportable(self, name: str, array: np.ndarray) -> Any:
        """Returns an array as an object that exports it by DLPack, in a dtype that JAX keeps."""
        if array.dtype == BFLOAT16:
            return _Retyped(array.view(np.uint16), _BFLOAT_CODE)
        if array.dtype == np.bool_:  # which numpy itself exports only since 1.25
            return _Retyped(array.view(np.uint8), _BOOL_CODE)
        narrow = _NARROWED.get(array.dtype.name)
        if narrow is None or self._jax.config.jax_enable_x64:
            return array
        return self._narrow(name, array, np.dtype(narrow))

    def _narrow(self, name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        wide = dtype_name(array.dtype)
        if name not in self._narrowed:
            self._narrowed.add(name)
            logger.info("%s: %s becomes a copy in %s, since JAX's x64 mode (jax_enable_x64) is off", name, wide, dtype.name)
        narrow = array.astype(dtype)
        if dtype.kind == "i" and not np.array_equal(narrow, array):
            first = array[narrow != array].flat[0]
            raise InvalidArgumentError(f"{name}: {first} does not fit {dtype.name}, which JAX makes of {wide} unless jax_enable_x64 is on")
        return narrow


class _Retyped:
    """Exports an array by DLPack under another type of the same size that numpy itself does not export.

    Args:
        array: array of unsigned integers, in host memory.
        code: type code of dlpack.h.
    """

    __slots__ = ("_array", "_code")

    def __init__(self, array: np.ndarray, code: int) -> None:
        self._array = array
        self._code = code

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self._array.__dlpack__()
        address = _pointer_of_capsule(capsule, b"dltensor")
        ctypes.c_uint8.from_address(address + _DTYPE_CODE_AT).value = self._code
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()
