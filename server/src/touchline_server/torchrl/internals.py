"""What Touchline knows of TorchRL's private state. Everything that touches it is here, which is why torchrl has an upper bound."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TypeAlias

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

Storage: TypeAlias = LazyTensorStorage


def make_storage(capacity: int) -> Storage:
    """Returns a storage for ``capacity`` rows of columns that :func:`adopt` gives it."""
    return LazyTensorStorage(capacity, device="auto")


def adopt(storage: Storage, columns: Mapping[str, torch.Tensor]) -> None:
    """Makes a storage hold these columns, [capacity, ...] by dotted name, instead of allocating its own."""
    device = next(iter(columns.values())).device
    nested = {tuple(name.split(".")): column for name, column in columns.items()}
    storage._storage = TensorDict(nested, [storage.max_size], device=device)
    storage.device = device
    storage.initialized = True


def note_written(storage: Storage, rows: np.ndarray) -> None:
    """Records in a storage that these rows, [n] int64 in order of time, were written past it."""
    storage._len = max(storage._len, int(rows.max()) + 1)
    storage._set_last_cursor(int(rows[-1]))
    storage._bump_mutation_revision()


def release(storage: Storage) -> None:
    """Resets a storage to before its first write; it releases the columns."""
    storage._storage = None
    storage.initialized = False
    storage._storage_keys = None
    storage._len = 0
    storage._set_last_cursor(-1)
    storage._bump_mutation_revision()
    storage.device = "auto"


def exclude_writes(buffer: ReplayBuffer, lock: AbstractContextManager[bool]) -> None:
    """Makes a buffer hold ``lock``, which must be reentrant, while it samples or extends."""
    buffer._write_lock = lock
