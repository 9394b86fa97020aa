"""What Touchline knows of TorchRL's private state. Everything that touches it is here, which is why torchrl has an upper bound."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer

Storage: TypeAlias = LazyTensorStorage | LazyMemmapStorage


@contextmanager
def unannounced() -> Iterator[None]:
    """Has TorchRL print nothing of what this thread does in the block, warnings apart; whatever else it logs goes where it always goes.

    It sets a logger of its own up at its import, which announces each allocation on stdout, and stdout is the program's.
    """
    logger, own = logging.getLogger("torchrl"), threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != own or record.levelno >= logging.WARNING

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def column_tensor(storage: Storage, name: str) -> torch.Tensor:
    """Returns a whole column of an initialised storage, [capacity, ...], by dotted name. Indexing would stop at the current length."""
    tensor: torch.Tensor = storage._storage.get(tuple(name.split(".")))
    return tensor


def note_written(storage: Storage, rows: np.ndarray) -> None:
    """Tells a storage that these rows, [n] int64 in order of time, were written behind its back."""
    storage._len = max(storage._len, int(rows.max()) + 1)
    storage._set_last_cursor(int(rows[-1]))
    storage._bump_mutation_revision()


def release(storage: Storage) -> None:
    """Puts a storage back to before its first write; the memory, or the files' blocks, are freed once no view of them is left."""
    if isinstance(storage, LazyMemmapStorage) and storage._storage is not None:
        # The next columns of these names would share a file that stays, and so overwrite the views that are left.
        for column in storage._storage.values(include_nested=True, leaves_only=True):
            Path(column.filename).unlink(missing_ok=True)
    storage._storage = None
    storage.initialized = False
    storage._storage_keys = None
    storage._len = 0
    storage._set_last_cursor(-1)
    storage._bump_mutation_revision()
    if not isinstance(storage, LazyMemmapStorage):
        storage.device = "auto"


def exclude_writes(buffer: ReplayBuffer, lock: AbstractContextManager[bool]) -> None:
    """Has a buffer hold ``lock``, which must be reentrant, while it samples or extends."""
    buffer._write_lock = lock
