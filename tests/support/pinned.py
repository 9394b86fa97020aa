"""Pinned memory for tests that look whether something waits for the device."""

from __future__ import annotations

import torch

MAX_BYTES = 1 << 16


def have_pinned_memory_ready() -> None:
    """Leaves blocks of each small size with torch's allocator: taking new ones from CUDA may wait for the device."""
    sizes = [1 << power for power in range(4, MAX_BYTES.bit_length())]
    blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes for _ in range(4)]
    del blocks
