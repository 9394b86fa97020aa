"""The figures of a table, the same on both sides of the wire."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Counts:
    """What a table holds now, and what happened to it since it was first created.

    ``episodes_added == episodes_stored + episodes_evicted`` and the same for steps, at any moment. A cleared episode counts as evicted.
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
    """Rows that made room for newer ones."""
    episodes_evicted: int = 0
    """Episodes that made room for newer ones."""
    episodes_refused: int = 0
    """Episodes that were malformed or did not fit the schema."""
    episodes_duplicate: int = 0
    """Episodes whose key was stored before: acknowledged, not stored again."""
    episodes_too_short: int = 0
    """Episodes added with fewer than (configured horizon + 1) rows: stored, never sampled at that horizon."""
