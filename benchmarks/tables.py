"""Adds to one table while the disk of another is slow, or hangs. Writes ``docs/benchmarks/tables.md``.

    python -m benchmarks.tables

One server, two durable tables that answer after the fsync. The disk of table ``slow`` is slowed down where its database commits; all the
rest, and the other table's disk, is what it always is. Three conditions take turns in one run.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.statistics import median_interval, ratio_interval
from touchline import ReplayClient
from touchline_server import Config
from touchline_server.durability.database import Database
from touchline_server.service.app import ServerThread

REPORT = Path(__file__).parents[1] / "docs" / "benchmarks" / "tables.md"
STEPS, ACTORS, DELAY_S = 500, 4, 0.5
EPISODE = {
    "obs": np.zeros((STEPS, 64), np.float32),
    "action": np.zeros((STEPS, 8), np.float32),
    "reward": np.zeros(STEPS, np.float32),
}
CONDITIONS = {
    "idle": "no actor adds to the other table",
    "slow": f"{ACTORS} actors add to the other table, each of whose commits takes {DELAY_S * 1e3:.0f} ms more",
    "hanging": f"{ACTORS} actors add to the other table, whose disk hangs",
}


class SlowDisk:
    """The disk of table ``slow``: waits before each commit of its database."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.released = threading.Event()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Slows the database down until the block ends."""
        commit = Database.commit

        def slowly(database: Database, *args: Any, **keys: Any) -> None:
            if database.path.parent.name == "slow" and self.delay_s:
                self.released.wait(self.delay_s)
            commit(database, *args, **keys)

        Database.commit = slowly  # type: ignore[method-assign]
        try:
            yield
        finally:
            Database.commit = commit  # type: ignore[method-assign]


def measure(*, rounds: int, seconds: float) -> dict[str, list[np.ndarray]]:
    """Returns the seconds that each add to the table ``fast`` took under each condition, an array a round."""
    disk, rng = SlowDisk(), random.Random(7)
    took: dict[str, list[np.ndarray]] = {name: [] for name in CONDITIONS}
    with tempfile.TemporaryDirectory() as folder, disk.installed():
        config = Config(
            config={"buffer_size": 50_000, "batch_size": 256, "horizon": 3, "min_history": 1},
            storage={"device": "cpu", "data_dir": folder, "durability": "sync"},
            server={"port": 0, "log_level": "error"},
            tables={"fast": {}, "slow": {}},
        )
        with ServerThread(config) as server, ReplayClient(server.address, timeout_s=120.0) as client:
            for _ in range(rounds):
                for name in rng.sample(list(CONDITIONS), len(CONDITIONS)):
                    took[name].append(_slice(client, disk, name, seconds))
    return took


def _slice(client: ReplayClient, disk: SlowDisk, condition: str, seconds: float) -> np.ndarray:
    stop = threading.Event()

    def act() -> None:
        while not stop.is_set():
            client.add(EPISODE, table="slow")

    disk.released.clear()
    disk.delay_s = {"idle": 0.0, "slow": DELAY_S, "hanging": 600.0}[condition]
    actors = [threading.Thread(target=act) for _ in range(ACTORS if disk.delay_s else 0)]
    for actor in actors:
        actor.start()
    took, end = [], time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        client.add(EPISODE, table="fast")
        took.append(time.perf_counter() - begin)
    stop.set()
    disk.released.set()
    for actor in actors:
        actor.join()
    return np.array(took)


def report(took: dict[str, list[np.ndarray]]) -> str:
    """Returns the report's text."""
    rates = {name: [len(one) / one.sum() for one in slices] for name, slices in took.items()}
    lines = [
        "# Tables do not wait for each other",
        "",
        "Written by `python -m benchmarks.tables`: one server, two durable tables (`storage.durability` is `sync`). One actor adds",
        f"episodes of {STEPS} steps of W1 to one of them, one after another. The conditions take turns in one run; medians of",
        f"{len(rates['idle'])} rounds, with intervals that hold the true median with 95 % probability. The other table's disk is slowed",
        "down where its database commits.",
        "",
        *(f"- {name}: {value}" for name, value in machine.describe().items()),
        "",
        "| Meanwhile | adds/s | 95 % interval | of idle | 95 % interval | p50, ms | p99, ms | longest, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, text in CONDITIONS.items():
        rate, ratio = median_interval(rates[name]), ratio_interval(rates[name], rates["idle"])
        every = np.concatenate(took[name]) * 1e3
        lines.append(
            f"| {text} | {rate.median:,.0f} | {rate.low:,.0f} to {rate.high:,.0f} | {ratio.median:.2f} "
            f"| {ratio.low:.2f} to {ratio.high:.2f} | {np.median(every):.1f} | {np.quantile(every, 0.99):.1f} | {every.max():.1f} |"
        )
    lines += [
        "",
        "An add that waited for the other table would take as long as that table's commits. What the actors of the slow table cost is",
        "the CPU time of their own adds; those of the hanging one cost nothing. That none ever waits is tested with a disk that hangs:",
        "`test_tables.py::test_adds_to_a_table_are_acknowledged_while_the_disk_of_another_hangs`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="slices of each condition")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a slice")
    parser.add_argument("--output", type=Path, default=REPORT, help="file to write")
    args = parser.parse_args()
    args.output.write_text(report(measure(rounds=args.rounds, seconds=args.seconds)), "utf-8")
    sys.stdout.write(args.output.read_text("utf-8"))


if __name__ == "__main__":
    main()
