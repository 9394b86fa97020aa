"""Single keys from a terminal, without Enter, and a way to wake the thread that waits for them."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from types import FrameType, TracebackType
from typing import Any

ESCAPES = {b"\x1b[C": ">", b"\x1bOC": ">", b"\x1b[D": "<", b"\x1bOD": "<", b"\x1b[B": "n", b"\x1bOB": "n", b"\x1b[A": "N", b"\x1bOA": "N"}
"""Keys for the sequences that arrow keys send."""


class Keyboard:
    """Reads keys of the terminal on stdin while it is entered. A context manager that restores the terminal; used by the main thread."""

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._saved: list[Any] = []
        self._handler: Any = None

    def __enter__(self) -> Keyboard:
        self._saved = termios.tcgetattr(sys.stdin)
        tty.setcbreak(sys.stdin)
        self._handler = signal.signal(signal.SIGTERM, self._on_end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self._handler)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._saved)
        os.close(self._read_end)
        self._write_end, end = -1, self._write_end
        os.close(end)

    def wake(self) -> None:
        """Makes a :meth:`read` in progress, or the next one, return; called by any thread."""
        try:
            os.write(self._write_end, b"w")
        except (BlockingIOError, OSError):  # the pipe is full, so a read is about to return; or it is closed
            return

    def read(self, timeout_s: float) -> list[str]:
        """Returns the keys that were pressed; none after a wake or the time. An end of the terminal counts as ``q``."""
        ready, _, _ = select.select([sys.stdin, self._read_end], [], [], timeout_s)
        if self._read_end in ready:
            os.read(self._read_end, 4096)
        if sys.stdin not in ready:
            return []
        try:
            typed = os.read(sys.stdin.fileno(), 64)
        except OSError:  # the terminal is gone
            typed = b""
        if not typed:
            return ["q"]
        return [ESCAPES[typed]] if typed in ESCAPES else [one for one in typed.decode("utf-8", "replace") if one.isprintable()]

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)
