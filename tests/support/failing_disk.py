"""A disk that fails on request: below SQLite, by a VFS that wraps its own (https://www.sqlite.org/vfs.html), and below ``os``.

The VFS is made with ctypes and needs no compiler, but an ``_sqlite3`` that is linked to a shared libsqlite3, as Linux distributions build
it. Everything that does not fail reaches the real disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int64, c_void_p
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

SUFFIXES = ("-wal", "-shm", "acknowledged", "mark")
"""Suffixes of the files that faults distinguish; any other name is the database's."""
RULES_VARIABLE = "FAILING_DISK_RULES"
"""Environment variable with the file that a server in a process of its own takes its faults from."""


@dataclass
class Fault:
    """One call that fails."""

    call: str
    """``write``, ``sync``, ``truncate``, ``shm`` (space for the index of the log) or ``read``."""
    file: str
    """``db``, or the end of the file's name: ``-wal``, ``-shm``, ``acknowledged``, ``mark``."""
    full: bool = False
    """Whether the disk reports that it is full, instead of an I/O error."""
    done: bool = False
    """Whether the call fails after it has done its work."""
    skip: int = 0
    """Calls that succeed before the first failure."""
    times: int = 1 << 30
    """Calls that fail."""


class _Vfs(ctypes.Structure):
    _fields_ = [
        ("version", c_int),
        ("file_bytes", c_int),
        ("longest_name", c_int),
        ("next", c_void_p),
        ("name", c_char_p),
        ("data", c_void_p),
        ("open", c_void_p),
        ("rest", c_void_p * 15),
    ]


METHODS = [
    *("close", "read", "write", "truncate", "sync", "file_size", "lock", "unlock", "check_reserved", "control", "sector", "features"),
    *("shm_map", "shm_lock", "shm_barrier", "shm_unmap", "fetch", "unfetch"),
]


class _Methods(ctypes.Structure):
    _fields_ = [("version", c_int), *((name, c_void_p) for name in METHODS)]


_OPEN = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_TYPES: dict[str, Any] = {
    "read": CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64),
    "write": CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64),
    "truncate": CFUNCTYPE(c_int, c_void_p, c_int64),
    "sync": CFUNCTYPE(c_int, c_void_p, c_int),
    "shm_map": CFUNCTYPE(c_int, c_void_p, c_int, c_int, c_int, c_void_p),
}
_CODES = {
    "read": sqlite3.SQLITE_IOERR_READ,
    "write": sqlite3.SQLITE_IOERR_WRITE,
    "truncate": sqlite3.SQLITE_IOERR_TRUNCATE,
    "sync": sqlite3.SQLITE_IOERR_FSYNC,
    "shm_map": sqlite3.SQLITE_IOERR_SHMSIZE,
}


class FailingDisk:
    """The disk of this process. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._rules = os.environ.get(RULES_VARIABLE, "")
        self._rules_read = ""
        self.failed = threading.Event()
        """Set once a call has failed."""
        self.calls: list[tuple[str, str]] = []
        """Every write, sync and truncation: what and of which file."""
        self.synced: dict[str, bytes] | None = None
        """Durable content by path: each file as it was last synced. None: not recorded."""

    def fail(self, *faults: Fault) -> None:
        """Has calls fail from now on, and no others."""
        with self._lock:
            self._faults = list(faults)
            self.failed.clear()

    def mend(self) -> None:
        """Makes every call succeed from now on."""
        self.fail()

    def cut_power(self, folder: Path, target: Path) -> None:
        """Copies a folder as a machine that loses power now may leave it: files as they were synced last."""
        assert self.synced is not None
        target.mkdir()
        for file in folder.iterdir():
            if not file.name.endswith("-shm"):
                (target / file.name).write_bytes(self.synced.get(str(file), b""))

    def verdict(self, call: str, path: str) -> Fault | None:
        """Returns how a call fails; None if it goes well."""
        file = next((suffix for suffix in SUFFIXES if path.endswith(suffix)), "db")
        with self._lock:
            self._read_rules()
            if call != "read":
                self.calls.append((call, file))
            for fault in self._faults:
                if fault.call == call and fault.file == file and fault.times:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    self.failed.set()
                    return fault
        return None

    def note_synced(self, path: str) -> None:
        """Remembers a file as it is."""
        if self.synced is not None:
            with contextlib.suppress(OSError):
                self.synced[path] = Path(path).read_bytes()

    def _read_rules(self) -> None:
        if self._rules:
            with contextlib.suppress(FileNotFoundError):
                text = Path(self._rules).read_text(encoding="utf-8")
                if text != self._rules_read:
                    self._rules_read = text
                    self._faults = [Fault(**fault) for fault in json.loads(text)]


def write_rules(path: Path, *faults: Fault) -> None:
    """Sets the faults of a process that was started with :data:`RULES_VARIABLE`, from now on."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps([asdict(fault) for fault in faults]), encoding="utf-8")
    fresh.rename(path)


def _library() -> Any:
    """Returns the libsqlite3 of this process; None if ``_sqlite3`` contains its own."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line.split()[-1] for line in maps if "libsqlite3" in line}
    return ctypes.CDLL(paths.pop()) if len(paths) == 1 else None


class _Shim:
    """The VFS, one for each process, since SQLite may keep using it as long as the process lives."""

    def __init__(self, library: Any) -> None:
        library.sqlite3_vfs_find.restype = POINTER(_Vfs)
        library.sqlite3_vfs_register.argtypes = [POINTER(_Vfs), c_int]
        self._library = library
        self._real = library.sqlite3_vfs_find(None)
        self._real_open = _OPEN(self._real.contents.open)
        self._vfs = _Vfs()
        ctypes.memmove(ctypes.byref(self._vfs), self._real, ctypes.sizeof(_Vfs))
        self._vfs.name = b"failing-disk"
        self._open = _OPEN(self._open_file)
        self._vfs.open = ctypes.cast(self._open, c_void_p)
        self._names: dict[int, str] = {}
        self._patched: dict[int, _Methods] = {}
        self._originals: dict[int, dict[str, Any]] = {}
        self._callbacks = {name: kind(self._callback(name)) for name, kind in _TYPES.items()}
        self.disk: FailingDisk | None = None

    def register(self, *, default: bool) -> None:
        self._library.sqlite3_vfs_register(ctypes.byref(self._vfs) if default else self._real, 1)

    def _open_file(self, vfs: int, name: int | None, file: int, flags: int, out: int) -> int:
        code = int(self._real_open(ctypes.addressof(self._real.contents), name, file, flags, out))
        methods = c_void_p.from_address(file)
        if code == sqlite3.SQLITE_OK and methods.value and name is not None:
            self._names[file] = os.fsdecode(ctypes.string_at(name))  # SQLite itself keeps the address, so that is what goes on
            methods.value = ctypes.addressof(self._patch(methods.value))
        return code

    def _patch(self, address: int) -> _Methods:
        if address not in self._patched:
            methods = _Methods.from_buffer_copy(_Methods.from_address(address))
            self._originals[ctypes.addressof(methods)] = {}
            for name, kind in _TYPES.items():
                if getattr(methods, name):  # files without locks have no index in shared memory
                    self._originals[ctypes.addressof(methods)][name] = kind(getattr(methods, name))
                    setattr(methods, name, ctypes.cast(self._callbacks[name], c_void_p))
            self._patched[address] = methods
        return self._patched[address]

    def _callback(self, name: str) -> Callable[..., int]:
        def call(file: int, *arguments: Any) -> int:
            original = self._originals[c_void_p.from_address(file).value or 0][name]
            disk, path = self.disk, self._names.get(file, "")
            if disk is None or (name == "shm_map" and not arguments[2]):
                return int(original(file, *arguments))
            fault = disk.verdict("shm", f"{path}-shm") if name == "shm_map" else disk.verdict(name, path)
            if fault is None or fault.done:
                code = int(original(file, *arguments))
                if fault is None:
                    if name == "sync" and code == sqlite3.SQLITE_OK:
                        disk.note_synced(path)
                    return code
            return sqlite3.SQLITE_FULL if fault.full and name == "write" else _CODES[name]

        return call


_shims: list[_Shim] = []


@contextlib.contextmanager
def failing_disk() -> Iterator[FailingDisk]:
    """Yields the disk of this process; connections that are opened meanwhile use it for as long as they live."""
    if not _shims:
        library = _library()
        if library is None:
            pytest.skip("this Python's sqlite3 has its own SQLite inside, which no VFS can be added to")
        _shims.append(_Shim(library))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_shims[0]))  # connections that are open at the end still call it
    shim, disk = _shims[0], FailingDisk()
    real_fsync, real_pwrite = os.fsync, os.pwrite

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        fault = disk.verdict("sync", path)
        if fault is not None:
            raise OSError(errno.ENOSPC if fault.full else errno.EIO, "Input/output error")
        real_fsync(descriptor)
        disk.note_synced(path)

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        fault = disk.verdict("write", os.readlink(f"/proc/self/fd/{descriptor}"))
        if fault is not None and not fault.done:
            raise OSError(errno.ENOSPC if fault.full else errno.EIO, "Input/output error")
        written = real_pwrite(descriptor, data, offset)
        if fault is not None:
            raise OSError(errno.EIO, "Input/output error")
        return written

    shim.disk = disk
    shim.register(default=True)
    os.fsync, os.pwrite = fsync, pwrite  # type: ignore[assignment]
    try:
        yield disk
    finally:
        os.fsync, os.pwrite = real_fsync, real_pwrite
        shim.register(default=False)
        shim.disk = None


def kill_image(folder: Path, target: Path) -> None:
    """Copies a folder as a process that is killed now leaves it."""
    shutil.copytree(folder, target)


if __name__ == "__main__":  # touchline-server, on a disk that fails as the file of rules says
    from touchline_server.cli.main import app

    with failing_disk():
        app()
