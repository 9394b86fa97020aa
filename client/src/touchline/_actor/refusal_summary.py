"""Summary of refused episodes by reason, so that thousands of refusals take a few lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

NUMBER = re.compile(r"(?<![A-Za-z\d])\d+(,\d{3})*")
"""Number in an error message, such as ``12,000``, but not the one in ``float32``."""
EXAMPLES = 3
"""Maximum number of refusals of one reason whose full message is kept."""


@dataclass(slots=True)
class RefusalSummary:
    """Episodes that were refused for one reason."""

    count: int = 0
    """Number of episodes."""
    examples: list[tuple[int, str]] = field(default_factory=list)
    """Position and full message of the first few."""


def add_refusal(reasons: dict[str, RefusalSummary], position: int, message: str) -> None:
    """Adds an episode to the summary of its reason, which is the message with ``#`` in place of each number."""
    summary = reasons.setdefault(NUMBER.sub("#", message), RefusalSummary())
    summary.count += 1
    if len(summary.examples) < EXAMPLES:
        summary.examples.append((position, message))
