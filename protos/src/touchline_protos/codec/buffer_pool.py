"""Receive buffers that are reused once no view of them is left."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np

from touchline_protos.codec.wire import char_array

_ALIGNMENT = 64
_SMALLEST = 4096


class BufferPool:
    """A pool of writable buffers. A buffer returns when the last view of it has died, in whichever thread that happens.

    A lease is a ctypes array over the buffer. Arrays made from it keep it alive as their base, and so does whatever is made from those:
    views, torch tensors. A weak reference to the lease reports when the last of them is gone. (The cyclic collector cannot look into
    numpy arrays, so it considers a lease in use as long as an array holds it: no weak reference fires early for garbage that a
    finalizer resurrects.)

    Thread-safe without a lock: a lease may die at any moment, even while code of this pool runs in the same thread, which would deadlock
    on a lock. Every step is therefore one operation on a dict or a deque, which the interpreter lock makes atomic.

    Args:
        max_idle_bytes: approximate limit of the idle buffers; one of each size may be idle however large it is. Buffers in use do not
            count.
    """

    def __init__(self, max_idle_bytes: int) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._shelves: dict[int, _Shelf] = {}

    @property
    def idle_bytes(self) -> int:
        """Size of all idle buffers, in bytes."""
        return sum(shelf.size * len(shelf.idle) for shelf in list(self._shelves.values()))

    def lease(self, size: int) -> Any:
        """Returns a writable buffer of at least ``size`` bytes at an address that is a multiple of 64, with arbitrary content."""
        # Round up to one of 8 sizes per power of two, so that batches whose sizes differ a little share buffers, and less than an eighth
        # of one is unused.
        step = max(_SMALLEST, 1 << max(size.bit_length() - 4, 0))
        size = max(-(-size // step), 1) * step
        shelf = self._shelves.get(size)
        if shelf is None:
            shelf = self._shelves.setdefault(size, _Shelf(size))
        self._drop_idle(shelf)
        try:
            memory = shelf.idle.pop()
        except IndexError:
            unaligned = np.empty(size + _ALIGNMENT, np.uint8)
            skip = -unaligned.ctypes.data % _ALIGNMENT
            memory = unaligned[skip : skip + size]
        lease = shelf.array_type.from_buffer(memory)
        shelf.lend(lease, memory, max(self._max_idle_bytes // size, 1))
        return lease

    def _drop_idle(self, current: _Shelf) -> None:
        """Frees idle buffers of other sizes if there are too many: the size of batches has changed."""
        if len(self._shelves) == 1:
            return
        for size, shelf in list(self._shelves.items()):
            if self.idle_bytes <= self._max_idle_bytes:
                return
            if shelf is not current:
                shelf.idle.clear()
                if not shelf.lent:
                    self._shelves.pop(size, None)


class _Return(weakref.ref[Any]):
    """A weak reference to a lease that returns the buffer when the lease dies.

    It refers to the shelf and not to the pool, as a pool may die before its leases.
    """

    __slots__ = ("capacity", "memory", "shelf")

    memory: np.ndarray
    shelf: _Shelf
    capacity: int


class _Shelf:
    """The buffers of one size.

    Args:
        size: size of a buffer, in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.array_type = char_array(size)
        self.idle: deque[np.ndarray] = deque()
        self.lent: dict[int, _Return] = {}

    def lend(self, lease: Any, memory: np.ndarray, capacity: int) -> None:
        """Watches a lease, and returns its buffer to this shelf when it dies, unless ``capacity`` buffers are idle."""
        reference = _Return(lease, _put_back)
        reference.memory, reference.shelf, reference.capacity = memory, self, capacity
        self.lent[id(reference)] = reference


def _put_back(reference: weakref.ref[Any]) -> None:
    assert isinstance(reference, _Return)
    shelf = reference.shelf
    shelf.lent.pop(id(reference), None)
    if len(shelf.idle) < reference.capacity:
        shelf.idle.append(reference.memory)
