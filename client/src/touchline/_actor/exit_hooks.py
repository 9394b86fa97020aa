"""Exit hooks: episode writers that are still open when the process ends get a short time to finish; the rest is logged.

``atexit`` does not run in children of ``multiprocessing``, which end through finalizers of their own, so both are used.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from typing import Protocol

from touchline.errors import SpoolError, UnacknowledgedError
from touchline_protos.log_lines import get_logger

GRACE_S = 2.0
"""Time that all writers of a process have to finish, together."""

logger = get_logger(__name__)

_open: dict[Flushable, int] = {}
"""Open writers with the process that each belongs to; a forked child inherits its parent's entries."""
_hooked_processes: set[int] = set()
"""Processes (this one and those it was forked from) that have installed the hooks."""


class Flushable(Protocol):
    """Writer that may hold unsent episodes."""

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is pending."""

    def describe_loss(self) -> str | None:
        """Returns what would be lost if the process ended now; None if nothing would."""

    def describe_spooled(self) -> str | None:
        """Returns what waits in the spool for the next process; None if nothing does."""


def register(writer: Flushable) -> None:
    """Keeps a writer alive and flushes it at exit, until it is unregistered."""
    _open[writer] = os.getpid()
    if os.getpid() in _hooked_processes:
        return
    if not _hooked_processes:
        atexit.register(_flush_open_writers)  # a forked child inherits this hook
    _hooked_processes.add(os.getpid())
    # Read from sys.modules: if another thread is importing multiprocessing right now, this process is not a child of it.
    parent_process = getattr(sys.modules.get("multiprocessing.process"), "parent_process", None)
    if parent_process is not None and parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, _flush_open_writers, exitpriority=10)


def unregister(writer: Flushable) -> None:
    """Removes a writer that has nothing left to lose."""
    _open.pop(writer, None)


def grace_after(error: BaseException) -> float:
    """Returns how long a writer may still take, in seconds, after an interruption (Ctrl-C) has ended the body of its ``with``.

    All writers that the same interruption passes share :data:`GRACE_S`.
    """
    ends: float = vars(error).setdefault("_touchline_grace_ends", time.monotonic() + GRACE_S)
    return max(0.0, ends - time.monotonic())


def _flush_open_writers() -> None:
    ends = time.monotonic() + GRACE_S
    while own := [writer for writer, process in _open.items() if process == os.getpid()]:
        writer = own[0]
        del _open[writer]
        with contextlib.suppress(UnacknowledgedError, SpoolError):  # logged where it happened; the lines below log the rest
            writer.flush(max(0.0, ends - time.monotonic()))
        loss = writer.describe_loss()
        if loss is not None:
            logger.error(loss)
        spooled = writer.describe_spooled()
        if spooled is not None:
            logger.warning(spooled)
