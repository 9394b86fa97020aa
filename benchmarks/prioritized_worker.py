"""The process of the subjects of :mod:`benchmarks.prioritized`: learners that send priorities back."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from benchmarks.learner import RemoteSubject
from benchmarks.local import LocalSubject
from benchmarks.priorities import Priorities
from benchmarks.protocol import cpu_seconds, serve
from benchmarks.servers import ServerProcess
from benchmarks.timing import seconds_per_call, take_for
from benchmarks.workloads import W1, Content
from touchline import ReplayClient
from touchline_protos import Batch


class UpdatingRemote:
    """A learner of a server with the law ``prioritized``, which sends priorities back for every batch."""

    def __init__(self, subject: RemoteSubject) -> None:
        workload = subject.content.workload
        self._subject = subject
        self._priorities = Priorities((workload.horizon, workload.batch_size))

    def take(self) -> Batch:
        """Takes a batch and updates its priorities."""
        batch = self._subject.take()
        self._subject.client.update_priorities(batch, self._priorities.take())
        return batch


class UpdatingLocal:
    """The in-process buffer under the law ``prioritized``, with an update for every batch."""

    def __init__(self, subject: LocalSubject) -> None:
        workload = subject.content.workload
        self._buffer = subject.buffer
        self._priorities = Priorities((workload.horizon, workload.batch_size))

    def take(self) -> Batch:
        """Draws a batch and updates its priorities."""
        batch = self._buffer.sample()
        self._buffer.update_priorities(batch, self._priorities.take())
        return batch


class PrioritizedSubjects:
    """Subjects by name, made on request."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._resources = ExitStack()
        self._takes: dict[str, Any] = {}
        self._draws: dict[str, LocalSubject] = {}
        self._clients: dict[str, ReplayClient] = {}
        self._servers: dict[str, ServerProcess] = {}

    def make_ring(self, name: str, *, law: str, rows: int) -> None:
        """Makes a server of workload W1 under a law, and a learner on its ring; ``prioritized`` with an update for every batch."""
        content = Content(replace(W1.resized(rows), law=law))
        server = self._resources.enter_context(ServerProcess(content.workload))
        client = self._resources.enter_context(ReplayClient(server.address, timeout_s=60.0))
        for tag in content.tags_to_fill(rows):
            client.add(content.episode(tag), policy_version=tag)
        subject = RemoteSubject(server.address, content, path="ring")
        self._takes[name] = UpdatingRemote(subject).take if law == "prioritized" else subject.take
        self._clients[name] = subject.client
        self._servers[name] = server

    def make_local(self, name: str, *, law: str, rows: int) -> None:
        """Makes the in-process buffer under a law; ``prioritized`` with an update for every batch."""
        subject = LocalSubject(Content(replace(W1.resized(rows), law=law)))
        self._takes[name] = UpdatingLocal(subject).take if law == "prioritized" else subject.take
        self._draws[name] = subject

    def run(self, name: str, *, seconds: float) -> dict[str, float]:
        """Returns batches a second of one slice, after a short warm-up, and the CPU time of learner and server for each."""
        take = self._takes[name]
        take_for(take, 0.1)
        cpu, begin, taken = self._cpu_seconds(name), time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begin) < seconds:
            for _ in range(10):
                take()
            taken += 10
        return {"batches_per_s": taken / elapsed, "cpu_s": (self._cpu_seconds(name) - cpu) / taken}

    def _cpu_seconds(self, name: str) -> float:
        server = self._servers.get(name)
        return time.process_time() + (cpu_seconds(server.pid) if server is not None else 0.0)

    def draw(self, name: str, *, seconds: float) -> dict[str, float]:
        """Returns the cost of drawing the rows of a batch."""
        return {"draw_s": seconds_per_call(self._draws[name].draw, seconds)}

    def counters(self, name: str) -> dict[str, int]:
        """Returns what happened to the slices whose priorities were sent back."""
        found = self._clients[name].priorities.flush()
        return {"updated": found.updated, "evicted": found.evicted, "dropped": found.dropped}

    def close(self) -> None:
        """Ends the servers."""
        self._resources.close()

    def methods(self) -> dict[str, Any]:
        """Returns the methods that the driver may call."""
        return {name: getattr(self, name) for name in ("make_ring", "make_local", "run", "draw", "counters", "close")}


if __name__ == "__main__":
    serve(PrioritizedSubjects().methods())
