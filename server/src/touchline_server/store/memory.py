"""How much memory there is: what the store asks before it allocates."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where this process's container has its limit and usage, and the part of the usage that the kernel gives back when asked (files that
were read once): control groups version 2, then 1."""


KEPT_BLOCK_BYTES = 1 << 28
"""Blocks up to this size are kept when they are freed."""
KEPT_BYTES = 1 << 29
"""So much free memory is kept at the top of the heap."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def available_host_bytes() -> int:
    """Returns the bytes of host memory that this process could still use: what the machine has left, or its container if less."""
    available = _machine_bytes()
    for folder, limit_file, usage_file, reclaimable in _CGROUPS:
        try:
            limit, usage = (folder / limit_file).read_text().strip(), int((folder / usage_file).read_text())
        except OSError:
            continue
        if limit.isdigit():
            # A version 1 group without a limit names a number near 2**63.
            used = max(usage - _figure(folder / "memory.stat", reclaimable), 0)
            available = min(available, max(int(limit) - used, 0))
    return available


def keep_freed_memory() -> bool:
    """Has the C library keep the memory of freed messages for the next ones, for this whole process.

    A fresh large allocation costs more in page faults than filling it, and glibc gives large ones back to the kernel when they are freed.

    Returns:
        Whether the C library took it; only glibc does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))


def give_back_freed_memory() -> None:
    """Gives what is free in the C library's heap back to the kernel, where it is glibc: what was kept for the next messages as well."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _machine_bytes() -> int:
    return _figure(Path("/proc/meminfo"), "MemAvailable:") * 1024 or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _figure(file: Path, name: str) -> int:
    """Returns the number behind a name in a file of names and numbers; 0 where there is none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(words[1]) for words in map(str.split, lines) if words[:1] == [name]), 0)
