"""What a name may be: of an actor or a client. Names stand in logs, errors, batches and terminals of others."""

from __future__ import annotations

import unicodedata

MAX_NAME_CHARS = 128

_DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They turn the text around that they stand in."""

_CATEGORIES = {"Cc": "a control character", "Zl": "a line separator", "Zp": "a paragraph separator", "Cs": "half a surrogate pair"}


def name_fault(name: str, *, least_chars: int = 0) -> str | None:
    """Returns what is wrong with a name, to stand behind what it names; None where nothing is."""
    if not least_chars <= len(name) <= MAX_NAME_CHARS:
        span = f"{least_chars} to {MAX_NAME_CHARS}" if least_chars else f"up to {MAX_NAME_CHARS}"
        return f"{len(name)} characters, expected {span}"
    for place, one in enumerate(name):
        kind = "a direction mark" if one in _DIRECTION_MARKS else _CATEGORIES.get(unicodedata.category(one))
        if kind is not None:
            return f"{kind} (U+{ord(one):04X}) at position {place}, expected text without one"
    return None
