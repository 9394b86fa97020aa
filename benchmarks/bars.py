"""The bars that the project set itself: ratios within one run, and whether they are reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.statistics import Interval, ratio_interval

Sections = Mapping[str, Mapping[str, Any]]
"""Section by name: its ``slices`` by subject, as in the results' JSON."""


@dataclass(frozen=True)
class Bar:
    """One ratio of two subjects of one section."""

    text: str
    section: str
    over: str
    under: str
    value: float
    prototypes: str
    metric: str = "batches_per_s"
    at_most: bool = False
    goal: bool = False
    """Whether it is a wish, not a requirement."""


BARS = (
    Bar("W1, ring, unloaded / gather limit in process", "W1", "ring", "limit", 0.85, "0.90"),
    Bar("W1, ring, under 10 k steps/s of inserts / Reverb under the same", "peers W1", "ring-10k", "reverb-10k", 80, "90"),
    Bar("W1, TCP stream, unloaded / TD-MPC2's in-process buffer (cache off, 1 M rows)", "W1", "stream", "tdmpc2", 12, "10 to 15"),
    Bar("W1, TCP stream / Reverb, unloaded", "peers W1", "stream", "reverb", 20, "21 to 26"),
    Bar("W1, ring / TD-MPC2's in-process buffer (cache off, 1 M rows)", "W1", "ring", "tdmpc2", 25, "26 to 37"),
    Bar("W2, ring / gather limit", "W2", "ring", "limit", 0.85, "0.90"),
    Bar("W2, TCP stream / Reverb", "peers W2", "stream", "reverb", 2, "1 to 2"),
    Bar("W1 inserts, four actors / Reverb's best", "peers W1", "insert-4", "reverb-insert", 18, "27", metric="steps_per_s"),
    Bar("cost of a draw at 1 M rows / at 10 k rows", "W1", "draw-large", "draw-small", 1.2, "1.0", metric="draw_s", at_most=True),
    Bar("in-process `ReplayBuffer.sample()` / TD-MPC2's buffer (cache off, 1 M rows)", "W1", "local", "tdmpc2", 15, "20 to 40"),
    Bar(
        "a goal, not a bar: W1, TCP stream, four actors inserting flat out / unloaded", "W1", "stream-flat", "stream", 0.4, "0.2", goal=True
    ),
)


@dataclass(frozen=True)
class Verdict:
    """The result for one bar."""

    bar: Bar
    ratio: Interval | None
    """None: not measured in this run."""

    @property
    def word(self) -> str:
        """``met`` if the interval reaches the bar, with ``clearly`` if all of it does."""
        if self.ratio is None:
            return "not measured"
        # Inverted if less is better, so that more is better in either case.
        sign = -1 if self.bar.at_most else 1
        worst, best = sorted((sign * self.ratio.low, sign * self.ratio.high))
        if best < sign * self.bar.value:
            return "not met"
        return "clearly met" if worst >= sign * self.bar.value else "met"


def judge(sections: Sections, bars: Sequence[Bar] = BARS) -> list[Verdict]:
    """Returns the verdict on each bar."""
    return [Verdict(bar, _ratio(sections, bar)) for bar in bars]


def values(sections: Sections, section: str, subject: str, metric: str) -> list[float] | None:
    """Returns a subject's values, round by round; None if they were not measured."""
    slices = sections.get(section, {}).get("slices", {}).get(subject)
    if not slices or metric not in slices[0]:
        return None
    return [float(one[metric]) for one in slices]


def _ratio(sections: Sections, bar: Bar) -> Interval | None:
    over = values(sections, bar.section, bar.over, bar.metric)
    under = values(sections, bar.section, bar.under, bar.metric)
    if not over or not under:
        return None
    # A subject that failed midway has fewer rounds than the other: those that both have are compared.
    count = min(len(over), len(under))
    return ratio_interval(over[:count], under[:count])
