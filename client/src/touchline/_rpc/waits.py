"""Waits that last: a line in the log after 10 s and then once a minute, saying who waits for what and why.

A thread that waits is blocked, in gRPC mostly, so another one looks: one a process, started by the first wait and ended once none has begun
for a while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from touchline._rpc.fork import register_after_fork
from touchline_protos.log_lines import get_logger

FIRST_S = 10.0
"""How long a wait lasts before it is logged."""
EVERY_S = 60.0
"""Between two lines about one wait."""
SILENT_S = 2.0
"""How long a wait that is to be logged at once lasts where nothing has failed yet: most answers come before that."""
LOOK_S = 1.0
"""How often the waits under way are looked at."""
IDLE_LOOKS = 30
"""Looks without a wait after which the thread ends."""

logger = get_logger(__name__)

Reason = Callable[[], str]


class WaitLog:
    """Logs waits that last. Safe to use from many threads.

    Args:
        clock: seconds that never go back; for tests.
        watched: whether a thread looks; False leaves that to whoever calls :meth:`look`.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, watched: bool = True) -> None:
        self._clock = clock
        self._watched = watched
        self._begin_afresh()
        register_after_fork(self)

    def wait(self, who: str, what: str, reason: Reason, *, first_s: float = FIRST_S) -> Wait:
        """Returns a wait that begins when it is entered, as a context manager, and may be entered again once it was left.

        Args:
            who: waits, such as ``"add()"``.
            what: it waits for.
            reason: says why that takes time; called from another thread, for each line, and may ask the server.
            first_s: how long it lasts before it is logged; 0: the first :meth:`Wait.note` is, and silence after :data:`SILENT_S`.
        """
        return Wait(self, who, what, reason, first_s)

    def look(self) -> bool:
        """Logs what is due; returns whether there are waits."""
        with self._lock:
            waits = list(self._waits)
        for wait in waits:
            if self._clock() >= wait.due:
                self.tell(wait)
        return bool(waits)

    def begin(self, wait: Wait) -> None:
        """Has a wait looked at from now on."""
        wait.since = self._clock()
        wait.due = wait.since + (wait.first_s or SILENT_S)
        self._local.wait = wait
        try:
            with self._lock:
                self._waits[wait] = None
                if self._thread is None and self._watched:
                    self._start()
        except BaseException:  # Ctrl-C, at this very moment
            self.end(wait)
            raise

    def end(self, wait: Wait) -> None:
        """Forgets a wait."""
        self._local.wait = None
        with self._lock:
            self._waits.pop(wait, None)
        if wait.told:
            logger.info("%s goes on after %.0f s", wait.who, self._clock() - wait.since)

    def current(self) -> Wait | None:
        """Returns the wait that this thread has begun."""
        wait: Wait | None = getattr(self._local, "wait", None)
        return wait

    def tell(self, wait: Wait) -> None:
        """Logs a wait; the next line about it is due in a minute."""
        wait.due = self._clock() + EVERY_S
        try:
            reason = wait.reason()
        except Exception as error:
            reason = f"why is not known ({error!r})"
        with self._lock:
            if wait not in self._waits:
                return  # it ended while the reason was being asked for
        wait.told = True
        logger.warning("%s waits for %s, %.0f s so far: %s", wait.who, wait.what, self._clock() - wait.since, reason)

    def after_fork_in_child(self) -> None:
        """The waits, and the thread that looks at them, are the parent's."""
        self._begin_afresh()

    def _begin_afresh(self) -> None:
        self._lock = threading.Lock()
        self._local = threading.local()
        self._waits: dict[Wait, None] = {}
        self._thread: threading.Thread | None = None

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="touchline-waits", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no other thread: the next wait tries again
            return
        self._thread = thread

    def _work(self) -> None:
        idle = 0
        while True:
            time.sleep(LOOK_S)
            idle = 0 if self.look() else idle + 1
            if idle >= IDLE_LOOKS:
                with self._lock:
                    if not self._waits:
                        self._thread = None
                        return


class Wait:
    """One wait, of one thread. Within another wait of the same thread only what it notes counts, as the reason of that one."""

    __slots__ = ("_log", "_outer", "_reason", "due", "first_s", "reason", "since", "told", "what", "who")

    def __init__(self, log: WaitLog, who: str, what: str, reason: Reason, first_s: float) -> None:
        self._log = log
        self._outer: Wait | None = None
        self._reason = self.reason = reason
        self.who, self.what, self.first_s = who, what, first_s
        self.since = self.due = 0.0
        self.told = False

    def note(self, reason: str) -> None:
        """Says why the wait lasts, until it ends or another reason is noted."""
        wait = self._outer or self
        wait.reason = lambda: reason
        if not wait.first_s and not wait.told:
            self._log.tell(wait)

    def __enter__(self) -> Wait:
        self._outer = self._log.current()
        self.told = False
        if self._outer is None:
            self.reason = self._reason
            self._log.begin(self)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._outer is None:
            self._log.end(self)
        self._outer = None


process_waits = WaitLog()
"""The process's one log of waits."""


def waiting(who: str, what: str, reason: Reason, *, first_s: float = FIRST_S) -> Wait:
    """Returns a wait of the process's log; see :meth:`WaitLog.wait`."""
    return process_waits.wait(who, what, reason, first_s=first_s)
