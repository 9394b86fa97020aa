"""How much memory there is, by files like those of the kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from touchline_server.store import memory

GIB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 64 GiB left."""
    monkeypatch.setattr(memory, "_machine_bytes", lambda: 64 * GIB)


def control_group(folder: Path, limit: str, usage: int, *, version: int = 2, inactive: int | None = None) -> Path:
    """Makes the files of a control group and returns their folder."""
    names = ("memory.max", "memory.current", "inactive_file") if version == 2 else _VERSION_1
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    if inactive is not None:
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\nactive_file 7\n")
    return folder


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def use(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Replaces the folders of the control groups, version 2 first, then version 1."""
    found = [(folder, *names) for folder, (_, *names) in zip(folders, memory._CGROUPS, strict=False)]
    monkeypatch.setattr(memory, "_CGROUPS", tuple(found))


def test_available_host_bytes_without_a_container_is_the_machines(machine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, tmp_path / "none", tmp_path / "none")

    assert memory.available_host_bytes() == 64 * GIB


@pytest.mark.parametrize(
    ("limit", "usage", "inactive", "expected"),
    [
        (str(8 * GIB), 3 * GIB, None, 5 * GIB),
        (str(8 * GIB), 3 * GIB, 2 * GIB, 7 * GIB),
        (str(8 * GIB), 9 * GIB, 0, 0),
        (str(100 * GIB), GIB, 0, 64 * GIB),
        ("max", 3 * GIB, 0, 64 * GIB),
    ],
    ids=["limit", "files that can be dropped", "over the limit", "more than the machine has", "no limit"],
)
def test_available_host_bytes_in_a_container_is_what_its_limit_leaves(
    machine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, usage: int, inactive: int | None, expected: int
) -> None:
    use(monkeypatch, control_group(tmp_path, limit, usage, inactive=inactive), tmp_path / "none")

    assert memory.available_host_bytes() == expected


@pytest.mark.parametrize(
    ("limit", "expected"), [(8 * GIB, 6 * GIB), (9_223_372_036_854_771_712, 64 * GIB)], ids=["limit", "the number that means none"]
)
def test_available_host_bytes_in_a_version_1_group_is_what_its_limit_leaves(
    machine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int, expected: int
) -> None:
    use(monkeypatch, tmp_path / "none", control_group(tmp_path, str(limit), 3 * GIB, version=1, inactive=GIB))

    assert memory.available_host_bytes() == expected


def test_available_host_bytes_of_this_machine_is_plausible() -> None:
    assert 0 < memory.available_host_bytes() < 2**50


def test_keep_freed_memory_is_taken_by_glibc_in_a_process_of_its_own() -> None:
    code = "import platform; from touchline_server.store import memory; print(memory.keep_freed_memory(), platform.libc_ver()[0])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert printed[0] == str(printed[1:] == ["glibc"])
