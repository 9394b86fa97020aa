"""The episodes that can be sampled, as a CUDA device sees them: a copy of their index entries that follows the changes."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from touchline_server.errors import InvalidArgumentError
from touchline_server.selectors import entries as index
from touchline_server.selectors.eligible import EligibleEpisodes

if TYPE_CHECKING:
    import torch

DRAWN_LAWS = ("episode", "step")
"""Laws by which a device draws."""

MIN_ENTRIES = 1024
"""Entries for which device memory is taken at least."""


def check_draw(draw: str, *, mixed: bool, has_out: bool) -> str:
    """Returns where a batch is drawn.

    Args:
        draw: ``host`` or ``device``.
        mixed: whether the batch is one of several tables.
        has_out: whether an earlier batch is to be overwritten.

    Raises:
        InvalidArgumentError: it is neither, or a device cannot draw such a batch.
    """
    if draw not in ("host", "device"):
        raise InvalidArgumentError(f"draw: {draw!r}, expected 'host' or 'device'")
    if draw == "device" and mixed:
        raise InvalidArgumentError("draw: 'device' with a mix, expected draw='host', or batches of one table")
    if draw == "device" and has_out:
        raise InvalidArgumentError("draw: 'device' with out, expected draw='host', or device_sampler() for batches at fixed addresses")
    return draw


class Entry(enum.IntEnum):
    """Fields of an episode's entry on the device, int64."""

    ID = 0
    FIRST_ROW = 1
    LENGTH = 2
    ACTOR = 3
    POLICY_VERSION = 4
    STARTS_BEFORE = 5
    """Starts of all episodes before this one, plus the constant ``State.FIRST_START``."""


ENTRY_FIELDS = len(Entry)


class State(enum.IntEnum):
    """Words by which the kernel finds the entries, int64. Their address stays the same, so a CUDA graph may read them."""

    TABLE = 0
    """Address of the entries, a ring."""
    ENTRIES = 1
    """Entries that fit."""
    OLDEST = 2
    """Position in the ring of the oldest episode."""
    EPISODES = 3
    """Number of episodes."""
    FIRST_START = 4
    """``STARTS_BEFORE`` of the oldest episode."""
    STARTS = 5
    """Starts of all episodes."""


@dataclass(frozen=True, slots=True)
class EpisodeChanges:
    """What has changed since the changes before: copied while the store was locked."""

    oldest: int
    """Number of the oldest episode, counted from the first that was ever eligible."""
    episodes: int
    first_start: int
    starts: int
    added: np.ndarray
    """[n, ENTRY_FIELDS] int64: entries of the newest episodes, which the device does not have."""
    complete: bool
    """Whether these are all episodes: the device has none of them."""


class EpisodeTracker:
    """Finds out what has changed among the eligible episodes of one horizon. Called with the store locked."""

    def __init__(self) -> None:
        self._seen: EligibleEpisodes | None = None
        self._appended = 0
        self._oldest = -1

    def changes(self, eligible: EligibleEpisodes) -> EpisodeChanges | None:
        """Returns the changes since the call before, None if there are none: O(1) then, otherwise O(episodes added)."""
        oldest = eligible.appended - len(eligible)
        complete = eligible is not self._seen or oldest > self._appended
        if not complete and (oldest, eligible.appended) == (self._oldest, self._appended):
            return None
        new = len(eligible) if complete else eligible.appended - self._appended
        live, before = eligible.entries[len(eligible) - new :], eligible.starts_before[len(eligible) - new :]
        added = np.empty((new, ENTRY_FIELDS), np.int64)
        added[:, : Entry.STARTS_BEFORE] = live[:, [index.ID, index.FIRST_ROW, index.LENGTH, index.ACTOR, index.POLICY_VERSION]]
        added[:, Entry.STARTS_BEFORE] = before
        self._seen, self._appended, self._oldest = eligible, eligible.appended, oldest
        first_start = int(eligible.starts_before[0]) if len(eligible) else 0
        return EpisodeChanges(oldest, len(eligible), first_start, eligible.starts, added, complete)

    def forget(self) -> None:
        """Makes the next changes complete: the last ones did not get to the device."""
        self._seen = None


class DeviceEpisodes:
    """The entries on a device. Changes are queued on the current stream; the caller orders the streams it uses.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._table = torch.empty((0, ENTRY_FIELDS), dtype=torch.int64, device=device)
        self.state = torch.zeros(len(State), dtype=torch.int64, device=device)
        """[State] int64, read by the kernel."""

    def apply(self, changes: EpisodeChanges) -> None:
        """Copies changes to the device, in two to four small copies."""
        from touchline_protos.gather.row_gather import rows_to_device

        if changes.episodes > len(self._table):
            self._grow(changes)
        size = len(self._table)
        added = rows_to_device(changes.added, self._device)
        # The ring: an episode lies at its number modulo the size, so none is moved until the ring grows.
        begin = (changes.oldest + changes.episodes - len(added)) % max(size, 1)
        before_seam = min(len(added), size - begin)
        self._table[begin : begin + before_seam] = added[:before_seam]
        self._table[: len(added) - before_seam] = added[before_seam:]
        state = np.zeros(len(State), np.int64)
        state[State.TABLE], state[State.ENTRIES] = self._table.data_ptr(), size
        state[State.OLDEST], state[State.EPISODES] = changes.oldest % max(size, 1), changes.episodes
        state[State.FIRST_START], state[State.STARTS] = changes.first_start, changes.starts
        self.state.copy_(rows_to_device(state, self._device))

    def _grow(self, changes: EpisodeChanges) -> None:
        """Takes a larger ring, and moves the entries that are on the device already."""
        import torch

        old, kept = self._table, changes.episodes - len(changes.added)
        self._table = torch.empty((max(2 * changes.episodes, MIN_ENTRIES), ENTRY_FIELDS), dtype=torch.int64, device=self._device)
        if kept:
            numbers = changes.oldest + torch.arange(kept, device=self._device)
            self._table[numbers % len(self._table)] = old[numbers % len(old)]
        if self._device.type == "cuda":
            old.record_stream(torch.cuda.current_stream(self._device))
