"""What a mixed batch costs: W1 over the ring, two tables half and half against one table of all rows. Writes ``docs/benchmarks/mixing.md``.

    python -m benchmarks.mixing

Both learners are of one server, and take turns in one run. The server's CPU time is nearly all that of the thread that fills the ring.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.protocol import cpu_seconds
from benchmarks.rounds import Section, Slice, Subject
from benchmarks.servers import ServerProcess
from benchmarks.statistics import median_interval, ratio_interval
from benchmarks.timing import rate_and_cpu
from benchmarks.workloads import W1, Content
from touchline import ReplayClient

REPORT = Path(__file__).parents[1] / "docs" / "benchmarks" / "mixing.md"
BAR = 0.9
"""Least ratio of the mix to the table."""


MEANING = (
    "A mixed batch has the same bytes from the same number of rows, and is gathered with the same calls: the tables' columns lie in",
    'one address space (docs/design.md, "Draw and gather"). What it costs more is a second draw, pin and reservation for each group of',
    "batches, and provenance that is written for each table. CPU time is less disturbed by other processes on the machine than batches",
    "a second.",
)
"""Last paragraph of the report."""


def measure(*, rows: int, rounds: int, seconds: float) -> dict[str, list[Slice]]:
    """Returns batches a second and the server's CPU seconds a batch of each subject, a value a round."""
    content = Content(W1.resized(rows))
    with ServerProcess(content.workload) as server, ReplayClient(server.address, timeout_s=60.0) as client:
        for table, capacity in (("one", rows), ("online", rows // 2), ("demos", rows // 2)):
            client.create_table(table, buffer_size=capacity)
            for tag in content.tags_to_fill(capacity):
                client.add(content.episode(tag), policy_version=tag, table=table)
        mix = client.batches(mix={"online": 0.5, "demos": 0.5})
        one = client.batches(table="one")

        def run(batches: Any) -> Callable[[float], Slice]:
            def take() -> Any:
                return next(batches)

            def slice_(length: float) -> Slice:
                rate, cpu_s = rate_and_cpu(take, length, lambda: cpu_seconds(server.pid))
                return {"batches_per_s": rate, "server_cpu_s": cpu_s}

            return slice_

        section = Section(
            "mixing", [Subject("two tables, half and half", run(mix), seconds), Subject("one table", run(one), seconds)], rounds
        )
        section.run(seed=7, advance=lambda text: None)
        assert mix.transport == one.transport == "ring"
        mix.close()
        one.close()
    return section.slices


def report(found: dict[str, list[Slice]], rows: int) -> str:
    """Returns the report's text."""
    rates = {name: [one["batches_per_s"] for one in slices] for name, slices in found.items()}
    costs = {name: [one["server_cpu_s"] * 1e6 for one in slices] for name, slices in found.items()}
    ratio = ratio_interval(*rates.values())
    # A server's rate is the inverse of its time a batch.
    cpu_ratio = ratio_interval(*reversed(costs.values()))
    lines = [
        "# Mixed batches: costs",
        "",
        "Written by `python -m benchmarks.mixing`. Both learners are of one server and take turns in one run; medians of",
        f"{ratio.count} rounds, with intervals that hold the true median with 95 % probability.",
        f"W1: slices of 4 steps, 256 in a batch, {rows:,} rows.",
        "",
        *(f"- {name}: {value}" for name, value in machine.describe().items()),
        "",
        "| W1, ring | batches/s | 95 % interval | server CPU, µs a batch | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for name in found:
        rate, cost = median_interval(rates[name]), median_interval(costs[name])
        lines.append(
            f"| {name} | {rate.median:,.0f} | {rate.low:,.0f} to {rate.high:,.0f} "
            f"| {cost.median:,.0f} | {cost.low:,.0f} to {cost.high:,.0f} |"
        )
    verdict = "met" if ratio.median >= BAR else "not met"
    lines.append(
        f"| two tables / one, at least {BAR} | **{ratio.median:.2f}** ({verdict}) | {ratio.low:.2f} to {ratio.high:.2f} "
        f"| {cpu_ratio.median:.2f} | {cpu_ratio.low:.2f} to {cpu_ratio.high:.2f} |"
    )
    lines += ["", *MEANING]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the one table, and of the two together")
    parser.add_argument("--rounds", type=int, default=21, help="slices of each subject")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a slice")
    parser.add_argument("--output", type=Path, default=REPORT, help="file to write")
    args = parser.parse_args()
    args.output.write_text(report(measure(rows=args.rows, rounds=args.rounds, seconds=args.seconds), args.rows), "utf-8")
    sys.stdout.write(args.output.read_text("utf-8"))


if __name__ == "__main__":
    main()
