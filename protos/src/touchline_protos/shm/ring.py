"""A ring of batches in shared memory: one server writes, one learner on the same host reads, and no message carries a batch.

The memory is one page of control words (:mod:`.ring_control`) followed by the slots (:mod:`.ring_slots`). This module makes and maps it: a
server offers a ring by a path, sizes and a token, and hands the memory itself over by a Unix socket (:mod:`.sealed_memory`).

It is a plain ``mmap`` rather than ``multiprocessing.shared_memory``, whose tracker unlinks files that it does not own. Rings need Linux on
x86-64; :func:`shared_memory_id` is empty elsewhere.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from touchline_protos.shm import sealed_memory
from touchline_protos.shm.ring_control import MAX_SLOTS, TOKEN_BYTES, ConsumerControl, ProducerControl, RingError
from touchline_protos.shm.ring_returns import ReturnGeometry
from touchline_protos.shm.ring_slots import RingGeometry, RingSlots

__all__ = ["MAX_SLOTS", "RingError", "RingGeometry", "RingReader", "RingWriter", "shared_memory_id", "sweep_dead_rings"]

SHARED_MEMORY_DIR = Path("/dev/shm")
_PREFIX = "touchline-"
_NAME = re.compile(r"touchline-[0-9a-f]{32}")


def shared_memory_id() -> str:
    """Returns a name for the shared memory that this process can map: processes with the same name see the same files.

    Returns:
        The host's boot id and the device number of its shared-memory file system; ``""`` if rings do not work here.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{SHARED_MEMORY_DIR.stat().st_dev}"
    except OSError:
        return ""


class RingWriter:
    """The server's end of a ring: it makes the memory and hands it over.

    Args:
        geometry: the sizes.
        returns: position of the priorities that come back; None if they come by calls only.
        others: descriptors of other sealed memory that is handed over with the ring's; the caller keeps them.

    Raises:
        RingError: there is no memory for the ring, or no shared folder.
    """

    def __init__(self, geometry: RingGeometry, returns: ReturnGeometry | None = None, *, others: Sequence[int] = ()) -> None:
        geometry.check()
        self.geometry = geometry
        self.returns = returns
        """Position of the priorities that come back; None if they come by calls only."""
        self.path = SHARED_MEMORY_DIR / f"{_PREFIX}{secrets.token_hex(16)}"
        """The socket by which a process of the same user gets the memory."""
        self.token = secrets.token_bytes(TOKEN_BYTES)
        """Secret that stands in the offer and in the memory."""
        try:
            self._file = sealed_memory.make("touchline-ring", geometry.size_bytes)
        except OSError as error:
            raise RingError(f"no memory for a ring of {geometry.size_bytes} bytes: {error.strerror or error}") from None
        try:
            memory = mmap.mmap(self._file, geometry.size_bytes)
            self.handover = sealed_memory.Handover(self.path, [self._file, *others])
            """Hands the memory over; to be served while the offer stands."""
        except OSError as error:
            os.close(self._file)
            raise RingError(f"no ring in {SHARED_MEMORY_DIR}: {error.strerror or error}") from None
        self.control = ProducerControl(memory, geometry.slots)
        self.slots = RingSlots(memory, geometry)
        self.control.initialize(self.token, geometry.slot_size_bytes)

    def close(self) -> None:
        """Hands the memory over no more; it is freed with the last mapping of it. Closing again does nothing."""
        self.handover.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class RingReader:
    """The learner's end of a ring: it receives and maps the memory that a server offers. Nothing in the offer is trusted.

    Args:
        path: path of the socket on which the server hands the memory over.
        token: secret that the memory must contain.
        geometry: the sizes.
        size_bytes: size of the whole memory.
        others: sizes of the other memory that is handed over with the ring's.

    Raises:
        RingError: the offer is malformed, or the memory cannot be received, belongs to another user or does not match the offer.
    """

    def __init__(self, path: str, token: bytes, geometry: RingGeometry, size_bytes: int, others: Sequence[int] = ()) -> None:
        geometry.check()
        self.geometry = geometry
        memory, *self.others = _receive(path, geometry, size_bytes, others)
        """The other memory, mapped so that it can only be read."""
        self.control = ConsumerControl(memory, geometry.slots)
        self.slots = RingSlots(memory, geometry)
        if not self.control.matches(token, geometry.slot_size_bytes):
            raise RingError(f"{path}: the memory is not the ring that was offered")


def _receive(path: str, geometry: RingGeometry, size_bytes: int, others: Sequence[int]) -> list[mmap.mmap]:
    name = Path(path).name
    if Path(path).parent != SHARED_MEMORY_DIR or not _NAME.fullmatch(name):
        raise RingError(f"{path!r} is not the name of a ring, expected {SHARED_MEMORY_DIR}/{_PREFIX}<32 hexadecimal digits>")
    if size_bytes != geometry.size_bytes:
        raise RingError(f"{path}: {size_bytes} bytes offered, expected {geometry.size_bytes} for its slots")
    try:
        files = sealed_memory.receive(path, [size_bytes, *others])
    except OSError as error:
        raise RingError(f"{path}: {error.strerror or error}") from None
    try:
        ring, *read_only = files
        return [mmap.mmap(ring, size_bytes), *(mmap.mmap(*pair, prot=mmap.PROT_READ) for pair in zip(read_only, others, strict=True))]
    except OSError as error:
        raise RingError(f"{path}: {size_bytes + sum(others)} bytes cannot be mapped: {error.strerror or error}") from None
    finally:
        for file in files:
            os.close(file)


def sweep_dead_rings() -> int:
    """Removes the sockets that killed servers of this user left behind, and returns their number. Their memory is gone already."""
    try:
        dead = [path for path in SHARED_MEMORY_DIR.iterdir() if _NAME.fullmatch(path.name) and sealed_memory.is_abandoned(path)]
    except OSError:
        return 0
    for path in dead:
        path.unlink(missing_ok=True)
    return len(dead)
