"""The memory of a ring's slots, one batch's body each: in host memory that two processes share, and pinned for CUDA devices."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from touchline_protos.log_lines import get_logger
from touchline_protos.shm.ring_control import CONTROL_BYTES, MAX_SLOTS, RingError

logger = get_logger(__name__)

PAGE = 4096


@dataclass(frozen=True, slots=True)
class RingGeometry:
    """The sizes of a ring. The server chooses them, and both sides check them against the memory that they map."""

    slots: int
    """Number of slots, 2 to :data:`MAX_SLOTS`."""
    slot_size_bytes: int
    """Size of a slot: a multiple of the page size."""

    @classmethod
    def of(cls, slots: int, body_bytes: int) -> RingGeometry:
        """Returns the geometry of ``slots`` slots that hold ``body_bytes`` each."""
        return cls(slots, -(-body_bytes // PAGE) * PAGE)

    @property
    def size_bytes(self) -> int:
        """Size of the whole memory: the control words, then the slots."""
        return CONTROL_BYTES + self.slots * self.slot_size_bytes

    def offset(self, slot: int) -> int:
        """Returns where a slot begins in the memory, in bytes."""
        return CONTROL_BYTES + slot * self.slot_size_bytes

    def check(self) -> None:
        """Raises RingError unless the sizes make a ring."""
        if not 2 <= self.slots <= MAX_SLOTS or self.slot_size_bytes < PAGE or self.slot_size_bytes % PAGE:
            raise RingError(f"a ring of {self.slots} slots of {self.slot_size_bytes} bytes, expected 2 to {MAX_SLOTS} slots of whole pages")


class RingSlots:
    """The slots in host memory. May be used from any thread; who may write which slot is for the control words to say.

    Args:
        memory: the ring's memory, control words included.
        geometry: sizes of the ring.
    """

    def __init__(self, memory: mmap.mmap, geometry: RingGeometry) -> None:
        self._memory = memory
        self._geometry = geometry

    def array(self, slot: int) -> Any:
        """Returns a slot's memory as a new ctypes array: a writable view that is weakly referenceable and keeps the mapping alive."""
        return (ctypes.c_ubyte * self._geometry.slot_size_bytes).from_buffer(self._memory, self._geometry.offset(slot))

    def whole_array(self) -> Any:
        """Returns all of the memory, control words included, as :meth:`array` returns a slot's."""
        return (ctypes.c_ubyte * self._geometry.size_bytes).from_buffer(self._memory)


class PinnedRegion:
    """The same memory, page-locked until :meth:`close` so that a CUDA device copies to and from it by itself. One thread at a time.

    Args:
        torch: the module. It is passed in because neither this package nor the thin client imports torch.
        memory: a ctypes array over the mapping; this object keeps it, and the array keeps the mapping alive.
    """

    def __init__(self, torch: Any, memory: Any) -> None:
        self.memory = memory
        self.address = ctypes.addressof(memory)
        self.size_bytes = ctypes.sizeof(memory)
        self._cuda = torch.cuda.cudart()
        status = int(self._cuda.cudaHostRegister(self.address, self.size_bytes, 0))
        self.pinned = status == 0
        """False if the system does not allow that much locked memory; copies then have to go through other memory."""
        if not self.pinned:
            logger.info("%d bytes of shared memory are not pinned: CUDA error %d", self.size_bytes, status)
        self.tensor = torch.from_numpy(np.frombuffer(memory, np.uint8))
        """[size_bytes] uint8: a view of the memory."""

    def close(self) -> None:
        """Unlocks the pages. No copy may be in progress. Closing again does nothing."""
        if self.pinned:
            self.pinned = False
            self._cuda.cudaHostUnregister(self.address)
