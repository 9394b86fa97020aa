"""The deduplication ledger: which episodes each sender has stored, so that adding is idempotent by the episode's key."""

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
"""Senders (client and incarnation) that are remembered; the least recent one to store an episode is forgotten first."""

MAX_RECENT = 65_536
"""Episodes whose digest and id are remembered, of all senders together; of older ones, only the sequence number is known. At most
MAX_SENDERS, so that the sender of such an episode is never forgotten."""

MAX_INTERVALS = 1_024
"""Intervals of consecutive numbers that are remembered for a sender: one more than the gaps between them. Beyond that its oldest interval
is forgotten, and numbers below the next one are refused unless they are among the recent episodes."""

MAX_ALL_INTERVALS = 262_144
"""Intervals of all senders together. Beyond that, the senders with the most intervals forget their oldest ones until a 64th is free. Each
sender keeps at least three, however many the others have."""


@dataclass(frozen=True, slots=True)
class KnownEpisode:
    """An episode that was stored before."""

    episode_id: int
    """Id of the episode; -1 if only the key is still known."""


def payload_digest(columns: Mapping[str, np.ndarray]) -> int:
    """Returns a CRC-32 of an episode's columns: names, dtypes, shapes and bytes, whatever the order of the columns."""
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
    """Returns 16 bytes that stand for a sender, however long its client id is: a BLAKE2b hash, for which no collision can be found."""
    return blake2b(client_id.encode(errors="surrogatepass"), digest_size=16, salt=incarnation.to_bytes(8, "little", signed=True)).digest()


def intervals_to_keep(sizes: Sequence[int]) -> list[int]:
    """Returns how many intervals each sender keeps when all together have more than MAX_ALL_INTERVALS.

    The senders with the most give up one at a time, until a 64th of MAX_ALL_INTERVALS is free.

    Args:
        sizes: number of intervals of each sender, the least recent sender first: among equals it is the first to give one up.
    """
    has = np.array(sizes)
    kept = MAX_ALL_INTERVALS - MAX_ALL_INTERVALS // 64
    # [n] number of senders with at least n intervals; summed over 1..n, what is kept if each keeps at most n.
    senders_with_at_least = np.cumsum(np.bincount(has)[::-1])[::-1]
    # The largest n for which that fits; some senders above it may then keep one more.
    level = int(np.searchsorted(np.cumsum(senders_with_at_least[1:]), kept, side="right"))
    keep = np.minimum(has, level)
    above = np.flatnonzero(has > level)
    # The most recent of them.
    keep[above[len(above) - (kept - int(keep.sum())) :]] += 1
    return keep.tolist()


class SequenceIntervals:
    """The sequence numbers that one sender has stored, as half-open intervals: numbers in order need no more memory than one."""

    __slots__ = ("_bounds", "forgotten_below")

    def __init__(self, forgotten_below: int) -> None:
        self._bounds = array("Q")
        """Start and stop of each interval in turn, ascending. A number is contained if an odd number of bounds is at most the number."""
        self.forgotten_below = forgotten_below
        """Smallest number that is known to be stored or not; below it, nothing is known."""

    def __len__(self) -> int:
        return len(self._bounds) // 2

    def __contains__(self, sequence: int) -> bool:
        return bisect_right(self._bounds, sequence) % 2 == 1

    def intervals(self) -> list[tuple[int, int]]:
        """Returns start and stop of each interval, ascending."""
        return list(zip(self._bounds[::2], self._bounds[1::2], strict=True))

    def append(self, start: int, stop: int) -> None:
        """Appends an interval above the others; raises ValueError if it is not above them, or empty."""
        if not max(self._bounds[-1:], default=-1) < start < stop:
            raise ValueError(f"an interval from {start} to {stop} above those to {max(self._bounds, default=0)}")
        self._bounds.extend((start, stop))

    def add(self, sequence: int) -> None:
        """Adds a number that is not contained yet."""
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

    def keep(self, intervals: int) -> int:
        """Drops all but the newest ``intervals`` intervals; returns how many were dropped."""
        forgotten = len(self) - intervals
        if forgotten <= 0:
            return 0
        # A copy, because an array that shrinks keeps its memory for a while.
        self._bounds = self._bounds[2 * forgotten :]
        self.forgotten_below = self._bounds[0]
        return forgotten


class _Recent:
    """The most recent episodes of all senders, in a ring of fixed size."""

    def __init__(self, size: int) -> None:
        self._names = np.zeros((size, 2), np.uint64)
        self._sequences = np.zeros(size, np.int64)
        self._digests = np.zeros(size, np.uint32)
        self._episode_ids = np.zeros(size, np.int64)
        self._count = 0
        """Number of episodes ever added."""

    def add(self, name: bytes, sequence: int, digest: int, episode_id: int) -> None:
        """Adds an episode; overwrites the oldest one if the ring is full."""
        place = self._count % len(self._sequences)
        self._names[place] = np.frombuffer(name, np.uint64)
        self._sequences[place] = sequence
        self._digests[place] = digest
        self._episode_ids[place] = episode_id
        self._count += 1

    def find(self, name: bytes, sequence: int) -> tuple[int, int] | None:
        """Returns an episode's digest and id; None if it is not among them. A linear search: only keys sent again are looked for."""
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

    Memory is bounded by the limits above: a sender's numbers are kept as intervals, its name as a hash. What is forgotten, and what follows
    from it, from least to worst: the digest of an older episode, so that another payload under its key passes for a duplicate; a sender's
    oldest numbers, which are refused if they are sent again; a sender, whose episodes are stored a second time if they are sent again.
    """

    def __init__(self) -> None:
        self._senders: OrderedDict[bytes, SequenceIntervals] = OrderedDict()
        """Numbers by sender, the least recent sender first."""
        self._recent = _Recent(MAX_RECENT)
        self._intervals = 0
        """Number of intervals of all senders."""
        self.forgotten_senders = 0
        """Number of senders forgotten so far."""
        self.forgotten_intervals = 0
        """Number of intervals forgotten so far."""

    def find(self, key: EpisodeKey, digest: int) -> KnownEpisode | None:
        """Returns the episode stored under this key; None if the key is new.

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
        """Records an episode as stored under a new key.

        The durable ledger, :class:`touchline_server.durability.ledger.LedgerTables`, follows the same rules for what is forgotten.
        """
        name = sender_name(key.client_id, key.incarnation)
        numbers = self._senders.get(name)
        if numbers is None:
            numbers = self._senders[name] = SequenceIntervals(0)
            self._bound_senders()
        else:
            self._senders.move_to_end(name)
        self._recent.add(name, key.sequence, digest, episode_id)
        self._intervals -= len(numbers)
        numbers.add(key.sequence)
        self._count_forgotten(numbers.keep(MAX_INTERVALS), 1)
        self._intervals += len(numbers)
        if self._intervals > MAX_ALL_INTERVALS:
            self._bound_intervals()

    def restore(self, client_id: str, incarnation: int, *, forgotten_below: int) -> bytes:
        """Restores a sender after a restart. Senders are restored in the order in which they last stored an episode.

        Args:
            client_id: client id in its keys.
            incarnation: incarnation in its keys.
            forgotten_below: smallest number that is not forgotten.

        Returns:
            The sender's name, for :meth:`restore_interval` and :meth:`restore_recent`.
        """
        name = sender_name(client_id, incarnation)
        self._senders[name] = SequenceIntervals(forgotten_below)
        return name

    def restore_interval(self, name: bytes, start: int, stop: int) -> None:
        """Restores an interval of a sender's numbers. Must be called in ascending order; raises ValueError otherwise."""
        self._senders[name].append(start, stop)
        self._intervals += 1

    def restore_recent(self, name: bytes, sequence: int, digest: int, episode_id: int) -> None:
        """Restores a recent episode, and its number if no interval contains it. Must be called in the order of the ids."""
        self._recent.add(name, sequence, digest, episode_id)
        numbers = self._senders[name]
        if sequence not in numbers and sequence >= numbers.forgotten_below:
            self._intervals -= len(numbers)
            numbers.add(sequence)
            self._intervals += len(numbers)

    def senders(self) -> Iterator[tuple[bytes, int, list[tuple[int, int]]]]:
        """Yields each sender's name, its smallest number that is not forgotten, and its intervals; the least recent sender first."""
        for name, numbers in self._senders.items():
            yield name, numbers.forgotten_below, numbers.intervals()

    def recent(self) -> Iterator[tuple[bytes, int, int, int]]:
        """Yields the sender's name, sequence number, digest and id of each recent episode, oldest first."""
        return iter(self._recent)

    def _bound_senders(self) -> None:
        while len(self._senders) > MAX_SENDERS:
            _, numbers = self._senders.popitem(last=False)
            self._intervals -= len(numbers)
            self.forgotten_senders += 1
            # The first time, and whenever the count has doubled.
            if self.forgotten_senders.bit_count() == 1:
                logger.warning(
                    "%d senders are forgotten, the least recent ones, because %d others have stored episodes since: an episode that one of "
                    "them sends again is stored again",
                    self.forgotten_senders,
                    MAX_SENDERS,
                )

    def _bound_intervals(self) -> None:
        keep = intervals_to_keep([len(numbers) for numbers in self._senders.values()])
        forgotten = [numbers.keep(intervals) for numbers, intervals in zip(self._senders.values(), keep, strict=True)]
        self._intervals -= sum(forgotten)
        self._count_forgotten(sum(forgotten), sum(map(bool, forgotten)))

    def _count_forgotten(self, intervals: int, senders: int) -> None:
        before, self.forgotten_intervals = self.forgotten_intervals, self.forgotten_intervals + intervals
        # The first time, and whenever the count has doubled.
        if self.forgotten_intervals.bit_length() > before.bit_length():
            logger.warning(
                "%d intervals of sequence numbers are forgotten, now %d of %d senders, whose numbers have many gaps: what they send again "
                "from there is refused",
                self.forgotten_intervals,
                intervals,
                senders,
            )
