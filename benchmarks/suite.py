"""The sections of ``make bench``: which subjects meet in which rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.processes import ACTORS, PACED_STEPS_PER_S, ProcessGroup
from benchmarks.protocol import Worker
from benchmarks.rounds import Section, Subject
from benchmarks.workloads import WORKLOADS

PATHS = ("unary", "stream", "ring")


@dataclass(frozen=True)
class Effort:
    """The effort of a run, which decides its time."""

    rounds: int = 15
    """Rounds of the sections with the headline ratios."""
    side_rounds: int = 7
    """Rounds of the other sections."""
    seconds: float = 0.4
    """Length of a slice."""
    shrink: int = 1
    """Factor by which stores are smaller, to see only that everything works."""

    def rows(self, workload: str) -> int:
        """Returns the rows of a workload's store."""
        return WORKLOADS[workload].rows // self.shrink


QUICK = Effort(rounds=2, side_rounds=1, seconds=0.1, shrink=20)


@dataclass
class Findings:
    """Results of the sections."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)

    def record(self, section: Section) -> None:
        """Keeps a section's slices."""
        self.sections[section.name] = {"rounds": section.rounds, "slices": section.slices}


Run = Callable[[Section], None]
"""Runs a section's rounds, showing how far it is."""


def state_section(processes: ProcessGroup, effort: Effort, findings: Findings, run: Run) -> None:
    """W1: all subjects, unloaded and under load, inserts, and what a draw costs at two sizes."""
    rows, small = effort.rows("W1"), max(effort.rows("W1") // 100, 1000)
    inner = processes.worker("benchmarks.in_process")
    subjects = []
    for name, cache, writing in (
        ("tdmpc2", False, False),
        ("tdmpc2-writes", False, True),
        ("tdmpc2-cached", True, False),
        ("tdmpc2-cached-writes", True, True),
    ):
        grown = inner.call("make_tdmpc2", name=name, workload="W1", rows=rows, cache=cache, writing=writing)
        findings.memory.setdefault("W1 TD-MPC2's buffer", grown)
        subjects.append(_local_subject(inner, name, effort.seconds))
    findings.memory["W1 Touchline in process"] = inner.call("make_local", name="local", workload="W1", rows=rows)
    inner.call("make_local", name="local-writes", workload="W1", rows=rows, writing=True)
    inner.call("make_limit", name="limit", over="local", provenance=False)
    inner.call("make_limit", name="limit-provenance", over="local", provenance=True)
    inner.call("make_local", name="small", workload="W1", rows=small)
    subjects += [_local_subject(inner, name, effort.seconds) for name in ("limit", "limit-provenance", "local", "local-writes")]
    for name, over in (("draw-large", "local"), ("draw-small", "small")):
        subjects.append(Subject(name, _drawing(inner, over), effort.seconds / 2))

    server, findings.memory["W1 Touchline's server"] = processes.server("W1", rows)
    learner = processes.worker("benchmarks.learner")
    remote = {path: processes.remote(learner, server, "W1", rows, path, name=path, seconds=effort.seconds) for path in PATHS}
    subjects += remote.values()
    eight = processes.actor_group(server, "W1", rows, 8)
    four = eight.first(ACTORS)
    for path in ("stream", "ring"):
        for load, pace in (("10k", PACED_STEPS_PER_S), ("flat", 0.0)):
            loaded = four.under_load(remote[path].run, steps_per_s=pace)
            subjects.append(Subject(f"{path}-{load}", loaded, effort.seconds))
    for actors in (1, 4, 8):
        subjects.append(Subject(f"insert-{actors}", eight.first(actors).insert(server_pid=server.pid), effort.seconds))
    subjects.append(Subject("add-4", four.insert(server_pid=server.pid, one_by_one=True), effort.seconds))
    section = Section("W1", subjects, effort.rounds)
    run(section)
    findings.record(section)


def sizes_section(processes: ProcessGroup, effort: Effort, findings: Findings, run: Run) -> None:
    """W1 with stores of three sizes."""
    inner, learner = processes.worker("benchmarks.in_process"), processes.worker("benchmarks.learner")
    subjects = []
    for share, label in ((100, "10k"), (10, "100k"), (1, "1M")):
        rows = max(effort.rows("W1") // share, 1000)
        inner.call("make_tdmpc2", name=f"tdmpc2@{label}", workload="W1", rows=rows, cache=False, writing=False)
        inner.call("make_local", name=f"local@{label}", workload="W1", rows=rows)
        inner.call("make_limit", name=f"limit@{label}", over=f"local@{label}", provenance=False)
        subjects += [_local_subject(inner, f"{name}@{label}", effort.seconds * 0.75) for name in ("tdmpc2", "local", "limit")]
        server, _ = processes.server("W1", rows)
        for path in ("stream", "ring"):
            subjects.append(processes.remote(learner, server, "W1", rows, path, name=f"{path}@{label}", seconds=effort.seconds * 0.75))
    section = Section("sizes", subjects, effort.side_rounds)
    run(section)
    findings.record(section)


def unequal_section(processes: ProcessGroup, effort: Effort, findings: Findings, run: Run) -> None:
    """W3: unequal episodes with a task, by both laws; TD-MPC2's buffer has only the episode law."""
    inner, learner = processes.worker("benchmarks.in_process"), processes.worker("benchmarks.learner")
    rows = effort.rows("W3")
    inner.call("make_tdmpc2", name="tdmpc2 episode", workload="W3", rows=rows, cache=False, writing=False)
    subjects = [_local_subject(inner, "tdmpc2 episode", effort.seconds * 0.75)]
    for workload, law in (("W3", "episode"), ("W3-step", "step")):
        inner.call("make_local", name=f"local {law}", workload=workload, rows=rows)
        inner.call("make_limit", name=f"limit {law}", over=f"local {law}", provenance=False)
        subjects += [_local_subject(inner, f"{name} {law}", effort.seconds * 0.75) for name in ("local", "limit")]
        server, _ = processes.server(workload, rows)
        for path in ("stream", "ring"):
            subjects.append(processes.remote(learner, server, workload, rows, path, name=f"{path} {law}", seconds=effort.seconds * 0.75))
    section = Section("W3", subjects, effort.side_rounds)
    run(section)
    findings.record(section)


def pixels_section(processes: ProcessGroup, effort: Effort, findings: Findings, run: Run) -> None:
    """W2: unloaded and under load."""
    rows = effort.rows("W2")
    inner = processes.worker("benchmarks.in_process")
    findings.memory["W2 TD-MPC2's buffer"] = inner.call("make_tdmpc2", name="tdmpc2", workload="W2", rows=rows, cache=False, writing=False)
    findings.memory["W2 Touchline in process"] = inner.call("make_local", name="local", workload="W2", rows=rows)
    inner.call("make_limit", name="limit", over="local", provenance=False)
    seconds = effort.seconds * 1.5
    subjects = [_local_subject(inner, name, seconds) for name in ("tdmpc2", "local", "limit")]
    server, findings.memory["W2 Touchline's server"] = processes.server("W2", rows)
    learner = processes.worker("benchmarks.learner")
    remote = {path: processes.remote(learner, server, "W2", rows, path, name=path, seconds=seconds) for path in PATHS}
    subjects += remote.values()
    four = processes.actor_group(server, "W2", rows, ACTORS)
    for path in ("stream", "ring"):
        subjects.append(Subject(f"{path}-10k", four.under_load(remote[path].run, steps_per_s=PACED_STEPS_PER_S), seconds))
    subjects.append(Subject("insert-4", four.insert(server_pid=server.pid), seconds))
    section = Section("W2", subjects, effort.rounds)
    run(section)
    findings.record(section)


SECTIONS: dict[str, Callable[[ProcessGroup, Effort, Findings, Run], None]] = {
    "W1": state_section,
    "sizes": sizes_section,
    "W3": unequal_section,
    "W2": pixels_section,
}


def _local_subject(worker: Worker, name: str, seconds: float) -> Subject:
    return Subject(name, lambda length: worker.call("run", name=name, seconds=length), seconds)


def _drawing(worker: Worker, over: str) -> Callable[[float], dict[str, float]]:
    return lambda length: worker.call("draw", name=over, seconds=length)
