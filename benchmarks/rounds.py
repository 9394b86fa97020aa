"""Rounds: every subject gets a slice of each round, in an order of its own each time, so that all of them see the machine's moods alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Slice = dict[str, float]
"""What one slice of one subject measured; see :meth:`benchmarks.timing.SliceTimer.run`."""


@dataclass(frozen=True)
class Subject:
    """Something to measure."""

    name: str
    run: Callable[[float], Slice]
    """Function that runs a slice of the given length in seconds."""
    seconds: float = 0.4


@dataclass
class Section:
    """Subjects that are compared with each other, and what was measured of each, round by round."""

    name: str
    subjects: Sequence[Subject]
    rounds: int
    slices: dict[str, list[Slice]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Slices in all."""
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
