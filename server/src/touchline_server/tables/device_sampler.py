"""Batches that are drawn and gathered on the columns' device. Importing this imports torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from weakref import ref

import numpy as np
import torch

from touchline_protos import Batch
from touchline_protos.codec import BatchLayout
from touchline_protos.gather.row_gather import Launcher, rows_to_device, why_no_kernel
from touchline_protos.types.batch import assemble_batch
from touchline_server.errors import InvalidArgumentError, NotReadyError, SchemaChangedError
from touchline_server.store.columns import Columns
from touchline_server.store.device_episodes import DRAWN_LAWS, DeviceEpisodes, EpisodeTracker
from touchline_server.store.device_gather import BodyViews, make_gather
from touchline_server.tables.sampler import TableSampler
from touchline_server.tables.table import SampleSpec, Table

MAX_BLOCK = 1024
"""Slices that the kernel draws together."""


MAX_KEY = (1 << 63) - 1
"""Largest key of random numbers."""

MAX_SAMPLERS = 8
"""Samplers that a buffer keeps for its own calls; the one used longest ago gives way."""


class DeviceSampler:
    """Batches of one table, drawn and gathered on its CUDA device into the same tensors each time.

    The host only copies new episodes' index entries to the device, so a batch costs two launches. These can be captured in a CUDA graph:

    >>> sampler = buffer.device_sampler()
    >>> sampler.sample()  # once before the capture
    >>> with sampler.hold(), torch.cuda.graph(graph):
    ...     sampler.launch()
    ...     train(sampler.batch)
    >>> while training:
    ...     with sampler.hold():
    ...         graph.replay()

    If other threads add meanwhile, capture with ``capture_error_mode="thread_local"``.

    One thread at a time. On whichever stream it is used, it follows what it did on others. Keep it until what it queued is done.

    Args:
        table: the table.
        spec: what to draw.
        key: key of the random numbers: the same key and the same episodes at each draw give the same batches.

    Raises:
        InvalidArgumentError: the law is not one of :data:`DRAWN_LAWS`, or the columns are not on a CUDA device, or Triton is missing.
        NotReadyError: nothing can be sampled yet.
    """

    def __init__(self, table: Table, spec: SampleSpec, key: int) -> None:
        if spec.law not in DRAWN_LAWS:
            raise InvalidArgumentError(f"draw: 'device' with the law {spec.law!r}, expected one of {', '.join(DRAWN_LAWS)}, or draw='host'")
        self._table = table
        self._spec = spec
        self._tracker = EpisodeTracker()
        # It draws none itself.
        self._reservations = TableSampler(table, spec, np.random.default_rng(0))
        with table.store.pin_episodes(spec.reach, EpisodeTracker()) as (columns, _):
            # A cleared table's memory is freed, even while the sampler is kept.
            self._columns = ref(columns)
        self.device = columns.device
        _check_can_draw(self.device)
        plan = table.plan(columns.schema, spec.horizon)
        self._layout = plan.layout(spec.batch_size, ("valid",) if spec.pad else ())
        self._gather = make_gather(plan.outputs, self._layout, [(columns, 0, spec.batch_size)], owns=False)
        self._episodes = DeviceEpisodes(self.device)
        self._random = self._begin(key)
        self._rows = torch.empty((2, spec.batch_size), dtype=torch.int64, device=self.device)
        self._draw = Launcher(_find_draw_kernel, 1, self.device)
        self._stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        self._views = BodyViews(self._layout)
        self._body = DeviceBatch(self._layout, self._views, self.device)
        self.batch = self._body.batch(table)
        """The batch, filled by :meth:`launch`. All of it is on the device, also the provenance."""

    @contextmanager
    def hold(self, batches: int = 1) -> Iterator[None]:
        """Makes the episodes that are stored now drawable, and keeps their rows for the launches and replays that are queued in the block.

        Everything must be queued on the stream that is current at the begin of the block. Adds wait for nothing in it but the queueing, and
        the rows are overwritten after what was queued has read them.

        Args:
            batches: number of batches that are queued, which the table's rate limit counts.

        Raises:
            NotReadyError: nothing can be sampled, or the table's rate limit does not allow this many batches now.
            SchemaChangedError: the table was cleared: this sampler can no longer be used, make another one.
        """
        with self._reserved(batches), self._table.store.pin_episodes(self._spec.reach, self._tracker) as (columns, changes):
            if not self.fits(columns):
                raise SchemaChangedError("the table was cleared, and its columns are others now: make another sampler")
            self._follow_stream()
            columns.follow_writes()
            if changes is not None:
                try:
                    self._episodes.apply(changes)
                except BaseException:
                    self._tracker.forget()
                    raise
            try:
                yield
            finally:
                columns.note_reads()

    def launch(self, body: DeviceBatch | None = None, *, random: torch.Tensor | None = None) -> None:
        """Queues a batch on the current stream: draws it and gathers it. Within :meth:`hold`, or a capture whose replays are.

        Args:
            body: memory to fill; None fills :attr:`batch`.
            random: [2] int64, key and number of the batch; None takes the sampler's, and advances them.
        """
        body = self._body if body is None else body
        spec = self._spec
        self._draw(
            self._episodes.state,
            self._random if random is None else random,
            self._rows,
            body.provenance,
            body.probability,
            body.valid,
            spec.batch_size,
            spec.horizon,
            spec.reach,
            DRAWN_LAWS.index(spec.law),
            spec.pad,
            min(1 << (spec.batch_size - 1).bit_length(), MAX_BLOCK),
        )
        self._gather.run(self._rows, body.memory)

    def sample(self) -> Batch:
        """Fills :attr:`batch` and returns it."""
        with self.hold():
            self.launch()
        return self.batch

    def sample_fresh(self, key: int | None = None) -> Batch:
        """Returns a batch in fresh memory: the next one, or the first one of another key."""
        body = DeviceBatch(self._layout, self._views, self.device)
        with self.hold():
            self.launch(body, random=None if key is None else self._begin(key))
        return body.batch(self._table)

    def settle(self) -> None:
        """Waits until the device has done all queued work: the sampler's memory may be freed then."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def fits(self, columns: Columns | None) -> bool:
        """Returns whether these are the columns that it was made for."""
        return columns is not None and columns is self._columns()

    @contextmanager
    def _reserved(self, batches: int) -> Iterator[None]:
        """Reserves batches with the rate limit, and reports how they ended."""
        reserved = self._reservations.reserve(batches, waits=False)
        if reserved is None or reserved.batches < batches:
            if reserved is not None:
                self._reservations.cancel(*reserved)
            raise NotReadyError(self._reservations.explain_not_ready())
        try:
            yield
        except BaseException:
            self._reservations.cancel(*reserved)
            raise
        self._reservations.delivered(*reserved)

    def _begin(self, key: int) -> torch.Tensor:
        """Returns the random numbers of a key, [2] int64, in the order of the current stream."""
        return rows_to_device(np.array([key, 0]), self.device)

    def _follow_stream(self) -> None:
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            if current != self._stream:
                current.wait_stream(self._stream)
                self._stream = current


class DeviceBatch:
    """Memory of a batch on a device: the columns, and the provenance that the kernel writes.

    Args:
        layout: the batch's layout.
        views: the layout's views.
        device: the device.
    """

    def __init__(self, layout: BatchLayout, views: BodyViews, device: torch.device) -> None:
        self._layout = layout
        self._views = views
        size = layout.batch_size
        self.memory = views.empty(device)
        # ids, starts, actors, policy versions, and as float64 the probabilities
        numbers = torch.empty((5, size), dtype=torch.int64, device=device)
        self.provenance = numbers[:4]
        self.probability = numbers[4].view(torch.float64)
        horizon = next((spec.shape[0] for spec in layout.specs if spec.name == "provenance.valid"), 0)
        self.valid = torch.empty((max(horizon, 1), size, 1), dtype=torch.uint8, device=device)

    def batch(self, table: Table) -> Batch:
        """Returns the batch that is in this memory."""
        names = ("episode_id", "start", "actor", "policy_version")
        tensors = self._views.of(self.memory)
        tensors |= {f"provenance.{name}": values for name, values in zip(names, self.provenance, strict=True)}
        tensors["provenance.probability"] = self.probability
        if "valid" in self._layout.optional:
            tensors["provenance.valid"] = self.valid.view(torch.bool)
        return assemble_batch(tensors, StoredActorNames(table), store_generations=self._layout.store_generations)


class StoredActorNames(Mapping[int, str]):
    """Names of the actors of a table's stored episodes by their numbers, as they are when asked for. Thread-safe.

    The host does not know which actors a batch drawn on the device has.
    """

    def __init__(self, table: Table) -> None:
        self._actors = table.store.actors

    def __getitem__(self, number: int) -> str:
        return self._actors.name(number)

    def __iter__(self) -> Iterator[int]:
        return iter(self._actors.numbers())

    def __len__(self) -> int:
        return len(self._actors)


def _check_can_draw(device: torch.device) -> None:
    """Raises InvalidArgumentError if no kernel runs on the device."""
    if device.type == "cpu":
        # Triton's interpreter takes the kernel for tests without a card.
        reason = "" if os.environ.get("TRITON_INTERPRET") == "1" else "the columns are in host memory, see storage.device"
    else:
        reason = why_no_kernel(device.type)
    if reason:
        raise InvalidArgumentError(f"draw: 'device', expected 'host': {reason}")


def _find_draw_kernel() -> object:
    from touchline_server.store.draw_kernel import draw_slices

    return draw_slices


class DeviceSamplers:
    """The device samplers of a buffer: for its own calls, one for each request, and those that it makes for callers. Thread-safe.

    Args:
        table: the table.
        rng: random numbers that give each sampler without a seed its key.
    """

    def __init__(self, table: Table, rng: np.random.Generator) -> None:
        self._table = table
        self._rng = rng
        self._lock = threading.Lock()
        self._samplers: dict[SampleSpec, DeviceSampler] = {}

    def make(self, spec: SampleSpec, seed: int | None) -> DeviceSampler:
        """Returns a sampler for a caller."""
        if seed is not None:
            return DeviceSampler(self._table, spec, _check_key(seed))
        with self._lock:
            return DeviceSampler(self._table, spec, self._new_key())

    def sample(self, spec: SampleSpec, seed: int | None) -> Batch:
        """Returns a batch in fresh memory: the first one of a seed, or the next one for these requests."""
        key = None if seed is None else _check_key(seed)
        with self._lock:
            sampler = self._samplers.pop(spec, None)
            if sampler is not None and not sampler.fits(self._table.store.columns):
                sampler.settle()
                sampler = None
            if sampler is None:
                sampler = DeviceSampler(self._table, spec, self._new_key())
            if len(self._samplers) >= MAX_SAMPLERS:
                self._samplers.pop(next(iter(self._samplers))).settle()
            self._samplers[spec] = sampler  # the one used last is the last
            return sampler.sample_fresh(key)

    def _new_key(self) -> int:
        return int(self._rng.integers(MAX_KEY + 1))


def _check_key(seed: int) -> int:
    if not 0 <= seed <= MAX_KEY:
        raise InvalidArgumentError(f"seed: {seed}, expected 0 to {MAX_KEY}")
    return seed
