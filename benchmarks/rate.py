"""Rate limits: whether the ratio holds, and what a limit that does not bind costs. ``python -m benchmarks.rate``.

Prints both and writes ``docs/benchmarks/rate.md``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.protocol import REPOSITORY, child_environment, cpu_seconds
from benchmarks.servers import ServerProcess
from benchmarks.statistics import Interval, ratio_interval
from benchmarks.timing import take_for
from benchmarks.workloads import W1, Content
from touchline import ReplayClient
from touchline_server import Config
from touchline_server.service.app import ServerThread

TARGET = 8.0
ACTORS, LEARNERS, SECONDS, SETTLING_S = 4, 2, 120, 5
ROUNDS, SLICE_S, WARM_UP_S = 60, 0.2, 0.02
ROWS, STEPS = 100_000, 500
NOTE = Path(REPOSITORY) / "docs/benchmarks/rate.md"

EPISODE = {
    "obs": np.zeros((STEPS, 64), np.float32),
    "action": np.zeros((STEPS, 8), np.float32),
    "reward": np.zeros(STEPS, np.float32),
}
# No action led to an episode's first row.
EPISODE["action"][0] = EPISODE["reward"][0] = np.nan


def make_config() -> Config:
    """Returns the configuration of a server for W1's rows, with the target as its limit."""
    return Config(
        config={"buffer_size": ROWS, "batch_size": 256, "horizon": 3, "min_history": 1},
        storage={"device": "cpu"},
        sampling={"seed": 1},
        rate={"samples_per_insert": TARGET},
        server={"port": 0, "log_level": "error"},
    )


class RingLearner:
    """A learner on the ring of a server in a process of its own, which is full of W1's rows.

    Args:
        stack: resources to close at the end.
        keys: keys of the server's configuration, by their environment variables.
    """

    def __init__(self, stack: ExitStack, keys: Mapping[str, str]) -> None:
        content = Content(W1.resized(ROWS))
        self._server = stack.enter_context(ServerProcess(content.workload, keys=keys))
        client = stack.enter_context(ReplayClient(self._server.address, as_numpy=True, timeout_s=60.0))
        client.load(content.episode(tag) for tag in content.tags_to_fill(ROWS))
        self._stream = client.batches(ring=True)
        next(self._stream)
        assert self._stream.transport == "ring", self._stream.transport_reason

    def measure(self, seconds: float) -> tuple[float, float]:
        """Takes batches for some time; returns batches a second, and CPU seconds a batch of both processes."""
        take_for(lambda: next(self._stream), WARM_UP_S)
        cpu = time.process_time() + cpu_seconds(self._server.pid)
        begin, taken = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begin) < seconds:
            for _ in islice(self._stream, 50):
                taken += 1
        return taken / elapsed, (time.process_time() + cpu_seconds(self._server.pid) - cpu) / taken


def cost() -> tuple[Interval, Interval]:
    """Returns the ratio of a ring with a limit that does not bind to one without: of its batches a second, and of its CPU time a batch."""
    limit = {"TOUCHLINE_RATE__SAMPLES_PER_INSERT": str(TARGET), "TOUCHLINE_RATE__TOLERANCE": "1e15"}
    with ExitStack() as stack:
        sides = [RingLearner(stack, {}), RingLearner(stack, limit)]
        rounds = []
        for number in range(ROUNDS):
            order = (0, 1) if number % 2 else (1, 0)
            measured = {side: sides[side].measure(SLICE_S) for side in order}
            rounds.append((measured[1], measured[0]))
    speeds, cpus = ([(within[kind], without[kind]) for within, without in rounds] for kind in (0, 1))
    return ratio_interval(*zip(*speeds, strict=True)), ratio_interval(*zip(*cpus, strict=True))


def band(seconds: float = SECONDS) -> tuple[float, float, float, list[float]]:
    """Runs actors and learners flat out, each a process.

    Returns:
        The ratio at the end, the tolerance, the lowest and the highest number of slices owed in turn, once a second.
    """
    config = make_config()
    with ServerThread(config) as server:
        roles = ["actor"] * ACTORS + ["learner"] * LEARNERS
        command = [sys.executable, "-m", "benchmarks.rate"]
        children = [
            subprocess.Popen([*command, role, server.address], cwd=REPOSITORY, env=child_environment(tuned=False)) for role in roles
        ]
        try:
            while not server.buffer.table.rate.status().slices_delivered:
                time.sleep(0.05)
            owed = []
            for _ in range(int(seconds)):
                time.sleep(1.0)
                owed.append(server.buffer.table.rate.status().owed_slices)
            status = server.buffer.table.rate.status()
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.wait()
    return status.slices_delivered / status.steps_added, status.rate.tolerance, float(status.steps_added), owed


def play(role: str, address: str) -> None:
    """Acts or learns until it is killed."""
    with ReplayClient(address, timeout_s=60) as client:
        while role == "actor":
            client.add(EPISODE)
        with client.batches() as stream:
            for _ in stream:
                pass


def main() -> None:
    """Measures both, prints them and writes the page."""
    load = os.getloadavg()[0]
    speed, cpu = cost()
    ratio, tolerance, steps, owed = band()
    settled = owed[SETTLING_S:]
    inside = sum(abs(value) <= tolerance for value in settled)
    found, used = (f"{ratio.median:.3f} (95 %: {ratio.low:.3f} to {ratio.high:.3f})" for ratio in (speed, cpu))
    text = (
        "# Rate limits\n\n"
        f"`python -m benchmarks.rate`. W1's rows and batches (256 slices, horizon 3), a store of {ROWS:,} rows.\n\n"
        "| | measured | bar |\n|---|---|---|\n"
        f"| ring with a limit that does not bind / without, batches a second, {speed.count} rounds | {found} | at least 0.97 |\n"
        f"| the same, CPU time a batch of server and learner | {used} | |\n"
        f"| seconds within the band of {TARGET:g} slices per step, {ACTORS} actors and {LEARNERS} learners, all but the first {SETTLING_S} "
        f"| {inside} of {len(settled)} | all |\n\n"
        f"Ratio at the end: {ratio:.4f} slices per step over {steps:,.0f} steps. Slices owed, once a second: {min(settled):,.0f} to "
        f"{max(settled):,.0f}, tolerance {tolerance:,.0f}.\n\n"
        f"The sides of the first rows are servers in processes of their own, in turns of {SLICE_S:g} s, each first in every other round.\n"
        f"Processes that were ready to run, on {os.cpu_count()} cores: {load:.0f}. With more than cores, CPU time says more than speed.\n"
    )
    print(text)
    NOTE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        play(sys.argv[1], sys.argv[2])
    else:
        main()
