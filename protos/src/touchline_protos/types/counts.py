"""Counts of a table, the same on both sides of the wire."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of a table: what it stores now, and what has happened since it was created. Immutable.

    ``episodes_added == episodes_stored + episodes_evicted`` at any moment, and the same for steps. A cleared episode counts as evicted.
    """

    steps_stored: int = 0
    """Rows stored now."""
    episodes_stored: int = 0
    """Episodes stored now."""
    steps_added: int = 0
    """Rows ever added."""
    episodes_added: int = 0
    """Episodes ever added."""
    steps_evicted: int = 0
    """Rows replaced by newer ones, or cleared."""
    episodes_evicted: int = 0
    """Episodes replaced by newer ones, or cleared."""
    episodes_refused: int = 0
    """Episodes refused: malformed, not of the schema, or too large."""
    episodes_duplicate: int = 0
    """Episodes sent again under a known key: acknowledged, not stored again."""
    episodes_too_short: int = 0
    """Episodes added with fewer than (configured horizon + 1) rows: stored, never sampled at that horizon."""

    def __str__(self) -> str:
        return ", ".join(f"{one.name}={getattr(self, one.name)}" for one in fields(self))
