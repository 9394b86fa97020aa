"""Rounds: every subject gets a slice of each round, in a new order each time, so that the machine's fluctuations affect all alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Slice = dict[str, float]
"""Measurements of one slice of one subject; see :meth:`benchmarks.timing.SliceTimer.run`."""


@dataclass(frozen=True)
class Subject:
    """One thing to measure."""

    name: str
    run: Callable[[float], Slice]
    """Function that runs a slice of the given length in seconds."""
    seconds: float = 0.4


@dataclass
class Section:
    """Subjects that are compared with each other, with the measurements of each, round by round."""

    name: str
    subjects: Sequence[Subject]
    rounds: int
    slices: dict[str, list[Slice]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Total number of slices."""
        return self.rounds * len(self.subjects)

    def run(self, *, seed: int, advance: Callable[[str], None]) -> None:
        """Runs all rounds.

        Args:
            seed: seed of the orders.
            advance: callback that gets a subject's name before its slice.
        """
        order = random.Random(seed)
        self.slices = {subject.name: [] for subject in self.subjects}
        for _ in range(self.rounds):
            for subject in order.sample(list(self.subjects), len(self.subjects)):
                advance(f"{self.name} {subject.name}")
                self.slices[subject.name].append(subject.run(subject.seconds))
