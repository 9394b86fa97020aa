"""The folder of memory-mapped columns, locked by one buffer at a time: two would write into each other's episodes."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from touchline_protos.files.locks import HAS_LOCKS, lock, open_private
from touchline_protos.log_lines import get_logger
from touchline_server.config.source import why_unwritable
from touchline_server.errors import StorageFailedError, StoreInUseError

logger = get_logger(__name__)

LOCK_NAME = "touchline-scratch.lock"


class ScratchDir:
    """A locked ``storage.scratch_dir``: until :meth:`release`, the end of this object, or the end of the process.

    Raises:
        StoreInUseError: another buffer has locked it, in this process or in another.
        StorageFailedError: it cannot be created or written.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = open_private(folder / LOCK_NAME)
        except OSError as error:
            raise StorageFailedError(f"storage.scratch_dir: {folder}: {why_unwritable(error)}; choose a writable folder") from None
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            if HAS_LOCKS:
                lock(descriptor)
        except BlockingIOError:
            self.release()
            raise StoreInUseError(
                f"storage.scratch_dir: {folder} is in use by another buffer, with files of the same names; stop it or choose another folder"
            ) from None
        except OSError as error:
            logger.warning("storage.scratch_dir: %s has no locks (%s): make sure that no other buffer uses it", folder, error.strerror)

    def release(self) -> None:
        """Releases the lock. May be called again."""
        self._close()
