"""What durability costs: insert throughput in each mode over the wire, and the time of a restart.

    python -m benchmarks.durability [--seconds 10] [--folder DIR]
    python -m benchmarks.durability --spool [--seconds 10] [--folder DIR]

Four processes add episodes of workload W1 (500 rows of 64 float32, an action of 8) one at a time, each waiting for its acknowledgement.
With ``--spool``, one actor hands such episodes to an EpisodeWriter, in memory and with a spool; then its spool is filled while the server
is away, opened again, and emptied.
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
    """Adds until the time is over and sends back how many episodes were acknowledged."""
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
    """Stops a server cleanly."""
    process.send_signal(signal.SIGTERM)
    process.wait()


def forget_pages(folder: Path) -> None:
    """Drops a folder's files from the page cache, so that the next read comes from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


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
        stored = min((added + ACTORS) * ROWS, rows) * 296
        line += f"   file {size / 2**20:.0f} MiB for {stored / 2**20:.0f} MiB of rows, restart beyond an empty one:"
        for source in ("page cache", "disk"):
            if source == "disk":
                forget_pages(Path(data_dir))
            process, _, full_s = serve(data_dir, mode, rows)
            stop(process)
            line += f" {full_s - empty_s:.1f} s from the {source} ({(full_s - empty_s) / (stored / 2**30):.1f} s/GiB)"
    print(line, flush=True)


def measure_handing_on(address: str, spool_dir: Path | None, seconds: float) -> None:
    """Prints how long ``end_episode`` takes, and how many episodes arrive, with a server that answers."""
    from touchline import EpisodeWriter, ReplayClient

    rng = np.random.default_rng(0)
    obs, action = rng.standard_normal((ROWS, 64), dtype=np.float32), rng.standard_normal((ROWS, 8), dtype=np.float32)
    rows = [{"obs": obs[row], "action": action[row], "reward": 0.5, "done": 0.0} for row in range(ROWS)]
    took: list[float] = []
    with ReplayClient(address) as client, EpisodeWriter(client, spool_dir=spool_dir) as writer:
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            for row in rows:
                writer.append(row)
            before = time.perf_counter()
            writer.end_episode()
            took.append(time.perf_counter() - before)
        writer.flush()
        rate = len(took) / (time.monotonic() - begin)
    took.sort()
    place = "spool" if spool_dir is not None else "memory"
    middle, late = took[len(took) // 2], took[len(took) * 99 // 100]
    print(f"{place:7} end_episode {middle * 1e3:6.2f} ms, p99 {late * 1e3:6.2f} ms {rate:8.0f} episodes/s from one actor", flush=True)


def measure_backlog(address: str, spool_dir: Path, episodes: int) -> None:
    """Prints how fast a spool fills while the server is away, how long opening it takes, and how fast it is sent."""
    from touchline import ReplayClient
    from touchline._spool.queue import Spool
    from touchline.writer import EpisodeWriter
    from touchline_protos.codec import Episode

    rng = np.random.default_rng(0)
    columns = {
        "obs": rng.standard_normal((ROWS, 64), dtype=np.float32),
        "action": rng.standard_normal((ROWS, 8), dtype=np.float32),
        "reward": np.zeros(ROWS, np.float32),
        "done": np.zeros(ROWS, np.float32),
    }
    with ReplayClient(address) as client:
        spool = Spool(spool_dir, limit_bytes=4 << 30)
        begin = time.monotonic()
        for _ in range(episodes):
            assert spool.put(spool.pack(Episode(columns, key=client.next_key())), drop_oldest=False).kept
        filled_s = time.monotonic() - begin
        spool.close()
        size = spool.size_bytes
        begin = time.monotonic()
        writer = EpisodeWriter(client, spool_dir=spool_dir, spool_limit_bytes=4 << 30)
        opened_s = time.monotonic() - begin
        writer.flush()
        sent_s = time.monotonic() - begin - opened_s
        writer.close()
    print(
        f"backlog of {episodes} episodes, {size / 2**20:.0f} MiB on the disk: filled at {episodes / filled_s:.0f} episodes/s, opened in "
        f"{opened_s:.2f} s, sent at {episodes / sent_s:.0f} episodes/s",
        flush=True,
    )


def main() -> None:
    """Measures each mode in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--spool", action="store_true", help="measure an actor's spool instead")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.spool:
            process, address, _ = serve("", "batch", options.rows)
            for round_number in range(3):
                measure_handing_on(address, None, options.seconds)
                measure_handing_on(address, Path(folder) / f"spool-{round_number}", options.seconds)
            measure_backlog(address, Path(folder) / "backlog", 2000)
            stop(process)
            return
        for mode in ("none", "memory", "batch", "sync"):
            measure(mode, Path(folder), options.seconds, options.rows)


if __name__ == "__main__":
    main()
