"""What storing an episode changes in the durable store."""

from __future__ import annotations

import math
import time

import numpy as np

from touchline_protos.codec import Episode
from touchline_protos.types.dtypes import BFLOAT16
from touchline_server.durability.plan import PlannedInsert
from touchline_server.durability.records import Change, EpisodeRow, payloads_of
from touchline_server.errors import InvalidEpisodeError


def make_insert(episode: Episode, digest: int, planned: PlannedInsert, *, incoming: bool, copy: bool) -> Change:
    """Returns what an episode changes.

    Args:
        episode: checked.
        digest: of its columns.
        planned: what it does to the ring.
        incoming: the row convention, for its return.
        copy: whether the change has bytes of its own; if not, the episode's arrays must stay as they are until it is written.
    """
    row = EpisodeRow(
        planned.episode_id,
        episode.key,
        episode.actor,
        episode.policy_version,
        episode.length,
        episode_return(episode.columns["reward"], incoming=incoming),
        time.time(),
        digest,
    )
    return Change(row, payloads_of(episode.columns, copy=copy), planned.evicted, planned.schema)


def episode_return(reward: np.ndarray, *, incoming: bool) -> float | None:
    """Returns the sum of the defined rewards, None where it is not finite."""
    defined = reward[1:] if incoming else reward[:-1]
    if defined.dtype == BFLOAT16:
        defined = (np.ascontiguousarray(defined).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        total = float(np.sum(defined, dtype=np.float64))
    return total if math.isfinite(total) else None


def check_storable(episode: Episode) -> None:
    """Raises InvalidEpisodeError where a name or number does not go into a table."""
    key = episode.key
    for name, text in (("actor", episode.actor), ("key.client_id", key.client_id if key is not None else "")):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidEpisodeError(f"{name}: {text[:40]!r}, expected text that UTF-8 can hold") from None
    for name, number in (("incarnation", key.incarnation), ("sequence", key.sequence)) if key is not None else ():
        if not -(2**63) <= number < 2**63 - 1:
            raise InvalidEpisodeError(f"key.{name}: {number}, expected a 64-bit integer below its largest")
