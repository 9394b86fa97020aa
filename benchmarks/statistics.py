"""Medians, and intervals that say how far to trust them, with no assumption about the noise.

Needs nothing but the standard library.
"""

from __future__ import annotations

import math
import statistics as stdlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A median and a confidence interval of it."""

    median: float
    low: float
    high: float
    coverage: float
    """Probability with which such an interval holds the true median; below 0.95 for fewer than 6 values."""
    count: int


def median_interval(values: Sequence[float], *, coverage: float = 0.95) -> Interval:
    """Returns the median and the narrowest interval between two values that covers it.

    From order statistics (Conover, Practical Nonparametric Statistics, 3rd ed., 3.2): the j-th smallest and the j-th largest of n
    independent values enclose the true median with probability 1 - 2 P(Binomial(n, 1/2) < j), whatever their distribution.

    Args:
        values: the measured values, at least one.
        coverage: minimum coverage; the widest interval is returned if n is too small for it.

    Raises:
        ValueError: there are no values.
    """
    ordered = sorted(values)
    count = len(ordered)
    if not count:
        raise ValueError("no values, expected at least one")
    j = 1
    while j < (count + 1) // 2 and _coverage(count, j + 1) >= coverage:
        j += 1
    return Interval(stdlib.median(ordered), ordered[j - 1], ordered[count - j], _coverage(count, j), count)


def ratio_interval(over: Sequence[float], under: Sequence[float]) -> Interval:
    """Returns the median of the ratios round by round, which the machine's fluctuations from round to round do not affect.

    Raises:
        ValueError: the numbers of rounds differ.
    """
    return median_interval([a / b for a, b in zip(over, under, strict=True)])


def _coverage(count: int, j: int) -> float:
    """Probability that the j-th smallest and the j-th largest of ``count`` values enclose the median."""
    tail = sum(math.comb(count, k) for k in range(j)) / float(2**count)
    return max(1 - 2 * tail, 0.0)
