"""The sections of ``make bench-gpu``: each workload in process, served and beside a training step; and updates of a compiled learner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu.measurement import Measurement
from benchmarks.protocol import Worker
from benchmarks.servers import ServerProcess

SLICE_S = 0.25
"""Maximum length of a slice."""

SHORT_S = 0.1
"""Length of the slices that only copy or run kernels."""

UPDATES = "updates"
"""Name of the section of the compiled learner."""

UPDATE_SLICES = 3
"""Factor by which slices of updates are longer: an update takes as long as a hundred batches."""


@dataclass(frozen=True)
class Task:
    """What a section is measured with."""

    measurement: Measurement
    workload: str
    rows: int
    seconds: float
    """Length of a slice."""
    device: str
    """Device of the learner, and of the columns that are not in host memory: ``cuda``; ``cpu`` in a dry run."""

    @property
    def place(self) -> dict[str, object]:
        """Arguments that every method takes which makes a subject."""
        return {"workload": self.workload, "rows": self.rows, "device": self.device}


def measure_workload(task: Task) -> None:
    """Prepares the section of a workload: its in-process subjects, and those of two servers."""
    group = task.measurement.processes
    inner = [group.worker("benchmarks.gpu.in_process") for _ in range(2)]
    # A learner for each path: an error on the device ends all that its process does.
    ring, on_device, in_host = (group.worker("benchmarks.gpu.learner") for _ in range(3))
    task.measurement.prepare(
        [
            partial(_references, task, inner[0]),
            partial(_own, task, inner[1]),
            partial(_served, task, columns="cuda", ring=ring, learner=on_device, step_name="step only"),
            partial(_served, task, columns="cpu", ring=None, learner=in_host, step_name="step of host columns"),
        ]
    )


def measure_updates(task: Task) -> None:
    """Prepares the section of the compiled learner: on a fixed batch, and on served ones."""
    measurement = task.measurement
    learner = measurement.processes.worker("benchmarks.gpu.learner")
    servers: dict[str, ServerProcess] = {}
    paths = {"cuda": ("device", "ring"), "cpu": ("device",)}

    def start(columns: str) -> None:
        wanted = ["fixed", *_names("update", paths[columns], columns)] if columns == "cuda" else _names("update", paths[columns], columns)
        server = measurement.server(task.workload, task.rows, device=_where(task, columns), wanted=wanted)
        if server is not None:
            servers[columns] = server

    measurement.prepare([partial(start, columns) for columns in paths])
    if not servers:
        return
    first = next(iter(servers.values()))
    seconds = task.seconds * UPDATE_SLICES
    if not measurement.make(["fixed"], learner, "make_fixed", name="fixed", address=first.address, compiled=True, **task.place):
        return
    measurement.add("fixed", learner, seconds, server_pid=first.pid)
    for columns, server in servers.items():
        for path in paths[columns]:
            _remote(task, learner, server, f"update {path} {columns}", path=path, seconds=seconds, work=True)


@dataclass(frozen=True)
class Section:
    """A part of the measurement whose subjects take turns."""

    workload: str
    share: float
    """Share of the whole time, in which the section has to end. Those of all sections and of the tests add up to 1."""
    prepare: Callable[[Task], None]
    """Function that makes the subjects."""


SECTIONS = {
    "W1": Section("W1", 0.20, measure_workload),
    "W2": Section("W2", 0.32, measure_workload),
    UPDATES: Section("W1", 0.26, measure_updates),
}


def _references(task: Task, worker: Worker) -> None:
    """TD-MPC2's construction, and plain copies."""
    measurement = task.measurement
    if measurement.make(["copy", "to-host", "to-device"], worker, "make_copies", device=task.device):
        for name in ("copy", "to-host", "to-device"):
            measurement.add(name, worker, min(task.seconds, SHORT_S))
    if measurement.make(["tdmpc2"], worker, "make_tdmpc2", name="tdmpc2", cache=False, **task.place):
        measurement.add("tdmpc2", worker, task.seconds)


def _own(task: Task, worker: Worker) -> None:
    """Touchline's in-process buffer and the gather limit."""
    measurement = task.measurement
    for name, writing in (("local", False), ("local-writes", True)):
        if measurement.make([name], worker, "make_local", name=name, writing=writing, **task.place):
            measurement.add(name, worker, task.seconds)
    if measurement.make(["limit", "kernels"], worker, "make_limits", over="local"):
        measurement.add("limit", worker, task.seconds)
        measurement.add("kernels", worker, min(task.seconds, SHORT_S))


def _served(task: Task, *, columns: str, ring: Worker | None, learner: Worker, step_name: str) -> None:
    """A server with its columns on the device or in host memory, and its learners."""
    measurement = task.measurement
    served = [f"device {columns}", *([f"ring {columns}"] if ring else []), step_name, f"step device {columns}"]
    server = measurement.server(task.workload, task.rows, device=_where(task, columns), wanted=served)
    if server is None:
        return
    if ring is not None:
        _remote(task, ring, server, f"ring {columns}", path="ring", seconds=task.seconds)
    _remote(task, learner, server, f"device {columns}", path="device", seconds=task.seconds)
    if measurement.make([step_name], learner, "make_fixed", name=step_name, address=server.address, compiled=False, **task.place):
        measurement.add(step_name, learner, task.seconds, server_pid=server.pid)
        _remote(task, learner, server, f"step device {columns}", path="device", seconds=task.seconds, work=True)


def _remote(task: Task, learner: Worker, server: ServerProcess, name: str, *, path: str, seconds: float, work: bool = False) -> None:
    if task.measurement.make([name], learner, "make", name=name, address=server.address, path=path, work=work, **task.place):
        task.measurement.add(name, learner, seconds, server_pid=server.pid)


def _names(prefix: str, paths: tuple[str, ...], columns: str) -> list[str]:
    return [f"{prefix} {path} {columns}" for path in paths]


def _where(task: Task, columns: str) -> str:
    return columns if task.device == "cuda" else "cpu"
