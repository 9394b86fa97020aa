"""What it costs to count: W1 with metrics and someone who watches, against without. ``python -m benchmarks.metrics``.

Prints the ratios and writes ``docs/benchmarks/metrics.md``.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from benchmarks.protocol import REPOSITORY, cpu_seconds
from benchmarks.servers import ServerProcess
from benchmarks.statistics import Interval, ratio_interval
from benchmarks.workloads import W1, Content
from touchline import ReplayClient

ROWS = 100_000
ROUNDS, SLICE_S, WARM_UP_S = 100, 0.25, 0.03
BAR = 0.98
KINDS = {"ring": "batches from a ring", "stream": "batches from a stream", "sample": "calls of `sample()`", "add": "calls of `add()`"}
NOTE = Path(REPOSITORY) / "docs/benchmarks/metrics.md"


WATCHER = """
import sys, threading, time, urllib.request
from touchline import ReplayClient

address, page = sys.argv[1:]

def listen():
    with urllib.request.urlopen(page + "api/events") as events:
        for _ in events:
            pass

def scrape():
    while True:
        urllib.request.urlopen(page + "metrics").read()
        time.sleep(1.0)

client = ReplayClient(address)
snapshots = client.watch_status(1.0, newest_episodes=8)
next(snapshots)
for one in (listen, scrape):
    threading.Thread(target=one, daemon=True).start()
print("watching", flush=True)
for _ in snapshots:
    pass
"""
"""Program that watches a server: the page's events, a scrape and a ``Status`` snapshot a second each."""


class Side:
    """A server in a process of its own, full of W1's rows, and a client of each kind.

    Args:
        stack: resources to close at the end.
        keys: keys of the server's configuration, by their environment variables.
    """

    def __init__(self, stack: ExitStack, keys: Mapping[str, str]) -> None:
        content = Content(W1.resized(ROWS))
        self.server = stack.enter_context(ServerProcess(content.workload, keys=keys))
        client = stack.enter_context(ReplayClient(self.server.address, as_numpy=True, timeout_s=60.0))
        client.load(content.episode(tag) for tag in content.tags_to_fill(ROWS))
        episode = content.episode(0)
        ring, stream = client.batches(ring=True), client.batches(ring=False)
        next(ring), next(stream)
        assert ring.transport == "ring", ring.transport_reason
        self._steps: dict[str, Callable[[], object]] = {
            "ring": lambda: sum(1 for _ in islice(ring, 20)),
            "stream": lambda: sum(1 for _ in islice(stream, 20)),
            "sample": lambda: [client.sample() for _ in range(20)],
            "add": lambda: [client.add(episode) for _ in range(20)],
        }

    def watch(self, stack: ExitStack) -> None:
        """Keeps a page open, scrapes the metrics and takes a snapshot each second, from another process, until the stack ends."""
        watcher = subprocess.Popen([sys.executable, "-c", WATCHER, self.server.address, self.server.page_url], stdout=subprocess.PIPE)
        stack.callback(watcher.wait)
        stack.callback(watcher.kill)
        assert watcher.stdout is not None
        stack.callback(watcher.stdout.close)
        assert watcher.stdout.readline() == b"watching\n"

    def measure(self, kind: str) -> tuple[float, float]:
        """Works for some time; returns batches or episodes a second, and CPU seconds of both processes for each."""
        self._repeat(kind, WARM_UP_S)
        cpu = time.process_time() + cpu_seconds(self.server.pid)
        begin = time.perf_counter()
        done = self._repeat(kind, SLICE_S)
        elapsed = time.perf_counter() - begin
        return done / elapsed, (time.process_time() + cpu_seconds(self.server.pid) - cpu) / done

    def _repeat(self, kind: str, seconds: float) -> int:
        ends, done = time.perf_counter() + seconds, 0
        while time.perf_counter() < ends:
            self._steps[kind]()
            done += 20
        return done


def cost(rounds: int = ROUNDS) -> dict[str, tuple[Interval, Interval]]:
    """Returns for each kind the ratio with / without: of what is done a second, and of its CPU time."""
    with ExitStack() as stack:
        without = Side(stack, {"TOUCHLINE_METRICS__ENABLED": "false", "TOUCHLINE_HTTP__ENABLED": "off"})
        within = Side(stack, {"TOUCHLINE_HTTP__ENABLED": "on", "TOUCHLINE_HTTP__PORT": "0"})
        within.watch(stack)
        measured: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {kind: [] for kind in KINDS}
        for number in range(rounds):
            for kind in KINDS:
                if number % 2:
                    first = within.measure(kind)
                    measured[kind].append((first, without.measure(kind)))
                else:
                    second = without.measure(kind)
                    measured[kind].append((within.measure(kind), second))
    return {
        kind: (
            ratio_interval([one[0] for one, _ in pairs], [other[0] for _, other in pairs]),
            ratio_interval([one[1] for one, _ in pairs], [other[1] for _, other in pairs]),
        )
        for kind, pairs in measured.items()
    }


def main() -> None:
    """Measures, prints and writes the page."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    rows = []
    for kind, (speed, cpu) in cost(rounds).items():
        found, used = (f"{ratio.median:.3f} (95 %: {ratio.low:.3f} to {ratio.high:.3f})" for ratio in (speed, cpu))
        rows.append(f"| {KINDS[kind]} | {found} | {used} | {BAR} |")
    NOTE.write_text(
        "# Cost of metrics\n\n"
        f"`python -m benchmarks.metrics`. W1's rows and batches, a store of {ROWS:,} rows, two servers side by side: one with metrics, "
        "an open page, a scrape of `/metrics` and a `Status` snapshot with 8 episodes a second each, one with `metrics.enabled = false` "
        "and no page. Interleaved: "
        f"{rounds} rounds of {SLICE_S:g} s for each kind and side, in turn.\n\n"
        "| | done a second, with / without | CPU time of client and server, with / without | bar for the first, at least |\n"
        "|---|---|---|---|\n" + "\n".join(rows) + "\n\nThe CPU time is the steadier of the two on a machine that does other work too.\n",
        "utf-8",
    )
    print(NOTE.read_text("utf-8"))


if __name__ == "__main__":
    main()
