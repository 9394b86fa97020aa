"""The whole of ``make bench-gpu``: the tests, then the sections, within a time limit; writes the results after each of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

from benchmarks.gpu.device_tests import run_device_tests
from benchmarks.gpu.measurement import Measurement
from benchmarks.gpu.report import GPU_FILE
from benchmarks.gpu.suite import SECTIONS, SLICE_S, UPDATES, Task
from benchmarks.processes import ProcessGroup
from benchmarks.protocol import REPOSITORY
from benchmarks.suite import Effort

TESTS = "tests"
TESTS_SHARE = 0.22
"""Share of the whole time in which the tests have to end."""

MIN_ROWS = 500
"""Rows of an episode of the workloads here."""

DRY = Effort(rounds=1, side_rounds=1, seconds=0.02, shrink=50)
"""Effort of a dry run."""


@dataclass(frozen=True)
class Session:
    """A run.

    Args:
        effort: how much to measure.
        limit_s: length of the whole, at most.
        only: what to do: :data:`TESTS` and names of :data:`~benchmarks.gpu.suite.SECTIONS`.
        seed: seed of the order of the subjects.
        device: ``cuda``; ``cpu`` for a dry run.
        tuned: whether the C library's memory allocation is tuned.
        tell: callback that gets a line about what happens.
    """

    effort: Effort
    limit_s: float
    only: Sequence[str]
    seed: int
    device: str = "cuda"
    tuned: bool = True
    tell: Callable[[str], None] = print

    def run(self, output: Path, head: dict[str, Any]) -> dict[str, Any]:
        """Runs everything and returns the results.

        Args:
            output: folder for the JSON file, which is written anew after each part.
            head: the first keys of the results: ``machine`` and ``settings``.
        """
        output.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        results: dict[str, Any] = {**head, "sections": {}, "failures": {}}

        def write() -> None:
            results["took_s"] = round(time.monotonic() - began, 1)
            (output / GPU_FILE).write_text(json.dumps(results, indent=1) + "\n")

        shares = {TESTS: TESTS_SHARE} | {name: section.share for name, section in SECTIONS.items()}
        shares = {name: share for name, share in shares.items() if name in self.only}
        second = self.limit_s / sum(shares.values())  # a share of 1, in seconds
        share = shares.get(TESTS, 0.0)
        if TESTS in shares:
            self.tell("tests")
            with self._compiling(began + share * second):
                results["tests"] = run_device_tests(share * second)
            self.tell(f"tests: {results['tests']['outcomes']}")
        write()
        for name in [name for name in SECTIONS if name in shares]:
            share += shares[name]
            # Time that an earlier part left is for the later ones.
            try:
                results["sections"][name] = self._section(name, deadline=began + share * second)
            except Exception as error:
                results["failures"][name] = f"{type(error).__name__}: {error}"
                self.tell(f"{name}: {results['failures'][name]}")
            write()
        return results

    @contextmanager
    def _compiling(self, deadline: float) -> Iterator[None]:
        """Compiles the learner of the updates beside the tests, which takes about a minute, up to a deadline."""
        if self.device != "cuda" or UPDATES not in self.only:
            yield
            return
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu.world_model"], cwd=REPOSITORY, stdout=DEVNULL, stderr=DEVNULL)
        try:
            yield
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.0))
        finally:
            process.kill()
            process.wait()

    def _section(self, name: str, *, deadline: float) -> dict[str, Any]:
        section = SECTIONS[name]
        self.tell(f"{name}: filling stores")
        with ProcessGroup(tuned=self.tuned) as processes:
            measurement = Measurement(name, self.effort.rounds, deadline, processes)
            rows = max(self.effort.rows(section.workload), 2 * MIN_ROWS)
            section.prepare(Task(measurement, section.workload, rows, min(self.effort.seconds, SLICE_S), self.device))
            self.tell(f"{name}: {len(measurement.subjects)} subjects")
            measurement.run(seed=self.seed, advance=lambda text: None)
        found = measurement.found()
        self.tell(f"{name}: {found['rounds']} rounds")
        for subject, reason in found["failures"].items():
            self.tell(f"{name} {subject} failed: {reason.strip().splitlines()[-1]}")
        return found
