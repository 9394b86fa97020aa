"""What this process may do with its memory."""

from __future__ import annotations

from pathlib import Path


def is_writable(address: int) -> bool:
    """Returns whether the page of an address can be written. Raises LookupError if nothing is mapped there."""
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        span, access, *_ = line.split()
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            return access[1] == "w"
    raise LookupError(f"{address:#x}: nothing is mapped there")
