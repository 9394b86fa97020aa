"""Forks: what lets a child of ``os.fork`` use gRPC, and how objects forget what was their parent's.

gRPC's core survives a fork only if it was told to before it is loaded (``GRPC_ENABLE_FORK_SUPPORT``) and only if no thread is inside it
at that moment; a child forked otherwise hangs in its first call. So this module, which the package loads before anything that loads
``grpc``, sets the variable unless the user has, and holds a gate that calls pass and at which a fork waits.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import Protocol

from touchline_protos.log_lines import get_logger

_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"
GATE_WAIT_S = 5.0
"""How long a fork waits for calls of other threads to leave gRPC."""

logger = get_logger(__name__)


def _enable() -> bool:
    if "grpc" not in sys.modules:
        os.environ.setdefault(_VARIABLE, "1")
    return os.environ.get(_VARIABLE, "").lower() in ("1", "true", "yes", "y", "on")


SUPPORTED = _enable()
"""False where gRPC was loaded before this package and without fork support: then a forked child must not use a client."""


class ForkAware(Protocol):
    """Holds what a forked child must not touch: locks, channels, threads."""

    def after_fork_in_child(self) -> None:
        """Starts afresh. Runs in the child's only thread, before anything else of the child; must take no lock of the parent's."""


class ForkGate:
    """What is inside ``with gate:`` is finished before a fork happens. Safe to use from many threads; not reentrant."""

    def __init__(self) -> None:
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
        """Lets nobody in, and waits until all are out."""
        with self._changed:
            self._forks += 1
            if not self._changed.wait_for(lambda: self._inside == 0, GATE_WAIT_S):
                logger.warning(
                    "forking while %d calls are still in gRPC after %.0f s; the child may be unable to use it", self._inside, GATE_WAIT_S
                )

    def reopen(self) -> None:
        """In the parent: goes on."""
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        """In the child: nobody else is there."""
        self._changed = threading.Condition()
        self._inside = 0
        self._forks = 0


gate = ForkGate()
"""The process's one gate: gRPC's core is one a process, too."""

_orphans: list[object] = []
_forgetful: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def register_after_fork(thing: ForkAware) -> None:
    """Calls ``thing.after_fork_in_child()`` in every child forked from now on, for as long as the thing lives."""
    _forgetful.add(thing)


def clone_event(event: threading.Event) -> threading.Event:
    """In a child: returns an event that is set where this one is, and whose lock nobody of the parent's holds."""
    fresh = threading.Event()
    if event.is_set():
        fresh.set()
    return fresh


def leak_parent_object(thing: object) -> None:
    """In a child: keeps what is the parent's alive, since its destructor could reach what both share."""
    _orphans.append(thing)


def _after_in_child() -> None:
    gate.after_fork_in_child()
    for thing in list(_forgetful):
        thing.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=gate.shut, after_in_parent=gate.reopen, after_in_child=_after_in_child)
