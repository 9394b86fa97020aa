"""Describes the machine that the results were measured on."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.protocol import REPOSITORY

PACKAGES = ("numpy", "torch", "torchrl", "tensordict", "grpcio", "protobuf")


def describe_device() -> dict[str, str]:
    """Returns the CUDA device, its driver and torch's CUDA version, as short texts."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return {
        "device": f"one {properties.name}, {memory}, driver {driver}, CUDA {torch.version.cuda}",
        "registering read-only host memory": {0: "not supported", 1: "supported"}.get(_device_attribute(113), "unknown"),
    }


def _device_attribute(number: int) -> int | None:
    """Returns an attribute (``CUdevice_attribute``) of the first device; None if the driver does not say."""
    try:
        value = ctypes.c_int()
        status = ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(value), number, 0)
    except (OSError, AttributeError):
        return None
    return None if status else value.value


def describe() -> dict[str, str]:
    """Returns the machine, its system, the versions in use and how busy it is, each as a short text."""
    packages = []
    for name in PACKAGES:
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(packages),
        "commit": _commit(),
        "load": f"{load:.1f} processes ready to run before the first round",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
