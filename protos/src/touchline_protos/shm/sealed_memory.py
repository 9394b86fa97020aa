"""Memory of two processes that neither can take from the other, and its way from one to the other.

A file in shared memory that two processes map can be shortened by either, and the other's next access is then its end (SIGBUS). So the
memory is a file without a name (``memfd``) that is sealed against shrinking and growing. It goes by a Unix socket, whose name both sides
see where they have one ``/dev/shm``, also from different containers, and to which only their common user may connect.

For Linux on x86-64. Python's own ``os.memfd_create`` is missing where it was built for an old C library, as in some distributions of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import stat
from functools import cache
from pathlib import Path
from typing import Any

_MEMFD_CREATE = 319  # the system call
_MFD_CLOEXEC, _MFD_ALLOW_SEALING = 1, 2
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4
_SEALS = _F_SEAL_SHRINK | _F_SEAL_GROW

ANSWER_S = 5.0
"""How long whoever connects waits for the memory."""


@cache
def system_call() -> Any:
    """Returns the C library's ``syscall``. Once: each ``CDLL`` makes classes, which only the garbage collector frees."""
    return ctypes.CDLL(None, use_errno=True).syscall


def make(name: str, size_bytes: int) -> int:
    """Returns a file descriptor of fresh memory, zero, with its pages reserved, sealed.

    Raises:
        OSError: there is no room, or the kernel has no such memory.
    """
    file = system_call()(_MEMFD_CREATE, name.encode(), _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    if file < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        # Without this a lack of memory would be a SIGBUS at some later write.
        os.posix_fallocate(file, 0, size_bytes)
        fcntl.fcntl(file, _F_ADD_SEALS, _SEALS | _F_SEAL_SEAL)
    except OSError:
        os.close(file)
        raise
    return file


class Handover:
    """Gives a file descriptor to whoever connects to a Unix socket of this user. Not safe for several threads.

    Args:
        path: of the socket; made, for this user alone.
        file: to give; stays the caller's.

    Raises:
        OSError: the socket cannot be made there.
    """

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self._file = file
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        # Under its own name only once somebody listens: a socket with nobody behind it is one of a server that was killed.
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
        """Returns the descriptor that becomes readable when somebody has connected; negative once closed."""
        return self._listener.fileno()

    def serve(self) -> None:
        """Gives the file to one who has connected. Does nothing if there is none."""
        with contextlib.suppress(OSError):  # it is gone already
            connection, _ = self._listener.accept()
            with connection:
                connection.setblocking(False)
                socket.send_fds(connection, [b"ring"], [self._file])

    def close(self) -> None:
        """Removes the socket. Closing again does nothing."""
        if self._listener.fileno() >= 0:
            self._listener.close()
            self.path.unlink(missing_ok=True)


def receive(path: str, size_bytes: int) -> int:
    """Returns the file descriptor that a :class:`Handover` gives.

    Raises:
        OSError: nobody gives one there; the text says why.
    """
    status = os.lstat(path)
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.getuid():
        raise OSError(0, f"not a socket of this user ({os.getuid()})")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(ANSWER_S)
        try:
            connection.connect(path)
            _, files, _, _ = socket.recv_fds(connection, 16, 1, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise OSError(0, f"no memory came within {ANSWER_S} s") from None
    if len(files) != 1:
        raise OSError(0, "no memory came")
    try:
        if os.fstat(files[0]).st_size != size_bytes or fcntl.fcntl(files[0], _F_GET_SEALS) & _SEALS != _SEALS:
            raise OSError(0, f"the memory that came is not {size_bytes} bytes that cannot shrink")
    except OSError:
        os.close(files[0])
        raise
    return files[0]


def is_abandoned(path: Path) -> bool:
    """Returns whether a socket of this user has nobody behind it any more."""
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
