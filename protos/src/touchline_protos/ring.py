"""A ring of batches in shared memory: one server writes, one learner reads, and no message carries a batch.

One file holds a header, a word for each slot and the slots. The server fills any free slot, notes it in the order of publication and
raises ``head``; the learner takes slots in that order and frees each when it is done, in any order, so a batch that is held does not
hold up the others. Whoever waits spins briefly and then sleeps on a futex, so an idle side costs no core.

Works where stores are seen by other cores in the order in which they were made (x86-64) and where the kernel has futexes (Linux);
:func:`shared_memory_id` is empty elsewhere. Plain ``mmap`` and not ``multiprocessing.shared_memory``, whose tracker unlinks files that
it does not own.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import platform
import re
import secrets
import stat
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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
        """Of the whole file."""
        return PAGE + self.slots * self.slot_size_bytes

    def offset(self, slot: int) -> int:
        """Returns where a slot begins in the file."""
        return PAGE + slot * self.slot_size_bytes

    def check(self) -> None:
        """Raises RingError unless the sizes make a ring."""
        if not 2 <= self.slots <= MAX_SLOTS or self.slot_size_bytes < PAGE or self.slot_size_bytes % PAGE:
            raise RingError(f"a ring of {self.slots} slots of {self.slot_size_bytes} bytes, expected 2 to {MAX_SLOTS} slots of whole pages")


@cache
def _syscall() -> Any:
    """Returns the C library's ``syscall``. Once: each ``CDLL`` makes classes, which only the garbage collector frees."""
    return ctypes.CDLL(None, use_errno=True).syscall


class _Ring:
    """What both sides see of the file. The words are aligned, so each load and store of one is a single instruction."""

    def __init__(self, memory: mmap.mmap, geometry: RingGeometry) -> None:
        self.geometry = geometry
        self.memory = memory
        self._words = (ctypes.c_int64 * (PAGE // 8)).from_buffer(memory)
        self._address = ctypes.addressof(self._words)
        self._syscall = _syscall()

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
    """The server's side. One thread writes; any thread may :meth:`interrupt` it."""

    def __init__(self, geometry: RingGeometry) -> None:
        """Makes the file, readable for this user alone, with its space reserved.

        Raises:
            RingError: there is no room in shared memory, or no shared memory.
        """
        geometry.check()
        self.path = SHARED_MEMORY_DIR / f"{_PREFIX}{secrets.token_hex(16)}"
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._head = 0
        self._linked = True
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise RingError(f"no ring in {SHARED_MEMORY_DIR}: {error.strerror}") from None
        try:
            # Held while this process lives: a file without its lock is a dead server's.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Without this a full file system would be a SIGBUS at some later write.
            os.posix_fallocate(self._file, 0, geometry.size_bytes)
            memory = mmap.mmap(self._file, geometry.size_bytes)
        except OSError as error:
            self.close()
            raise RingError(f"no ring of {geometry.size_bytes} bytes in {SHARED_MEMORY_DIR}: {error.strerror}") from None
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

    def unlink(self) -> None:
        """Takes the file's name away; both sides keep their mapping."""
        if self._linked:
            self._linked = False
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Unlinks and unlocks the file; its memory goes with the last mapping of it."""
        self.unlink()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _find_free(self) -> list[int]:
        states = self._words[_STATES : _STATES + self.geometry.slots]
        return [slot for slot, state in enumerate(states) if state == _FREE]


class RingReader(_Ring):
    """The learner's side. One thread takes; any thread may free a slot or :meth:`interrupt`."""

    def __init__(self, path: str, token: bytes, geometry: RingGeometry, size_bytes: int) -> None:
        """Maps a ring that a server offered. Nothing that the offer says is trusted.

        Raises:
            RingError: the offer is not that of a ring, or the file is not there, not this user's or not what the offer says.
        """
        geometry.check()
        name = Path(path).name
        if Path(path).parent != SHARED_MEMORY_DIR or not _NAME.fullmatch(name):
            raise RingError(f"{path!r} is no ring's name, expected {SHARED_MEMORY_DIR}/{_PREFIX}<32 hexadecimal digits>")
        if size_bytes != geometry.size_bytes:
            raise RingError(f"{path}: {size_bytes} bytes offered, expected {geometry.size_bytes} for its slots")
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise RingError(f"{path}: {error.strerror}") from None
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_size != size_bytes:
                raise RingError(f"{path}: not a file of this user of {size_bytes} bytes")
            memory = mmap.mmap(file, size_bytes)
        finally:
            os.close(file)
        super().__init__(memory, geometry)
        header = (self._words[_MAGIC], self._words[_SLOTS], self._words[_SLOT_BYTES])
        found = memory[8 * _TOKEN : 8 * _TOKEN + _TOKEN_BYTES]
        if header != (MAGIC, geometry.slots, geometry.slot_size_bytes) or not secrets.compare_digest(found, token):
            raise RingError(f"{path}: the file is not the ring that was offered")
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
    """Removes the files of servers of this user that were killed; returns how many."""
    removed = 0
    try:
        candidates = [path for path in SHARED_MEMORY_DIR.iterdir() if _NAME.fullmatch(path.name)]
    except OSError:
        return 0
    for path in candidates:
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if os.fstat(file).st_uid == os.getuid():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                removed += 1
        except OSError:
            pass  # locked: its server lives
        finally:
            os.close(file)
    return removed


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))
