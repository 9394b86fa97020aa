"""Torch tensors and numpy arrays over the same memory. Importing this imports torch, so the serving path does it only for CUDA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from touchline_protos.codec import TensorSpec
from touchline_protos.types.dtypes import BFLOAT16
from touchline_server.errors import InvalidArgumentError

_TORCH_OF: dict[np.dtype, torch.dtype] = {
    np.dtype(np.bool_): torch.bool,
    np.dtype("u1"): torch.uint8,
    np.dtype("i1"): torch.int8,
    np.dtype("<i2"): torch.int16,
    np.dtype("<i4"): torch.int32,
    np.dtype("<i8"): torch.int64,
    np.dtype("<f2"): torch.float16,
    BFLOAT16: torch.bfloat16,
    np.dtype("<f4"): torch.float32,
    np.dtype("<f8"): torch.float64,
}


_NUMPY_OF = {theirs: ours for ours, theirs in _TORCH_OF.items()}


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """Returns the torch dtype of a supported numpy dtype."""
    return _TORCH_OF[dtype]


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """Returns the numpy dtype of a torch dtype. Raises KeyError if columns cannot have it."""
    return _NUMPY_OF[dtype]


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Returns a CPU tensor that shares a writable array's memory; bfloat16 comes back as such."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Returns a numpy array that shares a CPU tensor's memory; bfloat16 by its bits."""
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy()).view(BFLOAT16)
    return np.asarray(tensor.numpy())


def check_out(spec: TensorSpec, tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Returns a tensor of an earlier batch that is to be overwritten.

    Raises:
        InvalidArgumentError: there is none, or it has another dtype, shape, place or order in memory than the batch's.
    """
    if tensor is None:
        raise InvalidArgumentError(f"out: has no {spec.name}, expected a batch that sample() returned for the same arguments")
    found, expected = (tensor.dtype, tuple(tensor.shape), tensor.device), (torch_dtype(spec.dtype), spec.shape, device)
    if found != expected or not tensor.is_contiguous():
        raise InvalidArgumentError(f"out: {spec.name} is {_describe(*found)}, expected {_describe(*expected)}, contiguous")
    return tensor


def host_arrays(tensors: Mapping[str, torch.Tensor], specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """Returns arrays over the tensors of an earlier batch on the host, to be overwritten.

    Raises:
        InvalidArgumentError: they are not of these specs; see :func:`check_out`.
    """
    host = torch.device("cpu")
    return {spec.name: as_array(check_out(spec, tensors.get(spec.name), host)) for spec in specs}


def _describe(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"
