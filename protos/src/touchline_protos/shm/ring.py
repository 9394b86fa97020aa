"""A ring of batches in shared memory: one server writes, one learner reads, and no message carries a batch.

A header, a word for each slot and the slots lie in one stretch of memory. The server fills any free slot, notes it in the order of
publication and raises ``head``; the learner takes slots in that order and frees each when it is done, in any order, so a batch that is
held does not hold up the others. Whoever waits spins briefly and then sleeps on a futex, so an idle side costs no core.

Works where stores are seen by other cores in the order in which they were made (x86-64) and where the kernel has futexes (Linux);
:func:`shared_memory_id` is empty elsewhere. Plain ``mmap`` and not ``multiprocessing.shared_memory``, whose tracker unlinks files that
it does not own. How the memory comes from one side to the other, and why neither can take it from the other, is in
:mod:`.sealed_memory`.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import platform
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from touchline_protos.shm import sealed_memory

SHARED_MEMORY_DIR = Path("/dev/shm")
_NAME = re.compile(r"touchline-[0-9a-f]{32}")
_PREFIX = "touchline-"

MAGIC = 0x31_474E_4952_4C54  # "TLRING1", little-endian
MAX_SLOTS = 64
PAGE = 4096

_TOKEN_BYTES = 16
# Words (8 bytes) of the header. What one side writes shares no cache line with what the other writes.
_MAGIC, _TOKEN, _SLOTS, _SLOT_BYTES = 0, 1, 3, 4
_HEAD, _SERVER_SLEEPS = 8, 9
_FREED, _LEARNER_SLEEPS = 16, 17
_ORDER = 64
_STATES = _ORDER + MAX_SLOTS
_ACTORS = _STATES + MAX_SLOTS
"""From here: the order of publication, each slot's state, and how many actors' names its batch needs."""
_FREE, _USED = 0, 1

SPIN_S = 50e-6
"""How long a side spins before it sleeps."""
NAP_S = 0.1
"""Longest sleep without a look at whether the other side still lives."""

_FUTEX_CALL = 202  # x86-64
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1


class RingError(Exception):
    """The ring cannot be used; the caller falls back to messages."""


def shared_memory_id() -> str:
    """Returns a name for the shared memory that this process can map: two processes with the same name see the same files.

    Returns:
        The host's boot and the device number of its shared-memory file system; empty where rings do not work.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{SHARED_MEMORY_DIR.stat().st_dev}"
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class RingGeometry:
    """The sizes of a ring: agreed when it is set up, and checked against each other by both sides."""

    slots: int
    slot_size_bytes: int
    """A multiple of the page size."""

    @classmethod
    def of(cls, slots: int, body_bytes: int) -> RingGeometry:
        """Returns the geometry for so many batches of this size."""
        return cls(slots, -(-body_bytes // PAGE) * PAGE)

    @property
    def size_bytes(self) -> int:
        """Of the whole memory."""
        return PAGE + self.slots * self.slot_size_bytes

    def offset(self, slot: int) -> int:
        """Returns where a slot begins in it."""
        return PAGE + slot * self.slot_size_bytes

    def check(self) -> None:
        """Raises RingError unless the sizes make a ring."""
        if not 2 <= self.slots <= MAX_SLOTS or self.slot_size_bytes < PAGE or self.slot_size_bytes % PAGE:
            raise RingError(f"a ring of {self.slots} slots of {self.slot_size_bytes} bytes, expected 2 to {MAX_SLOTS} slots of whole pages")


class _Ring:
    """What both sides see of the memory. The words are aligned, so each load and store of one is a single instruction."""

    def __init__(self, memory: mmap.mmap, geometry: RingGeometry) -> None:
        self.geometry = geometry
        self.memory = memory
        self._words = (ctypes.c_int64 * (PAGE // 8)).from_buffer(memory)
        self._address = ctypes.addressof(self._words)
        self._syscall = sealed_memory.system_call()

    def slot_array(self, slot: int) -> Any:
        """Returns a slot's memory as a fresh ctypes array: writable, shared, weak-referenceable, keeps the mapping alive."""
        return (ctypes.c_ubyte * self.geometry.slot_size_bytes).from_buffer(self.memory, self.geometry.offset(slot))

    def whole_array(self) -> Any:
        """Returns all of the memory as :meth:`slot_array` does a slot's."""
        return (ctypes.c_ubyte * self.geometry.size_bytes).from_buffer(self.memory)

    def _sleep(self, word: int, seen: int, flag: int) -> None:
        """Sleeps until a word differs from what was seen, or for a nap."""
        spin_until = time.perf_counter() + SPIN_S
        words = self._words
        while words[word] == seen:
            if time.perf_counter() < spin_until:
                continue
            words[flag] = 1
            # The kernel compares again under its own lock; a store between this look and that one ends the wait at once.
            if words[word] == seen:
                timeout = _Timespec(0, int(NAP_S * 1e9))
                self._syscall(
                    _FUTEX_CALL, self._futex(word), _FUTEX_WAIT, ctypes.c_uint32(seen & 0xFFFFFFFF), ctypes.byref(timeout), None, 0
                )
            words[flag] = 0
            return

    def _wake(self, word: int, flag: int) -> None:
        # Were this load ever to overtake the store before it, the sleeper's nap would be the delay.
        if self._words[flag]:
            self._syscall(_FUTEX_CALL, self._futex(word), _FUTEX_WAKE, 1, None, None, 0)

    def _futex(self, word: int) -> ctypes.c_void_p:
        # A futex is 32 bits: the lower half of the counter.
        return ctypes.c_void_p(self._address + 8 * word)


class RingWriter(_Ring):
    """The server's side. One thread writes; any thread may :meth:`interrupt` it. The learner gets the memory by its ``handover``."""

    def __init__(self, geometry: RingGeometry) -> None:
        """Makes the memory, and the socket by which a process of this user gets it.

        Raises:
            RingError: there is no memory for it, or no shared folder.
        """
        geometry.check()
        self.path = SHARED_MEMORY_DIR / f"{_PREFIX}{secrets.token_hex(16)}"
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._head = 0
        try:
            self._file = sealed_memory.make("touchline-ring", geometry.size_bytes)
        except OSError as error:
            raise RingError(f"no memory for a ring of {geometry.size_bytes} bytes: {error.strerror or error}") from None
        try:
            memory = mmap.mmap(self._file, geometry.size_bytes)
            self.handover = sealed_memory.Handover(self.path, self._file)
        except OSError as error:
            os.close(self._file)
            raise RingError(f"no ring in {SHARED_MEMORY_DIR}: {error.strerror or error}") from None
        super().__init__(memory, geometry)
        memory[8 * _TOKEN : 8 * _TOKEN + _TOKEN_BYTES] = self.token
        self._words[_SLOTS] = geometry.slots
        self._words[_SLOT_BYTES] = geometry.slot_size_bytes
        self._words[_MAGIC] = MAGIC

    def free_slots(self) -> list[int]:
        """Returns the slots that may be written; none after a nap at most."""
        freed = self._words[_FREED]
        slots = self._find_free()
        if not slots:
            self._sleep(_FREED, freed, _SERVER_SLEEPS)
            slots = self._find_free()
        return slots

    def publish(self, slot: int, actors_told: int) -> None:
        """Gives a filled slot to the learner.

        Args:
            slot: from :meth:`free_slots`.
            actors_told: names of actors that the stream has told before; the learner waits for them.
        """
        words = self._words
        words[_STATES + slot] = _USED
        words[_ACTORS + slot] = actors_told
        words[_ORDER + self._head % self.geometry.slots] = slot
        self._head += 1
        words[_HEAD] = self._head
        self._wake(_HEAD, _LEARNER_SLEEPS)

    def interrupt(self) -> None:
        """Ends a sleep in :meth:`free_slots`; from any thread."""
        self._syscall(_FUTEX_CALL, self._futex(_FREED), _FUTEX_WAKE, 1, None, None, 0)

    def close(self) -> None:
        """Gives the memory to nobody any more; it goes with the last mapping of it. Closing again does nothing."""
        self.handover.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _find_free(self) -> list[int]:
        states = self._words[_STATES : _STATES + self.geometry.slots]
        return [slot for slot, state in enumerate(states) if state == _FREE]


class RingReader(_Ring):
    """The learner's side. One thread takes; any thread may free a slot or :meth:`interrupt`."""

    def __init__(self, path: str, token: bytes, geometry: RingGeometry, size_bytes: int) -> None:
        """Gets and maps a ring that a server offered. Nothing that the offer says is trusted.

        Raises:
            RingError: the offer is not that of a ring, or the memory is not to be had, not this user's or not what the offer says.
        """
        geometry.check()
        name = Path(path).name
        if Path(path).parent != SHARED_MEMORY_DIR or not _NAME.fullmatch(name):
            raise RingError(f"{path!r} is no ring's name, expected {SHARED_MEMORY_DIR}/{_PREFIX}<32 hexadecimal digits>")
        if size_bytes != geometry.size_bytes:
            raise RingError(f"{path}: {size_bytes} bytes offered, expected {geometry.size_bytes} for its slots")
        try:
            file = sealed_memory.receive(path, size_bytes)
        except OSError as error:
            raise RingError(f"{path}: {error.strerror or error}") from None
        try:
            memory = mmap.mmap(file, size_bytes)
        except OSError as error:
            raise RingError(f"{path}: {size_bytes} bytes cannot be mapped: {error.strerror or error}") from None
        finally:
            os.close(file)
        super().__init__(memory, geometry)
        header = (self._words[_MAGIC], self._words[_SLOTS], self._words[_SLOT_BYTES])
        found = memory[8 * _TOKEN : 8 * _TOKEN + _TOKEN_BYTES]
        if header != (MAGIC, geometry.slots, geometry.slot_size_bytes) or not secrets.compare_digest(found, token):
            raise RingError(f"{path}: the memory is not the ring that was offered")
        self._process = os.getpid()
        self._taken = 0
        self._frees = itertools.count(1)
        self._out = [False] * geometry.slots
        self._interrupted = False

    @property
    def held(self) -> int:
        """Slots that were taken and not freed yet."""
        return sum(self._out)

    def take(self) -> tuple[int, int] | None:
        """Returns the next published slot and how many actors' names it needs, or None after a nap at most.

        Raises:
            RingError: the server wrote what makes no sense.
        """
        words = self._words
        if words[_HEAD] == self._taken and not self._interrupted:
            self._sleep(_HEAD, self._taken, _LEARNER_SLEEPS)
        if words[_HEAD] == self._taken:
            return None
        slot = words[_ORDER + self._taken % self.geometry.slots]
        if not 0 <= slot < self.geometry.slots:
            raise RingError(f"slot {slot} published, expected 0 to {self.geometry.slots - 1}")
        self._taken += 1
        self._out[slot] = True
        return slot, words[_ACTORS + slot]

    def free(self, slot: int) -> None:
        """Gives a slot back to the server. Does nothing in a forked child: the slot is the parent's."""
        if os.getpid() != self._process:
            return
        words = self._words
        self._out[slot] = False
        words[_STATES + slot] = _FREE
        # Several threads may free at once: any number that was not there before tells of a change.
        words[_FREED] = next(self._frees)
        self._wake(_FREED, _SERVER_SLEEPS)

    def interrupt(self) -> None:
        """Ends a :meth:`take` under way, and lets none sleep from now on."""
        self._interrupted = True
        self._syscall(_FUTEX_CALL, self._futex(_HEAD), _FUTEX_WAKE, 1, None, None, 0)


def sweep_dead_rings() -> int:
    """Removes the sockets of servers of this user that were killed; returns how many. Their memory went with them."""
    try:
        dead = [path for path in SHARED_MEMORY_DIR.iterdir() if _NAME.fullmatch(path.name) and sealed_memory.is_abandoned(path)]
    except OSError:
        return 0
    for path in dead:
        path.unlink(missing_ok=True)
    return len(dead)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))
