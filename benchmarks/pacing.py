"""What actors of every kind have in common.

Needs nothing but the standard library.
"""

from __future__ import annotations

READY_BYTES = 48 << 20
"""Approximate size of the episodes that an actor makes in advance: the benchmark does not measure making them."""

MAX_READY = 32

FIRST_TAG = 100_000
"""Tags of actors' episodes begin here, those of the fill lie below."""


def ready_tags(number: int, *, episode_bytes: int) -> range:
    """Returns the tags of the episodes that an actor makes in advance; no two actors share one."""
    count = min(max(READY_BYTES // episode_bytes, 2), MAX_READY)
    first = FIRST_TAG * (number + 1)
    return range(first, first + count)
