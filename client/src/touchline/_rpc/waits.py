"""A log of long waits: a line after 10 s and then once a minute that says what waits, for what and why.

A waiting thread is blocked, mostly in gRPC, so another thread writes the lines. There is one in a process; it starts with the first wait
and ends when no wait has begun for a while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from touchline._rpc.fork import register_after_fork
from touchline_protos.log_lines import get_logger

FIRST_LINE_S = 10.0
"""Duration of a wait after which it is logged."""
LINE_INTERVAL_S = 60.0
"""Time between two lines about the same wait."""
SILENT_S = 2.0
"""Duration after which a wait with ``first_s=0`` is logged if nothing has failed yet; most answers come earlier."""
POLL_INTERVAL_S = 1.0
"""Time between two checks of the waits in progress."""
IDLE_POLLS = 30
"""Number of checks without a wait after which the thread ends."""

logger = get_logger(__name__)

Reason = Callable[[], str]


class WaitLog:
    """Logs waits that last. Thread-safe.

    Args:
        clock: clock in seconds that never goes back; replaced in tests.
        threaded: whether a thread calls :meth:`log_due`; False leaves that to the caller.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, threaded: bool = True) -> None:
        self._clock = clock
        self._threaded = threaded
        self._reset()
        register_after_fork(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._local = threading.local()
        self._waits: dict[Wait, None] = {}
        self._thread: threading.Thread | None = None

    def after_fork_in_child(self) -> None:
        """Starts empty: the waits, and the thread that logs them, are the parent's."""
        self._reset()

    def wait(self, who: str, what: str, reason: Reason, *, first_s: float = FIRST_LINE_S) -> Wait:
        """Returns a wait, a context manager that begins it and ends it, and may be entered again after that.

        Args:
            who: name of the call that waits, such as ``"add()"``.
            what: name of what it waits for, such as the server's address.
            reason: function that returns why that takes time. Called from another thread, once a line; may ask the server.
            first_s: duration after which the wait is logged; 0 logs it at the first :meth:`Wait.note`, or without one after
                :data:`SILENT_S`.
        """
        return Wait(self, who, what, reason, first_s)

    def log_due(self) -> bool:
        """Writes the lines that are due; returns whether there are waits."""
        with self._lock:
            waits = list(self._waits)
        for wait in waits:
            if self._clock() >= wait.due:
                self.log(wait)
        return bool(waits)

    def begin(self, wait: Wait) -> None:
        """Adds a wait, which is the thread's current one until it ends."""
        wait.since = self._clock()
        wait.due = wait.since + (wait.first_s or SILENT_S)
        self._local.wait = wait
        try:
            with self._lock:
                self._waits[wait] = None
                if self._thread is None and self._threaded:
                    self._start()
        except BaseException:  # Ctrl-C, at this very moment
            self.end(wait)
            raise

    def end(self, wait: Wait) -> None:
        """Removes a wait."""
        self._local.wait = None
        with self._lock:
            self._waits.pop(wait, None)
        if wait.logged:
            logger.info("%s goes on after %.0f s", wait.who, self._clock() - wait.since)

    def current(self) -> Wait | None:
        """Returns the wait that this thread has begun."""
        wait: Wait | None = getattr(self._local, "wait", None)
        return wait

    def log(self, wait: Wait) -> None:
        """Writes a line about a wait; the next one is due in a minute."""
        wait.due = self._clock() + LINE_INTERVAL_S
        try:
            reason = wait.reason()
        except Exception as error:
            reason = f"the reason is not known ({error!r})"
        with self._lock:
            if wait not in self._waits:
                return  # it ended while the reason was being asked for
        wait.logged = True
        logger.warning("%s waits for %s, %.0f s so far: %s", wait.who, wait.what, self._clock() - wait.since, reason)

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="touchline-waits", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left: the next wait tries again
            return
        self._thread = thread

    def _work(self) -> None:
        idle = 0
        while True:
            time.sleep(POLL_INTERVAL_S)
            idle = 0 if self.log_due() else idle + 1
            if idle >= IDLE_POLLS:
                with self._lock:
                    if not self._waits:
                        self._thread = None
                        return


class Wait:
    """One wait of one thread. A wait inside another one of the same thread is not logged; what it notes is the outer one's reason."""

    __slots__ = ("_log", "_outer", "_reason", "due", "first_s", "logged", "noted", "reason", "since", "what", "who")

    def __init__(self, log: WaitLog, who: str, what: str, reason: Reason, first_s: float) -> None:
        self._log = log
        self._outer: Wait | None = None
        self._reason = self.reason = reason
        self.who, self.what, self.first_s = who, what, first_s
        self.since = self.due = 0.0
        self.logged = False
        self.noted = ""
        """The reason that was noted last; empty before the first."""

    def note(self, reason: str) -> None:
        """Sets why the wait lasts, until it ends or another reason is noted."""
        wait = self._outer or self
        wait.noted = reason
        wait.reason = lambda: reason
        if not wait.first_s and not wait.logged:
            self._log.log(wait)

    def __enter__(self) -> Wait:
        self._outer = self._log.current()
        self.logged = False
        if self._outer is None:
            self.reason, self.noted = self._reason, ""
            self._log.begin(self)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._outer is None:
            self._log.end(self)
        self._outer = None


process_waits = WaitLog()
"""The process's log of waits."""


def waiting(who: str, what: str, reason: Reason, *, first_s: float = FIRST_LINE_S) -> Wait:
    """Returns a wait of the process's log; see :meth:`WaitLog.wait`."""
    return process_waits.wait(who, what, reason, first_s=first_s)
