"""What durability costs: insert throughput in each mode over the wire, and the time of a restart.

    python -m benchmarks.durability [--seconds 10] [--folder DIR]

Four processes add episodes of workload W1 (500 rows of 64 float32, an action of 8) one at a time, each waiting for its acknowledgement.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ACTORS = 4
ROWS = 500


def add_episodes(address: str, number: int, seconds: float, counted: object) -> None:
    """Adds until the time is over and tells how many."""
    from touchline import ReplayClient

    rng = np.random.default_rng(number)
    episode = {
        "obs": rng.standard_normal((ROWS, 64), dtype=np.float32),
        "action": rng.standard_normal((ROWS, 8), dtype=np.float32),
        "reward": rng.standard_normal(ROWS, dtype=np.float32),
        "done": np.zeros(ROWS, dtype=np.float32),
    }
    added = 0
    with ReplayClient(address) as client:
        client.add(episode)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            client.add(episode)
            added += 1
    counted.put(added)  # type: ignore[attr-defined]


def serve(data_dir: str, durability: str, rows: int) -> tuple[subprocess.Popen[str], str, float]:
    """Starts a server; returns its process, its address and the seconds until it served."""
    environment = os.environ | {
        "TOUCHLINE_STORAGE__DEVICE": "cpu",
        "TOUCHLINE_CONFIG__BUFFER_SIZE": str(rows),
        "TOUCHLINE_STORAGE__DATA_DIR": data_dir,
        "TOUCHLINE_STORAGE__DURABILITY": durability,
    }
    begin = time.monotonic()
    command = [sys.executable, "-m", "touchline_server", "serve", "--port", "0", "--log-level", "warning"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().removeprefix("listening on ").strip()
    return process, address, time.monotonic() - begin


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a server in order."""
    process.send_signal(signal.SIGTERM)
    process.wait()


def measure(mode: str, folder: Path, seconds: float, rows: int) -> None:
    """Prints one mode's throughput, the file's size, and the time of a restart."""
    data_dir = str(folder / mode) if mode != "none" else ""
    process, address, empty_s = serve(data_dir, mode if data_dir else "batch", rows)
    context = multiprocessing.get_context("spawn")
    counted = context.Queue()
    actors = [context.Process(target=add_episodes, args=(address, number, seconds, counted)) for number in range(ACTORS)]
    for actor in actors:
        actor.start()
    added = sum(counted.get() for _ in actors)
    for actor in actors:
        actor.join()
    stop(process)
    rate = added / seconds
    line = f"{mode:7} {rate:8.0f} episodes/s {rate * ROWS:10.0f} steps/s {rate * ROWS * 296 / 2**20:7.0f} MiB/s"
    if data_dir:
        size = (Path(data_dir) / "touchline.db").stat().st_size
        process, _, full_s = serve(data_dir, mode, rows)
        stop(process)
        stored = min((added + ACTORS) * ROWS, rows) * 296
        line += f"   file {size / 2**20:.0f} MiB for {stored / 2**20:.0f} MiB of rows, restart {full_s - empty_s:.1f} s more than empty"
        line += f" ({(full_s - empty_s) / (stored / 2**30):.1f} s/GiB)"
    print(line, flush=True)


def main() -> None:
    """Measures each mode in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one where left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for mode in ("none", "memory", "batch", "sync"):
            measure(mode, Path(folder), options.seconds, options.rows)


if __name__ == "__main__":
    main()
