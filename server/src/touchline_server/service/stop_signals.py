"""SIGTERM and SIGINT, from the process's first moments to its last: one of them stops the server in order, further ones change nothing."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_SIG_IGN = 1


class StoppedError(Exception):
    """The server was told to stop before it was ready."""


class StopSignals:
    """Notes the signals instead of dying of them. Of the main thread; the process's only one.

    It is no handler of the event loop's, because those end with the loop, and a second signal would then end the process with a code of
    its own in the middle of its last steps.
    """

    def __init__(self) -> None:
        self.came = False
        """Whether one came."""
        self._wake: Callable[[], object] | None = None

    def install(self) -> StopSignals:
        """Handles the signals from now on; returns itself."""
        for number in _NUMBERS:
            signal.signal(number, self._note)
        return self

    def on_stop(self, wake: Callable[[], object]) -> None:
        """Has ``wake`` called with the first signal, at once if that came already. It must be fit for a signal handler."""
        self._wake = wake
        if self.came:
            wake()

    def check(self) -> None:
        """Raises StoppedError once a signal came."""
        if self.came:
            raise StoppedError

    def finish(self) -> None:
        """Ignores what comes from now on: nothing is left to stop, and the interpreter gives its handlers up before it ends."""
        self._wake = None
        # By the C library first: Python complains of a signal that came in the moment in which its handler was taken away.
        ignore = ctypes.CDLL(None).signal
        ignore.argtypes, ignore.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        for number in _NUMBERS:
            ignore(number, _SIG_IGN)
            signal.signal(number, signal.SIG_IGN)  # runs the handler of one that came before

    def _note(self, number: int, frame: object) -> None:
        first, self.came = not self.came, True
        if first and self._wake is not None:
            self._wake()
