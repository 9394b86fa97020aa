"""The rules for names of actors and clients, which other people see in logs, errors, batches and terminals."""

from __future__ import annotations

import unicodedata

MAX_NAME_CHARS = 128
"""Maximum number of characters in the name of an actor or a client."""

_DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text around them."""

_CATEGORIES = {"Cc": "a control character", "Zl": "a line separator", "Zp": "a paragraph separator", "Cs": "half a surrogate pair"}


def name_fault(name: str, *, min_chars: int = 0) -> str | None:
    """Returns what is wrong with a name, for a message that begins with what the name is of; None if it is valid.

    Args:
        name: name to check.
        min_chars: minimum number of characters.
    """
    if not min_chars <= len(name) <= MAX_NAME_CHARS:
        span = f"{min_chars} to {MAX_NAME_CHARS}" if min_chars else f"up to {MAX_NAME_CHARS}"
        return f"{len(name)} characters, expected {span}"
    for place, one in enumerate(name):
        kind = "a direction mark" if one in _DIRECTION_MARKS else _CATEGORIES.get(unicodedata.category(one))
        if kind is not None:
            return f"{kind} (U+{ord(one):04X}) at position {place}, expected text without one"
    return None
