"""Who has sent what: makes adding idempotent by the episode's key."""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from touchline_protos.codec import EpisodeKey
from touchline_protos.log_lines import get_logger
from touchline_protos.types.names import name_fault
from touchline_server.errors import InvalidEpisodeError, KeyConflictError

logger = get_logger(__name__)

MAX_SENDERS = 65_536
"""Senders (client and incarnation) that are remembered; the one that stored longest ago is forgotten first."""

MAX_RECENT = 65_536
"""Episodes whose payload and id are remembered, of all senders together; older ones are known by their number alone. Not more than
MAX_SENDERS: so no such episode is of a sender that is forgotten."""

MAX_RUNS = 1_024
"""Runs of consecutive numbers that are remembered for a sender: one more than the gaps between them. Beyond that its oldest gap is
forgotten: what is at or below it is refused unless it is among the recent ones."""

MAX_ALL_RUNS = 262_144
"""Runs of all senders together. Beyond that those senders who have the most forget their oldest ones, until a 64th is free; three are left
to each, whatever the others have."""


@dataclass(frozen=True, slots=True)
class KnownEpisode:
    """An episode that was stored before."""

    episode_id: int
    """-1 where only the key is still known."""


def payload_digest(columns: Mapping[str, np.ndarray]) -> int:
    """Returns a checksum of an episode's columns that does not depend on their order or on how they travelled."""
    digest = 0
    for name in sorted(columns):
        array = columns[name]
        digest = zlib.crc32(f"{name}|{array.dtype.str}|{array.shape}".encode(errors="surrogatepass"), digest)
        digest = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, digest)
    return digest


def key_conflict(key: EpisodeKey) -> KeyConflictError:
    """Returns the error for a key that was used for another payload."""
    return KeyConflictError(
        f"key ({key.client_id}, {key.incarnation}, {key.sequence}): was used for another episode, expected a key of its own"
    )


def sender_name(client_id: str, incarnation: int) -> bytes:
    """Returns 16 bytes that stand for a sender, however long its client's id is: a BLAKE2b of both, which nobody finds two senders for."""
    return blake2b(client_id.encode(errors="surrogatepass"), digest_size=16, salt=incarnation.to_bytes(8, "little", signed=True)).digest()


def runs_to_keep(sizes: Sequence[int]) -> list[int]:
    """Returns how many runs each sender keeps where they have more than MAX_ALL_RUNS: those who have most give up one after the other.

    Args:
        sizes: how many runs each sender has, the one that stored longest ago first: among equals it is the first to give one up.
    """
    has = np.array(sizes)
    kept = MAX_ALL_RUNS - MAX_ALL_RUNS // 64
    senders_with_at_least = np.cumsum(np.bincount(has)[::-1])[::-1]
    # The most that all may have, and how many of those above it may have one more.
    level = int(np.searchsorted(np.cumsum(senders_with_at_least[1:]), kept, side="right"))
    keep = np.minimum(has, level)
    above = np.flatnonzero(has > level)
    keep[above[len(above) - (kept - int(keep.sum())) :]] += 1
    return keep.tolist()


class SequenceIntervals:
    """The sequence numbers that one sender has stored: as runs, so that numbers in order take no room."""

    __slots__ = ("_bounds", "forgotten_below")

    def __init__(self, forgotten_below: int) -> None:
        self._bounds = array("Q")
        """Where runs begin and end, in turn, ascending: a number is in one where an odd number of bounds is not above it."""
        self.forgotten_below = forgotten_below
        """Of numbers below it, it can no longer be told whether they are stored."""

    def __len__(self) -> int:
        return len(self._bounds) // 2

    def __contains__(self, sequence: int) -> bool:
        return bisect_right(self._bounds, sequence) % 2 == 1

    def runs(self) -> list[tuple[int, int]]:
        """Returns [first, after) of each run, ascending."""
        return list(zip(self._bounds[::2], self._bounds[1::2], strict=True))

    def append(self, first: int, after: int) -> None:
        """Takes a run behind the others; raises ValueError where it is not one."""
        if not max(self._bounds[-1:], default=-1) < first < after:
            raise ValueError(f"a run of numbers from {first} to {after} behind those to {max(self._bounds, default=0)}")
        self._bounds.extend((first, after))

    def add(self, sequence: int) -> None:
        """Notes a number that is not contained yet."""
        bounds = self._bounds
        place = bisect_right(bounds, sequence)
        joins_before = place > 0 and bounds[place - 1] == sequence
        joins_after = place < len(bounds) and bounds[place] == sequence + 1
        if joins_before and joins_after:
            del bounds[place - 1 : place + 1]
        elif joins_before:
            bounds[place - 1] += 1
        elif joins_after:
            bounds[place] -= 1
        else:
            bounds[place:place] = array("Q", (sequence, sequence + 1))

    def keep(self, runs: int) -> int:
        """Forgets the oldest runs beyond so many; returns how many."""
        forgotten = len(self) - runs
        if forgotten <= 0:
            return 0
        # A copy: an array that shrinks keeps its memory for a while.
        self._bounds = self._bounds[2 * forgotten :]
        self.forgotten_below = self._bounds[0]
        return forgotten


class _Recent:
    """The last episodes of all senders, in a ring of fixed size."""

    def __init__(self, size: int) -> None:
        self._names = np.zeros((size, 2), np.uint64)
        self._sequences = np.zeros(size, np.int64)
        self._digests = np.zeros(size, np.uint32)
        self._episode_ids = np.zeros(size, np.int64)
        self._count = 0
        """How many were ever taken."""

    def add(self, name: bytes, sequence: int, digest: int, episode_id: int) -> None:
        """Takes one, in the place of the oldest where all are taken."""
        place = self._count % len(self._sequences)
        self._names[place] = np.frombuffer(name, np.uint64)
        self._sequences[place] = sequence
        self._digests[place] = digest
        self._episode_ids[place] = episode_id
        self._count += 1

    def find(self, name: bytes, sequence: int) -> tuple[int, int] | None:
        """Returns an episode's digest and id, None where it is not among them. Looks through all: only who sends again asks."""
        places = np.flatnonzero(self._sequences[: self._count] == sequence)
        places = places[(self._names[places] == np.frombuffer(name, np.uint64)).all(axis=1)]
        return (int(self._digests[places[0]]), int(self._episode_ids[places[0]])) if len(places) else None

    def __iter__(self) -> Iterator[tuple[bytes, int, int, int]]:
        """Yields the sender's name, sequence number, digest and id of each, oldest first."""
        size = len(self._sequences)
        for count in range(max(0, self._count - size), self._count):
            place = count % size
            values = self._sequences[place], self._digests[place], self._episode_ids[place]
            yield self._names[place].tobytes(), *(int(value) for value in values)


class DedupLedger:
    """Remembers the keys of stored episodes. Not thread-safe: the store calls it under its write lock.

    Memory is bounded, by the limits above: a sender's numbers are kept as runs, and its name as a hash of it. What is forgotten, and what
    comes of it, from the least to the worst: the payload of an older episode, whose key another payload may then be taken for; a sender's
    oldest numbers, which are refused if they are sent again; a sender, whose episodes are stored a second time if they are sent again.
    """

    def __init__(self) -> None:
        self._senders: OrderedDict[bytes, SequenceIntervals] = OrderedDict()
        """The one that stored longest ago first."""
        self._recent = _Recent(MAX_RECENT)
        self._runs = 0
        """Of all senders."""
        self.forgotten_senders = 0
        self.forgotten_runs = 0

    def find(self, key: EpisodeKey, digest: int) -> KnownEpisode | None:
        """Returns the episode stored under this key, None where it is new.

        Raises:
            InvalidEpisodeError: the key is malformed.
            KeyConflictError: the key was used for another payload.
        """
        fault = name_fault(key.client_id, min_chars=1)
        if fault is not None:
            raise InvalidEpisodeError(f"key.client_id: {fault}")
        if not -(2**63) <= key.incarnation < 2**63:
            raise InvalidEpisodeError(f"key.incarnation: {key.incarnation}, expected a 64-bit integer")
        if not 0 <= key.sequence < 2**63 - 1:  # an interval's stop is a 64-bit integer too
            raise InvalidEpisodeError(f"key.sequence: {key.sequence}, expected 0 or more, below 2**63 - 1")
        name = sender_name(key.client_id, key.incarnation)
        numbers = self._senders.get(name)
        if numbers is None:
            return None
        forgotten = key.sequence < numbers.forgotten_below
        if not forgotten and key.sequence not in numbers:
            return None
        known = self._recent.find(name, key.sequence)
        if known is not None:
            if known[0] != digest:
                raise key_conflict(key)
            return KnownEpisode(known[1])
        if forgotten:
            raise KeyConflictError(
                f"key ({key.client_id}, {key.incarnation}, {key.sequence}): too far behind the sender's newest to tell whether it was "
                "stored, expected a new key"
            )
        return KnownEpisode(-1)

    def remember(self, key: EpisodeKey, digest: int, episode_id: int) -> None:
        """Notes that the episode under this key, which is not known yet, is stored.

        What is forgotten for it, the durable store forgets by the same rules:
        :class:`touchline_server.durability.ledger.LedgerTables`.
        """
        name = sender_name(key.client_id, key.incarnation)
        numbers = self._senders.get(name)
        if numbers is None:
            numbers = self._senders[name] = SequenceIntervals(0)
            self._bound_senders()
        else:
            self._senders.move_to_end(name)
        self._recent.add(name, key.sequence, digest, episode_id)
        self._runs -= len(numbers)
        numbers.add(key.sequence)
        self._note_forgotten_runs(numbers.keep(MAX_RUNS), 1)
        self._runs += len(numbers)
        if self._runs > MAX_ALL_RUNS:
            self._bound_runs()

    def restore(self, client_id: str, incarnation: int, *, forgotten_below: int) -> bytes:
        """Takes over a sender from before a restart; the one called for last counts as the one that stored last.

        Args:
            client_id: names it, with the next.
            incarnation: as in its keys.
            forgotten_below: numbers below it that are not among the recent ones are refused.

        Returns:
            Its name, for :meth:`restore_run` and :meth:`restore_recent`.
        """
        name = sender_name(client_id, incarnation)
        self._senders[name] = SequenceIntervals(forgotten_below)
        return name

    def restore_run(self, name: bytes, first: int, after: int) -> None:
        """Takes over a run of numbers of a sender's, first <= number < after, in ascending order; raises ValueError where it is not one."""
        self._senders[name].append(first, after)
        self._runs += 1

    def restore_recent(self, name: bytes, sequence: int, digest: int, episode_id: int) -> None:
        """Takes over what is known of an episode, in the order in which they were stored, and its number, where that is in no run."""
        self._recent.add(name, sequence, digest, episode_id)
        numbers = self._senders[name]
        if sequence not in numbers and sequence >= numbers.forgotten_below:
            self._runs -= len(numbers)
            numbers.add(sequence)
            self._runs += len(numbers)

    def senders(self) -> Iterator[tuple[bytes, int, list[tuple[int, int]]]]:
        """Yields each sender's name, the number below which it is forgotten, and its runs; the one that stored longest ago first."""
        for name, numbers in self._senders.items():
            yield name, numbers.forgotten_below, numbers.runs()

    def recent(self) -> Iterator[tuple[bytes, int, int, int]]:
        """Yields the sender's name, sequence number, digest and id of each recent episode, oldest first."""
        return iter(self._recent)

    def _bound_senders(self) -> None:
        while len(self._senders) > MAX_SENDERS:
            _, numbers = self._senders.popitem(last=False)
            self._runs -= len(numbers)
            self.forgotten_senders += 1
            # At first, and each time that the count has doubled.
            if self.forgotten_senders.bit_count() == 1:
                logger.warning(
                    "%d senders are forgotten, those that stored longest ago, since %d others have stored something since then: what one "
                    "of them sends again is stored again",
                    self.forgotten_senders,
                    MAX_SENDERS,
                )

    def _bound_runs(self) -> None:
        keep = runs_to_keep([len(numbers) for numbers in self._senders.values()])
        forgotten = [numbers.keep(runs) for numbers, runs in zip(self._senders.values(), keep, strict=True)]
        self._runs -= sum(forgotten)
        self._note_forgotten_runs(sum(forgotten), sum(map(bool, forgotten)))

    def _note_forgotten_runs(self, runs: int, senders: int) -> None:
        before, self.forgotten_runs = self.forgotten_runs, self.forgotten_runs + runs
        # At first, and each time that the count has doubled.
        if self.forgotten_runs.bit_length() > before.bit_length():
            logger.warning(
                "%d runs of numbers are forgotten, now %d of %d senders', who have many gaps between theirs: what they send again from "
                "there is refused",
                self.forgotten_runs,
                runs,
                senders,
            )
