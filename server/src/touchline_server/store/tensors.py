"""Torch tensors and numpy arrays over the same memory. Importing this imports torch, so the serving path does it only for CUDA."""

from __future__ import annotations

import numpy as np
import torch

from touchline_protos.types.dtypes import BFLOAT16

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
