"""Whether this machine has a CUDA device for the columns, without importing torch where that cannot be."""

from __future__ import annotations

import ctypes
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from touchline_server.config.source import ConfigError


def is_available() -> bool:
    """Returns whether torch finds a CUDA device.

    Torch takes two seconds to import. Where its build has neither CUDA nor ROCm, or the machine has no NVIDIA driver, the answer is known
    without it.
    """
    if "torch" not in sys.modules and not is_possible():
        return False
    import torch

    return torch.cuda.is_available()


def current() -> tuple[str, int]:
    """Returns the name of torch's current CUDA device and the bytes that are free on it."""
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    return str(device), int(torch.cuda.mem_get_info(device)[0])


def prepare(wanted: str) -> None:
    """Imports torch if ``storage.device = wanted`` may need it, so that the first episode does not wait for that.

    Raises:
        ConfigError: a CUDA device that this machine does not have.
    """
    if wanted == "auto":
        is_available()
    elif wanted.startswith("cuda"):
        count = _device_count()
        if int(wanted.partition(":")[2] or 0) >= count:
            raise ConfigError(f"storage.device: '{wanted}', expected a device that torch finds: there are {count} for CUDA")


def _device_count() -> int:
    if not is_available():
        return 0
    import torch

    return torch.cuda.device_count()


def is_possible() -> bool:
    """Returns whether this machine may have a CUDA device, without importing torch: False only if it certainly has none."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return True  # importing it says what is wrong
    try:
        version = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    except Exception:
        return True  # not the file that it used to be: torch itself has to say
    if version.get("hip"):
        return True
    if not version.get("cuda"):
        return False
    try:
        # Without it torch finds no device, whatever its build.
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
