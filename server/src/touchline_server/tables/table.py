"""One table: everything that belongs to a name."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from touchline_protos import Counts
from touchline_protos.codec import BatchLayout, Episode
from touchline_protos.types.priorities import PriorityUpdate
from touchline_server.config.settings import Config
from touchline_server.errors import InvalidArgumentError, OverLimitError, RestoringError, StorageFailedError, UnknownTableError
from touchline_server.limiters.limiter import RateLimiter
from touchline_server.limiters.samples_per_insert import Rate, SamplesPerInsert
from touchline_server.selectors.options import NO_OPTIONS, LawOptions, check_options, check_pad
from touchline_server.selectors.prioritized import PRIORITIZED
from touchline_server.selectors.registry import LAWS, check_law
from touchline_server.selectors.seeds import SeedSource
from touchline_server.store import cuda_device
from touchline_server.store.batch_draw import BatchDraw
from touchline_server.store.episode_store import EpisodeStore
from touchline_server.store.gather import GatherPlan
from touchline_server.store.gather_threads import GatherThreads
from touchline_server.store.index import Fill
from touchline_server.store.inserts import Stored
from touchline_server.store.memory import give_back_freed_memory
from touchline_server.store.pinned_draw import PinnedDraw, locate, pad_draw
from touchline_server.store.schema import Schema

if TYPE_CHECKING:
    from touchline_server.durability.background import BackgroundCommitter
    from touchline_server.durability.priorities import PriorityKeeper
    from touchline_server.durability.storage_state import StorageMonitor
    from touchline_server.store.inserts import CommitFuture

MAX_UPDATE_SLICES = 65_536
"""Most slices whose priorities are updated by one call."""

MAX_PLANS = 64
"""Gather plans kept: one for each schema and horizon in use."""

DEFAULT_TOLERANCE_BATCHES = 16
"""Batches of which the slices are the tolerance of a rate limit that sets none: about what a ring keeps ready."""

DEFAULT_TOLERANCE_STEPS = 1_000
"""Steps of which the slices are the tolerance of a rate limit that sets none, if they are more: about an episode."""

Outcome = TypeVar("Outcome", bound="Stored | CommitFuture | None")


class SampleSpec(NamedTuple):
    """What to draw: checked, and with the table's values for what the request left out."""

    batch_size: int
    horizon: int
    law: str
    options: LawOptions = NO_OPTIONS
    """The request's parameters of the law."""
    pad: bool = False
    """Whether slices may run over their episode's end."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Fields of the optional provenance of its batches, in wire order."""
        law = LAWS[self.law].optional
        return (*law, "valid") if self.pad else law

    @property
    def has_priorities(self) -> bool:
        """Whether it is drawn by a law with priorities."""
        return "weight" in LAWS[self.law].optional

    @property
    def reach(self) -> int:
        """Transitions that follow a start at least: an episode with more rows than this can be sampled."""
        return 1 if self.pad else self.horizon


class Table:
    """A named store with its own configuration, selectors, rate limiter, seeds, subscribers and, if durable, folder.

    Tables share nothing: adding to one never waits for another. Every method may be called from any thread.

    Args:
        name: the table's name; empty for the default table.
        config: the table's configuration.
        limiter: the table's rate limit; by default the configuration's.
        accept_eviction: whether opening a durable store may evict stored episodes for which ``config.buffer_size`` has become too small,
            as ``storage.accept_eviction`` allows; without either that is a StoreMismatchError.
    """

    def __init__(self, name: str, config: Config, *, limiter: RateLimiter | None = None, accept_eviction: bool = False) -> None:
        self.name = name
        self.config = config
        self.store = EpisodeStore(config)
        """The stored episodes."""
        self.subscriptions = self.store.writes.subscriptions
        """Listeners to every change of what is stored, or of what the rate limit allows."""
        self.rate = SamplesPerInsert(rate_of(config), name=name, is_filled=self._is_filled, notify=self.subscriptions.notify)
        """The configured rate limit."""
        self.limiter: RateLimiter = self.rate if limiter is None else limiter
        """The rate limit, which streams, calls and adds ask."""
        self.seeds = SeedSource(config.sampling.seed)
        """The random generators of this table's streams of batches."""
        self.restored = not config.durable_dir
        """Whether the durable store, if there is to be one, has been read. Until then every other method raises RestoringError."""
        self.dropped = False
        """Whether the table was dropped. Then every method raises UnknownTableError."""
        self._accept_eviction = accept_eviction or config.storage.accept_eviction
        self._restore_progress = (0, 0)
        self._committer: BackgroundCommitter | None = None
        self._priorities: PriorityKeeper | None = None
        self._gather_threads = GatherThreads(config.server.gather_threads)
        self._plans_lock = threading.Lock()
        self._plans: OrderedDict[tuple[Schema, int], GatherPlan] = OrderedDict()

    def restore(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Opens the folder of the durable store, if one is configured, and puts its episodes into the ring.

        Args:
            progress: called again and again with the rows read so far and all rows.

        Raises:
            ConfigError: a CUDA device that this machine does not have.
            StoreInUseError: another server uses the folder.
            StoreMismatchError: it is of another format or configuration, or the buffer is too small for its episodes.
            DamagedStoreError: something in it is not as it was written.
            StorageFailedError: it cannot be read or written.
            TooLargeError: there is no memory for the columns.
        """
        cuda_device.prepare(self.config.storage.device)
        if not self.restored:
            from touchline_server.durability.priorities import PriorityKeeper
            from touchline_server.durability.restore import open_durable

            def note_progress(read: int, total: int) -> None:
                self._restore_progress = read, total
                if progress is not None:
                    progress(read, total)

            self._committer = open_durable(self.store, self.config, note_progress, accept_eviction=self._accept_eviction)
            self._priorities = PriorityKeeper(self.store, Path(self.config.durable_dir))
            self.restored = True

    @property
    def restore_progress(self) -> tuple[int, int]:
        """Rows of the durable store that were read so far, and all its rows."""
        return self._restore_progress

    def check_restored(self) -> None:
        """Raises RestoringError until the durable store has been read: what the table holds is not known before."""
        if not self.restored:
            read, total = self._restore_progress
            progress = f" ({read} of {total} rows, {100 * read // total} %)" if total else ""
            raise RestoringError(f"the durable store in {self.config.durable_dir} is being read{progress}; try again when it is")
        self.check_not_dropped()

    def check_not_dropped(self) -> None:
        """Raises UnknownTableError once the table was dropped. Calls that wait for the table ask it after every change."""
        if self.dropped:
            raise UnknownTableError(f"table: {self.name!r} was dropped")

    def drop(self) -> None:
        """Ends everything that waits for the table, answers the adds that it has accepted, and frees its memory."""
        self.dropped = True
        self.subscriptions.notify()
        if self._priorities is not None:
            self._priorities.close(save=False)
        if self._committer is not None:
            self._committer.close()
        self.store.discard()
        self.store.close()
        give_back_freed_memory()

    def close(self) -> None:
        """Commits adds in progress, saves priorities, and releases ``storage.data_dir`` and ``storage.scratch_dir``."""
        if self._priorities is not None:
            self._priorities.close()
        if self._committer is not None:
            self._committer.close()
        self.store.close()

    @property
    def storage_monitor(self) -> StorageMonitor | None:
        """State of the disk under the durable store; None without one, or before it is read."""
        return self._committer.monitor if self._committer is not None else None

    @property
    def committer(self) -> BackgroundCommitter | None:
        """What commits to the durable store; None without one, or before it is read."""
        return self._committer

    def counts(self) -> Counts:
        """Returns the counts at this moment."""
        self.check_restored()
        return self.store.counts()

    def ready(self) -> bool:
        """Returns whether at least one episode can be sampled at the configured horizon."""
        self.check_restored()
        return self.store.can_sample(self.spec().reach)

    def fill(self) -> Fill:
        """Returns how much can be sampled, as configured."""
        return self.store.fill(1 if self.config.sampling.pad == "end" else self.config.horizon)

    def episodes_not_sampled(self) -> int:
        """Returns the number of stored episodes that are too short for a slice, as configured."""
        fill = self.fill()
        return fill.episodes - fill.eligible

    # Adding. Raises as EpisodeStore.add does.

    def add(self, episode: Episode) -> Stored:
        """Stores one episode, whole or not at all, and waits for the disk. Its arrays are copied.

        Raises:
            OverLimitError: the rate limit does not allow it now. No other thread may be there to change that, so this does not wait.
        """
        self.check_restored()
        if not self.limiter.reserve_insert(episode.length):
            raise OverLimitError(f"the rate limit holds adds back: {self.limiter.explain_adds()}")
        return self._insert(self.store.add, episode)

    def submit(self, episode: Episode) -> Stored | CommitFuture:
        """Stores one episode without waiting for the disk, see :meth:`EpisodeStore.submit`. Its steps are reserved with the limiter."""
        self.check_restored()
        try:
            return self._insert(self.store.submit, episode)
        except StorageFailedError:
            self.check_not_dropped()  # after the check above
            raise

    def try_add(self, episode: Episode) -> Stored | None:
        """Stores one episode, or returns None if that means waiting: for the limiter, or see :meth:`EpisodeStore.try_add`."""
        self.check_not_dropped()
        if not self.limiter.reserve_insert(episode.length):
            return None
        return self._insert(self.store.try_add, episode)

    def clear(self) -> Counts:
        """Evicts all episodes and forgets the schema. Episode ids and the counts of what was ever added continue."""
        self.check_restored()
        counts = self.store.clear()
        self.limiter.cleared()
        give_back_freed_memory()
        return counts

    def set_rate(self, config: Config) -> None:
        """Changes the rate limit to that of a configuration that is otherwise the table's own, and wakes the callers that wait."""
        self.config = config
        self.rate.change(rate_of(config))

    def _is_filled(self, min_steps: int) -> bool:
        """Returns whether this many steps are stored, or as many as fit, and something can be sampled at the configured horizon."""
        fill = self.fill()
        return fill.eligible > 0 and fill.has(min_steps)

    # Sampling

    def spec(
        self,
        *,
        batch_size: int | None = None,
        horizon: int | None = None,
        law: str | None = None,
        options: LawOptions = NO_OPTIONS,
        pad: str | None = None,
    ) -> SampleSpec:
        """Returns what to draw, with the configured values for what is None.

        Raises:
            InvalidArgumentError: a value is out of range.
        """
        self.check_restored()
        limits = self.config.limits
        batch_size = self.config.batch_size if batch_size is None else batch_size
        horizon = self.config.horizon if horizon is None else horizon
        if not 1 <= batch_size <= limits.max_batch_size:
            raise InvalidArgumentError(f"batch_size: {batch_size}, expected 1 to {limits.max_batch_size} (limits.max_batch_size)")
        if not 1 <= horizon <= limits.max_horizon:
            raise InvalidArgumentError(f"horizon: {horizon}, expected 1 to {limits.max_horizon} (limits.max_horizon)")
        law = self.config.sampling.law if law is None else check_law(law)
        spec = SampleSpec(batch_size, horizon, law, options, check_pad(self.config.sampling.pad if pad is None else pad))
        check_options(law, options, self.store.law_settings, reach=spec.reach)
        return spec

    def draw(self, spec: SampleSpec, rng: np.random.Generator, *, batches: int = 1) -> BatchDraw:
        """Draws batches, and pins them until the end of a ``with`` block, in which they are gathered.

        The rate limit is not asked: the caller that hands the batches over asks it.

        Args:
            spec: what to draw.
            rng: the random numbers; by the same ones, ``batches`` draws in a row give the same batches.
            batches: number of batches.

        Raises:
            NotReadyError: no stored episode has horizon + 1 steps.
        """
        pinned = self.store.draw(spec.batch_size, spec.horizon, spec.law, rng, batches=batches, options=spec.options, pad=spec.pad)
        return self.batch_draw(spec, pinned, batches=batches)

    def batch_draw(self, spec: SampleSpec, pinned: PinnedDraw, *, batches: int) -> BatchDraw:
        """Returns batches whose slices are drawn and pinned; unpins them if it fails.

        Args:
            spec: what was drawn.
            pinned: the slices of all batches.
            batches: number of batches.
        """
        try:
            plan = self.plan(pinned.columns.schema, spec.horizon)
            draw = pad_draw(pinned.draw, spec.horizon) if spec.pad else pinned.draw
            part = locate(draw, pinned.columns, batches=batches, horizon=spec.horizon)
            return BatchDraw((pinned,), (part,), plan, plan.layout(spec.batch_size, draw.optional))
        except BaseException:  # there may be no memory for the rows of a large batch
            pinned.release()
            raise

    def update_priorities(self, update: PriorityUpdate) -> int:
        """Sets the priorities of slices that were drawn by the law ``prioritized``, and returns how many of them are still stored.

        Raises:
            InvalidArgumentError: the update is too large, or a slice does not lie within its episode. Nothing has changed.
        """
        self.check_restored()
        most = self.config.limits.max_horizon, MAX_UPDATE_SLICES
        if any(found > allowed for found, allowed in zip(update.priorities.shape, most, strict=True)):
            raise InvalidArgumentError(f"priorities: shape {update.priorities.shape}, expected at most {most} (limits.max_horizon first)")
        return self.store.update_priorities(PRIORITIZED, update)

    def layout(self, spec: SampleSpec) -> BatchLayout | None:
        """Returns how a batch looks at present; None while there is no schema."""
        schema = self.store.schema
        return None if schema is None else self.plan(schema, spec.horizon).layout(spec.batch_size, spec.optional)

    def fits_inline(self, spec: SampleSpec, *, batches: int = 1) -> bool:
        """Returns whether an event loop may gather batches by itself: see :meth:`GatherPlan.fits_inline`."""
        columns = self.store.columns
        if columns is None:
            return False
        plan = self.plan(columns.schema, spec.horizon)
        return plan.fits_inline(columns, plan.layout(spec.batch_size, spec.optional), batches=batches)

    def actor_names(self, numbers: Iterable[int]) -> dict[int, str]:
        """Returns the names of actors by their numbers."""
        return {number: self.store.actor_name(number) for number in sorted(numbers)}

    def plan(self, schema: Schema, horizon: int) -> GatherPlan:
        """Returns how slices of a schema become tensors."""
        key = (schema, horizon)
        plan = self._plans.get(key)
        if plan is None:
            incoming = self.config.sampling.row_convention == "incoming"
            generation, threads = self.store.store_generation, self._gather_threads
            plan = GatherPlan(schema, horizon=horizon, incoming=incoming, store_generation=generation, threads=threads)
            with self._plans_lock:
                while len(self._plans) >= MAX_PLANS:
                    self._plans.popitem(last=False)
                self._plans[key] = plan
        return plan

    def _insert(self, insert: Callable[[Episode], Outcome], episode: Episode) -> Outcome:
        """Stores an episode whose steps are reserved, and reports to the limiter how it ended."""
        if not self.limiter.active:
            return insert(episode)
        steps = episode.length
        try:
            outcome = insert(episode)
        except BaseException:
            self.limiter.cancel_insert(steps)
            raise
        if isinstance(outcome, Future):
            outcome.add_done_callback(lambda future: self._report_insert(_result(future), steps))
        else:
            self._report_insert(outcome, steps)
        return outcome

    def _report_insert(self, stored: Stored | None, steps: int) -> None:
        if stored is None or stored.duplicate:
            self.limiter.cancel_insert(steps)
        else:
            self.limiter.inserted(steps)


def _result(future: Future[Stored]) -> Stored | None:
    """Returns the answer to an add that is done; None if it failed or was cancelled."""
    return None if future.cancelled() or future.exception() is not None else future.result()


def rate_of(config: Config) -> Rate:
    """Returns the rate limit of a table's configuration, with the tolerance that it leaves out."""
    rate = config.rate
    tolerance = rate.tolerance or max(DEFAULT_TOLERANCE_BATCHES * config.batch_size, DEFAULT_TOLERANCE_STEPS * rate.samples_per_insert)
    return Rate(rate.samples_per_insert, tolerance, rate.min_steps)
