"""Objects that are dropped without being closed, and are closed all the same."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from touchline._rpc.fork import leak_parent_object


def when_dropped(owner: object, end: Callable[..., Any], *arguments: Any) -> weakref.finalize[Any, Any]:
    """Arranges for ``end(*arguments)`` to be called once the owner is garbage. Neither may refer to the owner.

    The call is made in a thread of its own, because the collector may run at any point, even in a thread that holds a lock that ``end``
    needs. There is no call at the exit of the process, nor in a forked child, where ``end`` would end what is the parent's.

    Returns:
        The finalizer; ``detach()`` cancels the call.
    """
    finalizer = weakref.finalize(owner, _call_in_thread, os.getpid(), end, arguments)
    finalizer.atexit = False
    return finalizer


def _call_in_thread(process: int, end: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if process != os.getpid():
        leak_parent_object((end, arguments))
        return
    # If the system has no thread left, the little that stays open goes with the process.
    with contextlib.suppress(RuntimeError):
        threading.Thread(target=end, args=arguments, name="touchline-dropped", daemon=True).start()
