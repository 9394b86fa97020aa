"""The control words of a ring: which slots are free, in which order the others were published, and how a waiting side sleeps.

One producer (the server) and one consumer (the learner) map the same page of words. The producer fills any free slot, appends its number
to the order of publication and raises ``HEAD``; the consumer takes slots in that order and frees each one when it is done with it, in any
order, so a slot that is held for long does not block the others. A side that has nothing to do spins briefly and then sleeps on a futex, so
an idle side uses no core. Where the slots' own memory lies does not matter here: see :mod:`.ring_slots`.

Memory order: every word is aligned, so each load and store is one instruction, and x86-64 makes the stores of one core visible to others
in program order (total store order). A batch's bytes are therefore visible before the words that publish it. Only a load may overtake an
earlier store; :meth:`_RingControl._wake` says what that costs. Hence x86-64 only, and Linux only for its futexes.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import secrets
import time
from bisect import bisect_left

from touchline_protos.shm import sealed_memory
from touchline_protos.types.status import LATENCY_BOUNDS_S

MAGIC = 0x31_474E_4952_4C54  # "TLRING1", little-endian
MAX_SLOTS = 64
TOKEN_BYTES = 16
CONTROL_BYTES = 4096
"""Size of the control words: one page."""

SPIN_S = 50e-6
"""Time for which a side spins before it sleeps."""
MAX_SLEEP_S = 0.1
"""Longest sleep; after it the caller checks whether the other side is still alive."""
SHORT_SLEEP_S = 0.01
"""Longest sleep of a producer that waits for something other than a slot, and may miss the interrupt that reports it."""

# The page as words of 8 bytes. What is fixed when the ring is made:
_MAGIC, _TOKEN, _SLOTS, _SLOT_BYTES = 0, 1, 3, 4
# The producer's count of publications and its sleep flag, then the consumer's count of frees and its sleep flag. A cache line is 8 words,
# so the counter that one side writes shares no line with the counter that the other side writes.
_HEAD, _PRODUCER_SLEEPS = 8, 9
_FREED, _CONSUMER_SLEEPS = 16, 17
# The consumer's count of taken slots, beside its others. Consumers up to 1.0 leave it at 0.
_TAKEN = 18
# How long the consumer has waited for slots, in nanoseconds, and whether it measures that at all. Consumers up to 1.1 leave both at 0.
_WAITED_NS, _MEASURES = 19, 20
# The way back, see :mod:`.ring_returns`: on the producer's line how many entries it has taken, how many of their slices it has updated,
# found evicted and refused, and whether it looks no more; on the consumer's how many it has sent, and its sleep flag. Sides up to 1.2 leave
# all of them at 0.
_RETURNS_TAKEN, _UPDATED, _EVICTED, _REFUSED, _RETURNS_ENDED = 10, 11, 12, 13, 14
_RETURNS_SENT, _RETURNS_SLEEPS = 22, 23
# Three arrays of MAX_SLOTS words: the order of publication, each slot's state, and how many actors' names its batch needs.
_ORDER = 64
_STATES = _ORDER + MAX_SLOTS
_ACTORS = _STATES + MAX_SLOTS
# The consumer's counts of its waits by their duration: see LATENCY_BOUNDS_S. Takes without a wait are not counted.
_WAITS = _ACTORS + MAX_SLOTS
# The producer's marks of slots whose rows were taken back. Words up to here are 0 in rings up to protocol 1.2.
_REVOKED = 320
_FREE, _USED = 0, 1

_FUTEX_CALL = 202  # x86-64
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1


class RingError(Exception):
    """The ring cannot be used; the caller falls back to messages."""


class _RingControl:
    """What both sides do with the control words.

    Args:
        memory: the ring's memory, which begins with the control words. Kept mapped by this object.
        slots: number of slots.
    """

    def __init__(self, memory: mmap.mmap, slots: int) -> None:
        self._slots = slots
        self._memory = memory
        self._words = (ctypes.c_int64 * (CONTROL_BYTES // 8)).from_buffer(memory)
        self._address = ctypes.addressof(self._words)
        self._syscall = sealed_memory.system_call()

    def _sleep(self, word: int, seen: int, sleep_flag: int, *, max_s: float = MAX_SLEEP_S, spin_s: float = SPIN_S) -> None:
        """Returns once ``word`` differs from ``seen``, or after ``max_s`` seconds. Spins for the first ``spin_s`` seconds."""
        spin_until = time.perf_counter() + spin_s
        words = self._words
        while words[word] == seen:
            if time.perf_counter() < spin_until:
                continue
            # The flag first, then the second look at the word; the other side stores the word first and then loads the flag. So either this
            # side sees the word change or the other side sees the flag.
            words[sleep_flag] = 1
            if words[word] == seen:
                # The kernel compares the word once more under its own lock, so a store in between ends the wait. It compares only the
                # lower 32 bits: a change by an exact multiple of 2**32 in between would be missed, and delay this side by ``max_s``.
                timeout = _Timespec(0, int(max_s * 1e9))
                self._syscall(
                    _FUTEX_CALL, self._futex(word), _FUTEX_WAIT, ctypes.c_uint32(seen & 0xFFFFFFFF), ctypes.byref(timeout), None, 0
                )
            words[sleep_flag] = 0
            return

    def _wake(self, word: int, sleep_flag: int) -> None:
        # x86-64 may let this load overtake the caller's store to the word, so a sleeper can be missed. A fence would cost more than the
        # rare delay, which is at most MAX_SLEEP_S.
        if self._words[sleep_flag]:
            self._wake_sleeper(word)

    def _wake_sleeper(self, word: int) -> None:
        self._syscall(_FUTEX_CALL, self._futex(word), _FUTEX_WAKE, 1, None, None, 0)

    def _futex(self, word: int) -> ctypes.c_void_p:
        # A futex is 32 bits: on a little-endian machine the lower half of the counter lies at its address.
        return ctypes.c_void_p(self._address + 8 * word)


class ProducerControl(_RingControl):
    """The server's side. One thread fills and publishes; any thread may :meth:`interrupt` it."""

    def __init__(self, memory: mmap.mmap, slots: int) -> None:
        super().__init__(memory, slots)
        # Own count of publications: the shared word can be overwritten by a malicious consumer and is therefore never read back.
        self._head = 0

    def initialize(self, token: bytes, slot_size_bytes: int) -> None:
        """Writes what is fixed; the magic number comes last, so that a consumer that sees it also sees the rest."""
        self._memory[8 * _TOKEN : 8 * _TOKEN + TOKEN_BYTES] = token
        self._words[_SLOTS] = self._slots
        self._words[_SLOT_BYTES] = slot_size_bytes
        self._words[_MAGIC] = MAGIC

    def free_slots(self) -> list[int]:
        """Returns the slots that may be written; an empty list if none became free within :data:`MAX_SLEEP_S`."""
        # The counter is read before the states: a free in between changes the counter, so that the sleep does not begin.
        freed = self._words[_FREED]
        slots = self._find_free()
        if not slots:
            self._sleep(_FREED, freed, _PRODUCER_SLEEPS)
            slots = self._find_free()
        return slots

    def publish(self, slot: int, actors_sent: int) -> None:
        """Hands a filled slot to the learner.

        Args:
            slot: one of :meth:`free_slots`.
            actors_sent: number of actors' names that the stream has sent so far; the learner waits for them.
        """
        words = self._words
        words[_STATES + slot] = _USED
        words[_ACTORS + slot] = actors_sent
        # Wrap-around: publication n stands at n modulo the number of slots. A slot stays used until it is freed, so at most that many
        # publications are not taken yet, and none of them is overwritten here.
        words[_ORDER + self._head % self._slots] = slot
        self._head += 1
        # Last: the consumer loads HEAD first and must then find everything above. At 64 bits it never wraps.
        words[_HEAD] = self._head
        self._wake(_HEAD, _CONSUMER_SLEEPS)

    def revoke(self, slot: int) -> None:
        """Marks a slot, from any thread: what it refers to may be overwritten once this returns and the caller has released a lock.

        The store of the mark precedes the caller's later stores for every observer, and releasing a lock is a fence: so a consumer that
        has read an overwritten byte finds the mark.
        """
        self._words[_REVOKED + slot] = 1

    def renew(self, slot: int) -> None:
        """Removes the mark of a free slot, before it is published again."""
        self._words[_REVOKED + slot] = 0

    def count_used(self) -> int:
        """Returns the number of slots that are published and not freed."""
        return self._slots - len(self._find_free())

    def count_taken(self, used: int) -> int:
        """Returns the number of publications that the learner has taken, as far as it says.

        Args:
            used: result of :meth:`count_used`. What was freed was taken, and more a learner up to 1.0 does not say.
        """
        # The consumer writes the word, so it may hold anything.
        return max(self._head - used, min(self._words[_TAKEN], self._head))

    def consumer_waits(self) -> tuple[int, float, list[int]] | None:
        """Returns the slots that the learner has taken, the seconds that it waited for them, and its waits by their duration; None if it
        does not measure that. From any thread.
        """
        words = self._words
        if not words[_MEASURES]:
            return None
        # The consumer writes these words, so they may hold anything.
        taken = min(max(words[_TAKEN], 0), self._head)
        buckets = [min(max(count, 0), taken) for count in words[_WAITS : _WAITS + len(LATENCY_BOUNDS_S) + 1]]
        return taken, max(words[_WAITED_NS], 0) / 1e9, buckets

    def wait_freed(self) -> None:
        """Returns once a slot was freed, another thread interrupted, or :data:`SHORT_SLEEP_S` passed, even if slots are free already."""
        self._sleep(_FREED, self._words[_FREED], _PRODUCER_SLEEPS, max_s=SHORT_SLEEP_S, spin_s=0)

    def interrupt(self) -> None:
        """Ends a sleep in :meth:`free_slots` or :meth:`wait_freed`; from any thread."""
        self._wake_sleeper(_FREED)

    def count_returns(self) -> int:
        """Returns how many entries the learner has sent back, as it says. It writes the word, so it may be anything."""
        return int(self._words[_RETURNS_SENT])

    def report_returns(self, taken: int, updated: int, evicted: int, refused: int) -> None:
        """Reports to the learner how many of its entries were taken so far, and what happened to their slices."""
        words = self._words
        words[_UPDATED], words[_EVICTED], words[_REFUSED] = updated, evicted, refused
        # Last: a learner that sees its entries taken must find the counts above.
        words[_RETURNS_TAKEN] = taken
        self._wake(_RETURNS_TAKEN, _RETURNS_SLEEPS)

    def end_returns(self) -> None:
        """Reports to the learner that no more entries will be taken."""
        self._words[_RETURNS_ENDED] = 1
        self._wake_sleeper(_RETURNS_TAKEN)

    @property
    def published(self) -> int:
        """Number of publications so far, which is the number of the next one."""
        return self._head

    def _find_free(self) -> list[int]:
        states = self._words[_STATES : _STATES + self._slots]
        return [slot for slot, state in enumerate(states) if state == _FREE]


class ConsumerControl(_RingControl):
    """The learner's side. One thread takes; any thread may free a slot or :meth:`interrupt`."""

    def __init__(self, memory: mmap.mmap, slots: int) -> None:
        super().__init__(memory, slots)
        self._process = os.getpid()
        self._taken = 0
        self._frees = itertools.count(1)
        self._held = [False] * slots
        self._interrupted = False
        self._waiting_ns = 0
        """Duration of the wait for the next slot so far."""
        self._words[_MEASURES] = 1

    def matches(self, token: bytes, slot_size_bytes: int) -> bool:
        """Returns whether the words are those that :meth:`ProducerControl.initialize` writes with these arguments."""
        words = (self._words[_MAGIC], self._words[_SLOTS], self._words[_SLOT_BYTES])
        found = self._memory[8 * _TOKEN : 8 * _TOKEN + TOKEN_BYTES]
        return words == (MAGIC, self._slots, slot_size_bytes) and secrets.compare_digest(found, token)

    @property
    def held(self) -> int:
        """Number of slots that were taken and are not freed yet."""
        return sum(self._held)

    def has_published(self) -> bool:
        """Returns whether a slot can be taken without waiting."""
        return bool(self._words[_HEAD] != self._taken)

    def take(self) -> tuple[int, int] | None:
        """Returns the next published slot and how many actors' names its batch needs; None if none came within :data:`MAX_SLEEP_S`.

        Raises:
            RingError: the server wrote a slot number that is out of range.
        """
        words = self._words
        if words[_HEAD] == self._taken and not self._interrupted:
            begin = time.perf_counter_ns()
            self._sleep(_HEAD, self._taken, _CONSUMER_SLEEPS)
            slept_ns = time.perf_counter_ns() - begin
            self._waiting_ns += slept_ns
            words[_WAITED_NS] += slept_ns
        if words[_HEAD] == self._taken:
            return None
        # Loads are not reordered with each other: HEAD was seen to count this publication, so its order, names and bytes are there.
        slot = words[_ORDER + self._taken % self._slots]
        if not 0 <= slot < self._slots:
            raise RingError(f"slot {slot} published, expected 0 to {self._slots - 1}")
        self._taken += 1
        self._held[slot] = True
        words[_TAKEN] = self._taken
        if self._waiting_ns:
            words[_WAITS + bisect_left(LATENCY_BOUNDS_S, self._waiting_ns / 1e9)] += 1
            self._waiting_ns = 0
        return slot, words[_ACTORS + slot]

    def is_revoked(self, slot: int) -> bool:
        """Returns whether the server has taken back what a taken slot refers to: what was read of that before this call is not valid."""
        return bool(self._words[_REVOKED + slot])

    def free(self, slot: int) -> None:
        """Returns a slot to the server. Has no effect in a forked child: the slot belongs to the parent."""
        if os.getpid() != self._process:
            return
        words = self._words
        self._held[slot] = False
        # The state first, then the counter: a producer that sees the counter change finds the slot free.
        words[_STATES + slot] = _FREE
        # Threads may free at the same time and store their numbers in either order. The producer only checks for a change, and no number
        # is stored twice.
        words[_FREED] = next(self._frees)
        self._wake(_FREED, _PRODUCER_SLEEPS)

    @property
    def last_taken(self) -> int:
        """Number of the publication that :meth:`take` returned last, counted from 0."""
        return self._taken - 1

    @property
    def published(self) -> int:
        """Number of publications so far, as the server says."""
        return int(self._words[_HEAD])

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child, in which the ring is the parent's."""
        return os.getpid() != self._process

    def send_return(self, sent: int) -> None:
        """Hands entries over, the last of which is number ``sent`` - 1. Their bytes must be written."""
        self._words[_RETURNS_SENT] = sent

    def count_returns(self) -> tuple[int, int, int, int]:
        """Returns how many entries the server has taken, and how many of their slices it has updated, found evicted, and refused."""
        words = self._words
        # The counts come after the entries: they may be newer, but never miss what is counted as taken.
        taken = self.returns_taken
        return taken, words[_UPDATED], words[_EVICTED], words[_REFUSED]

    @property
    def returns_taken(self) -> int:
        """Number of entries that the server has taken."""
        return int(self._words[_RETURNS_TAKEN])

    @property
    def returns_ended(self) -> bool:
        """Whether the server takes no more entries."""
        return bool(self._words[_RETURNS_ENDED])

    def wait_returns(self, taken: int) -> None:
        """Wakes the producer, and returns once it has taken other than ``taken`` entries, or after :data:`SHORT_SLEEP_S`."""
        self._words[_FREED] = next(self._frees)
        self._wake(_FREED, _PRODUCER_SLEEPS)
        self._sleep(_RETURNS_TAKEN, taken, _RETURNS_SLEEPS, max_s=SHORT_SLEEP_S, spin_s=0)

    def interrupt(self) -> None:
        """Ends a :meth:`take` that sleeps, and keeps later ones from sleeping; from any thread."""
        self._interrupted = True
        self._wake_sleeper(_HEAD)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))
