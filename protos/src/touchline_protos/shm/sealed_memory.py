"""Memory that two processes share and neither can take from the other, and how one hands it to the other.

If two processes map a named file in shared memory, either can shorten it, and the other's next access is a SIGBUS that kills it. So the
memory is a file without a name (``memfd``), sealed against shrinking and growing. It is handed over through a Unix socket in ``/dev/shm``:
both sides see its name if they share that folder, even from different containers, and only their common user may connect.

For Linux on x86-64. The system call is made directly because ``os.memfd_create`` is missing from Pythons built for an old C library.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import stat
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

_MEMFD_CREATE = 319  # the system call
_MFD_CLOEXEC, _MFD_ALLOW_SEALING = 1, 2
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_FUTURE_WRITE = 1, 2, 4, 16
_SEALS = _F_SEAL_SHRINK | _F_SEAL_GROW

_MMAP, _MPROTECT, _MADVISE = 9, 10, 28  # the system calls
_MAP_FIXED = 0x10
_MADV_POPULATE_WRITE, _MADV_COLLAPSE = 23, 25
_HUGE_PAGE_BYTES = 1 << 21

MAX_FILES = 64
"""Most descriptors that are handed over together; the system allows a few more."""

ANSWER_S = 5.0
"""Time for which a learner waits for the memory after it has connected."""


@cache
def system_call() -> Any:
    """Returns the C library's ``syscall``. Cached, because each ``CDLL`` creates classes that only the garbage collector frees."""
    return ctypes.CDLL(None, use_errno=True).syscall


def make(name: str, size_bytes: int) -> int:
    """Returns a file descriptor of new, sealed memory: zero-filled, with its pages reserved. The caller closes it.

    Args:
        name: shown in ``/proc`` only.
        size_bytes: size of the memory.

    Raises:
        OSError: not enough memory, or a kernel without ``memfd``.
    """
    file = _create(name)
    try:
        # Otherwise a lack of memory would show as a SIGBUS at some later write.
        os.posix_fallocate(file, 0, size_bytes)
        fcntl.fcntl(file, _F_ADD_SEALS, _SEALS | _F_SEAL_SEAL)
    except OSError:
        os.close(file)
        raise
    return file


def make_read_only(name: str, size_bytes: int) -> tuple[memoryview, int]:
    """Returns new memory that the caller writes and other processes can only read: zero-filled, with its pages reserved.

    It is sealed against every writable mapping after the returned one, also by processes of this user that open the file again. Before
    Linux 5.1 there is no such seal: then only the descriptor's access mode forbids it.

    Args:
        name: shown in ``/proc`` only.
        size_bytes: size of the memory, more than 0.

    Returns:
        The one writable mapping, and a descriptor opened to read, which the caller closes.

    Raises:
        OSError: not enough memory, or a kernel without ``memfd``.
    """
    return _make_mapped(name, size_bytes, (_SEALS | _F_SEAL_FUTURE_WRITE, _SEALS), os.O_RDONLY)


def make_writable(name: str, size_bytes: int) -> tuple[memoryview, int]:
    """Returns what :func:`make_read_only` does, but a process that gets the descriptor may write, too. It cannot shorten the memory."""
    return _make_mapped(name, size_bytes, (_SEALS,), os.O_RDWR)


def protect(address: int, size_bytes: int, protection: int) -> bool:
    """Changes what this process may do with mapped pages, to ``mmap.PROT_READ`` and the like; returns whether it is allowed."""
    return bool(system_call()(_MPROTECT, ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), protection) == 0)


def _make_mapped(name: str, size_bytes: int, seals: Sequence[int], access: int) -> tuple[memoryview, int]:
    """Returns new memory with the first of some seals that the kernel has, mapped, and a descriptor opened with this access."""
    file = _create(name)
    try:
        os.ftruncate(file, size_bytes)
        memory = _map_aligned(file, size_bytes)
        _reserve(file, memory)
        for number, added in enumerate(seals, 1):
            try:
                fcntl.fcntl(file, _F_ADD_SEALS, added | _F_SEAL_SEAL)
                break
            except OSError:
                if number == len(seals):
                    raise
        return memory, os.open(f"/proc/self/fd/{file}", access | os.O_CLOEXEC)
    finally:
        os.close(file)


def _create(name: str) -> int:
    file: int = system_call()(_MEMFD_CREATE, name.encode(), _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    if file < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return file


def _map_aligned(file: int, size_bytes: int) -> memoryview:
    """Returns a writable mapping of a file, at an address at which a huge page can begin. It is unmapped with its last view."""
    # Python cannot map at a given address: the file takes the place of part of a larger mapping, which ends both.
    region = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    begin = -address % _HUGE_PAGE_BYTES
    where, size = ctypes.c_void_p(address + begin), ctypes.c_size_t(size_bytes)
    if system_call()(_MMAP, where, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, file, ctypes.c_long(0)) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return memoryview(region)[begin : begin + size_bytes]


def _reserve(file: int, memory: memoryview) -> None:
    """Reserves all pages of a mapped file, huge ones if the system has them: random rows are read an eighth faster from those."""
    address, size_bytes = ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory)
    # Since Linux 6.1 a range that has a page becomes a huge page on request, also if ``shmem_enabled`` is "never". Every call may fail.
    _advise(address, size_bytes, mmap.MADV_HUGEPAGE)
    for offset in range(0, size_bytes - _HUGE_PAGE_BYTES + 1, _HUGE_PAGE_BYTES):
        _advise(address + offset, mmap.PAGESIZE, _MADV_POPULATE_WRITE)
    _advise(address, size_bytes, _MADV_COLLAPSE)
    _advise(address, size_bytes, _MADV_POPULATE_WRITE)
    # Does what is left: before Linux 5.14 all of it. Raises if there is no memory.
    os.posix_fallocate(file, 0, size_bytes)


def _advise(address: int, size_bytes: int, advice: int) -> None:
    """Calls ``madvise`` directly, because ``mmap.madvise`` keeps the interpreter lock: for seconds if the memory is large."""
    system_call()(_MADVISE, ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), advice)


class Handover:
    """Sends file descriptors to every process of this user that connects to a Unix socket. Not thread-safe.

    Args:
        path: path of the socket, created with access for this user only.
        files: descriptors to send, at most :data:`MAX_FILES`; the caller keeps them.

    Raises:
        OSError: the socket cannot be created there.
    """

    def __init__(self, path: Path, files: Sequence[int]) -> None:
        self.path = path
        self._files = list(files)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        # It gets its name only once it listens: a socket with that name that does not accept connections was left by a killed server.
        unready = path.with_name(f"{path.name}.new")
        try:
            self._listener.bind(str(unready))
            unready.chmod(0o600)
            self._listener.listen(8)
            unready.rename(path)
        except OSError:
            unready.unlink(missing_ok=True)
            self._listener.close()
            raise

    def fileno(self) -> int:
        """Returns the descriptor that becomes readable when a process has connected; negative once closed."""
        return self._listener.fileno()

    def serve(self) -> None:
        """Sends the files to one process that has connected. Does nothing if there is none."""
        with contextlib.suppress(OSError):  # the peer is gone already
            connection, _ = self._listener.accept()
            with connection:
                connection.setblocking(False)
                socket.send_fds(connection, [b"ring"], self._files)

    def close(self) -> None:
        """Removes the socket. Closing again does nothing."""
        if self._listener.fileno() >= 0:
            self._listener.close()
            self.path.unlink(missing_ok=True)


def receive(path: str, sizes: Sequence[int]) -> list[int]:
    """Returns the file descriptors that a :class:`Handover` sends. The caller closes them.

    Args:
        path: the socket.
        sizes: the size that each memory must have, in bytes.

    Raises:
        OSError: no memory was received, or not what was expected; the text says why.
    """
    status = os.lstat(path)
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.getuid():
        raise OSError(0, f"not a socket of this user ({os.getuid()})")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(ANSWER_S)
        try:
            connection.connect(path)
            _, files, _, _ = socket.recv_fds(connection, 16, MAX_FILES, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise OSError(0, f"no memory received within {ANSWER_S} s") from None
    try:
        if len(files) != len(sizes):
            raise OSError(0, f"{len(files)} memories received, expected {len(sizes)}" if files else "no memory received")
        for file, size_bytes in zip(files, sizes, strict=True):
            found = os.fstat(file)
            sealed = fcntl.fcntl(file, _F_GET_SEALS) & _SEALS == _SEALS
            if found.st_size != size_bytes or found.st_uid != os.getuid() or not sealed:
                raise OSError(0, f"the memory received is not {size_bytes} bytes that cannot shrink, of this user")
    except OSError:
        for file in files:
            os.close(file)
        raise
    return list(files)


def is_abandoned(path: Path) -> bool:
    """Returns whether this is a socket of this user on which no process listens any more."""
    try:
        status = path.lstat()
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.getuid():
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            probe.connect(str(path))
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False
