"""The in-process replay buffer: one table, usable on its own, and what the server serves as its default table.

Further tables are buffers too, in :attr:`ReplayBuffer.tables`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from touchline_protos import Batch, Counts
from touchline_protos.codec import Episode, EpisodeKey, StoredEpisode
from touchline_protos.codec.buffer_pool import BufferPool
from touchline_protos.types.batch import assemble_batch, batch_arrays
from touchline_protos.types.flatten import ColumnError, flatten_columns, split_episodes
from touchline_protos.types.mix import Mix
from touchline_protos.types.priorities import updates_by_table
from touchline_server.config.settings import Config
from touchline_server.errors import InvalidArgumentError, InvalidEpisodeError, NotReadyError
from touchline_server.selectors.options import LawOptions
from touchline_server.store.batch_draw import BatchDraw
from touchline_server.store.device_episodes import check_draw
from touchline_server.store.reader import EpisodeQuery, EpisodeReader
from touchline_server.tables.batch_adds import add_batch
from touchline_server.tables.device_draws import DeviceDraws
from touchline_server.tables.mix_sampler import MixSampler, MixSpec
from touchline_server.tables.registry import TableRegistry
from touchline_server.tables.sampler import TableSampler
from touchline_server.tables.table import Table
from touchline_server.tables.table_buffers import TableBuffers

if TYPE_CHECKING:
    import torchrl.data

    from touchline_server.durability.storage_state import StorageMonitor
    from touchline_server.store.inserts import Stored

MAX_IDLE_BYTES = 1 << 28
"""Bytes kept for the next batches, of batches that no caller holds any more."""


class ReplayBuffer(TableBuffers, DeviceDraws):
    """A ring of whole episodes and batches of contiguous slices of them, like TD-MPC2's buffer (Hansen et al. 2024).

    It is the in-process interface to one table. Every method may be called from any thread. Adding copies what it is given; batches are
    the caller's.

    >>> buffer = ReplayBuffer(Config(tables={"demos": {"law": "step"}}))
    >>> buffer.tables["demos"].add(episode)
    >>> buffer.create_table("expert", buffer_size=10_000).add(episode)
    """

    def __init__(
        self,
        config: Config,
        *,
        restore: bool = True,
        accept_eviction: bool = False,
        table: Table | None = None,
        registry: TableRegistry | None = None,
    ) -> None:
        """Makes a buffer. It is empty, or holds what its ``storage.data_dir`` held; the first episode allocates the columns.

        Args:
            config: the configuration.
            restore: False leaves opening the folder and finding the device to :meth:`restore`, which must be called before anything else.
            accept_eviction: whether stored episodes for which ``config.buffer_size`` has become too small may be evicted, as
                ``storage.accept_eviction`` allows for the server; without either that is a StoreMismatchError.
            table: the table to work on; a new one by default.
            registry: the tables that ``table`` is one of; by default the configuration's, which :meth:`close` closes.

        Raises:
            ConfigError, ReplayError: as :meth:`restore`.
        """
        if table is None:
            table = Table("", config.for_table(""), accept_eviction=accept_eviction)
        self._owns_tables = registry is None
        super().__init__(table, TableRegistry(table, config, accept_eviction=accept_eviction) if registry is None else registry)
        self.config = config
        self.store = self.table.store
        self.seeds = self.table.seeds
        self._rng = self.seeds.stream()
        self._rng_lock = threading.Lock()
        self._pool = BufferPool(MAX_IDLE_BYTES)
        self._torchrl: torchrl.data.ReplayBuffer | None = None
        if restore:
            self.restore()

    def restore(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Opens ``storage.data_dir``, if one is configured, and puts the episodes of every table into its ring.

        Args:
            progress: called again and again with the rows read so far and all rows, of one table after the other.

        Raises:
            ConfigError: a CUDA device that this machine does not have.
            StoreInUseError: another server uses the folder.
            StoreMismatchError: it is of another format or configuration, or the buffer is too small for its episodes.
            DamagedStoreError: something in it is not as it was written.
            StorageFailedError: it cannot be read or written.
            TooLargeError: there is no memory for the columns.
        """
        self.registry.restore(None if progress is None else lambda _, read, total: progress(read, total))

    @property
    def restored(self) -> bool:
        """Whether the durable store, if there is to be one, has been read. Until then every other method raises RestoringError."""
        return self.table.restored

    def check_restored(self) -> None:
        """Raises RestoringError until the durable store has been read: what the buffer holds is not known before."""
        self.table.check_restored()

    def close(self) -> None:
        """Commits adds in progress, and releases ``storage.data_dir`` and ``storage.scratch_dir``. Of every table; a further table's buffer
        is closed with the default one's.
        """
        if self._owns_tables:
            self.registry.close()

    def set_rate(self, **keys: float) -> None:
        """Changes the table's rate limit; see :meth:`TableRegistry.change`.

        Args:
            keys: keys as in ``[tables.NAME.rate]`` of the configuration: ``samples_per_insert=4``. The others stay as they are.

        Raises:
            InvalidArgumentError: a key or a value is wrong; the text names it.
        """
        self.registry.change(self.table.name, {"rate": keys})
        self.config = self.table.config

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
        """State of the disk under the durable store; None without one, or before it is read."""
        return self.table.storage_monitor

    def counts(self) -> Counts:
        """Returns the counts at this moment."""
        return self.table.counts()

    def ready(self) -> bool:
        """Returns whether at least one episode can be sampled at the configured horizon."""
        return self.table.ready()

    def add(self, td: Mapping[str, Any], *, actor: str = "", policy_version: int = 0, key: EpisodeKey | None = None) -> int:
        """Stores one episode.

        Args:
            td: a TensorDict, or a mapping of tensors or arrays, of shape (episode_length, ...): ``obs`` (may be nested), ``action``,
                ``reward``, optionally ``done``, ``task`` and any others. Its rows follow the configured row convention. Not changed.
            actor: name of the actor that played the episode.
            policy_version: version of the policy that played it.
            key: key of the episode: one whose key is stored already is not stored again. None: it is stored each time.

        Returns:
            The number of episodes in the buffer.

        Raises:
            InvalidEpisodeError: the episode is malformed or does not fit the schema.
            KeyConflictError: the key was used for another episode.
            TooLargeError: there is no memory for the columns.
            OverLimitError: the table's rate limit does not allow it now.
            StorageFullError: the durable store's disk is full.
            StorageUncertainError: writing failed, and it is not known whether the episode is stored: add it again, with the same
                ``key``, to the buffer that is opened next.
            StorageFailedError: the durable store cannot be written, or belongs to the parent process. Nothing was stored.
        """
        try:
            episode = self._episode(td, actor, policy_version, key)
        except InvalidEpisodeError as error:
            self.store.count_refused(str(error))
            raise
        return self.add_episode(episode).counts.episodes_stored

    def load(self, td: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, actor: str = "", policy_version: int = 0) -> int:
        """Stores many episodes.

        Args:
            td: a TensorDict or mapping as in :meth:`add`, of shape (num_episodes, episode_length, ...); or an iterable of episodes as
                in :meth:`add`, of any lengths. Not changed.
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

    def add_batch(
        self,
        td: Mapping[str, Any],
        *,
        lengths: Any = None,
        actor: str | Sequence[str] = "",
        policy_version: int = 0,
        keys: Sequence[EpisodeKey] | None = None,
    ) -> int:
        """Stores the episodes of a vector simulator together: all or none, and each column with one copy.

        CUDA tensors stay on the device if the columns are there too, without keys and ``storage.data_dir``; see docs/gpu.md.

        Args:
            td: a TensorDict, or a mapping of tensors or arrays, of shape (envs, T, ...): columns as in :meth:`add`. Not changed.
            lengths: [envs] integers, 1 to T: rows of each episode, the first of its T. None: all T.
            actor: name of the actor that played them, or a name for each.
            policy_version: version of the policy that played them.
            keys: a key for each episode, as in :meth:`add`.

        Returns:
            The number of episodes in the buffer.

        Raises:
            InvalidEpisodeError: something does not fit, or a value is not finite; the message says where. Counts as one refused episode.
            ReplayError: as :meth:`add`.
        """
        add_batch(self.table, td, lengths, actor=actor, policy_version=policy_version, keys=keys)
        return self.num_eps

    def sample(
        self,
        *,
        batch_size: int | None = None,
        horizon: int | None = None,
        law: str | None = None,
        seed: int | None = None,
        recent_steps: int | None = None,
        recent_half_life: float | None = None,
        beta: float | None = None,
        pad: str | None = None,
        mix: Mix | None = None,
        when_empty: str = "wait",
        draw: str = "host",
        out: Batch | None = None,
    ) -> Batch:
        """Draws one batch.

        Args:
            batch_size: B, slices; the configured number by default, as for the others.
            horizon: H, transitions in a slice.
            law: name of the sampling law, see ``docs/laws.md``.
            seed: seed of this draw only: the same seed and the same stored episodes give the same batch.
            recent_steps: newest rows that ``recent`` draws from; replaces both this and the half-life of the configuration.
            recent_half_life: rows after which a start is half as likely under ``recent``, at least 1; replaces both as well.
            beta: exponent of the weights of ``prioritized``, 0 to 1.
            pad: ``"end"`` if slices may run over their episode's end, see :attr:`~touchline_protos.Batch.valid`; ``"none"`` if not.
            mix: share of each table in the batch, ``{"online": 0.5, "demos": 0.5}``, instead of this table; see docs/tables.md. Each
                draws by its own law, if ``law`` is None; the first has the configured numbers.
            when_empty: ``wait`` raises NotReadyError while a table of the mix has nothing to sample, ``others`` shares out its share.
            draw: ``host``, or ``device`` if the columns' CUDA device draws: by the laws ``episode`` and ``step``, without a mix. Its random
                numbers are others: a seed gives another batch than on the host.
            out: batch that a call with the same arguments returned. It is overwritten and returned again, so its addresses are fixed. If
                the device draws, :meth:`device_sampler` does that.

        Returns:
            Tensors on the buffer's device (see :class:`~touchline_protos.Batch`), fresh without ``out``; provenance on the host, unless the
            device draws.

        Raises:
            NotReadyError: no stored episode has horizon + 1 rows, or the table's rate limit does not allow a batch now.
            InvalidArgumentError: an argument is out of range, or the columns of two tables of the mix do not fit each other.
            UnknownTableError: a table of the mix does not exist.
        """
        options = LawOptions(recent_steps, recent_half_life, beta)
        on_device = check_draw(draw, mixed=mix is not None, has_out=out is not None) == "device"
        if mix is not None:
            sampler = self._mix_sampler(
                MixSpec.of(mix, when_empty), seed, batch_size=batch_size, horizon=horizon, law=law, options=options, pad=pad
            )
            return self._take(sampler, out)
        spec = self.spec(batch_size=batch_size, horizon=horizon, law=law, options=options, pad=pad)
        if on_device:
            return self._sample_on_device(spec, seed)
        if seed is not None:
            return self._take(TableSampler(self.table, spec, self.seeds.stream(seed)), out)
        with self._rng_lock:
            return self._take(TableSampler(self.table, spec, self._rng), out)

    def update_priorities(self, slices: Batch | tuple[Any, ...], priorities: Any) -> int:
        """Sets the priorities of a batch that was drawn by the law ``prioritized``, for later draws.

        Args:
            slices: the batch, which may be mixed, or its ``episode_id`` and ``start``, [B] each, as arrays or tensors on any device, and
                maybe its store generation (``batch.store_generations[0]``): then they are ignored if ids have begun again since.
            priorities: [H, B]: priority of each transition, such as the absolute TD error; finite, at least 0. An array or a tensor on any
                device; not changed.

        Returns:
            The number of slices whose episodes are still stored; the others are ignored.

        Raises:
            InvalidArgumentError: a shape, a dtype or a number is wrong, or the batch was drawn by another law. Nothing has changed.
        """
        try:
            updates = updates_by_table(slices, priorities, self.table.name)
        except ColumnError as error:
            raise InvalidArgumentError(str(error)) from None
        return sum(self.registry.get(name).update_priorities(update) for name, update in updates)

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
        """Reads stored episodes back, each whole and bit for bit as it was added, in the order of their ids.

        The episodes stored at the time of the call are read; one that is evicted before its turn is left out. Adding continues
        meanwhile and waits for a copy of at most 1 MiB.

        Args:
            ids: ids of the episodes to read, in any order, each once; excludes the next four. None: all, or what those select.
            first: smallest id.
            last: largest id.
            actor: name of the episodes' actor.
            newest: number of the most recent episodes that match the three above.
            columns: names of the columns to read; ``obs`` stands for ``obs.*`` as well. None: all.
            skip_missing: whether ids that are not stored are left out instead of an error.

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
        """Evicts all episodes and forgets the schema. Episode ids and the counts of what was ever added continue."""
        return self.table.clear()

    def as_torchrl(self) -> torchrl.data.ReplayBuffer:
        """Returns this same table as a regular TorchRL buffer: what one adds, the other samples.

        ``extend`` takes whole episodes (split where the ``episode`` column changes; without that column it is one episode). ``sample``
        returns a TensorDict of ``batch_size`` x (``horizon`` + 1) rows, see :mod:`.torchrl.adapter`.
        """
        self.check_restored()
        from touchline_server.torchrl.adapter import make_torchrl_buffer

        with self.store.writes.lock:
            if self._torchrl is None:
                self._torchrl = make_torchrl_buffer(self.table)
            return self._torchrl

    def add_episode(self, episode: Episode) -> Stored:
        """Stores one episode of numpy columns, as the codec decodes it. Raises as :meth:`add` does."""
        return self.table.add(episode)

    def _new_buffer(self, table: Table) -> ReplayBuffer:
        return ReplayBuffer(table.config, restore=False, table=table, registry=self.registry)

    def _mix_sampler(self, mix: MixSpec, seed: int | None, **request: Any) -> MixSampler:
        tables = [self.registry.get(name) for name in mix.names]
        if seed is not None:
            return MixSampler(mix, tables, tables[0].seeds.stream(seed), **request)
        with self._rng_lock:
            rng = self._rng.spawn(1)[0]
        return MixSampler(mix, tables, rng, **request)

    def _take(self, sampler: TableSampler | MixSampler, out: Batch | None = None) -> Batch:
        reserved = sampler.reserve(1, waits=False)
        if reserved is None:
            raise NotReadyError(sampler.explain_not_ready())
        try:
            with sampler.draw(reserved) as drawn:
                actor_names = MappingProxyType(sampler.actor_names(drawn.actors()))
                batch = assemble_batch(
                    self._tensors(drawn, out),
                    actor_names,
                    table_names=sampler.table_names,
                    store_generations=drawn.layout.store_generations,
                )
        except BaseException:
            sampler.cancel(*reserved)
            raise
        sampler.delivered(*reserved)
        return batch

    def _tensors(self, drawn: BatchDraw, out: Batch | None) -> dict[str, Any]:
        if drawn.on_cuda or out is not None:
            return drawn.gather_tensors(None if out is None else batch_arrays(out))
        from touchline_server.store.tensors import as_tensor

        # Pooled: page faults of a fresh allocation cost more than the gather of a large batch itself.
        arrays = drawn.layout.body_views(self._pool.lease(drawn.layout.body_bytes))
        drawn.gather_into((arrays,))
        return {name: as_tensor(array) for name, array in arrays.items()}

    @staticmethod
    def _episode(td: Mapping[str, Any], actor: str, policy_version: int, key: EpisodeKey | None) -> Episode:
        try:
            return Episode(flatten_columns(td), key=key, actor=actor, policy_version=policy_version)
        except ColumnError as error:
            raise InvalidEpisodeError(str(error)) from None
