"""Epoch-based reclamation: the writer reuses rows only after every reader that may still see them has finished."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class HeldPin:
    """A pin that a reader outside the store's control holds, such as a learner's process. Made by :meth:`ReaderEpochs.hold`."""

    __slots__ = ("epoch", "on_revoke", "revoking")

    def __init__(self, epoch: int, on_revoke: Callable[[], None]) -> None:
        self.epoch = epoch
        self.on_revoke = on_revoke
        self.revoking = False
        """Whether ``on_revoke`` is being called."""


class ReaderEpochs:
    """Active readers of rows, by the epoch in which they located them.

    This is epoch-based reclamation (K. Fraser, "Practical lock-freedom", University of Cambridge, UCAM-CL-TR-579, 2004, section 5.2.3),
    with a mutex instead of per-thread epochs. The epoch is the number of rows evicted so far. Rows are numbered in the order in which they
    were ever added, so a reader of epoch E sees rows from number E on. Evicting rows advances the epoch (:meth:`advance`), so a later
    reader cannot find them; rows below a number may be overwritten once no reader of a smaller epoch is left (:meth:`wait_quiescent`).
    Readers that arrive later never delay the writer.

    Readers of the server itself finish soon, and are waited for without limit. A pin that is held (:meth:`hold`) is waited for at most
    ``max_hold_s``, then it is revoked.

    Call every method with ``lock`` held; :attr:`active` may also be read without it, as a hint.

    Args:
        lock: guards the index that readers locate rows in.
        max_hold_s: seconds for which a writer waits for held pins.
        clock: the time in seconds.
    """

    def __init__(self, lock: threading.Lock, *, max_hold_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = lock
        self._unpinned = threading.Condition(lock)
        self._max_hold_s = max_hold_s
        self._clock = clock
        self._epoch = 0
        self._pins: dict[int, int] = {}
        """Number of active readers by epoch, only epochs that have any."""
        self._held: set[HeldPin] = set()

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

    def hold(self, epoch: int, on_revoke: Callable[[], None]) -> HeldPin:
        """Makes a reader of this epoch one that may be revoked; instead of :meth:`unpin`, :meth:`release` ends it.

        Args:
            epoch: what :meth:`pin` returned.
            on_revoke: called by the writer before it reuses rows that the reader may still see, without ``lock``. See
                :meth:`PinnedDraw.hold`.
        """
        held = HeldPin(epoch, on_revoke)
        self._held.add(held)
        self.unpin(epoch)
        return held

    def release(self, held: HeldPin) -> None:
        """Removes a held pin, and waits if it is being revoked. Does nothing if it was released or revoked before."""
        while held.revoking:
            self._unpinned.wait()
        if held in self._held:
            self._held.remove(held)
            self._unpinned.notify_all()

    @property
    def active(self) -> bool:
        """Whether there is any reader of the server itself, of whichever epoch."""
        return bool(self._pins)

    @property
    def oldest(self) -> int:
        """Smallest epoch that a reader is in, held ones included; the current one if there is none."""
        if not self._held:  # every add asks
            return min(self._pins) if self._pins else self._epoch
        return min((*self._pins, *(held.epoch for held in self._held)))

    def is_held(self, number: int) -> bool:
        """Returns whether a held pin may see rows below a number."""
        return bool(self._held) and any(held.epoch < number for held in self._held)

    def advance(self, rows: int) -> None:
        """Starts a new epoch: this many rows were evicted that readers of the earlier ones may still be reading."""
        self._epoch += rows

    def wait_quiescent(self, number: int) -> None:
        """Waits, with the lock released, until no reader sees rows below a number any more. Revokes held pins that take too long."""
        deadline: float | None = None
        while True:
            if self._pins and min(self._pins) < number:
                self._unpinned.wait()
                continue
            if not self.is_held(number):
                return
            if deadline is None:
                deadline = self._clock() + self._max_hold_s
            left = deadline - self._clock()
            if left > 0:
                self._unpinned.wait(left)
            else:
                self._revoke([held for held in self._held if held.epoch < number])

    def _revoke(self, late: list[HeldPin]) -> None:
        """Removes held pins after calling ``on_revoke`` of each with the lock released. If a call raises, none is removed."""
        for held in late:
            held.revoking = True
        self._lock.release()
        try:
            for held in late:
                held.on_revoke()
        finally:
            self._lock.acquire()
            for held in late:
                held.revoking = False
            self._unpinned.notify_all()
        self._held.difference_update(late)
