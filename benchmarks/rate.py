"""Rate limits: whether the ratio holds, and what a limit that does not bind costs. ``python -m benchmarks.rate``.

Prints both and writes ``docs/benchmarks/rate.md``.
"""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.protocol import REPOSITORY, child_environment
from benchmarks.statistics import Interval, ratio_interval
from touchline import BatchStream, ReplayClient
from touchline_server import Config, ReplayBuffer
from touchline_server.service.app import ServerThread

TARGET = 8.0
ACTORS, LEARNERS, SECONDS, SETTLING_S = 4, 2, 120, 5
ROUNDS, SLICE_S = 15, 0.5
ROWS, STEPS = 100_000, 500
NOTE = Path(REPOSITORY) / "docs/benchmarks/rate.md"

EPISODE = {
    "obs": np.zeros((STEPS, 64), np.float32),
    "action": np.zeros((STEPS, 8), np.float32),
    "reward": np.zeros(STEPS, np.float32),
}
# No action led to an episode's first row.
EPISODE["action"][0] = EPISODE["reward"][0] = np.nan


def make_config(*, samples_per_insert: float, tolerance: float = 0.0) -> Config:
    """Returns the configuration of a server for W1's rows, with a limit."""
    return Config(
        config={"buffer_size": ROWS, "batch_size": 256, "horizon": 3, "min_history": 1},
        storage={"device": "cpu"},
        sampling={"seed": 1},
        rate={"samples_per_insert": samples_per_insert, "tolerance": tolerance},
        server={"port": 0, "log_level": "error"},
    )


def filled(config: Config) -> ReplayBuffer:
    """Returns a full buffer, filled before the limit counts."""
    buffer = ReplayBuffer(config)
    buffer.set_rate(samples_per_insert=0)
    for _ in range(ROWS // STEPS):
        buffer.add(EPISODE)
    buffer.set_rate(samples_per_insert=config.rate.samples_per_insert)
    return buffer


def batches_per_s(stream: BatchStream, seconds: float) -> float:
    """Takes batches for some time, and returns how many a second."""
    begin, taken = time.perf_counter(), 0
    while time.perf_counter() < begin + seconds:
        for _ in islice(stream, 50):
            taken += 1
    return taken / (time.perf_counter() - begin)


def cost() -> Interval:
    """Measures a ring with a limit that does not bind over one without."""
    free, limited = make_config(samples_per_insert=0), make_config(samples_per_insert=TARGET, tolerance=1e15)
    with (
        ServerThread(free, filled(free)) as first,
        ServerThread(limited, filled(limited)) as second,
        ReplayClient(first.address) as one,
        ReplayClient(second.address) as two,
        one.batches(ring=True) as without,
        two.batches(ring=True) as within,
    ):
        for stream in (without, within):
            batches_per_s(stream, SLICE_S)
        speeds = [(batches_per_s(within, SLICE_S), batches_per_s(without, SLICE_S)) for _ in range(ROUNDS)]
        assert (without.transport, within.transport) == ("ring", "ring")
    return ratio_interval([over for over, _ in speeds], [under for _, under in speeds])


def band(seconds: float = SECONDS) -> tuple[float, float, float, list[float]]:
    """Runs actors and learners flat out, each a process.

    Returns:
        The ratio at the end, the tolerance, the lowest and the highest number of slices owed in turn, once a second.
    """
    config = make_config(samples_per_insert=TARGET)
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
    ring = cost()
    ratio, tolerance, steps, owed = band()
    settled = owed[SETTLING_S:]
    inside = sum(abs(value) <= tolerance for value in settled)
    found = f"{ring.median:.3f} (95 %: {ring.low:.3f} to {ring.high:.3f})"
    text = (
        "# Rate limits\n\n"
        f"`python -m benchmarks.rate`. W1's rows and batches (256 slices, horizon 3), a store of {ROWS:,} rows.\n\n"
        "| | measured | bar |\n|---|---|---|\n"
        f"| ring with a limit that does not bind / without, {ring.count} rounds | {found} | at least 0.97 |\n"
        f"| seconds within the band of {TARGET:g} slices per step, {ACTORS} actors and {LEARNERS} learners, all but the first {SETTLING_S} "
        f"| {inside} of {len(settled)} | all |\n\n"
        f"Ratio at the end: {ratio:.4f} slices per step over {steps:,.0f} steps. Slices owed, once a second: {min(settled):,.0f} to "
        f"{max(settled):,.0f}, tolerance {tolerance:,.0f}.\n"
    )
    print(text)
    NOTE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        play(sys.argv[1], sys.argv[2])
    else:
        main()
