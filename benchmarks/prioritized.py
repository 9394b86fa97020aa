"""What the law ``prioritized`` costs: over the ring, against TorchRL's prioritised sampler, and by the size of the store.

Writes ``docs/benchmarks/prioritized.json`` and from it ``prioritized.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.protocol import Worker
from benchmarks.rounds import Section, Slice, Subject
from benchmarks.statistics import Interval, median_interval, ratio_interval

PRIORITIZED_FILE = "prioritized.json"
REPORT_FILE = "prioritized.md"

SMALL_ROWS = 10_000
"""Rows of the smaller store whose draws are compared."""

SUBJECTS_A_ROUND = 8
"""Subjects of a round."""

RATIOS = (
    ("W1 ring, `prioritized` with an update for each batch / `episode`", "ring prioritized", "ring episode", "at least", 0.5),
    ("W1 ring, the same / TorchRL's PrioritizedSliceSampler in process", "ring prioritized", "TorchRL", "at least", 20),
    ("a draw under `prioritized` at 1 M rows / at 10 k rows", "draw 1 M", "draw 10 k", "at most", 2),
)
"""Ratios with a bar: title, the two subjects, and the bar."""

FOOT = """\
W1: slices of 4 steps, 256 in a batch, {rows:,} rows; the priorities of all 3 x 256 transitions are sent back after each batch.
Over the ring, {updated:,} slices were updated, and {dropped:,} dropped because the server did not keep up.

TorchRL ({versions}) in process: `PrioritizedSliceSampler(rows, alpha=0.6, beta=0.4, slice_len=4, traj_key="episode",
strict_length=True, cache_values=False)` on a `LazyTensorStorage(rows)`, batches of 256 x 4 rows, `update_priority` of all their rows after
each. *TorchRL, cached* has `cache_values=True`: it keeps the trajectories that it found until the next write, and nothing is written here,
which no actor allows. TorchRL draws a start by the priority of its own step only; Touchline by that of the whole slice.

With more processes ready to run than cores, both sides wait for other work, and the row by CPU time says more than the first one. What is
left of the law's cost is per slice, not per batch, because batches for all free slots of a ring are drawn together. Nearly half each:
finding starts among a million, in memory that is in no cache, and setting the weights of the five starts that an update of three
transitions changes. Updates go back through the ring's memory, which costs both sides together about an eighth of a batch."""

HEAD = """\
# The law `prioritized`: costs

Written by `python -m benchmarks prioritized`. All subjects took turns in one run, in another order each round. Medians, with intervals
that hold the true median with 95 % probability (order statistics); ratios are taken round by round."""


def measure(
    *, rows: int, rounds: int, seconds: float, seed: int, torchrl_python: Path | None, advance: Callable[[str], None]
) -> dict[str, Any]:
    """Measures all subjects in turns.

    Args:
        rows: rows of the stores.
        rounds: slices of each subject.
        seconds: length of a slice.
        seed: seed of the orders.
        torchrl_python: interpreter for TorchRL's sampler; None for this one.
        advance: callback that gets the name of the next slice before it runs.

    Returns:
        The measurements, for :func:`write_prioritized_report`.
    """
    with ExitStack() as stack:
        advance("filling stores")
        worker = stack.enter_context(Worker("benchmarks.prioritized_worker"))
        stack.callback(lambda: worker.call("close"))
        theirs = stack.enter_context(Worker("benchmarks.torchrl_worker", python=torchrl_python))
        theirs.call("make", name="TorchRL, cached", rows=rows, cache=True)
        versions = theirs.call("make", name="TorchRL", rows=rows, cache=False)
        for law in ("episode", "prioritized"):
            worker.call("make_ring", name=f"ring {law}", law=law, rows=rows)
            worker.call("make_local", name=f"in process {law}", law=law, rows=rows)
        worker.call("make_local", name="small", law="prioritized", rows=SMALL_ROWS)

        def run(name: str, process: Worker = worker) -> Callable[[float], Slice]:
            return lambda length: process.call("run", name=name, seconds=length)

        def draw(name: str) -> Callable[[float], Slice]:
            return lambda length: worker.call("draw", name=name, seconds=length)

        names = ("ring episode", "ring prioritized", "in process episode", "in process prioritized")
        subjects = [Subject(name, run(name), seconds) for name in names]
        subjects += [Subject(name, run(name, theirs), seconds) for name in ("TorchRL", "TorchRL, cached")]
        subjects.append(Subject("draw 1 M", draw("in process prioritized"), seconds / 2))
        subjects.append(Subject("draw 10 k", draw("small"), seconds / 2))
        section = Section("laws", subjects, rounds)
        section.run(seed=seed, advance=advance)
        counters = worker.call("counters", name="ring prioritized")
    return {"versions": versions, "rows": rows, "rounds": rounds, "slices": section.slices, "counters": counters}


def write_prioritized_report(folder: Path) -> Path:
    """Writes the report from the measurements in a folder, and returns its path."""
    results = json.loads((folder / PRIORITIZED_FILE).read_text())
    path = folder / REPORT_FILE
    path.write_text("\n".join(_lines(results)) + "\n")
    return path


def _lines(results: dict[str, Any]) -> Iterator[str]:
    slices = results["slices"]
    yield HEAD
    yield ""
    for name, value in (results["machine"] | {"settings": results["settings"]}).items():
        yield f"- {name}: {value}"
    yield ""
    yield "| | bar | measured | 95 % interval | |"
    yield "|---|---|---|---|---|"
    for title, over, under, word, bar in RATIOS:
        ratio = ratio_interval(_values(slices[over]), _values(slices[under]))
        interval = f"{ratio.low:.2f} to {ratio.high:.2f}"
        yield f"| {title} | {word} {bar:g} | **{ratio.median:.2f}** | {interval} | {_verdict(ratio, word, bar)} |"
    costs = ([slice_["cpu_s"] for slice_ in slices[name]] for name in ("ring episode", "ring prioritized"))
    cost = ratio_interval(*costs)
    yield f"| the first, by CPU time of learner and server for each batch | | {cost.median:.2f} | {cost.low:.2f} to {cost.high:.2f} | |"
    yield ""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield FOOT.format(rows=results["rows"], versions=versions, **results["counters"])
    yield ""
    yield "| | median | 95 % interval |"
    yield "|---|---|---|"
    for name, measured in slices.items():
        found = median_interval(_values(measured))
        unit, scale = ("us", 1e6) if name.startswith("draw") else ("batches/s", 1)
        yield f"| {name} | {found.median * scale:,.0f} {unit} | {found.low * scale:,.0f} to {found.high * scale:,.0f} |"


def _values(measured: list[Slice]) -> list[float]:
    return [slice_.get("batches_per_s") or slice_["draw_s"] for slice_ in measured]


def _verdict(ratio: Interval, word: str, bar: float) -> str:
    sign = 1 if word == "at least" else -1
    worst, best = (ratio.low, ratio.high) if sign == 1 else (ratio.high, ratio.low)
    if sign * worst >= sign * bar:
        return "clearly met"
    if sign * ratio.median >= sign * bar:
        return "met"
    return "undecided: the interval holds the bar" if sign * best >= sign * bar else "not met"
