"""The state of the disk under a durable store: usable, full, or failed.

After a failed fsync the kernel may have dropped the pages that it could not write, and the next fsync succeeds all the same (Rebello
et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020). So only a restart, which reads and verifies the file, leads out
of FAILED.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable

from touchline_protos.log_lines import get_logger
from touchline_server.errors import StorageFailedError, StorageUncertainError

logger = get_logger(__name__)

UNCERTAIN = "the episode may have been stored: send it again under the same key"
"""Text of an error about an episode whose commit had begun."""


class StorageState(enum.Enum):
    """What a durable store does with an episode."""

    OK = "ok"
    """Stores it."""
    FULL = "full"
    """Refuses it until there is space on the disk."""
    FAILED = "failed"
    """Refuses it until the server is restarted."""


class StorageMonitor:
    """The state of one durable store's disk. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state = StorageState.OK
        self._reason = ""
        self._listeners: list[Callable[[], None]] = []

    @property
    def state(self) -> StorageState:
        """The present state."""
        return self._state

    @property
    def reason(self) -> str:
        """Why the state is not OK; empty if it is."""
        return self._reason

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Calls ``listener`` after every change, from the thread that detected it; it must not block."""
        self._listeners.append(listener)

    def fill(self, reason: str) -> None:
        """Sets the state to FULL: the disk has no space."""
        if self._change(StorageState.FULL, reason):
            logger.error("adding is refused until there is space on the disk: %s", reason)

    def fail(self, reason: str) -> None:
        """Sets the state to FAILED: nothing written from now on can be relied on."""
        if self._change(StorageState.FAILED, reason):
            logger.error("adding is refused until the server is restarted, sampling goes on: %s", reason)

    def recover(self) -> None:
        """Sets the state from FULL to OK: something was written."""
        if self._state is StorageState.FULL and self._change(StorageState.OK, ""):
            logger.warning("adding goes on: there is space on the disk again")

    def check(self) -> None:
        """Raises StorageFailedError if the state is FAILED; nothing was begun."""
        if self._state is StorageState.FAILED:
            raise StorageFailedError(f"{self._refusal()}; nothing was stored by this call")

    def check_written(self) -> None:
        """Raises StorageUncertainError if the state is FAILED although a commit has just succeeded."""
        if self._state is StorageState.FAILED:
            raise StorageUncertainError(f"{self._refusal()}; {UNCERTAIN}")

    def _refusal(self) -> str:
        return f"the durable store takes nothing more until the server is started again ({self._reason})"

    def _change(self, state: StorageState, reason: str) -> bool:
        """Sets the state; returns whether it is another one than before. FAILED stays."""
        with self._lock:
            if self._state is StorageState.FAILED:
                return False
            changed = self._state is not state
            self._state, self._reason = state, reason
        if changed:
            for listener in tuple(self._listeners):
                listener()
        return changed
