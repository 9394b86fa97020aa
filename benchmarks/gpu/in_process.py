"""The process of subjects on the device that live in the learner's own process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.place import Place
from benchmarks.gpu.subjects import Copies, DeviceGatherLimit, DeviceLocalSubject, DeviceTdmpc2Subject
from benchmarks.gpu.timing import DeviceSliceTimer
from benchmarks.protocol import serve
from benchmarks.workloads import WORKLOADS, Content


class InProcess:
    """Holds subjects by name; makes and runs those that the driver asks for."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._runs: dict[str, Callable[[float], dict[str, float]]] = {}
        self._locals: dict[str, DeviceLocalSubject] = {}

    def make_copies(self, *, device: str) -> None:
        """Makes the copies, as ``copy``, ``to-host`` and ``to-device``."""
        copies = Copies(Place(device))
        self._runs |= {"copy": copies.on_device, "to-host": copies.to_host, "to-device": copies.to_device}

    def make_tdmpc2(self, name: str, *, workload: str, rows: int, device: str, cache: bool) -> None:
        """Makes TD-MPC2's construction as ``name``."""
        subject = DeviceTdmpc2Subject(Content(WORKLOADS[workload].resized(rows)), place=Place(device), cache=cache)
        self._runs[name] = DeviceSliceTimer(subject).run

    def make_local(self, name: str, *, workload: str, rows: int, device: str, writing: bool = False) -> None:
        """Makes Touchline's in-process buffer as ``name``."""
        subject = DeviceLocalSubject(Content(WORKLOADS[workload].resized(rows)), place=Place(device), writing=writing)
        self._locals[name] = subject
        self._runs[name] = DeviceSliceTimer(subject).run

    def make_limits(self, *, over: str) -> None:
        """Makes the gather limit over the columns of a local buffer, as ``limit``, and its kernels by themselves, as ``kernels``."""
        limit = DeviceGatherLimit(self._locals[over])
        self._runs["limit"] = DeviceSliceTimer(limit).run
        self._runs["kernels"] = limit.kernels()

    def run(self, name: str, *, seconds: float) -> dict[str, float]:
        """Runs a slice."""
        return self._runs[name](seconds)

    def methods(self) -> dict[str, Any]:
        """Returns the methods that the driver may call."""
        return {name: getattr(self, name) for name in ("make_copies", "make_tdmpc2", "make_local", "make_limits", "run")}


if __name__ == "__main__":
    serve(InProcess().methods())
