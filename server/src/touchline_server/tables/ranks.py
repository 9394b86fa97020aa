"""Learners by rank: the streams of one job share global batches, of each of which a rank gets its part.

A global batch has ``world_size`` times the slices of a rank's, by the numbers that one learner of that batch size would get from the seed.
It is drawn once, when the first rank needs it, and kept as positions in episodes: no rows are pinned for ranks that have not come for it
yet. So laws with state (starts already drawn, priorities) see one draw. When a rank comes, its part is pinned; slices whose episodes have
been evicted meanwhile are drawn again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from touchline_protos.log_lines import get_logger
from touchline_protos.types.names import name_fault
from touchline_server.errors import InvalidArgumentError
from touchline_server.selectors.draw import Draw
from touchline_server.store.episode_store import EpisodeStore
from touchline_server.store.pinned_draw import PinnedDraw
from touchline_server.tables.table import SampleSpec, Table

logger = get_logger(__name__)

MAX_WORLD_SIZE = 4096
"""Most ranks in a job."""
KEPT_BEHIND = 64
"""Global batches that are kept behind the slowest rank, for one that comes back: more than a rank has ahead of its learner."""
MAX_KEPT_BYTES = 16 << 20
"""Size limit of the global batches that a job keeps of one table. The oldest ones beyond it are dropped."""
BYTES_PER_SLICE = 72
"""Size of a slice of a kept global batch: nine numbers."""


class Rank(NamedTuple):
    """Which part of a job's batches a stream gets: checked."""

    rank: int
    world_size: int
    job: str
    """Name of the job."""
    first_batch: int | None
    """Number of the first global batch that the stream gets; None: the first of all, and the rank must not have been here before."""

    @classmethod
    def of(cls, rank: int, world_size: int, job: str, first_batch: int | None) -> Rank:
        """Returns a request's rank.

        Raises:
            InvalidArgumentError: a number is out of range.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise InvalidArgumentError(f"world_size: {world_size}, expected 1 to {MAX_WORLD_SIZE}")
        if not 0 <= rank < world_size:
            raise InvalidArgumentError(f"rank: {rank}, expected 0 to {world_size - 1} with world_size={world_size}")
        fault = name_fault(job)
        if fault is not None:
            raise InvalidArgumentError(f"job: {fault}")
        if first_batch is not None and first_batch < 0:
            raise InvalidArgumentError(f"first_batch: {first_batch}, expected 0 or more")
        return cls(rank, world_size, job, first_batch)


class _GlobalDraws:
    """The global batches of one table, or of its share of a mix. Thread-safe.

    Args:
        store: the table's episodes.
        spec: what to draw; its batch size does not count.
        count: slices of a rank's batch.
        world_size: number of ranks.
        rng: the job's random numbers, not used yet.
    """

    def __init__(self, store: EpisodeStore, spec: SampleSpec, count: int, world_size: int, rng: np.random.Generator) -> None:
        self._store = store
        self._spec = spec
        self._count = count
        self._slices = count * world_size
        self._again = rng.spawn(1)[0]
        """Random numbers of slices that are drawn again."""
        self._rng = rng
        self._begin = rng.bit_generator.state
        self._numbers = store.numbers_of(spec.law, spec.options) * self._slices
        """Random numbers that a global batch takes."""
        self._lock = threading.Lock()
        self._kept: dict[int, Draw] = {}
        """Global batches that were drawn, by their numbers."""
        self._dropped_below = 0
        """Batches below this number are not kept, and not drawn once more."""
        self.redrawn = 0
        """Slices that were drawn again."""

    def draw(self, rank: int, first: int, batches: int, *, keep_from: int) -> PinnedDraw:
        """Returns a rank's part of consecutive global batches, pinned.

        Args:
            rank: the rank.
            first: number of the first global batch.
            batches: how many.
            keep_from: number of the first global batch that some rank may still come for.

        Raises:
            NotReadyError: nothing can be sampled.
        """
        with self._lock:
            drawn: list[PinnedDraw] = []
            try:
                self._draw_missing(first, batches, drawn)
                parts = [self._part(number, rank, drawn) for number in range(first, first + batches)]
                _, horizon, law, options, pad = self._spec
                part = Draw.concatenate(parts)
                pinned, again = self._store.pin_drawn(part, horizon, law, self._again, options=options, pad=pad)
                self.redrawn += again
                return pinned
            finally:
                for part_pinned in drawn:
                    part_pinned.release()
                self._drop(keep_from)

    def _draw_missing(self, first: int, batches: int, drawn: list[PinnedDraw]) -> None:
        """Draws the batches that were not drawn yet. They stay pinned, in ``drawn``, so that none of their episodes can go meanwhile."""
        missing = [n for n in range(max(first, self._dropped_below), first + batches) if n not in self._kept]
        while missing:
            run = 1
            while run < len(missing) and missing[run] == missing[0] + run:
                run += 1
            self._rng.bit_generator.state = self._begin
            self._rng.bit_generator.advance(missing[0] * self._numbers)  # type: ignore[attr-defined]  # PCG64, as default_rng() makes
            pinned = self._draw(self._slices, self._rng, run)
            drawn.append(pinned)
            for at, number in enumerate(missing[:run]):
                self._kept[number] = pinned.draw.between(at * self._slices, (at + 1) * self._slices)
            del missing[:run]

    def _draw(self, slices: int, rng: np.random.Generator, batches: int) -> PinnedDraw:
        _, horizon, law, options, pad = self._spec
        return self._store.draw(slices, horizon, law, rng, batches=batches, options=options, pad=pad)

    def _part(self, number: int, rank: int, drawn: list[PinnedDraw]) -> Draw:
        """Returns a rank's part of a global batch; of one that is not kept any more, as many slices that are drawn now."""
        kept = self._kept.get(number)
        if kept is not None:
            return kept.between(rank * self._count, (rank + 1) * self._count)
        drawn.append(self._draw(self._count, self._again, 1))
        self.redrawn += self._count
        return drawn[-1].draw

    def _drop(self, keep_from: int) -> None:
        """Drops batches that no rank comes for, and the oldest ones while they take too much memory."""
        most = max(MAX_KEPT_BYTES // (self._slices * BYTES_PER_SLICE), 1)
        stale = sorted(number for number in self._kept if number < keep_from)
        rest = sorted(self._kept.keys() - set(stale))
        stale += rest[: max(len(rest) - most, 0)]
        for number in stale:
            del self._kept[number]
        if stale:
            self._dropped_below = max(self._dropped_below, stale[-1] + 1)


class _Job:
    """The streams of one job.

    Args:
        asked: what its first stream asked for, which all others must ask for as well.
        rng: the job's random numbers.
    """

    def __init__(self, asked: Mapping[str, object], rng: np.random.Generator) -> None:
        self.asked = asked
        self._seeds = rng.bit_generator.seed_seq
        self.lock = threading.Lock()
        self.draws: dict[int, _GlobalDraws] = {}
        """The global batches of each table of a mix, by its position."""
        self.next_of: dict[int, int] = {}
        """Number of the next global batch of each rank that has come."""
        self.streams_of: dict[int, int] = {}
        """Number of streams that each rank has opened so far."""
        self.streams = 0

    def rng(self) -> np.random.Generator:
        """Returns the job's random numbers from their beginning: the same ones each time."""
        seeds = self._seeds
        return np.random.default_rng(np.random.SeedSequence(seeds.entropy, spawn_key=seeds.spawn_key))  # type: ignore[attr-defined]


class RankShare:
    """A rank's part of its job's batches, for one stream. One thread at a time; streams of a job do not wait for each other's gathers."""

    def __init__(self, job: _Job, rank: Rank) -> None:
        self._job = job
        self._rank = rank
        self._next = rank.first_batch or 0
        # From now on the rank's place is this stream's: the thread of one that broke may still draw for a while.
        with job.lock:
            self._stream = job.streams_of[rank.rank] = job.streams_of.get(rank.rank, 0) + 1
            job.next_of[rank.rank] = self._next
        self.rng = job.rng()
        """The job's random numbers, which each of its streams has from their beginning."""
        self.world_size = rank.world_size

    def draw(
        self, position: int, store: EpisodeStore, spec: SampleSpec, rng: np.random.Generator, *, count: int, batches: int
    ) -> PinnedDraw:
        """Draws this rank's part of the next global batches, of one table, and pins it. :meth:`advance` goes on to those behind them.

        Args:
            position: position of the table in the mix; 0 without one.
            store: the table's episodes.
            spec: what to draw.
            rng: the table's random numbers in this job.
            count: slices of the rank's batch from this table.
            batches: number of batches.

        Raises:
            NotReadyError: nothing can be sampled.
        """
        job, rank = self._job, self._rank
        with job.lock:
            draws = job.draws.get(position)
            if draws is None:
                draws = job.draws[position] = _GlobalDraws(store, spec, count, rank.world_size, rng)
            slowest = min(job.next_of.values()) if len(job.next_of) == rank.world_size else 0
        return draws.draw(rank.rank, self._next, batches, keep_from=slowest - KEPT_BEHIND)

    def advance(self, batches: int) -> None:
        """Goes on to the next global batches, once a draw of each table has succeeded."""
        job, rank = self._job, self._rank.rank
        self._next += batches
        with job.lock:
            if job.streams_of[rank] == self._stream:
                job.next_of[rank] = self._next

    def describe(self) -> str:
        """Returns how far this rank is, for the log."""
        job, rank = self._job, self._rank
        with job.lock:
            redrawn = sum(draws.redrawn for draws in job.draws.values())
            text = f"rank {rank.rank} of {rank.world_size} of the job {rank.job!r}: {self._next} batches drawn"
        return f"{text}; {redrawn} slices of the job were drawn again, since their episodes had been evicted" if redrawn else text


class RankJobs:
    """The jobs whose ranks have open streams. A job ends with its last stream. For one thread: the event loop."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[object, ...], _Job] = {}

    @contextmanager
    def join(
        self, rank: Rank, tables: tuple[Table, ...], asked: Mapping[str, object], make_rng: Callable[[], np.random.Generator]
    ) -> Iterator[RankShare]:
        """Makes a stream part of its job until the end of the ``with`` block.

        Args:
            rank: the stream's rank.
            tables: tables that the job draws from. A job of the same name on other tables is another one.
            asked: what the stream asks for, by name, which all ranks must agree about.
            make_rng: source of a new job's random numbers.

        Raises:
            InvalidArgumentError: another rank of the job asked for something else, or this rank has been here and does not say where to
                go on.
        """
        key = (rank.job, *tables)
        job = self._jobs.get(key)
        if job is None:
            job = _Job(asked, make_rng())
        _check_agrees(rank, asked, job)
        if rank.first_batch is None and rank.rank in job.next_of:
            raise InvalidArgumentError(
                f"rank: {rank.rank} of the job {rank.job!r} has a stream, or had one ({job.next_of[rank.rank]} batches drawn, some of them "
                "ahead); expected each rank once, first_batch=N to go on after N batches, or for another job another name (job=)"
            )
        self._jobs[key] = job
        job.streams += 1
        share = RankShare(job, rank)
        try:
            yield share
        finally:
            logger.info("%s", share.describe())
            job.streams -= 1
            if not job.streams:
                del self._jobs[key]


def _check_agrees(rank: Rank, asked: Mapping[str, object], job: _Job) -> None:
    """Raises InvalidArgumentError if a stream asks for something other than the first one of its job did."""
    for name in asked.keys() | job.asked.keys():
        found, expected = asked.get(name), job.asked.get(name)
        if found != expected:
            raise InvalidArgumentError(
                f"{name}: {_shown(found)} of rank {rank.rank}, expected {_shown(expected)} as other ranks of the job {rank.job!r} ask for, "
                "or for another job another name (job=)"
            )


def _shown(value: object) -> str:
    return "none" if value is None else repr(value)
