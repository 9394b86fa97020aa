"""Files that one process keeps for itself, and that survive a loss of power: what a spool and a durable store have in common."""

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
"""Whether this system has POSIX file locks, which :func:`lock` needs."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""``errno`` values of a full disk, or of an exhausted quota."""
REWRITE_BYTES = 1 << 20
"""Bytes that :func:`rewrite` copies at a time."""


def open_private(path: Path) -> int:
    """Opens a file for reading and writing, creating it if necessary. Only this user may access it, and child programs do not inherit it.

    Returns:
        A file descriptor; the caller closes it.

    Raises:
        OSError: the file cannot be opened or created.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def lock(descriptor: int) -> None:
    """Takes a file's lock, without waiting for it. The lock ends with the descriptor, so at the latest with the process, even if killed.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file system has no locks.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def release(descriptor: int, *, owner: int) -> None:
    """Releases a file's lock and closes the descriptor.

    A forked child has the lock, too, until it has closed its copy, which may be at any later time. So the process that took the lock also
    unlocks it. A child only closes its copy: unlocking would take the lock from its parent.

    Args:
        descriptor: descriptor of the file.
        owner: id of the process that took the lock.
    """
    if os.getpid() == owner:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Returns whether a process holds a file's lock. For the moment of the check, no other process can take it.

    Raises:
        OSError: the file cannot be read, or the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # A shared lock can be had unless a process holds the exclusive one; closing the descriptor releases it.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def rewrite(path: Path) -> None:
    """Writes a file over itself and syncs it to the disk. Does nothing if it does not exist.

    After a failed fsync the kernel may hold in memory what it could not write, and mark it clean: reading still finds it, and a later
    fsync does not write it. Writing the same bytes again marks them dirty (Rebello et al., "Can Applications Recover from fsync
    Failures?", USENIX ATC 2020).

    Raises:
        OSError: the file cannot be read or written.
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
        # A copy-on-write file system cannot write in place if the disk is full.
        if error.errno not in DISK_FULL:
            raise
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Syncs the content of a file, or the entries of a folder, to the disk.

    Raises:
        OSError: the file system cannot, as is common for folders.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
