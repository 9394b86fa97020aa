"""Compares two checkouts of the project: is the new one slower anywhere?

Both sides live in processes of their own and take turns, slice by slice, in a random order. Everything is made anew for each block, because
where a process's memory happens to lie is worth several percent for as long as it lives.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.protocol import REPOSITORY, Worker
from benchmarks.statistics import Interval, median_interval, ratio_interval

RUNS = (
    "sample",
    "add",
    "W1 ring",
    "W1 stream",
    "W2 ring",
    "W2 stream",
    "insert",
    "insert memory",
    "insert batch",
    "insert sync",
)

W2_ROWS = 10_000
"""Rows of the W2 stores: both sides hold one at the same time, and a full one takes 3.7 GB."""


@dataclass
class Comparison:
    """Measurements of one run on both sides, slice by slice."""

    name: str
    old: list[float] = field(default_factory=list)
    new: list[float] = field(default_factory=list)

    def ratio(self) -> Interval:
        """Returns new / old, the median over the rounds."""
        return ratio_interval(self.new, self.old)

    def row(self) -> str:
        """Returns a row of a Markdown table."""
        ratio = self.ratio()
        old, new = median_interval(self.old).median, median_interval(self.new).median
        return f"| {self.name} | {old:,.0f} | {new:,.0f} | {ratio.median:.3f} | {ratio.low:.3f} to {ratio.high:.3f} | {ratio.count} |"


def compare(
    old: Path,
    *,
    only: Sequence[str],
    blocks: int,
    rounds: int,
    seconds: float,
    seed: int,
    advance: Callable[[str], None],
    shrink: int = 1,
) -> list[Comparison]:
    """Measures two checkouts.

    Args:
        old: the other checkout; this one is the new one.
        only: names of the runs, from :data:`RUNS`.
        blocks: how often everything is built from scratch.
        rounds: slices of each run and side in a block.
        seconds: length of a slice.
        seed: seed of the orders.
        advance: callback that gets the name of the next slice before it runs.
        shrink: divides the stores' sizes.

    Raises:
        ValueError: a name in ``only`` is unknown.
        WorkerError: one side failed, or imports another checkout than it should.
    """
    unknown = set(only) - set(RUNS)
    if unknown or not only:
        raise ValueError(f"only: {', '.join(sorted(unknown)) or 'nothing'}, expected some of {', '.join(RUNS)}")
    order = random.Random(seed)
    found = [Comparison(name) for name in only]
    for block in range(blocks):
        with ExitStack() as stack:
            advance(f"block {block + 1} of {blocks}: filling")
            sides = {"old": stack.enter_context(_side(old, only, shrink)), "new": stack.enter_context(_side(REPOSITORY, only, shrink))}
            for _ in range(rounds):
                for comparison in order.sample(found, len(found)):
                    for side in order.sample(("old", "new"), 2):
                        advance(comparison.name)
                        getattr(comparison, side).append(sides[side].call("run", name=comparison.name, seconds=seconds))
            for worker in sides.values():
                worker.call("close")
    return found


def table(found: Sequence[Comparison]) -> Iterator[str]:
    """Yields the lines of a Markdown table."""
    yield "| | old, a second | new, a second | new / old | 95 % interval | rounds |"
    yield "|---|---|---|---|---|---|"
    for comparison in found:
        yield comparison.row()


def _side(tree: Path, only: Sequence[str], shrink: int) -> Worker:
    """Returns the process that measures a checkout, with everything that the runs need."""
    worker = Worker("benchmarks.tree_worker", tree=tree)
    try:
        for folder in worker.call("where"):
            if not Path(folder).is_relative_to(tree.resolve()):
                raise RuntimeError(f"imported {folder}, expected the product code of {tree}")
        if {"sample", "add"} & set(only):
            worker.call("make_local", rows=1_000_000 // shrink)
        for workload, rows in (("W1", 1_000_000), ("W2", W2_ROWS)):
            if {f"{workload} ring", f"{workload} stream"} & set(only):
                worker.call("make_batches", workload=workload, rows=rows // shrink)
        for name in only:
            if name.startswith("insert"):
                worker.call("make_inserts", name=name, durability=name.removeprefix("insert").strip() or "none")
    except BaseException:
        worker.close()
        raise
    return worker
