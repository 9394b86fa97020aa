"""The sections of ``make bench-peers``: Reverb is tuned, then meets Touchline in the same rounds."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.processes import ACTORS, PACED_STEPS_PER_S, ActorGroup, ProcessGroup
from benchmarks.protocol import REPOSITORY, Worker
from benchmarks.rounds import Section, Slice, Subject
from benchmarks.suite import Effort, Findings, Run
from benchmarks.workloads import WORKLOADS

PEERS_PYTHON = REPOSITORY / ".venv-peers" / "bin" / "python"
"""Interpreter of the peers' environment."""

CHUNK_LENGTHS = (1, 4, 16, 64)
"""Steps in a chunk, the unit that Reverb compresses and sends."""

WORKERS, IN_FLIGHT = (1, 2, 4), (256, 768, 2048)
"""Tried for the best of the tables; Reverb's advice is 2 to 3 batches in flight."""

SWEEP_SECONDS = 0.8

INSERTED_ITEMS = 20_000
"""Size of the table in the insert runs: inserting evicts, as in any full buffer."""

Trial = dict[str, Any]


def versions() -> str:
    """Returns the versions of Reverb and TensorFlow."""
    asked = "from importlib.metadata import version as v; print('dm-reverb', v('dm-reverb') + ', tensorflow', v('tensorflow'))"
    return subprocess.run([str(PEERS_PYTHON), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


def run(
    name: str, processes: ProcessGroup, effort: Effort, findings: Findings, run_section: Run, tell: Callable[[str], None]
) -> list[Trial]:
    """Tunes Reverb for a workload and measures it against Touchline.

    Args:
        name: name of the workload.
        processes: group that starts and ends the processes.
        effort: how long to measure.
        findings: findings that the section ``peers <name>`` is added to.
        run_section: function that runs the rounds.
        tell: callback that gets a line about what is going on.

    Returns:
        The tried settings and their speed.
    """
    trials = _tune(name, effort, processes.tuned, tell)
    best = max(trials, key=lambda trial: trial["batches_per_s"])
    quickest = max((trial for trial in trials if "steps_per_s" in trial), key=lambda trial: trial["steps_per_s"])
    rows = effort.rows(name)
    peers = _Peers(processes, name, rows)
    packed = best["columns"] == "packed"
    tell(f"{name}: filling Reverb, {rows:,} rows")
    tables = {"reverb": {"max_size": rows, "packed": packed}}
    tables["inserted"] = {"max_size": min(rows, INSERTED_ITEMS), "packed": quickest["columns"] == "packed"}
    sampled = {"reverb": best}
    if packed and name == "W1":
        # Most users keep the columns separate. (On pixels the difference is not worth a second table.)
        sampled["reverb-apart"] = max((trial for trial in trials if trial["columns"] == "apart"), key=lambda trial: trial["batches_per_s"])
        tables["reverb-apart"] = {"max_size": rows, "packed": False}
    address = peers.start(tables)
    writers, inserters = peers.writers(), peers.writers()
    learner = processes.worker("benchmarks.peers.reverb_learner", python=PEERS_PYTHON)
    seconds = effort.seconds * (2.0 if name == "W2" else 1.0)
    subjects = []
    for table, trial in sampled.items():
        columns = trial["columns"] == "packed"
        peers.prepare(inserters, address, table, packed=columns, **_writer_options(trial))
        peers.fill(inserters)
        options = {key: trial[key] for key in ("sampler", "workers", "in_flight")}
        learner.call("make", name=table, address=address, workload=name, rows=rows, table=table, packed=columns, **options)
        subjects.append(Subject(table, _sampling(learner, table, peers.pid), seconds))
    reverb = subjects[0]
    # The actors under load use the writer that costs the server least.
    load = peers.prepare(writers, address, "reverb", packed=packed, structured=True)
    inserting = peers.prepare(inserters, address, "inserted", packed=quickest["columns"] == "packed", **_writer_options(quickest))

    tell(f"{name}: filling Touchline, {rows:,} rows")
    server, _ = processes.server(name, rows)
    ours = processes.worker("benchmarks.learner")
    remote = {path: processes.remote(ours, server, name, rows, path, name=path, seconds=seconds) for path in ("stream", "ring")}
    actors = processes.actor_group(server, name, rows, ACTORS)
    subjects += remote.values()
    for subject, group in ((reverb, load), (remote["stream"], actors), (remote["ring"], actors)):
        for how, pace in (("10k", PACED_STEPS_PER_S), ("flat", 0.0)):
            subjects.append(Subject(f"{subject.name}-{how}", group.under_load(subject.run, steps_per_s=pace), seconds))
    subjects += [
        Subject("reverb-insert", inserting.insert(server_pid=peers.pid), seconds * 1.5),
        Subject("insert-4", actors.insert(server_pid=server.pid), seconds),
    ]
    section = Section(f"peers {name}", subjects, effort.rounds)
    run_section(section)
    findings.record(section)
    return trials


class _Peers:
    """Reverb's processes for one workload."""

    def __init__(self, processes: ProcessGroup, workload: str, rows: int) -> None:
        self._processes, self._workload, self._rows = processes, workload, rows
        self._server = processes.worker("benchmarks.peers.reverb_server", python=PEERS_PYTHON)

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._server.pid

    def start(self, tables: dict[str, dict[str, Any]]) -> str:
        """Serves tables and returns the address."""
        return str(self._server.call("start", workload=self._workload, tables=tables))

    def writers(self) -> list[Worker]:
        """Starts four writers."""
        return [self._processes.worker("benchmarks.peers.reverb_writer", python=PEERS_PYTHON) for _ in range(ACTORS)]

    def prepare(self, writers: Sequence[Worker], address: str, table: str, **options: Any) -> ActorGroup:
        """Connects writers to a table, closing any earlier connection."""
        for number, writer in enumerate(writers):
            writer.send("prepare", address=address, workload=self._workload, rows=self._rows, number=number, table=table, **options)
        for writer in writers:
            writer.receive()
        return ActorGroup(writers)

    def fill(self, writers: Sequence[Worker]) -> None:
        """Fills a table by its prepared writers."""
        for number, writer in enumerate(writers):
            writer.send("fill", first=number, every=len(writers), rows=self._rows)
        for writer in writers:
            writer.receive()


def _tune(name: str, effort: Effort, tuned: bool, tell: Callable[[str], None]) -> list[Trial]:
    """Tries chunk lengths and columns, reading and writing, with one sampler, then samplers with those that were read fastest."""
    seconds = min(effort.seconds * 2, SWEEP_SECONDS)
    rows = min(effort.rows(name) // 5, 20_000 if name == "W1" else 4_000)
    with ProcessGroup(tuned=tuned) as processes:
        peers = _Peers(processes, name, rows)
        kinds: list[Trial] = [
            {"chunk_length": length, "columns": columns}
            for columns in ("packed", "apart")
            for length in (*CHUNK_LENGTHS, "auto", "structured")
        ]
        tables = {_table(kind): {"max_size": rows, "packed": kind["columns"] == "packed"} for kind in kinds}
        address = peers.start(tables)
        learner = processes.worker("benchmarks.peers.reverb_learner", python=PEERS_PYTHON)

        def measure(trial: Trial) -> Trial:
            tell(f"{name}: Reverb, " + ", ".join(str(value) for value in trial.values()))
            options = {key: trial[key] for key in ("sampler", "workers", "in_flight")}
            packed = trial["columns"] == "packed"
            learner.call("make", name="trial", address=address, workload=name, rows=rows, table=_table(trial), packed=packed, **options)
            rates = [learner.call("run", name="trial", seconds=seconds, server_pid=peers.pid)["batches_per_s"] for _ in range(2)]
            learner.call("drop", name="trial")
            return {**trial, "batches_per_s": max(rates)}

        writers = peers.writers()
        trials = []
        for kind in kinds:
            tell(f"{name}: Reverb, filling {_table(kind)}")
            group = peers.prepare(writers, address, _table(kind), packed=kind["columns"] == "packed", **_writer_options(kind))
            peers.fill(writers)
            inserting = group.insert(server_pid=peers.pid)
            steps_per_s = max(inserting(seconds)["steps_per_s"] for _ in range(2))
            trials.append({**measure({**kind, "sampler": "dataset", "workers": 2, "in_flight": 768}), "steps_per_s": steps_per_s})
        best = max(trials, key=lambda trial: trial["batches_per_s"])
        kind = {key: best[key] for key in ("chunk_length", "columns")}
        for workers in WORKERS:
            for in_flight in IN_FLIGHT:
                if (workers, in_flight) != (2, 768):
                    trials.append(measure({**kind, "sampler": "dataset", "workers": workers, "in_flight": in_flight}))
        trials.append(measure({**kind, "sampler": "client", "workers": 1, "in_flight": WORKLOADS[name].batch_size}))
    return trials


def _sampling(learner: Worker, name: str, server_pid: int) -> Callable[[float], Slice]:
    return lambda seconds: learner.call("run", name=name, seconds=seconds, server_pid=server_pid)


def _writer_options(kind: Trial) -> Trial:
    """Returns a writer's options for chunks."""
    length = kind["chunk_length"]
    return {"structured": length == "structured", "chunk_length": length if isinstance(length, int) else 0}


def _table(kind: Trial) -> str:
    return f"{kind['columns']}-{kind['chunk_length']}"
