"""How often the fault tests break things, and what they counted: :mod:`tests/faults/conftest` prints the sums at the end."""

from __future__ import annotations

import os
from collections import Counter

import pytest

KILLS = int(os.environ.get("FAULT_KILLS", "3"))
"""Kills of a server in one test."""
ACTOR_KILLS = int(os.environ.get("FAULT_ACTOR_KILLS", "3"))
"""Kills of an actor in one test."""
FLIPS = int(os.environ.get("FAULT_FLIPS", "60"))
"""Flipped bits in one test."""
MESSAGES = int(os.environ.get("FAULT_MESSAGES", "3000"))
"""Mutated and random messages, over all fuzzed places together."""
CONNECTS = int(os.environ.get("FAULT_CONNECTS", "40"))
"""Connects and disconnects in one test."""
EPISODES = int(os.environ.get("FAULT_EPISODES", "6"))
"""Episodes that each actor plays under one fault of the network."""
SCHEDULED = int(os.environ.get("FAULT_SCHEDULE", "12"))
"""Faults of a schedule in which all kinds come together."""
SEED = int(os.environ["FAULT_SEED"]) if os.environ.get("FAULT_SEED") else None
"""Seed of that schedule; None draws a new one for each run and prints it."""
LONG = bool(os.environ.get("FAULT_LONG"))
"""Whether the tests run that wait for a long time."""

long = pytest.mark.skipif(not LONG, reason="waits long: `make test-faults` runs it")

_ORDER = ("server_kills", "actor_kills", "learner_kills", "episodes_acknowledged", "sent_again", "lost", "doubled")

sums: Counter[str] = Counter()


def note(**counts: int) -> None:
    """Adds to the sums. Words are made of the names: ``sent_again`` is printed as ``sent again``."""
    sums.update(counts)


def summary() -> str:
    """Returns the sums as one line; empty if nothing was counted."""
    names = [name for name in _ORDER if name in sums] + sorted(sums.keys() - set(_ORDER))
    return ", ".join(f"{sums[name]:,} {name.replace('_', ' ')}" for name in names)
