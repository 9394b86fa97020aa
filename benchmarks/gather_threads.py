"""What threads bring to the gather of big batches: W2 by ring and stream, and W1 by ring. Writes ``docs/benchmarks/gather-threads.md``.

    python -m benchmarks.gather_threads

Two servers, one of which gathers in one thread, take turns in one run. The learner reads nothing of most batches, unless it copies each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.protocol import cpu_seconds
from benchmarks.rounds import Section, Slice, Subject
from benchmarks.servers import ServerProcess
from benchmarks.statistics import median_interval, ratio_interval
from benchmarks.timing import rate_and_cpu
from benchmarks.workloads import W1, W2, Content, Workload, read_row_ids
from touchline import ReplayClient
from touchline_protos import Batch

REPORT = Path(__file__).parents[1] / "docs" / "benchmarks" / "gather-threads.md"
BAR = 0.97
"""Least ratio of several threads to one, for W2 by ring."""

RUNS = {
    "W2, ring": (W2, "ring", False),
    "W2, ring, a learner that copies each batch": (W2, "ring", True),
    "W2, stream": (W2, "stream", False),
    "W1, ring": (W1, "ring", False),
}
"""Comparisons by title: workload, path, and whether the learner keeps a core of its own busy."""

MEANING = (
    "Only batches, or tensors of them, of 4 MiB or more are gathered by several threads, so W1 runs the same code with either setting: its",
    "ratio is the noise of the comparison. On two cores the learner needs one core itself, and a stream is bound by its connection. With",
    "more cores free, the gather becomes faster with each thread until the memory is busy. The server's CPU time grows a little, since",
    "threads compete for caches and are woken for each batch.",
)
"""Last paragraph of the report."""


def check(batch: Batch, content: Content) -> None:
    """Raises RuntimeError unless a sample of the batch's observations are the stored ones."""
    obs = np.asarray(batch.obs)[:, ::37]
    size = 8 if obs.dtype == np.uint8 else 2
    tags, steps = read_row_ids(obs.reshape(*obs.shape[:2], -1)[..., :size])
    expected = content.obs(tags.reshape(-1), steps.reshape(-1)).reshape(obs.shape)
    if not np.array_equal(obs, expected):
        raise RuntimeError("a batch has other observations than those that were stored")


def _runner(stack: ExitStack, server: ServerProcess, content: Content, path: str, *, busy: bool) -> Callable[[float], Slice]:
    client = stack.enter_context(ReplayClient(server.address, timeout_s=60.0, as_numpy=True))
    batches: Any = client.batches(ring=path == "ring")
    stack.callback(batches.close)

    copy = np.empty((4, 256, *content.workload.obs_shape), content.workload.obs_dtype)

    def take() -> Batch:
        batch: Batch = next(batches)
        if busy:
            copy[...] = batch.obs
        return batch

    def run(length: float) -> Slice:
        check(take(), content)
        if batches.transport != path:
            raise RuntimeError(f"batches come by {batches.transport!r}, expected {path!r}")
        rate, cpu_s = rate_and_cpu(take, length, lambda: cpu_seconds(server.pid))
        return {"batches_per_s": rate, "server_cpu_s": cpu_s}

    return run


def measure(workload: Workload, path: str, *, busy: bool, threads: int, rounds: int, seconds: float) -> dict[str, list[Slice]]:
    """Returns batches a second and the server's CPU seconds a batch, with several threads and with one, a value a round."""
    content = Content(workload)
    subjects = []
    with ExitStack() as stack:
        for number in (threads, 1):
            keys = {"TOUCHLINE_SERVER__GATHER_THREADS": str(number)}
            server = stack.enter_context(ServerProcess(workload, keys=keys))
            client = stack.enter_context(ReplayClient(server.address, timeout_s=60.0))
            for tag in content.tags_to_fill(workload.rows):
                client.add(content.episode(tag), policy_version=tag)
            subjects.append(
                Subject(f"{number} threads" if number > 1 else "1 thread", _runner(stack, server, content, path, busy=busy), seconds)
            )
        section = Section(f"{workload.name}, {path}", subjects, rounds)
        section.run(seed=7, advance=lambda text: None)
    return section.slices


def rows_of(title: str, found: dict[str, list[Slice]]) -> list[str]:
    """Returns the lines of the table for one comparison."""
    rates = {name: [one["batches_per_s"] for one in slices] for name, slices in found.items()}
    costs = {name: [one["server_cpu_s"] * 1e3 for one in slices] for name, slices in found.items()}
    lines = []
    for name in found:
        rate, cost = median_interval(rates[name]), median_interval(costs[name])
        lines.append(
            f"| {title}, {name} | {rate.median:,.0f} | {rate.low:,.0f} to {rate.high:,.0f} "
            f"| {cost.median:.2f} | {cost.low:.2f} to {cost.high:.2f} |"
        )
    ratio, cost_ratio = ratio_interval(*rates.values()), ratio_interval(*costs.values())
    # The bar is for rings. A stream is bound by its connection, and W1 has no tensor that is shared out: its servers are alike.
    verdict = f", at least {BAR}: {'met' if ratio.median >= BAR else 'not met'}" if title.startswith("W2, ring") else ""
    lines.append(
        f"| {title}, ratio{verdict} | **{ratio.median:.2f}** | {ratio.low:.2f} to {ratio.high:.2f} "
        f"| {cost_ratio.median:.2f} | {cost_ratio.low:.2f} to {cost_ratio.high:.2f} |"
    )
    return lines


def report(found: dict[str, dict[str, list[Slice]]], *, rounds: int, rows: dict[str, int]) -> str:
    """Returns the report's text."""
    lines = [
        "# Gather threads: gain and cost",
        "",
        "Written by `python -m benchmarks.gather_threads`. Two servers that differ in `server.gather_threads` take turns in one run;",
        f"medians of {rounds} rounds, with intervals that hold the true median with 95 % probability. Batches of 256 slices of 4 steps,",
        f"out of {', '.join(f'{count:,} rows ({name})' for name, count in rows.items())}.",
        "",
        *(f"- {name}: {value}" for name, value in machine.describe().items()),
        "",
        "| | batches/s | 95 % interval | server CPU, ms a batch | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for title, slices in found.items():
        lines += rows_of(title, slices)
    return "\n".join([*lines, "", *MEANING]) + "\n"


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads that are compared with one")
    parser.add_argument("--rows", type=int, default=40_000, help="rows of W2")
    parser.add_argument("--rounds", type=int, default=21, help="slices of each server")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a slice")
    parser.add_argument("--output", type=Path, default=REPORT, help="file to write")
    args = parser.parse_args()
    sizes = {"W2": args.rows, "W1": W1.rows}
    found = {
        title: measure(
            workload.resized(sizes[workload.name]), path, busy=busy, threads=args.threads, rounds=args.rounds, seconds=args.seconds
        )
        for title, (workload, path, busy) in RUNS.items()
    }
    args.output.write_text(report(found, rounds=args.rounds, rows=sizes), "utf-8")
    sys.stdout.write(args.output.read_text("utf-8"))


if __name__ == "__main__":
    main()
