"""The processes of a section: a filled server, a learner, actors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.protocol import Worker, cpu_seconds, resident_bytes
from benchmarks.rounds import Slice, Subject
from benchmarks.servers import ServerProcess
from benchmarks.workloads import WORKLOADS

PACED_STEPS_PER_S = 10_000.0
"""Pace of all actors together: some hundred robots at 50 Hz, or a few dozen simulators."""

ACTORS = 4


class ActorGroup:
    """Actors that add to one server at the same time.

    Args:
        workers: the actors' processes, prepared.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers

    def first(self, actors: int) -> ActorGroup:
        """Returns a group of the first ``actors`` of these."""
        return ActorGroup(self._workers[:actors])

    def under_load(self, run: Callable[[float], Slice], *, steps_per_s: float) -> Callable[[float], Slice]:
        """Returns a function that runs a slice while all actors add.

        Args:
            run: the slice to run.
            steps_per_s: pace of all actors together; 0 is flat out.
        """

        def loaded(seconds: float) -> Slice:
            for worker in self._workers:
                worker.call("start", steps_per_s=steps_per_s / len(self._workers))
            try:
                result = run(seconds)
            finally:
                added = sum(worker.call("stop")["steps_per_s"] for worker in self._workers)
            return {**result, "insert_steps_per_s": added}

        return loaded

    def insert(self, *, server_pid: int, **options: Any) -> Callable[[float], Slice]:
        """Returns a function that runs a slice in which all actors add flat out, with ``options``, and no learner samples."""

        def inserting(seconds: float) -> Slice:
            before = cpu_seconds(server_pid)
            for worker in self._workers:
                worker.send("insert", seconds=seconds, **options)
            results = [worker.receive() for worker in self._workers]
            steps_per_s = sum(result["steps_per_s"] for result in results)
            server_cpu_s = (cpu_seconds(server_pid) - before) / max(steps_per_s * seconds, 1.0)
            return {"steps_per_s": steps_per_s, "cpu_s": sum(r["cpu_s"] for r in results) / len(results), "server_cpu_s": server_cpu_s}

        return inserting


class ProcessGroup:
    """Starts the processes of a section and ends them with it. A context manager."""

    def __init__(self, *, tuned: bool = True) -> None:
        self.tuned = tuned
        """Whether the C library's memory allocation is tuned in all processes."""
        self._stack = ExitStack()

    def worker(self, module: str, *, python: Path | None = None) -> Worker:
        """Starts a subject's process, with this interpreter or another."""
        return self._stack.enter_context(Worker(module, python=python, tuned=self.tuned))

    def server(
        self, workload: str, rows: int, *, device: str = "cpu", keys: Mapping[str, str] = MappingProxyType({}), limit_s: float = 600.0
    ) -> tuple[ServerProcess, dict[str, float]]:
        """Starts a server and fills it.

        Args:
            workload: name of the workload.
            rows: size of the store.
            device: ``storage.device``.
            keys: other keys of the configuration, by the names of their environment variables.
            limit_s: longest time for the start, and for the fill.

        Returns:
            The server, and by how much its resident memory grew with the fill.

        Raises:
            WorkerError: it did not start, or was not filled, or not in time.
        """
        shape = WORKLOADS[workload].resized(rows)
        server = self._stack.enter_context(ServerProcess(shape, tuned=self.tuned, device=device, keys=keys, start_s=limit_s))
        before = resident_bytes(server.pid)
        with Worker("benchmarks.actor", tuned=self.tuned) as filler:
            filler.call_within(limit_s, "fill", address=server.address, workload=workload, rows=rows)
        return server, {"resident_bytes": resident_bytes(server.pid) - before, "rows": rows}

    def actor_group(self, server: ServerProcess, workload: str, rows: int, actors: int) -> ActorGroup:
        """Starts actors."""
        workers = [self.worker("benchmarks.actor") for _ in range(actors)]
        for number, worker in enumerate(workers):
            worker.call("prepare", address=server.address, workload=workload, rows=rows, number=number)
        return ActorGroup(workers)

    def remote(self, learner: Worker, server: ServerProcess, workload: str, rows: int, path: str, *, name: str, seconds: float) -> Subject:
        """Returns a subject that takes batches from a server."""
        learner.call("make", name=name, address=server.address, workload=workload, rows=rows, path=path)
        pid = server.pid
        return Subject(name, lambda length: learner.call("run", name=name, seconds=length, server_pid=pid), seconds)

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
