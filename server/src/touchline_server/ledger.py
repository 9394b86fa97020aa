"""Who has sent what: makes adding idempotent by the episode's key."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from touchline_protos.codec import EpisodeKey
from touchline_server.errors import InvalidEpisodeError, KeyConflictError

MAX_SENDERS = 65_536
"""Senders (client and incarnation) that are remembered; the one heard from longest ago is forgotten first."""

MAX_RECENT = 1_024
"""Episodes of a sender whose payload and id are remembered. Older ones are known by their number alone."""

MAX_GAPS = 1_024
"""Runs of numbers that are remembered for a sender. Beyond that its oldest gap is forgotten: what was never sent there is refused."""

MAX_CLIENT_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class Remembered:
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


class _Sender:
    """The sequence numbers that one incarnation of a client has stored: as runs, so that numbers in order take no room."""

    def __init__(self) -> None:
        self.recent: OrderedDict[int, tuple[int, int]] = OrderedDict()
        """Sequence number to (digest, episode id)."""
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._forgotten_below = 0

    @classmethod
    def of(cls, runs: Iterable[tuple[int, int]], recent: Iterable[tuple[int, int, int]], forgotten_below: int) -> _Sender:
        """Returns what :meth:`state` told of."""
        sender = cls()
        for first, after in runs:
            sender._begins.append(first)
            sender._ends.append(after)
        for sequence, digest, episode_id in recent:
            sender.recent[sequence] = (digest, episode_id)
        while len(sender.recent) > MAX_RECENT:
            sender.recent.popitem(last=False)
        sender._forgotten_below = forgotten_below
        return sender

    def state(self) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]], int]:
        """Returns the runs, the recent episodes and the number below which gaps are forgotten."""
        recent = [(sequence, digest, episode_id) for sequence, (digest, episode_id) in self.recent.items()]
        return list(zip(self._begins, self._ends, strict=True)), recent, self._forgotten_below

    def forgotten(self, sequence: int) -> bool:
        """Returns whether it can no longer be told if this number is stored: the gaps around it were too many."""
        return sequence < self._forgotten_below

    def __contains__(self, sequence: int) -> bool:
        run = bisect_right(self._begins, sequence) - 1
        return run >= 0 and sequence < self._ends[run]

    def add(self, sequence: int) -> None:
        """Notes a number that is not contained yet."""
        after = bisect_right(self._begins, sequence)
        joins_before = after > 0 and self._ends[after - 1] == sequence
        joins_after = after < len(self._begins) and self._begins[after] == sequence + 1
        if joins_before and joins_after:
            self._ends[after - 1] = self._ends.pop(after)
            self._begins.pop(after)
        elif joins_before:
            self._ends[after - 1] += 1
        elif joins_after:
            self._begins[after] -= 1
        else:
            self._begins.insert(after, sequence)
            self._ends.insert(after, sequence + 1)
            if len(self._begins) > MAX_GAPS:
                self._forgotten_below = self._begins.pop(1)
                self._ends.pop(0)


class KeyLedger:
    """Remembers the keys of stored episodes. Not thread-safe: the store calls it under its write lock.

    Memory is bounded: a sender's numbers are kept as runs, payload checksums for its last MAX_RECENT episodes, and senders are forgotten
    in the order in which they were last heard.
    """

    def __init__(self) -> None:
        self._senders: OrderedDict[tuple[str, int], _Sender] = OrderedDict()

    def find(self, key: EpisodeKey, digest: int) -> Remembered | None:
        """Returns the episode stored under this key, None where it is new.

        Raises:
            InvalidEpisodeError: the key is malformed.
            KeyConflictError: the key was used for another payload.
        """
        if not 1 <= len(key.client_id) <= MAX_CLIENT_ID_CHARS:
            raise InvalidEpisodeError(f"key.client_id: {len(key.client_id)} characters, expected 1 to {MAX_CLIENT_ID_CHARS}")
        if key.sequence < 0:
            raise InvalidEpisodeError(f"key.sequence: {key.sequence}, expected 0 or more")
        sender = self._senders.get((key.client_id, key.incarnation))
        if sender is None:
            return None
        self._senders.move_to_end((key.client_id, key.incarnation))
        known = sender.recent.get(key.sequence)
        if known is not None:
            if known[0] != digest:
                raise KeyConflictError(
                    f"key ({key.client_id}, {key.incarnation}, {key.sequence}): was used for another episode, expected a key of its own"
                )
            return Remembered(known[1])
        if sender.forgotten(key.sequence):
            raise KeyConflictError(
                f"key ({key.client_id}, {key.incarnation}, {key.sequence}): too far behind the sender's newest to tell whether it was "
                "stored, expected a new key"
            )
        return Remembered(-1) if key.sequence in sender else None

    def remember(self, key: EpisodeKey, digest: int, episode_id: int) -> None:
        """Notes that the episode under this key is stored."""
        name = (key.client_id, key.incarnation)
        sender = self._senders.get(name)
        if sender is None:
            if len(self._senders) == MAX_SENDERS:
                self._senders.popitem(last=False)
            sender = self._senders[name] = _Sender()
        self._senders.move_to_end(name)
        sender.recent[key.sequence] = (digest, episode_id)
        if len(sender.recent) > MAX_RECENT:
            sender.recent.popitem(last=False)
        sender.add(key.sequence)

    def restore(
        self,
        client_id: str,
        incarnation: int,
        *,
        runs: Iterable[tuple[int, int]],
        recent: Iterable[tuple[int, int, int]],
        forgotten_below: int,
    ) -> None:
        """Takes over what was known of a sender before a restart; the one called for last counts as the one heard last.

        Args:
            client_id: names it, with the next.
            incarnation: as in its keys.
            runs: [first, after) of consecutive numbers that are stored, ascending.
            recent: sequence number, digest and episode id of its last episodes, in the order in which they were stored.
            forgotten_below: numbers below it that are in no run are refused.
        """
        self._senders[client_id, incarnation] = _Sender.of(runs, recent, forgotten_below)

    def senders(self) -> Iterator[tuple[str, int, list[tuple[int, int]], list[tuple[int, int, int]], int]]:
        """Yields what :meth:`restore` takes of each sender, in the order of its arguments, the one heard longest ago first."""
        for (client_id, incarnation), sender in self._senders.items():
            yield client_id, incarnation, *sender.state()
