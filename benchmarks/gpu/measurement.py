"""One section of the measurement on a device: makes its subjects and runs the rounds, whatever fails on the way, within a deadline."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks.processes import ProcessGroup
from benchmarks.protocol import Worker, WorkerError
from benchmarks.rounds import Slice, Subject
from benchmarks.servers import ServerProcess

MAKE_S = 120.0
"""Longest time for making a subject: a compiled learner takes about a minute."""

ANSWER_S = 20.0
"""Longest time for a slice beyond its length."""

SHARED = {"TOUCHLINE_STORAGE__SHARE_COLUMNS": "writable"}
"""Keys of a server whose columns the learner gathers from. Most devices on PCIe read columns in host memory only with this value."""

Job = Callable[[], None]


@dataclass
class Measurement:
    """The subjects of a section, what they measured, and what failed.

    A subject that cannot be made, or fails in a round, is left out from then on; its complete rounds stay, except after wrong data.
    """

    name: str
    rounds: int
    deadline: float
    """Moment, by the monotonic clock, at which the section ends with the rounds that it has."""
    processes: ProcessGroup
    subjects: list[Subject] = field(default_factory=list)
    slices: dict[str, list[Slice]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Why subjects are missing or ended early, by name."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else was found out."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Runs jobs that make subjects, each in a thread of its own."""
        with ThreadPoolExecutor(max(len(jobs), 1)) as pool:
            for job in [pool.submit(job) for job in jobs]:
                job.result()

    def server(self, workload: str, rows: int, *, device: str, wanted: Sequence[str]) -> ServerProcess | None:
        """Returns a filled server; None, with a failure of all that is ``wanted`` from it, if there is none."""
        try:
            return self.processes.server(workload, rows, device=device, keys=SHARED, limit_s=self._limit(MAKE_S))[0]
        except (WorkerError, OSError) as error:
            self._fail(wanted, error)
            return None

    def make(self, wanted: Sequence[str], worker: Worker, method: str, **arguments: Any) -> bool:
        """Calls a method that makes subjects, and notes what it returned; returns whether it did."""
        try:
            result = worker.call_within(self._limit(MAKE_S), method, **arguments)
        except WorkerError as error:
            self._fail(wanted, error)
            return False
        if result:
            self.facts[wanted[0]] = result
        return True

    def add(self, name: str, worker: Worker, seconds: float, **arguments: Any) -> None:
        """Adds a subject that was made: a method ``run`` of a worker."""

        def run(length: float) -> Slice:
            slice_: Slice = worker.call_within(self._limit(length + ANSWER_S), "run", name=name, seconds=length, **arguments)
            return slice_

        self.subjects.append(Subject(name, run, seconds))

    def run(self, *, seed: int, advance: Callable[[str], None]) -> None:
        """Runs rounds until all are done, or another one like the last would pass the deadline.

        Args:
            seed: seed of the orders.
            advance: callback that gets a subject's name before its slice.
        """
        order = random.Random(seed)
        left = sorted(self.subjects, key=lambda subject: subject.name)  # jobs may have added them in any order
        self.slices = {subject.name: [] for subject in left}
        lasted_s = 0.0
        for _ in range(self.rounds):
            began = time.monotonic()
            if not left or began + lasted_s > self.deadline:
                break
            left = self._round(order.sample(left, len(left)), advance)
            lasted_s = time.monotonic() - began
        self.slices = {name: slices for name, slices in self.slices.items() if slices}

    def found(self) -> dict[str, Any]:
        """Returns the section for the results' JSON."""
        return {
            "rounds": max(map(len, self.slices.values()), default=0),
            "slices": self.slices,
            "failures": self.failures,
            "facts": self.facts,
        }

    def _round(self, subjects: Sequence[Subject], advance: Callable[[str], None]) -> list[Subject]:
        """Runs one round; returns the subjects that are left."""
        left = []
        for subject in subjects:
            advance(f"{self.name} {subject.name}")
            try:
                self.slices[subject.name].append(subject.run(subject.seconds))
                left.append(subject)
            except WorkerError as error:
                self._fail([subject.name], error)
                if "WrongDataError" in str(error):
                    del self.slices[subject.name]
        return left

    def _limit(self, seconds: float) -> float:
        return min(seconds, self.deadline + ANSWER_S - time.monotonic())

    def _fail(self, wanted: Sequence[str], error: BaseException) -> None:
        with self._lock:
            self.failures |= dict.fromkeys(wanted, str(error)[-2000:])
