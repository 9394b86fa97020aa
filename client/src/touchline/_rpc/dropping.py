"""What is dropped without being closed ends all the same."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any


def when_dropped(owner: object, end: Callable[..., Any], *arguments: Any) -> weakref.finalize[Any, Any]:
    """Has ``end(*arguments)`` called once the owner is garbage. Neither may refer to the owner.

    It is called in a thread of its own: a collection may begin anywhere, also in a thread that holds a lock that ``end`` needs. Not called
    at the process's exit.

    Returns:
        What to ``detach()`` in a forked child, where what ``end`` ends is the parent's.
    """
    finalizer = weakref.finalize(owner, _in_a_thread, end, arguments)
    finalizer.atexit = False
    return finalizer


def _in_a_thread(end: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # Where the system has no other thread, the little that is left over goes with the process.
    with contextlib.suppress(RuntimeError):
        threading.Thread(target=end, args=arguments, name="touchline-dropped", daemon=True).start()
