"""A learner on the host that gathers its batches itself, against a ring of batches. Writes ``docs/benchmarks/device.md``.

    python -m benchmarks.device_transport

One server with shared columns serves both ways, which take turns in one run. A learner either only takes batches or also computes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.gather_threads import check
from benchmarks.protocol import cpu_seconds
from benchmarks.rounds import Section, Slice, Subject
from benchmarks.servers import ServerProcess
from benchmarks.statistics import median_interval, ratio_interval
from benchmarks.timing import rate_and_cpu
from benchmarks.workloads import W1, W2, Content, Workload
from touchline import ReplayClient

REPORT = Path(__file__).parents[1] / "docs" / "benchmarks" / "device.md"

RUNS = {
    "W1": (W1, 0.0),
    "W1, a learner that computes for 1 ms": (W1, 1e-3),
    "W2": (W2, 0.0),
    "W2, a learner that computes for 20 ms": (W2, 20e-3),
}
"""Comparisons by title: workload, and the processor time that the learner spends on each batch, in seconds."""

MEANING = (
    "A learner that only takes batches shows what both processes can do together. One that computes shows what training sees: with a ring",
    "the server gathers meanwhile on another core; a learner that gathers by itself does it in its own time, but writes each byte once and",
    'leaves the server\'s core to actors. So `batches(transport="auto")` asks for a ring on the host.',
)
"""Last paragraph of the report."""


def compute(seconds: float) -> None:
    """Keeps a core busy for this much processor time."""
    ends = time.thread_time() + seconds
    values = np.ones((64, 64), np.float32)
    while time.thread_time() < ends:
        values @ values


def _runner(stack: ExitStack, server: ServerProcess, content: Content, transport: str, compute_s: float) -> Callable[[float], Slice]:
    client = stack.enter_context(ReplayClient(server.address, timeout_s=60.0, as_numpy=True))
    batches: Any = client.batches(transport=transport)
    stack.callback(batches.close)

    def take() -> None:
        next(batches)
        if compute_s:
            compute(compute_s)

    def run(length: float) -> Slice:
        check(next(batches), content)
        if batches.transport != transport:
            raise RuntimeError(f"batches come by {batches.transport!r}, expected {transport!r}: {batches.transport_reason}")
        rate, cpu_s = rate_and_cpu(take, length, lambda: cpu_seconds(server.pid) + time.process_time())
        return {"batches_per_s": rate, "cpu_ms": cpu_s * 1e3}

    return run


def measure(workload: Workload, compute_s: float, *, rounds: int, seconds: float) -> dict[str, list[Slice]]:
    """Returns batches a second and the processor time of a batch, in both processes, by each transport: a value a round."""
    content = Content(workload)
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(workload, keys={"TOUCHLINE_STORAGE__SHARE_COLUMNS": "on"}))
        client = stack.enter_context(ReplayClient(server.address, timeout_s=60.0))
        for tag in content.tags_to_fill(workload.rows):
            client.add(content.episode(tag), policy_version=tag)
        subjects = [Subject(name, _runner(stack, server, content, name, compute_s), seconds) for name in ("device", "ring")]
        section = Section(workload.name, subjects, rounds)
        section.run(seed=7, advance=lambda text: None)
    return section.slices


def rows_of(title: str, found: dict[str, list[Slice]]) -> list[str]:
    """Returns the lines of the table for one comparison."""
    rates = {name: [one["batches_per_s"] for one in slices] for name, slices in found.items()}
    costs = {name: [one["cpu_ms"] for one in slices] for name, slices in found.items()}
    lines = []
    for name in found:
        rate, cost = median_interval(rates[name]), median_interval(costs[name])
        lines.append(
            f"| {title}, {name} | {rate.median:,.0f} | {rate.low:,.0f} to {rate.high:,.0f} "
            f"| {cost.median:.3f} | {cost.low:.3f} to {cost.high:.3f} |"
        )
    ratio, cost_ratio = ratio_interval(*rates.values()), ratio_interval(*costs.values())
    lines.append(
        f"| {title}, device / ring | **{ratio.median:.2f}** | {ratio.low:.2f} to {ratio.high:.2f} "
        f"| {cost_ratio.median:.2f} | {cost_ratio.low:.2f} to {cost_ratio.high:.2f} |"
    )
    return lines


def report(found: dict[str, dict[str, list[Slice]]], *, rounds: int, rows: dict[str, int]) -> str:
    """Returns the report's text."""
    lines = [
        "# Gathering in the learner, on the host",
        "",
        "Written by `python -m benchmarks.device_transport`. A learner takes its batches by `device` (it gathers them itself, from columns",
        f"that the server shares) and through a `ring`, in turns from one server; medians of {rounds} rounds, with intervals that hold",
        "the true median with 95 % probability. Batches of 256 slices of 4 steps, out of",
        f"{', '.join(f'{count:,} rows ({name})' for name, count in rows.items())}. CPU is that of both processes, the computing included.",
        "",
        *(f"- {name}: {value}" for name, value in machine.describe().items()),
        "",
        "| | batches/s | 95 % interval | CPU, ms a batch | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for title, slices in found.items():
        lines += rows_of(title, slices)
    return "\n".join([*lines, "", *MEANING]) + "\n"


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="rows of W2")
    parser.add_argument("--rounds", type=int, default=15, help="slices of each transport")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a slice")
    parser.add_argument("--output", type=Path, default=REPORT, help="file to write")
    args = parser.parse_args()
    sizes = {"W1": W1.rows, "W2": args.rows}
    found = {
        title: measure(workload.resized(sizes[workload.name]), compute_s, rounds=args.rounds, seconds=args.seconds)
        for title, (workload, compute_s) in RUNS.items()
    }
    args.output.write_text(report(found, rounds=args.rounds, rows=sizes), "utf-8")
    sys.stdout.write(args.output.read_text("utf-8"))


if __name__ == "__main__":
    main()
