"""SIGTERM and SIGINT, from the process's first moments to its last: the first one stops the server cleanly, further ones are ignored."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_SIG_IGN = 1


class StoppedError(Exception):
    """A stop signal arrived before the server was ready."""


class StopSignals:
    """Records the signals, so that they do not end the process. Use one per process, in the main thread.

    The event loop's own signal handlers end with the loop; a second signal would then kill the process in the middle of its last steps,
    with another exit status.
    """

    def __init__(self) -> None:
        self.came = False
        """Whether a signal has arrived."""
        self._wake: Callable[[], object] | None = None

    def install(self) -> StopSignals:
        """Handles the signals from now on; returns ``self``."""
        for number in _NUMBERS:
            signal.signal(number, self._note)
        return self

    def on_stop(self, wake: Callable[[], object]) -> None:
        """Calls ``wake`` at the first signal, or now if it has arrived already. ``wake`` must be safe in a signal handler."""
        self._wake = wake
        if self.came:
            wake()

    def check(self) -> None:
        """Raises StoppedError if a signal has arrived."""
        if self.came:
            raise StoppedError

    def finish(self) -> None:
        """Ignores signals from now on: nothing is left to stop, and the interpreter removes its handlers before it ends."""
        self._wake = None
        # Through the C library first: Python reports a signal that arrives at the moment at which its handler is removed.
        ignore = ctypes.CDLL(None).signal
        ignore.argtypes, ignore.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        for number in _NUMBERS:
            ignore(number, _SIG_IGN)
            signal.signal(number, signal.SIG_IGN)  # runs the handler of a signal that arrived before

    def _note(self, number: int, frame: object) -> None:
        first, self.came = not self.came, True
        if first and self._wake is not None:
            self._wake()
