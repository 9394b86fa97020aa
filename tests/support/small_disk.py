"""A small file system for one test, and code that fills it to the last byte."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

LIBC = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def mounted(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mounts a file system of a size on a folder that it makes; skips the test if nothing may be mounted."""
    folder.mkdir()
    if LIBC.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size_bytes}".encode()) != 0:
        pytest.skip(f"nothing may be mounted here: {os.strerror(ctypes.get_errno())}; test_failing_disk.py has a disk that says it is full")
    try:
        yield folder
    finally:
        assert LIBC.umount2(bytes(folder), 2) == 0


def fill(ballast: Path) -> None:
    """Fills the rest of a file system."""
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
