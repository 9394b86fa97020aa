"""How much memory there is: what the store asks before it allocates."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Limit and usage of this process's container: control groups version 2, then 1."""


def available_host_bytes() -> int:
    """Returns the bytes of host memory that this process could still use: what the machine has left, or its container if less."""
    available = _machine_bytes()
    for limit_file, usage_file in _CGROUP_LIMITS:
        try:
            limit, usage = limit_file.read_text().strip(), usage_file.read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            # A version 1 group without a limit names a number near 2**63.
            available = min(available, max(int(limit) - int(usage), 0))
    return available


def free_cuda_bytes(device: torch.device) -> int:
    """Returns the free bytes of a CUDA device's memory."""
    return int(torch.cuda.mem_get_info(device)[0])


def _machine_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
