"""Whether there can be CUDA, told without importing torch."""

from __future__ import annotations

import ctypes
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from touchline_server import ConfigError
from touchline_server.store import cuda_device


def driver(there: bool) -> object:
    def load(name: str) -> object:
        assert name == "libcuda.so.1"
        if not there:
            raise OSError("cannot open shared object file")
        return object()

    return load


@pytest.mark.parametrize(
    ("version", "has_driver", "expected"),
    [
        ("cuda = None\nhip = None\n", True, False),
        ("cuda = '12.8'\nhip = None\n", False, False),
        ("cuda = '12.8'\nhip = None\n", True, True),
        ("cuda = None\nhip = '6.2'\n", False, True),
        ("from typing import Optional\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", True, False),
        ("not python", False, True),
        (None, False, True),
    ],
    ids=[
        "CPU build",
        "CUDA build, no driver",
        "CUDA build and driver",
        "ROCm build",
        "CPU build with types",
        "unreadable",
        "no file",
    ],
)
def test_is_possible_is_decided_by_build_and_driver_and_in_doubt_by_torch(
    version: str | None, has_driver: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version is not None:
        (tmp_path / "version.py").write_text(version, encoding="utf-8")
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(cuda_device, "find_spec", lambda name: spec)
    monkeypatch.setattr(ctypes, "CDLL", driver(has_driver))

    assert cuda_device.is_possible() is expected


def test_is_possible_agrees_with_the_installed_torch() -> None:
    torch = pytest.importorskip("torch")

    assert cuda_device.is_possible() or not torch.cuda.is_available()


def test_prepare_refuses_a_device_that_torch_does_not_find() -> None:
    with pytest.raises(ConfigError, match=r"storage\.device: 'cuda:99', expected a device that torch finds: there are \d+ for CUDA"):
        cuda_device.prepare("cuda:99")
