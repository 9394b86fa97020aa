"""Forks: a child of ``os.fork`` has a working client, and never waits for a lock of its parent's.

What a child may rely on:

* A client that was made before the fork works. It opens a channel of its own and becomes another sender of episodes.
* What was open at the fork (streams, writers, spools) goes on in the parent, and raises ForkError or SpoolError in the child.

gRPC's core survives a fork only if ``GRPC_ENABLE_FORK_SUPPORT`` is set before it is loaded, and only if no thread is inside it at that
moment; a child forked otherwise hangs in its first call. So this module, which the package imports before anything that imports
``grpc``, sets that variable unless the user has, and holds a gate that calls pass and at which a fork waits. SQLite, whose global locks a
child would find taken, is used behind the same gate.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from typing import Protocol

from touchline_protos.log_lines import get_logger

_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"
GATE_WAIT_S = 5.0
"""How long a fork waits for the calls of other threads to leave gRPC."""

logger = get_logger(__name__)


def _enable_fork_support() -> bool:
    if "grpc" not in sys.modules:
        os.environ.setdefault(_VARIABLE, "1")
    return os.environ.get(_VARIABLE, "").lower() in ("1", "true", "yes", "y", "on")


SUPPORTED = _enable_fork_support()
"""False if gRPC was imported before this package and without fork support: a child of a process with a channel then cannot make calls."""


class ForkGate:
    """Lets a fork wait until every ``with gate:`` block of other threads has ended. Thread-safe; not reentrant."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._forks = 0

    def __enter__(self) -> None:
        with self._changed:
            while self._forks:
                self._changed.wait()
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._inside -= 1
            if self._forks:
                self._changed.notify_all()

    def shut(self) -> None:
        """Keeps other threads out from now on, and waits up to :data:`GATE_WAIT_S` until those inside are out."""
        with self._changed:
            self._forks += 1
            if not self._changed.wait_for(lambda: self._inside == 0, GATE_WAIT_S):
                logger.warning(
                    "forking while %d calls are still in gRPC after %.0f s; the child may be unable to use it", self._inside, GATE_WAIT_S
                )

    def reopen(self) -> None:
        """Admits the parent's threads again."""
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        """Starts afresh: no other thread exists in the child."""
        self._reset()


gate = ForkGate()
"""The one gate of the process, as gRPC's core and SQLite are one a process, too."""


class ForkAware(Protocol):
    """Holds something that a forked child must not touch: locks, channels, open files."""

    def after_fork_in_child(self) -> None:
        """Starts afresh. Runs in the child's only thread, before anything else of the child; must take no lock of the parent's."""


_fork_aware: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def register_after_fork(thing: ForkAware) -> None:
    """Calls ``thing.after_fork_in_child()`` in every child forked from now on, for as long as the thing lives."""
    _fork_aware.add(thing)


def leak_parent_object(thing: object) -> None:
    """Keeps an object of the parent's alive in a child, for good: past the end of the interpreter as well.

    Its destructor could use what parent and child share, or wait for a lock that a thread of the parent held at the fork.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _after_in_child() -> None:
    gate.after_fork_in_child()
    for thing in list(_fork_aware):
        thing.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=gate.shut, after_in_parent=gate.reopen, after_in_child=_after_in_child)
