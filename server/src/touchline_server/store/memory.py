"""Available memory, which the store checks before it allocates."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Folder of the container's control group, and its files for the limit, the usage, and in ``memory.stat`` the part of the usage that the
kernel can reclaim (cached files): version 2, then version 1."""


KEPT_BLOCK_BYTES = 1 << 28
"""Largest block that the heap keeps when it is freed."""
KEPT_BYTES = 1 << 29
"""Free memory kept at the top of the heap."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def available_host_bytes() -> int:
    """Returns the bytes of host memory that this process can still use: what is free on the machine, or in its container if less."""
    available = _machine_bytes()
    for folder, limit_file, usage_file, reclaimable in _CGROUPS:
        try:
            limit, usage = (folder / limit_file).read_text().strip(), int((folder / usage_file).read_text())
        except OSError:
            continue
        if limit.isdigit():
            # A version 1 group without a limit has a number near 2**63.
            used = max(usage - _number_in(folder / "memory.stat", reclaimable), 0)
            available = min(available, max(int(limit) - used, 0))
    return available


def resident_bytes() -> int:
    """Returns the bytes of host memory that this process has in use, shared memory included; 0 if the system does not say."""
    return _number_in(Path("/proc/self/status"), "VmRSS:") * 1024


def keep_freed_memory() -> bool:
    """Makes the C library keep the memory of freed messages for the next ones, in this whole process.

    A new large allocation costs more in page faults than filling it, and by default glibc returns large blocks to the kernel when freed.

    Returns:
        Whether the C library supports it; only glibc does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))


def give_back_freed_memory() -> None:
    """Returns all free memory of the heap to the kernel, including what :func:`keep_freed_memory` keeps. Does nothing without glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _machine_bytes() -> int:
    return _number_in(Path("/proc/meminfo"), "MemAvailable:") * 1024 or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number_in(file: Path, name: str) -> int:
    """Returns the number that follows a name in a file of names and numbers; 0 if there is none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(words[1]) for words in map(str.split, lines) if words[:1] == [name]), 0)
