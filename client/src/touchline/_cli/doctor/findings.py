"""What a check found, how bad it is, and what to do about it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any


class Level(str, enum.Enum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing has to be done."""
    WARNING = "warning"
    """Something that holds back what works."""
    FAILED = "failed"

    __str__ = str.__str__


@dataclass(frozen=True, slots=True)
class Finding:
    """Outcome of one check."""

    check: str
    """Name of the check, the same in every version: ``"connect"``."""
    level: Level
    text: str
    """Result in words."""
    advice: str = ""
    """What to do about it; empty if there is nothing to do."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Measurements, by names with units."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the finding as values for JSON."""
        return {"check": self.check, "level": str(self.level), "text": self.text, "advice": self.advice, "figures": self.figures}


class GaveUpError(Exception):
    """A check failed without which no later one makes sense."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding)
        self.finding = finding
        """The finding that ends the checks."""

    def __str__(self) -> str:
        return self.finding.text


def give_up(check: str, text: str, advice: str) -> GaveUpError:
    """Returns the error that ends the checks with a failed one."""
    return GaveUpError(Finding(check, Level.FAILED, text, advice))
