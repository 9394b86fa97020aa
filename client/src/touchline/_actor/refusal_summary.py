"""Why episodes were refused, counted by reason: thousands of them are told in a few lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

NUMBER = re.compile(r"(?<![A-Za-z\d])\d+(,\d{3})*")
"""Also ``12,000``; not that in ``float32``."""
EXAMPLES = 3
"""Refusals of one reason that are kept with their text."""


@dataclass(slots=True)
class RefusalSummary:
    """The episodes that were refused for one reason."""

    count: int = 0
    """How many."""
    examples: list[tuple[int, str]] = field(default_factory=list)
    """Position and full message of the first few."""


def add_refusal(reasons: dict[str, RefusalSummary], position: int, message: str) -> None:
    """Counts an episode among those of its reason, which is the message with ``#`` for its numbers."""
    refusals = reasons.setdefault(NUMBER.sub("#", message), RefusalSummary())
    refusals.count += 1
    if len(refusals.examples) < EXAMPLES:
        refusals.examples.append((position, message))
