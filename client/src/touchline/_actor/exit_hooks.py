"""The end of a process in which an episode writer was not closed: a short chance to finish, then a log line about what is lost
and what waits in a spool.

``atexit`` does not run in children of ``multiprocessing``, which end through its own finalizers; so both are used.
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
"""Time that all writers of a process together have to finish."""

logger = get_logger(__name__)

_open: dict[Flushable, int] = {}
"""Each with the process that it belongs to: a forked child has its parent's here, too."""
_registered_in: set[int] = set()
"""Processes (the parents of this one, and itself) in which the handlers stand."""


class Flushable(Protocol):
    """Has something to lose."""

    def flush(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is pending."""

    def describe_loss(self) -> str | None:
        """Returns what would be lost; None for nothing."""

    def describe_rest(self) -> str | None:
        """Returns what waits where the next process finds it; None for nothing."""


def register(leaver: Flushable) -> None:
    """Keeps a writer alive, and speaks of it at exit, until it is forgotten."""
    _open[leaver] = os.getpid()
    if os.getpid() in _registered_in:
        return
    if not _registered_in:
        atexit.register(_leave)  # a forked child inherits it
    _registered_in.add(os.getpid())
    # Another thread may be importing it at this moment: then this process is no child of its own.
    parent_process = getattr(sys.modules.get("multiprocessing.process"), "parent_process", None)
    if parent_process is not None and parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, _leave, exitpriority=10)


def unregister(leaver: Flushable) -> None:
    """Says that a writer has nothing to lose any more."""
    _open.pop(leaver, None)


def grace_after(error: BaseException) -> float:
    """Returns how long a writer may still take, in seconds, once an interruption (Ctrl-C) has ended the body of its ``with``.

    All writers that the same interruption passes have :data:`GRACE_S` together.
    """
    ends: float = vars(error).setdefault("_touchline_grace_ends", time.monotonic() + GRACE_S)
    return max(0.0, ends - time.monotonic())


def _leave() -> None:
    ends = time.monotonic() + GRACE_S
    while mine := [leaver for leaver, process in _open.items() if process == os.getpid()]:
        leaver = mine[0]
        del _open[leaver]
        with contextlib.suppress(UnacknowledgedError, SpoolError):  # the log says what was refused, and the next line the rest
            leaver.flush(max(0.0, ends - time.monotonic()))
        loss = leaver.describe_loss()
        if loss is not None:
            logger.error(loss)
        rest = leaver.describe_rest()
        if rest is not None:
            logger.warning(rest)
