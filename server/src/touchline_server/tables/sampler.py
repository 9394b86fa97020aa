"""Where the batches of one stream, or one call, come from: a table here, several in :mod:`.mix_sampler`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from touchline_protos.codec import BatchLayout
from touchline_server.limiters.place import BatchesPlace
from touchline_server.store.batch_draw import BatchDraw
from touchline_server.store.columns import Columns
from touchline_server.store.gather import GatherPlan
from touchline_server.store.subscriptions import Subscriptions
from touchline_server.tables.ranks import RankShare
from touchline_server.tables.table import SampleSpec, Table

Split = tuple[int, ...]
"""Number of slices that each table provides of a batch; one table provides all of them."""


class Reserved(NamedTuple):
    """Batches that may be drawn and handed over: they are reserved with the rate limit of each table that they come from."""

    batches: int
    split: Split
    """The split of each of them."""


class GatherSource(NamedTuple):
    """What batches are gathered from at a moment."""

    plan: GatherPlan
    layout: BatchLayout
    columns: tuple[Columns | None, ...]
    """Columns of each table, in the order of the mix; None for a table without any."""


class Sampler(Protocol):
    """The batches of one stream. What it is made of is fixed; one thread at a time.

    What is reserved ends in exactly one report a batch, in any order: ``delivered`` or ``cancel``. See :class:`RateLimiter`.
    """

    batch_size: int
    """B, slices in a batch."""
    horizon: int
    """H, transitions in a slice."""

    @property
    def table_names(self) -> tuple[str, ...]:
        """Names of the tables of a mix; empty for one table."""
        ...

    @property
    def remembers_slices(self) -> bool:
        """Whether the laws remember what they drew, so that priorities can come back by the number of a batch: those with priorities do,
        but not for a rank's part of global batches."""
        ...

    def check_not_dropped(self) -> None:
        """Raises UnknownTableError once a table was dropped. Callers that wait for the tables ask it after every change."""
        ...

    def can_sample(self) -> bool:
        """Returns whether a batch can be drawn now, whatever the rate limit says.

        Raises:
            UnknownTableError: the table was dropped.
        """
        ...

    def explain_not_ready(self) -> str:
        """Returns why no batch can be drawn, or what the rate limit waits for, for errors."""
        ...

    def layout(self) -> BatchLayout | None:
        """Returns how a batch looks at present; None while there is no schema."""
        ...

    def source(self) -> GatherSource | None:
        """Returns what batches are gathered from at present; None while there is no schema."""
        ...

    def fits_inline(self, *, batches: int = 1) -> bool:
        """Returns whether an event loop may gather batches by itself: see :meth:`GatherPlan.fits_inline`."""
        ...

    def reserve(self, batches: int, *, waits: bool) -> Reserved | None:
        """Reserves up to ``batches`` batches with the rate limit; returns None if that allows none now.

        Args:
            batches: number of batches.
            waits: whether the learner has nothing else to do, so that it queues if it gets nothing. The caller must be subscribed to the
                tables' changes, and ask again after each.
        """
        ...

    def leave(self) -> None:
        """Leaves the queue of the rate limit, if the learner is in it: it ends, or waits for something else."""
        ...

    def delivered(self, batches: int, split: Split) -> None:
        """Reports that reserved batches were delivered."""
        ...

    def cancel(self, batches: int, split: Split) -> None:
        """Reports that reserved batches will not be delivered."""
        ...

    def draw(self, reserved: Reserved) -> BatchDraw:
        """Draws reserved batches, and pins them until the end of a ``with`` block; see :meth:`Table.draw`."""
        ...

    def has_actor(self, number: int) -> bool:
        """Returns whether the name of an actor's number is still known. Numbers are never reused."""
        ...

    def actor_count(self) -> int:
        """Returns the number of actors whose names are known."""
        ...

    def actor_names(self, numbers: Iterable[int]) -> dict[int, str]:
        """Returns the names of actors by their numbers."""
        ...

    @property
    def changes(self) -> tuple[Subscriptions, ...]:
        """Changes of each table that the batches are from."""
        ...


class TableSampler:
    """Batches of one table; see :class:`Sampler`.

    Args:
        table: the table.
        spec: what to draw.
        rng: the stream's own random numbers.
        learner: name of the learner, for the rate limit.
        share: the learner's share of a job's batches, if it is a rank of one; ``rng`` is the job's then.
    """

    table_names: ClassVar[tuple[str, ...]] = ()
    """Names of the tables of a mix: none."""
    __slots__ = ("_place", "_rng", "_share", "_spec", "_split", "_table", "batch_size", "horizon")

    def __init__(
        self, table: Table, spec: SampleSpec, rng: np.random.Generator, *, learner: str = "", share: RankShare | None = None
    ) -> None:
        self._table = table
        self._share = share
        self._spec = spec
        self._rng = rng
        self.batch_size = spec.batch_size
        self.horizon = spec.horizon
        self._split = (spec.batch_size,)
        self._place = BatchesPlace(table.limiter, learner)

    @property
    def remembers_slices(self) -> bool:
        """See :class:`Sampler`."""
        return self._share is None and self._spec.has_priorities

    def check_not_dropped(self) -> None:
        """See :class:`Sampler`."""
        self._table.check_not_dropped()

    def can_sample(self) -> bool:
        """See :class:`Sampler`."""
        self._table.check_not_dropped()
        return self._table.store.can_sample(self._spec.reach)

    def explain_not_ready(self) -> str:
        """See :class:`Sampler`."""
        fill = self._table.store.fill(self._spec.reach)
        return f"the rate limit holds batches back: {self._table.limiter.explain_batches()}" if fill.eligible else fill.explain_not_ready()

    def layout(self) -> BatchLayout | None:
        """See :class:`Sampler`."""
        return self._table.layout(self._spec)

    def source(self) -> GatherSource | None:
        """See :class:`Sampler`."""
        columns = self._table.store.columns
        if columns is None:
            return None
        plan = self._table.plan(columns.schema, self.horizon)
        return GatherSource(plan, plan.layout(self.batch_size, self._spec.optional), (columns,))

    def fits_inline(self, *, batches: int = 1) -> bool:
        """See :class:`Sampler`."""
        # A rank may have to draw for all others, too.
        return self._table.fits_inline(self._spec, batches=batches if self._share is None else batches * self._share.world_size)

    def reserve(self, batches: int, *, waits: bool) -> Reserved | None:
        """See :class:`Sampler`."""
        granted = self._place.reserve(batches, self.batch_size, waits=waits)
        return Reserved(granted, self._split) if granted else None

    def leave(self) -> None:
        """See :class:`Sampler`."""
        self._place.leave()

    def delivered(self, batches: int, split: Split) -> None:
        """See :class:`Sampler`."""
        self._table.limiter.delivered(batches, split[0])

    def cancel(self, batches: int, split: Split) -> None:
        """See :class:`Sampler`."""
        self._table.limiter.cancel_batches(batches, split[0])

    def draw(self, reserved: Reserved) -> BatchDraw:
        """See :class:`Sampler`."""
        table, spec, batches = self._table, self._spec, reserved.batches
        if self._share is None:
            return table.draw(spec, self._rng, batches=batches)
        pinned = self._share.draw(0, table.store, spec, self._rng, count=spec.batch_size, batches=batches)
        self._share.advance(batches)
        return table.batch_draw(spec, pinned, batches=batches)

    def has_actor(self, number: int) -> bool:
        """See :class:`Sampler`."""
        return number in self._table.store.actors

    def actor_count(self) -> int:
        """See :class:`Sampler`."""
        return len(self._table.store.actors)

    def actor_names(self, numbers: Iterable[int]) -> dict[int, str]:
        """See :class:`Sampler`."""
        return self._table.actor_names(numbers)

    @property
    def changes(self) -> tuple[Subscriptions, ...]:
        """See :class:`Sampler`."""
        return (self._table.subscriptions,)
