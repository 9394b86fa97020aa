"""Runs a mixed load for a given time and checks that the server's memory does not grow.

    python -m benchmarks.soak [--minutes 10] [--out docs/benchmarks/soak.png] [--growth-mib 32]

Four actors, two learners by stream and one by ring, each a process, use a durable server at a steady rate. Again and again one of them
is killed (`SIGKILL`) and another one takes its place; learners close their stream and open the next one. Prints a line a minute and draws
the server's memory. Ends with 1 if that grew more than the bound after the warm-up, a batch was wrong, or a process failed by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple, Self

import numpy as np

ROWS = 100
OBS, ACTION = 64, 8
CAPACITY = 40_000
"""Rows of the ring, which is full and evicts after some 8 seconds at the rate below."""
CAST = ("actor", "actor", "actor", "actor", "stream", "stream", "ring")
PER_SECOND = {"actor": 12.0, "stream": 40.0, "ring": 80.0}
"""Episodes or batches a second of each process: a steady load that two cores can carry."""
BATCH_SIZE, HORIZON = 128, 5
BATCHES_OF_A_STREAM = 500
"""Batches after which a learner closes its stream and opens another one."""
KILL_EVERY_S = 5.0
SAMPLE_EVERY_S = 2.0
WARM_UP_SHARE = 0.3
"""Share of the time for warm-up: the ring fills, threads and pools start, the C library takes the memory that it will keep."""


# One client, in a process of its own.


def act(address: str, number: int) -> Iterator[None]:
    """Adds an episode at each ``next``; its rows and its policy version hold the same number."""
    from touchline import ReplayClient

    with ReplayClient(address, actor=f"actor {number % 16}") as client:
        for version in itertools.count():
            marker = np.float32(version % 1000)
            client.add(
                {
                    "obs": np.full((ROWS, OBS), marker, np.float32),
                    "action": np.full((ROWS, ACTION), marker, np.float32),
                    "reward": np.full(ROWS, marker, np.float32),
                },
                policy_version=version,
            )
            yield


def learn(address: str, *, ring: bool) -> Iterator[None]:
    """Takes a batch at each ``next`` and checks it."""
    from touchline import ReplayClient

    with ReplayClient(address, as_numpy=True) as client:
        while True:
            with client.batches(batch_size=BATCH_SIZE, horizon=HORIZON, ring=ring) as batches:
                for batch in itertools.islice(batches, BATCHES_OF_A_STREAM):
                    expected = (batch.policy_version % 1000).astype(np.float32)
                    if not (batch.obs == expected[None, :, None]).all() or not (batch.reward == expected[None, :, None]).all():
                        raise AssertionError(f"a wrong batch: episodes {batch.episode_id.tolist()}")
                    yield


def play(kind: str, address: str, number: int) -> None:
    """Does one client's work until killed; prints once a second what was done and how long each item took, in ms, as JSON."""
    work = act(address, number) if kind == "actor" else learn(address, ring=kind == "ring")
    pause_s, took_ms, told = 1.0 / PER_SECOND[kind], [], time.monotonic()
    for due in itertools.count():
        begin = time.monotonic()
        next(work)
        now = time.monotonic()
        if due:  # the first one connects
            took_ms.append(round((now - begin) * 1e3, 2))
        if now - told >= 1.0:
            print(json.dumps(took_ms), flush=True)
            took_ms, told = [], now
        time.sleep(max(0.0, begin + pause_s - time.monotonic()))


# The whole.


class Client:
    """A client's process; a thread collects what it reports."""

    def __init__(self, kind: str, address: str, number: int) -> None:
        self.kind = kind
        self.took_ms: list[float] = []
        command = [sys.executable, "-m", "benchmarks.soak", "--play", kind, address, str(number)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def take(self) -> list[float]:
        """Returns the time of each episode or batch since the last call, in ms."""
        taken, self.took_ms = self.took_ms, []
        return taken

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # a killed process may leave half a line
                self.took_ms += json.loads(line)


class Memory(NamedTuple):
    """Resources that the server holds at a moment."""

    at_s: float
    resident_mib: float
    threads: int
    files: int


class Server:
    """A durable server in a process and a folder of its own."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="touchline-soak-")
        self.data_dir = Path(self._folder.name) / "data"
        environment = os.environ | {
            "TOUCHLINE_CONFIG__BUFFER_SIZE": str(CAPACITY),
            "TOUCHLINE_CONFIG__MIN_HISTORY": "0",
            "TOUCHLINE_STORAGE__DEVICE": "cpu",
            "TOUCHLINE_STORAGE__DATA_DIR": str(self.data_dir),
        }
        command = [sys.executable, "-m", "touchline_server", "serve", "--port", "0", "--log-level", "error"]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().removeprefix("listening on ").strip()

    def memory(self, at_s: float) -> Memory:
        folder = Path(f"/proc/{self._process.pid}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        return Memory(at_s, int(status["RssAnon"].split()[0]) / 1024, int(status["Threads"]), len(os.listdir(folder / "fd")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        self._folder.cleanup()


class Minute(NamedTuple):
    """One line of the table."""

    memory: Memory
    store_mib: float
    per_second: dict[str, float]
    p99_ms: dict[str, float]
    kills: int


HEADER = "     s | memory MiB  threads  files  store MiB | episodes/s  p99 ms | stream/s  p99 ms |   ring/s  p99 ms | kills"


def line(minute: Minute) -> str:
    """Returns a line of the table."""
    memory, rates, p99 = minute.memory, minute.per_second, minute.p99_ms
    held = f"{memory.at_s:6.0f} | {memory.resident_mib:10.1f} {memory.threads:8d} {memory.files:6d} {minute.store_mib:10.1f}"
    actors = f"{rates['actor']:10.1f} {p99['actor']:7.1f}"
    learners = " | ".join(f"{rates[kind]:8.1f} {p99[kind]:7.1f}" for kind in ("stream", "ring"))
    return f"{held} | {actors} | {learners} | {minute.kills:5d}"


class Soak:
    """The load and its observation."""

    def __init__(self, server: Server, *, seed: int) -> None:
        self._server = server
        self._rng = random.Random(seed)
        self._numbers = itertools.count()
        self._clients = [self._client(kind) for kind in CAST]
        self._took_ms: dict[str, list[float]] = {kind: [] for kind in PER_SECOND}
        self.samples: list[Memory] = []
        self.kills = 0
        self.episodes = 0

    def run(self, seconds: float, every_s: float) -> Iterator[Minute]:
        """Yields a line every ``every_s`` seconds."""
        begin = told = killed = time.monotonic()
        while (now := time.monotonic()) - begin < seconds:
            time.sleep(SAMPLE_EVERY_S)
            self._look()
            self.samples.append(self._server.memory(time.monotonic() - begin))
            if now - killed >= KILL_EVERY_S:
                killed = now
                self._kill_one()
            if time.monotonic() - told >= every_s:
                yield self._minute(time.monotonic() - told)
                told = time.monotonic()

    def end(self) -> None:
        """Ends every client."""
        for client in self._clients:
            client.kill()

    def _client(self, kind: str) -> Client:
        return Client(kind, self._server.address, next(self._numbers))

    def _look(self) -> None:
        for client in self._clients:
            self._took_ms[client.kind] += client.take()
            if client.process.poll() is not None:
                raise SystemExit(f"soak: a client ({client.kind}) ended by itself with {client.process.returncode}")

    def _kill_one(self) -> None:
        index = self._rng.randrange(len(self._clients))
        gone = self._clients[index]
        gone.kill()
        self._took_ms[gone.kind] += gone.take()
        self._clients[index] = self._client(gone.kind)
        self.kills += 1

    def _minute(self, seconds: float) -> Minute:
        self.episodes += len(self._took_ms["actor"])
        took, self._took_ms = self._took_ms, {kind: [] for kind in PER_SECOND}
        store = sum(file.stat().st_size for file in self._server.data_dir.iterdir()) / 2**20
        rates = {kind: len(times) / seconds for kind, times in took.items()}
        p99 = {kind: float(np.percentile(times, 99)) if times else float("nan") for kind, times in took.items()}
        return Minute(self.samples[-1], store, rates, p99, self.kills)


def growth_mib(samples: Sequence[Memory]) -> float:
    """Returns the growth of memory after the warm-up: the median of its last quarter over that of its first."""
    after = [sample.resident_mib for sample in samples if sample.at_s >= WARM_UP_SHARE * samples[-1].at_s]
    quarter = max(1, len(after) // 4)
    return median(after[-quarter:]) - median(after[:quarter])


def draw(samples: Sequence[Memory], file: Path) -> None:
    """Draws the server's memory over time."""
    from benchmarks.plots import COLOURS, GRID, INK, plt

    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.plot([sample.at_s / 60 for sample in samples], [sample.resident_mib for sample in samples], color=COLOURS["ours"])
    axes.axvspan(0, WARM_UP_SHARE * samples[-1].at_s / 60, color=GRID, label="warm-up")
    axes.set_ylim(0, 1.2 * max(sample.resident_mib for sample in samples))
    axes.set_xlim(left=0)
    axes.set_xlabel("minutes")
    axes.set_ylabel("memory of the server, MiB")
    axes.set_title("Mixed load with clients that are killed", loc="left", color=INK)
    axes.legend(frameon=False, loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, facecolor="white")
    plt.close(figure)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)s)")
    parser.add_argument("--every-s", type=float, default=60.0, help="seconds between two lines (default: %(default)s)")
    parser.add_argument("--growth-mib", type=float, default=32.0, help="most that memory may grow after the warm-up (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/soak.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed when (default: %(default)s)")
    parser.add_argument("--play", nargs=3, metavar=("KIND", "ADDRESS", "NUMBER"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """Runs the load; returns the exit status."""
    asked = parse_arguments(words)
    if asked.play:
        kind, address, number = asked.play
        play(kind, address, int(number))
        return 0
    with ExitStack() as stack:
        server = stack.enter_context(Server())
        soak = Soak(server, seed=asked.seed)
        stack.callback(soak.end)
        print(HEADER, flush=True)
        for minute in soak.run(asked.minutes * 60, asked.every_s):
            print(line(minute), flush=True)
    draw(soak.samples, asked.out)
    grown = growth_mib(soak.samples)
    verdict = f"{'within' if grown <= asked.growth_mib else 'MORE THAN'} the bound of {asked.growth_mib:g} MiB"
    print(f"memory grew by {grown:.1f} MiB after the warm-up, {verdict}; {soak.episodes} episodes added, {soak.kills} clients killed")
    return 0 if grown <= asked.growth_mib else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
