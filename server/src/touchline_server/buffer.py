"""The in-process replay buffer: usable on its own, and what the server serves."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from touchline_protos import Batch, Counts
from touchline_protos.codec import BatchLayout, Episode, EpisodeKey, StoredEpisode
from touchline_protos.codec.buffer_pool import BufferPool
from touchline_protos.types.batch import assemble_batch
from touchline_protos.types.flatten import ColumnError, flatten_columns, split_episodes
from touchline_server.config.settings import Config
from touchline_server.errors import InvalidArgumentError, InvalidEpisodeError, RestoringError
from touchline_server.selectors.registry import check_law
from touchline_server.selectors.seeds import SeedSource
from touchline_server.store import cuda_device
from touchline_server.store.batch_draw import BatchDraw
from touchline_server.store.committer import Stored
from touchline_server.store.episode_store import EpisodeStore
from touchline_server.store.gather import GatherPlan
from touchline_server.store.memory import give_back_freed_memory
from touchline_server.store.reader import EpisodeQuery, EpisodeReader
from touchline_server.store.schema import Schema

if TYPE_CHECKING:
    import torchrl.data

    from touchline_server.durability.group_commit import GroupCommitter
    from touchline_server.durability.storage_state import StorageMonitor
    from touchline_server.store.committer import CommitFuture

MAX_IDLE_BYTES = 1 << 28
"""Memory of batches that have died, kept for the next ones."""

MAX_PLANS = 64
"""Gather plans kept: one for each schema and horizon in use."""


class SampleSpec(NamedTuple):
    """What to draw: checked, and with the configuration's values where the request had none."""

    batch_size: int
    horizon: int
    law: str


class ReplayBuffer:
    """A ring of whole episodes that gives batches of contiguous slices, in the manner of TD-MPC2's buffer (Hansen et al. 2024).

    Every method may be called from any thread. Adding copies what it is given; batches are the caller's.
    """

    def __init__(self, config: Config, *, restore: bool = True, accept_eviction: bool = False) -> None:
        """Makes a buffer: empty, and nothing is allocated before the first episode fixes the columns; or with a ``storage.data_dir``
        as it was when the last one on that folder ended.

        Args:
            config: the configuration.
            restore: False leaves the folder, and finding the device, to :meth:`restore`, which must come before anything else.
            accept_eviction: whether stored episodes for which ``config.buffer_size`` has become too small may be evicted, as
                ``storage.accept_eviction`` says for the server; otherwise that is a StoreMismatchError.

        Raises:
            ConfigError, ReplayError: as :meth:`restore`.
        """
        self.config = config
        self.store = EpisodeStore(config)
        self.seeds = SeedSource(config.sampling.seed)
        self._rng = self.seeds.stream()
        self._rng_lock = threading.Lock()
        self._plans_lock = threading.Lock()
        self._plans: OrderedDict[tuple[Schema, int], GatherPlan] = OrderedDict()
        self._pool = BufferPool(MAX_IDLE_BYTES)
        self._torchrl: torchrl.data.ReplayBuffer | None = None
        self._committer: GroupCommitter | None = None
        self._accept_eviction = accept_eviction or config.storage.accept_eviction
        self.restored = not config.storage.data_dir
        """Whether the durable store, if there is to be one, is read. Until then every other method raises RestoringError."""
        self._restore_progress = (0, 0)
        if restore:
            self.restore()

    def restore(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Takes ``storage.data_dir``, if one is configured, and puts what is in it into the ring.

        Args:
            progress: told how many of how many rows are read, again and again.

        Raises:
            ConfigError: a CUDA device that this machine does not have.
            StoreInUseError: another server has the folder.
            StoreMismatchError: it is of another format or configuration, or the buffer is too small for what is in it.
            DamagedStoreError: something in it is not as it was written.
            StorageFailedError: it cannot be read or written.
            TooLargeError: there is no memory for the columns.
        """
        cuda_device.prepare(self.config.storage.device)
        if not self.restored:
            from touchline_server.durability.restore import open_durable

            def note_progress(read: int, total: int) -> None:
                self._restore_progress = read, total
                if progress is not None:
                    progress(read, total)

            self._committer = open_durable(self.store, self.config, note_progress, accept_eviction=self._accept_eviction)
            self.restored = True

    def check_restored(self) -> None:
        """Raises RestoringError while the durable store is not read: what the buffer holds is not known before that."""
        if not self.restored:
            read, total = self._restore_progress
            progress = f" ({read} of {total} rows, {100 * read // total} %)" if total else ""
            raise RestoringError(f"the durable store in {self.config.storage.data_dir} is being read{progress}; try again when it is")

    def close(self) -> None:
        """Commits what is under way, and lets go of the ``storage.data_dir`` and the ``storage.scratch_dir``, where there are such."""
        if self._committer is not None:
            self._committer.close()
        self.store.close()

    @property
    def capacity(self) -> int:
        """Maximum number of transitions, counted as stored rows."""
        return self.store.capacity

    @property
    def num_eps(self) -> int:
        """Episodes stored now."""
        return self.counts().episodes_stored

    @property
    def size(self) -> int:
        """Rows stored now."""
        return self.counts().steps_stored

    @property
    def min_history(self) -> int:
        """Rows that should be stored before training starts."""
        return self.config.min_history

    @property
    def storage_monitor(self) -> StorageMonitor | None:
        """What is known of the disk under the durable store; None without one, or before it is read."""
        return self._committer.monitor if self._committer is not None else None

    def counts(self) -> Counts:
        """Returns the figures of this moment."""
        self.check_restored()
        return self.store.counts()

    def ready(self) -> bool:
        """Returns whether at least one episode can be sampled at the configured horizon."""
        self.check_restored()
        return self.store.can_sample(self.config.horizon)

    def add(self, td: Mapping[str, Any], *, actor: str = "", policy_version: int = 0, key: EpisodeKey | None = None) -> int:
        """Stores one episode.

        Args:
            td: a TensorDict, or a mapping of tensors or arrays, of shape (episode_length, ...): ``obs`` (may be nested), ``action``,
                ``reward``, optionally ``done``, ``task`` and any others. Rows as the configured row convention says. Not changed.
            actor: name of the actor that played it.
            policy_version: version of the policy that played it.
            key: makes adding idempotent: an episode whose key is stored already is not stored again.

        Returns:
            The number of episodes in the buffer.

        Raises:
            InvalidEpisodeError: the episode is malformed or does not fit the schema of those before.
            KeyConflictError: the key was used for another episode.
            TooLargeError: there is no memory for the columns.
            StorageFullError: the durable store has no room for it.
            StorageUncertainError: writing failed, and whether it is stored is not known: add it again, with the same ``key``, to the
                buffer that is opened next.
            StorageFailedError: the durable store cannot be written, or is the parent process's. Nothing was stored.
        """
        try:
            episode = self._episode(td, actor, policy_version, key)
        except InvalidEpisodeError as error:
            self.store.count_refused(str(error))
            raise
        return self.add_episode(episode).counts.episodes_stored

    def load(self, td: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, actor: str = "", policy_version: int = 0) -> int:
        """Stores many episodes at once.

        Args:
            td: as in :meth:`add`, of shape (num_episodes, episode_length, ...); or an iterable of episodes as :meth:`add` takes
                them, of any lengths. Not changed.
            actor: name of the actor that played them.
            policy_version: version of the policy that played them.

        Returns:
            The number of episodes in the buffer.

        Raises:
            InvalidEpisodeError: an episode is malformed; those before it are stored, the message says which it was.
        """
        try:
            for number, episode in enumerate(split_episodes(td)):
                try:
                    self.add(episode, actor=actor, policy_version=policy_version)
                except InvalidEpisodeError as error:
                    raise InvalidEpisodeError(f"episode {number}: {error}") from None
        except ColumnError as error:
            raise InvalidEpisodeError(str(error)) from None
        return self.num_eps

    def sample(
        self,
        *,
        batch_size: int | None = None,
        horizon: int | None = None,
        law: str | None = None,
        seed: int | None = None,
    ) -> Batch:
        """Draws one batch.

        Args:
            batch_size: B, slices; the configured one where left out, as for the others.
            horizon: H, transitions in a slice.
            law: ``episode`` or ``step``.
            seed: decides this draw alone: the same seed and the same stored episodes give the same batch.

        Returns:
            Fresh tensors on the buffer's device (see :class:`~touchline_protos.Batch` for shapes), provenance on the host.

        Raises:
            NotReadyError: no stored episode has horizon + 1 rows.
            InvalidArgumentError: an argument is out of range.
        """
        spec = self.spec(batch_size=batch_size, horizon=horizon, law=law)
        if seed is not None:
            return self._sample(spec, self.seeds.stream(seed))
        with self._rng_lock:
            return self._sample(spec, self._rng)

    def episodes(
        self,
        *,
        ids: Iterable[int] | None = None,
        first: int | None = None,
        last: int | None = None,
        actor: str | None = None,
        newest: int | None = None,
        columns: Iterable[str] | None = None,
        skip_missing: bool = False,
    ) -> Iterator[StoredEpisode]:
        """Reads stored episodes back, each whole and to the bit as it was added, in the order of their ids.

        What is stored when this is called is what is read; an episode that is evicted before its turn is left out. Adding goes on
        meanwhile: it waits for a copy of 1 MiB at most.

        Args:
            ids: these alone, in any order, each once; none of the next four with it. None: all, or what those leave.
            first: from this id on, itself included.
            last: up to this id, itself included.
            actor: of the actor of this name alone.
            newest: of those that the three above leave, so many of the newest.
            columns: these alone; ``obs`` stands for ``obs.*`` as well. None: all.
            skip_missing: leaves out ids that are not stored, instead of an error.

        Returns:
            An iterator of episodes whose arrays are the caller's.

        Raises:
            UnknownEpisodeError: an id is not stored; the text names it.
            InvalidArgumentError: arguments that do not go together or are out of range, or an unknown column.
        """
        query = EpisodeQuery(
            ids=None if ids is None else tuple(ids),
            first=first,
            last=last,
            actor=actor,
            newest=newest,
            columns=None if columns is None else tuple(columns),
            skip_missing=skip_missing,
        )
        self.check_restored()
        return EpisodeReader(self.store, query).episodes()

    def clear(self) -> Counts:
        """Forgets all episodes and the schema. Episode ids and the counts of what was ever added go on."""
        self.check_restored()
        counts = self.store.clear()
        give_back_freed_memory()
        return counts

    def as_torchrl(self) -> torchrl.data.ReplayBuffer:
        """Returns this same store as a regular TorchRL buffer: what one adds, the other samples.

        ``extend`` takes whole episodes (split where the ``episode`` column changes, one episode where there is none), ``sample``
        returns a TensorDict of batch_size x (horizon + 1) rows with ``batch_size`` taken from it (see :mod:`.torchrl.adapter`).
        """
        self.check_restored()
        from touchline_server.torchrl.adapter import make_torchrl_buffer

        with self.store.write_lock:
            if self._torchrl is None:
                self._torchrl = make_torchrl_buffer(self.store, self.config, self.seeds)
            return self._torchrl

    def add_episode(self, episode: Episode) -> Stored:
        """Stores one episode of numpy columns, as the codec gives it. Raises as :meth:`add` does."""
        self.check_restored()
        return self.store.add(episode)

    def submit_episode(self, episode: Episode) -> Stored | CommitFuture:
        """Stores one episode without waiting for the disk: see :meth:`EpisodeStore.submit`."""
        self.check_restored()
        return self.store.submit(episode)

    def spec(self, *, batch_size: int | None = None, horizon: int | None = None, law: str | None = None) -> SampleSpec:
        """Returns what to draw, with the configuration's values where none is given.

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
        return SampleSpec(batch_size, horizon, self.config.sampling.law if law is None else check_law(law))

    def draw(self, spec: SampleSpec, rng: np.random.Generator, *, batches: int = 1) -> BatchDraw:
        """Draws batches, and pins them until the end of a ``with`` block, in which they are gathered. Raises as :meth:`sample` does."""
        pinned = self.store.draw(spec.batch_size, spec.horizon, spec.law, rng, batches=batches)
        try:
            plan = self._plan(pinned.columns.schema, spec.horizon)
            return BatchDraw(pinned, plan, plan.layout(spec.batch_size))
        except BaseException:
            pinned.release()
            raise

    def layout(self, spec: SampleSpec) -> BatchLayout | None:
        """Returns how a batch looks at present; None while there is no schema."""
        schema = self.store.schema
        return None if schema is None else self._plan(schema, spec.horizon).layout(spec.batch_size)

    def fits_inline(self, spec: SampleSpec, *, batches: int = 1) -> bool:
        """Returns whether an event loop may gather batches by itself: see :meth:`GatherPlan.fits_inline`."""
        columns = self.store.columns
        if columns is None:
            return False
        plan = self._plan(columns.schema, spec.horizon)
        return plan.fits_inline(columns, plan.layout(spec.batch_size), batches=batches)

    def actor_names(self, numbers: Iterable[int]) -> dict[int, str]:
        """Returns the names of actors by their numbers."""
        return {number: self.store.actor_name(number) for number in sorted(numbers)}

    def _plan(self, schema: Schema, horizon: int) -> GatherPlan:
        key = (schema, horizon)
        plan = self._plans.get(key)
        if plan is None:
            plan = GatherPlan(schema, horizon=horizon, incoming=self.store.incoming)
            with self._plans_lock:
                while len(self._plans) >= MAX_PLANS:
                    self._plans.popitem(last=False)
                self._plans[key] = plan
        return plan

    def _sample(self, spec: SampleSpec, rng: np.random.Generator) -> Batch:
        with self.draw(spec, rng) as drawn:
            if drawn.on_cuda:
                tensors = drawn.gather_tensors()
            else:
                from touchline_server.store.tensors import as_tensor

                # Pooled: page faults of a fresh allocation cost more than the gather of a large batch itself.
                arrays = drawn.layout.body_views(self._pool.lease(drawn.layout.body_bytes))
                drawn.gather_into((arrays,))
                tensors = {name: as_tensor(array) for name, array in arrays.items()}
            return assemble_batch(tensors, MappingProxyType(self.actor_names(drawn.actors())))

    @staticmethod
    def _episode(td: Mapping[str, Any], actor: str, policy_version: int, key: EpisodeKey | None) -> Episode:
        try:
            return Episode(flatten_columns(td), key=key, actor=actor, policy_version=policy_version)
        except ColumnError as error:
            raise InvalidEpisodeError(str(error)) from None
