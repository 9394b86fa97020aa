"""Shared memory that a CUDA device copies to and from by itself."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from touchline_protos.log_lines import get_logger

logger = get_logger(__name__)


class PinnedRegion:
    """A mapping of this process, page-locked for its CUDA devices until :meth:`close`.

    Needs torch, and is given it: neither this package nor the thin client imports it.

    Args:
        torch: the module.
        memory: a ctypes array over the mapping, which it keeps alive; this object keeps it.
    """

    def __init__(self, torch: Any, memory: Any) -> None:
        self.memory = memory
        self.address = ctypes.addressof(memory)
        self.size_bytes = ctypes.sizeof(memory)
        self._cuda = torch.cuda.cudart()
        status = int(self._cuda.cudaHostRegister(self.address, self.size_bytes, 0))
        self.pinned = status == 0
        """False where the system does not let so much memory be locked: copies then have to go through other memory."""
        if not self.pinned:
            logger.info("%d bytes of shared memory are not pinned: CUDA error %d", self.size_bytes, status)
        self.tensor = torch.from_numpy(np.frombuffer(memory, np.uint8))
        """[size_bytes] uint8: shares the memory."""

    def close(self) -> None:
        """Unlocks the pages. No copy may be under way. Closing again does nothing."""
        if self.pinned:
            self.pinned = False
            self._cuda.cudaHostUnregister(self.address)
