"""Readers of rows, and the writer that must not overwrite what they read."""

from __future__ import annotations

import threading


class ReaderEpochs:
    """Who reads rows at present, by when they were located. Every method under the lock that it was made with.

    Rows that become free are dead to whoever looks from then on (:meth:`retire`), and may be overwritten once those who located rows
    before are done (:meth:`wait_quiescent`). A reader that comes later never holds a writer up.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._unpinned = threading.Condition(lock)
        self._generation = 0
        self._pins: dict[int, int] = {}

    def pin(self) -> int:
        """Notes a reader; returns what :meth:`unpin` takes."""
        self._pins[self._generation] = self._pins.get(self._generation, 0) + 1
        return self._generation

    def unpin(self, generation: int) -> None:
        """Notes that a reader is done."""
        left = self._pins[generation] - 1
        if left:
            self._pins[generation] = left
        else:
            del self._pins[generation]
            self._unpinned.notify_all()

    @property
    def held(self) -> bool:
        """Whether anybody reads."""
        return bool(self._pins)

    def retire(self) -> None:
        """Notes that rows became free, which readers from before this moment may still read."""
        self._generation += 1

    def wait_quiescent(self) -> None:
        """Waits, the lock released meanwhile, until nobody reads what was located before the last :meth:`retire`."""
        while self._pins and min(self._pins) < self._generation:
            self._unpinned.wait()
