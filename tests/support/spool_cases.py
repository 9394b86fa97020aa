"""Spools for the tests of their maintenance: with episodes that wait, were refused, or are damaged."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from support.dataset_cases import make_episode
from touchline import InvalidEpisodeError
from touchline._spool.file import FILE_NAME
from touchline._spool.queue import Spool
from touchline_protos.codec import Episode, EpisodeKey

LIMIT = 4 << 20


def spooled(number: int, *, obs: int = 4) -> Episode:
    """Returns an episode that follows from its number."""
    return Episode(make_episode(number, obs=obs), key=EpisodeKey("robot", 1, number), actor="left", policy_version=number)


def fill(folder: Path, *episodes: Episode, refused: int = 0, table: str = "") -> None:
    """Puts episodes into a spool, and marks the first few as refused for a reason that contains their number."""
    spool = Spool(folder, limit_bytes=LIMIT, table=table)
    for episode in episodes:
        assert spool.put(spool.pack(episode), drop_oldest=False).kept
    for number in range(refused):
        taken = spool.peek()
        assert taken is not None
        spool.dead_letter(taken[0], InvalidEpisodeError(f"obs: as the test wants, for the {number}th time"))
    spool.close()


def damage(folder: Path, number: int) -> None:
    """Changes an episode's row behind the spool's back."""
    connection = sqlite3.connect(folder / FILE_NAME)
    connection.execute("UPDATE episodes SET length = length + 1 WHERE id = ?", (number,))
    connection.commit()
    connection.close()


def keys_in(folder: Path) -> list[int]:
    """Returns the sequence numbers of the waiting episodes' keys, oldest first."""
    spool = Spool(folder, limit_bytes=LIMIT, table=None)
    keys = spool.waiting_keys()
    spool.close()
    return [key.sequence for key in keys]
