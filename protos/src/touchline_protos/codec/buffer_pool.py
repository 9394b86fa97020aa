"""Receive buffers that are used again once nobody can see them any more."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np

from touchline_protos.codec.wire import char_array

_ALIGNMENT = 64
_SMALLEST = 4096


class BufferPool:
    """Lends writable buffers; a buffer comes back when the last view of it has died, in whichever thread that happens.

    A lease is a ctypes array over the buffer. Arrays made from it keep it alive as their base, and so does whatever is
    made from those: views, torch tensors. Its weak reference tells when the last of them is gone. (The cyclic collector
    cannot look into numpy arrays, so to it a lease is in use for as long as an array holds it: no weak reference fires
    early for garbage that a finalizer brings back to life.)

    Thread-safe without a lock: a lease may die at any moment, also while this pool's own code runs.

    Args:
        max_idle_bytes: about what the buffers that wait for their next use may take, though one of each size may wait
            however large it is. Buffers in use do not count.
    """

    def __init__(self, max_idle_bytes: int) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._shelves: dict[int, _Shelf] = {}

    @property
    def idle_bytes(self) -> int:
        """Bytes of the buffers that wait for their next use."""
        return sum(shelf.size * len(shelf.idle) for shelf in list(self._shelves.values()))

    def lease(self, size: int) -> Any:
        """Returns a writable buffer of at least ``size`` bytes, from a multiple of 64 on, with arbitrary content."""
        step = max(_SMALLEST, 1 << max(size.bit_length() - 4, 0))
        size = max(-(-size // step), 1) * step
        shelf = self._shelves.get(size)
        if shelf is None:
            shelf = self._shelves.setdefault(size, _Shelf(size))
        self._make_room(shelf)
        try:
            memory = shelf.idle.pop()
        except IndexError:
            unaligned = np.empty(size + _ALIGNMENT, np.uint8)
            skip = -unaligned.ctypes.data % _ALIGNMENT
            memory = unaligned[skip : skip + size]
        lease = shelf.array_type.from_buffer(memory)
        shelf.lend(lease, memory, max(self._max_idle_bytes // size, 1))
        return lease

    def _make_room(self, wanted: _Shelf) -> None:
        """Frees buffers of other sizes, which were wanted before, where too many are idle."""
        if len(self._shelves) == 1:
            return
        for size, shelf in list(self._shelves.items()):
            if self.idle_bytes <= self._max_idle_bytes:
                return
            if shelf is not wanted:
                shelf.idle.clear()
                if not shelf.lent:
                    self._shelves.pop(size, None)


class _Return(weakref.ref[Any]):
    """Puts a lease's buffer back when the lease dies.

    Holds the shelf and not the pool: a pool may die before its leases.
    """

    __slots__ = ("capacity", "memory", "shelf")

    memory: np.ndarray
    shelf: _Shelf
    capacity: int


class _Shelf:
    """The buffers of one size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.array_type = char_array(size)
        self.idle: deque[np.ndarray] = deque()
        self.lent: dict[int, _Return] = {}

    def lend(self, lease: Any, memory: np.ndarray, capacity: int) -> None:
        reference = _Return(lease, _put_back)
        reference.memory, reference.shelf, reference.capacity = memory, self, capacity
        self.lent[id(reference)] = reference


def _put_back(reference: weakref.ref[Any]) -> None:
    assert isinstance(reference, _Return)
    shelf = reference.shelf
    shelf.lent.pop(id(reference), None)
    if len(shelf.idle) < reference.capacity:
        shelf.idle.append(reference.memory)
