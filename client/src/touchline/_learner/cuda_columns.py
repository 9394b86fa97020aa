"""The server's columns as a CUDA device of this process reads them: host memory that is registered with CUDA, and memory opened by handle.

Registering takes half a second a gigabyte, so a thread does it, piece by piece. Everything is undone in :meth:`DeviceColumns.close`, after
the last gather: pieces are unregistered before their memory is unmapped, and handles are closed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from touchline._learner.cuda_device import NOT_SUPPORTED
from touchline._learner.row_offer import OfferedTable
from touchline_protos.log_lines import get_logger
from touchline_protos.shm.ring_control import RingError

PIECE_BYTES = 64 << 20
"""Size of the pieces that are registered one by one: a few hundredths of a second each, during which other calls of CUDA may wait."""

UNKNOWN = 999
"""``cudaErrorUnknown``."""

logger = get_logger(__name__)


class ColumnAccess(Protocol):
    """What :class:`DeviceColumns` needs of a device; :class:`~touchline._learner.cuda_device.CudaDevice` is one."""

    def register(self, address: int, size_bytes: int) -> int:
        """Makes host memory readable; returns an error's number, 0 for none."""

    def unregister(self, address: int) -> None:
        """Undoes ``register``."""

    def open(self, handle: bytes) -> int:
        """Opens memory by its handle; returns its address."""

    def close(self, address: int) -> None:
        """Undoes ``open``."""

    def wait_for_all(self) -> None:
        """Waits for all gathers."""


class DeviceColumns:
    """The memory of an offer's tables. :attr:`ready` is set by a thread; everything else is for one thread at a time.

    Args:
        device: device that will read them.
        tables: tables of the offer, with their memory mapped.

    Raises:
        RingError: a handle cannot be opened, or not even the first piece of host memory can be registered.
    """

    def __init__(self, device: ColumnAccess, tables: Sequence[OfferedTable]) -> None:
        self._device = device
        self._process = os.getpid()
        self._tables = tuple(tables)  # keeps the memory mapped
        self._opened: list[int] = []
        self._registered: list[int] = []
        self._stopping = False
        self._closed = False
        self._lock = threading.Lock()
        self._first = threading.Event()
        self._error = 0
        self.ready = threading.Event()
        """Set once a device can read all tables, or never if :attr:`failed`."""
        self._thread: threading.Thread | None = None
        try:
            self.addresses = tuple(self._address(table) for table in self._tables)
            """Address of each table's memory."""
            self._register_in_thread()
        except BaseException:
            self.close()
            raise

    @property
    def failed(self) -> bool:
        """Whether some host memory cannot be registered."""
        return bool(self._error)

    def wait(self) -> None:
        """Waits until all host memory is registered.

        Raises:
            RingError: it cannot be.
        """
        if self._thread is not None:
            self._thread.join()
        if not self.ready.is_set():
            raise RingError(_refusal(self._error))

    def close(self) -> None:
        """Waits for all gathers and releases everything, from any thread. Again, or in a forked child, it does nothing."""
        if os.getpid() != self._process:
            return
        self._stopping = True
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.ready.clear()
            if self._registered or self._opened:
                self._device.wait_for_all()
            for address in self._registered:
                self._device.unregister(address)
            for address in self._opened:
                self._device.close(address)
            self._tables = ()

    def _address(self, table: OfferedTable) -> int:
        if not table.rows:
            return 0  # of such a table no slices come
        if table.memory is not None:
            return int(np.frombuffer(table.memory, np.uint8).__array_interface__["data"][0])
        address = self._device.open(table.cuda_handle)
        self._opened.append(address)
        return address

    def _register_in_thread(self) -> None:
        """Starts registering, and waits for the first piece, which shows whether it is possible here."""
        pieces = [
            (address + at, min(PIECE_BYTES, table.size_bytes - at))
            for address, table in zip(self.addresses, self._tables, strict=True)
            if table.memory is not None
            for at in range(0, table.size_bytes, PIECE_BYTES)
        ]
        if not pieces:
            self.ready.set()
            return
        # Not a daemon: the process must not end while CUDA works on its memory. The thread ends soon after the main thread.
        thread = threading.Thread(target=self._register, args=(pieces,), name="touchline-register", daemon=False)
        thread.start()
        self._thread = thread
        self._first.wait()
        if self._error and not self._registered:
            raise RingError(_refusal(self._error))

    def _register(self, pieces: Sequence[tuple[int, int]]) -> None:
        began, size_bytes = time.monotonic(), 0
        try:
            for address, piece_bytes in pieces:
                if self._stopping or not threading.main_thread().is_alive():
                    return
                # In this thread, whose last error of CUDA no one else asks for.
                self._error = self._device.register(address, piece_bytes)
                if self._error:
                    break
                self._registered.append(address)
                size_bytes += piece_bytes
                self._first.set()
            else:
                self.ready.set()
                logger.debug("%d bytes of columns were registered with CUDA in %.1f s", size_bytes, time.monotonic() - began)
                return
            if size_bytes:
                logger.warning("%s, after %d bytes: the processor gathers instead", _refusal(self._error), size_bytes)
        except Exception:
            self._error = self._error or UNKNOWN
            logger.exception("the server's columns cannot be registered with CUDA")
        finally:
            self._first.set()


def _refusal(error: int) -> str:
    why = ""
    if error == NOT_SUPPORTED:
        why = ', the device reads only memory that this process can write (storage.share_columns = "writable" in the server allows it)'
    return f"the server's columns cannot be registered with CUDA: error {error}{why}"


def table_columns(table: OfferedTable, address: int, outputs: Sequence[Any], device: Any) -> dict[str, Any]:
    """Returns the columns of a table as a gather takes them, by their outputs' names; outputs without one are left out."""
    return {
        output.name: device.column(address + offset, table.rows, output.row_bytes)
        for output, offset in zip(outputs, table.offsets, strict=True)
        if offset >= 0 and output.row_bytes
    }
