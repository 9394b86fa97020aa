"""The measurements of ``make bench-gpu`` for one workload, in one section: in process, served, and during a training step."""

from __future__ import annotations

from benchmarks.processes import ProcessGroup
from benchmarks.protocol import Worker
from benchmarks.rounds import Section, Subject
from benchmarks.suite import Effort, Findings, Run

SLICE_S = 0.3
"""Maximum length of a slice."""

SHORT_S = 0.1
"""Length of the slices that only copy or run kernels."""


def run(name: str, processes: ProcessGroup, effort: Effort, findings: Findings, run_section: Run) -> None:
    """Measures a workload.

    Args:
        name: name of the workload.
        processes: group that starts and ends the processes.
        effort: how long to measure.
        findings: findings that the section is added to.
        run_section: function that runs the rounds.
    """
    rows, seconds = effort.rows(name), min(effort.seconds, SLICE_S)
    subjects = _in_process(processes.worker("benchmarks.gpu.in_process"), name, rows, seconds)
    learner = processes.worker("benchmarks.gpu.learner")
    servers = {device: processes.server(name, rows, device=device)[0] for device in ("cuda", "cpu")}
    for device, server in servers.items():
        place = {"address": server.address, "workload": name, "rows": rows}
        for path in ("stream", "ring"):
            learner.call("make", name=f"{path} {device}", path=path, **place)
            subjects.append(_remote(learner, f"{path} {device}", server.pid, seconds))
        for ahead in (True, False):
            subject = f"{'ahead' if ahead else 'by hand'} {device}"
            learner.call("make", name=subject, path="ring", ahead=ahead, step=True, **place)
            subjects.append(_remote(learner, subject, server.pid, seconds))
    learner.call("make_held", name="step only", address=servers["cpu"].address, workload=name, rows=rows)
    subjects.append(_remote(learner, "step only", servers["cpu"].pid, seconds))
    section = Section(name, subjects, effort.rounds)
    run_section(section)
    findings.record(section)


def _in_process(worker: Worker, name: str, rows: int, seconds: float) -> list[Subject]:
    worker.call("make_tdmpc2", name="tdmpc2", workload=name, rows=rows, cache=False)
    if name == "W1":
        worker.call("make_tdmpc2", name="tdmpc2-cached", workload=name, rows=rows, cache=True)
    worker.call("make_local", name="local", workload=name, rows=rows)
    worker.call("make_local", name="local-writes", workload=name, rows=rows, writing=True)
    worker.call("make_limits", over="local")
    subjects = ["tdmpc2", *(["tdmpc2-cached"] if name == "W1" else []), "local", "local-writes", "limit"]
    alone = ["kernels", "copy", "to-host", "to-device"]
    return [_local(worker, subject, seconds) for subject in subjects] + [_local(worker, subject, SHORT_S) for subject in alone]


def _local(worker: Worker, name: str, seconds: float) -> Subject:
    return Subject(name, lambda length: worker.call("run", name=name, seconds=length), seconds)


def _remote(learner: Worker, name: str, server_pid: int, seconds: float) -> Subject:
    return Subject(name, lambda length: learner.call("run", name=name, seconds=length, server_pid=server_pid), seconds)
