"""Files that one process keeps for itself, and what has them outlive the machine's power: what a spool and a durable store both need."""

from __future__ import annotations

import errno
import os
from pathlib import Path

try:
    import fcntl
except ImportError:
    HAS_LOCKS = False
else:
    HAS_LOCKS = True
"""Whether this system has the file locks of POSIX, without which :func:`lock` is not there."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or a quota, that is full."""
REWRITE_BYTES = 1 << 20


def open_own(path: Path) -> int:
    """Opens a file to read and write, and makes it where there is none: for its user alone, and not for child programs.

    Returns:
        A descriptor; the caller closes it.

    Raises:
        OSError: it cannot be opened or made.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def lock(descriptor: int) -> None:
    """Takes a file's lock without waiting for it. It ends with the descriptor, so at the latest with the process, however that ends.

    Raises:
        BlockingIOError: another holds it.
        OSError: the file system has no locks.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(path: Path) -> bool:
    """Returns whether a process holds a file's lock. Looking takes a share of it for a moment, in which nobody gets the lock.

    Raises:
        OSError: the file cannot be read, or the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def rewrite(path: Path) -> None:
    """Writes a file over itself and has it on the disk; nothing happens if there is none.

    If an fsync failed for it, the kernel may have only in memory what reading finds, and a later fsync would not write it.

    Raises:
        OSError: it cannot be read or written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        for begin in range(0, os.fstat(descriptor).st_size, REWRITE_BYTES):
            os.pwrite(descriptor, os.pread(descriptor, REWRITE_BYTES, begin), begin)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_ROOM:  # of a file system that writes nothing in its place
            raise
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Has the file system write a file's content, or a folder's entries, down.

    Raises:
        OSError: it cannot, as many cannot for a folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
