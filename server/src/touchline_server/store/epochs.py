"""Epoch-based reclamation: the writer reuses rows only after every reader that may still see them has finished."""

from __future__ import annotations

import threading


class ReaderEpochs:
    """Active readers of rows, by the epoch in which they located them.

    This is epoch-based reclamation (K. Fraser, "Practical lock-freedom", University of Cambridge, UCAM-CL-TR-579, 2004, section 5.2.3),
    with a mutex instead of per-thread epochs. Evicting rows advances the epoch (:meth:`advance`), so a later reader cannot find them;
    they may be overwritten once no reader of an earlier epoch is left (:meth:`wait_quiescent`). Readers that arrive later never delay
    the writer.

    Call every method with ``lock`` held; :attr:`active` may also be read without it, as a hint.

    Args:
        lock: guards the index that readers locate rows in.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._unpinned = threading.Condition(lock)
        self._epoch = 0
        self._pins: dict[int, int] = {}
        """Number of active readers by epoch, only epochs that have any."""

    def pin(self) -> int:
        """Registers a reader in the current epoch; returns the epoch, which :meth:`unpin` takes."""
        self._pins[self._epoch] = self._pins.get(self._epoch, 0) + 1
        return self._epoch

    def unpin(self, epoch: int) -> None:
        """Removes a reader of this epoch."""
        readers = self._pins[epoch] - 1
        if readers:
            self._pins[epoch] = readers
        else:
            del self._pins[epoch]
            self._unpinned.notify_all()

    @property
    def active(self) -> bool:
        """Whether there is any reader, of whichever epoch."""
        return bool(self._pins)

    def advance(self) -> None:
        """Starts a new epoch: rows were evicted that readers of the earlier ones may still be reading."""
        self._epoch += 1

    def wait_quiescent(self) -> None:
        """Waits, with the lock released, until no reader from before the last :meth:`advance` is left."""
        while self._pins and min(self._pins) < self._epoch:
            self._unpinned.wait()
