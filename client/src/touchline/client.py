"""The client: the verbs of the in-process buffer, over the network.

A learner::

    with ReplayClient("replay-host:50051") as client:
        client.wait_until_ready()
        for obs, action, reward, done in client.batches(batch_size=256, horizon=3):
            ...  # obs [4, 256, *obs_shape], action [3, 256, A], reward and done [3, 256, 1]

An actor that has whole episodes; one that has steps uses :class:`~touchline.EpisodeWriter`::

    with ReplayClient("replay-host:50051", actor="left-foot") as client:
        client.add({"obs": obs, "action": action, "reward": reward})  # [T+1, ...] each
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from touchline._actor.batch_adds import BatchAdds
from touchline._actor.episode_factory import EpisodeFactory
from touchline._actor.keys import Identity
from touchline._actor.upload import MAX_LOAD_BYTES, EpisodeUploader
from touchline._learner.episodes import EpisodeSource, EpisodeStream
from touchline._learner.outputs import host_converter, open_stream
from touchline._learner.priorities import PriorityUpdates
from touchline._learner.readiness import Readiness
from touchline._learner.single_batch import SingleBatchSampler
from touchline._learner.stream import BatchStream
from touchline._rpc.calls import RpcClient
from touchline._rpc.channel import ServerChannel, check_address
from touchline._rpc.convert import (
    check_actor,
    check_dtype,
    check_table,
    counts_of,
    episodes_request,
    sample_request,
    seconds,
    seconds_or_none,
    server_info_of,
    whole_number,
)
from touchline._rpc.credentials import Credentials, TlsConfig
from touchline._rpc.outcomes import add_key_if_outcome_unknown
from touchline._rpc.status_verbs import StatusVerbs
from touchline._rpc.table_verbs import TableVerbs
from touchline.errors import ClosedError, EpisodeResult, InvalidArgumentError, TouchlineError
from touchline.types import EpisodeSelection, ReadyState, SampleOptions, ServerInfo
from touchline_protos import DEFAULT_MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, Batch, Counts
from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.v1 import replay_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in the standard library from Python 3.11 on


class ReplayClient(BatchAdds, TableVerbs, StatusVerbs):
    """A replay buffer on a server: episodes in, batches of slices out. Also a context manager that closes it.

    The connection opens with the first call. Every call has a deadline; all but :meth:`clear` can be repeated without harm, since an
    episode carries a key, and are retried with backoff until that deadline while the server is unavailable or over a limit (in the latter
    case after the delay that it asks for). Episodes larger than a message travel in chunks.

    Thread-safe. A client can be pickled and copied, for example as an argument of a spawned process: address, settings and credentials (the
    token, and the paths of TLS files) travel with it, and the copy opens its own connection and becomes another sender of episodes. A
    forked child of the process becomes one as well; streams and writers that were open at the fork stay the parent's.

    Args:
        address: ``"host:50051"`` or ``"unix:/path"``.
        timeout_s: deadline of a call, its retries included, up to a year. Time that the server is asked to wait (``wait_s``) comes on
            top, and a second for every 4 MiB that are sent.
        client_id: name of the sender in the keys of episodes, 1 to 128 characters; None makes ``<hostname>-<random>``.
        actor: name of the actor for episodes that are added without one, up to 128 characters.
        max_message_bytes: size limit of one request or response, at most 2 MiB for a request. The server's own limit applies as well.
        as_numpy: return batches as numpy arrays even if torch is installed.
        dtype: ``"float32"`` stores float64 columns as float32; None stores them as they are.
        table: table on the server for calls that name none, up to 128 characters; empty for the server's default one. A table that does
            not exist is an UnknownTableError of each call.
        tls: TLS settings, for example ``TlsConfig(ca="ca.pem")``. True trusts gRPC's built-in roots, False turns TLS off. None reads the
            environment: ``TOUCHLINE_TLS_CA`` turns it on (with ``_CERT``, ``_KEY``, ``_SERVER_NAME``).
        token: token that identifies this client to the server; None reads ``TOUCHLINE_TOKEN``, empty sends none. Never logged.
        allow_plaintext: send the token to another machine even without TLS; None does so only if ``TOUCHLINE_ALLOW_PLAINTEXT`` is 1.

    Raises:
        InvalidArgumentError: an argument is out of range, a file cannot be read, or the token would be sent in plain text.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 30.0,
        client_id: str | None = None,
        actor: str = "",
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        as_numpy: bool = False,
        dtype: Any = None,
        table: str = "",
        tls: TlsConfig | bool | None = None,
        token: str | None = None,
        allow_plaintext: bool | None = None,
    ) -> None:
        self.timeout_s = seconds("timeout_s", timeout_s)
        whole_number("max_message_bytes", max_message_bytes, least=1 << 16)
        self.actor = check_actor(actor)
        self.dtype = check_dtype(dtype)
        self._as_numpy = as_numpy
        self._max_message_bytes = max_message_bytes
        self._table = check_table(table)
        self._identity = Identity(client_id)
        credentials = Credentials(check_address(address), tls=tls, token=token, allow_plaintext=allow_plaintext)
        self._channel = ServerChannel(address, max_message_bytes=max_message_bytes, credentials=credentials)
        self._rpc = RpcClient(self._channel, timeout_s=timeout_s)
        self._factory = EpisodeFactory(self._identity, dtype=self.dtype)
        self._uploader = EpisodeUploader(self._rpc, max_message_bytes=min(max_message_bytes, MAX_REQUEST_BYTES))
        self._sampler = SingleBatchSampler(self._rpc)
        self.priorities = PriorityUpdates(self._rpc, max_message_bytes=min(max_message_bytes, MAX_REQUEST_BYTES))
        """Updates of priorities on their way to the server: to wait for them, and to count them."""

    @property
    def address(self) -> str:
        """The server's address, as given."""
        return self._channel.address

    @property
    def client_id(self) -> str:
        """Name of this sender in the keys of its episodes."""
        return self._identity.client_id

    @property
    def table(self) -> str:
        """Table on the server for calls that name none; empty for the server's default one."""
        return self._table

    def next_key(self) -> EpisodeKey:
        """Returns a key that no episode of this client had before."""
        return self._identity.next_key()

    # Adding.

    def add(
        self,
        episode: Mapping[str, Any],
        *,
        table: str | None = None,
        actor: str | None = None,
        policy_version: int = 0,
        key: EpisodeKey | None = None,
    ) -> int:
        """Stores one episode and returns the number of episodes in the table.

        Args:
            episode: mapping or TensorDict of arrays or tensors [T+1, ...], a row for each step: ``obs`` (or nested, or ``obs.<name>``),
                ``action``, ``reward``, optionally ``done``, ``task`` and other columns. Not changed, and not needed after the call.
                Nested observations come back in the order of the first episode's keys.
            table: table to store it in; None takes the client's.
            actor: name of the actor that played it; None takes the client's.
            policy_version: version of the policy that acted; 0 if unknown.
            key: key of an earlier attempt, to send an episode again that may have been stored; None takes a new one.

        Raises:
            InvalidEpisodeError: the episode is malformed or does not match the schema. Nothing is stored.
            InvalidArgumentError: ``actor``, ``policy_version`` or ``key`` is out of range.
            KeyConflictError: the key was used before for another payload.
            TooLargeError: the episode is over the server's size limit.
            UnavailableError, DeadlineError, ServerError: the episode may or may not be stored. Add it again with the error's ``key``, which
                stores it once.
            TouchlineError: any other error of the tree in :mod:`touchline.errors`.
        """
        made_key, made = self._factory.make(episode, actor=self.actor if actor is None else actor, policy_version=policy_version, key=key)
        with add_key_if_outcome_unknown(made_key):
            return self._uploader.add(made, table=self._table_or_own(table))[1].episodes_stored

    def load(
        self,
        episodes: Mapping[str, Any] | Iterable[Mapping[str, Any]],
        *,
        table: str | None = None,
        actor: str | None = None,
        policy_version: int = 0,
        timeout_s: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Stores many episodes and returns the number of episodes in the table.

        They are sent in calls of up to 1,000 episodes or 256 MiB. A call is retried as a whole while the server is unavailable.

        Args:
            episodes: one mapping or TensorDict of arrays [num_episodes, T+1, ...], or an iterable of episodes as :meth:`add` takes them, of
                any lengths. Not changed; the arrays must not change until the call returns.
            table: table to store them in; None takes the client's.
            actor: name of the actor that played them; None takes the client's.
            policy_version: version of the policy that acted; 0 if unknown.
            timeout_s: deadline of each call; None takes the client's.
            progress: callback that gets the number of episodes answered so far, after each call.

        Raises:
            LoadError: some episodes were refused, all others are stored. Its ``results`` has the outcome of each.
            InvalidEpisodeError: the arrays of one mapping do not fit each other. Nothing is stored.
            UnavailableError, DeadlineError: a call failed. A note on the error says how many episodes were answered before.
        """
        made = self._factory.make_all(episodes, actor=self.actor if actor is None else actor, policy_version=policy_version)
        limit_s = seconds_or_none("timeout_s", timeout_s)
        counts = self._uploader.load(made, table=self._table_or_own(table), timeout_s=limit_s, progress=progress)
        return (counts or self.counts(table=table)).episodes_stored

    def deliver(self, episode: Episode, *, table: str | None = None) -> None:
        """Stores an episode that already carries its key, actor and policy version; :class:`~touchline.EpisodeWriter` sends with it.

        Args:
            episode: episode to store.
            table: table to store it in; None takes the client's.

        Raises:
            TouchlineError: as :meth:`add`.
        """
        self._uploader.add(episode, table=self._table_or_own(table))

    def deliver_all(
        self,
        episodes: Iterable[tuple[EpisodeKey, Episode | TouchlineError]],
        *,
        table: str | None = None,
        max_bytes: int = MAX_LOAD_BYTES,
    ) -> Iterator[list[EpisodeResult]]:
        """Stores episodes that already carry their keys, and yields their outcomes, call by call.

        Args:
            episodes: episodes with their keys; an error that stands for an episode becomes its result. The iterable is read as calls need
                episodes, so at most one call's episodes are in memory.
            table: table to store them in; None takes the client's.
            max_bytes: payload limit of a call; an episode above it gets a call of its own.

        Raises:
            TouchlineError: a call failed. Episodes whose results were yielded are answered; sending all of them again is harmless.
        """
        for results, _ in self._uploader.send(episodes, table=self._table_or_own(table), max_bytes=max_bytes):
            yield results

    # Sampling.

    def sample(self, *, wait_s: float = 0.0, as_numpy: bool | None = None, as_jax: bool = False, **options: Unpack[SampleOptions]) -> Batch:
        """Returns one batch: ``obs, action, reward, done = client.sample()``. For training, :meth:`batches` is faster.

        A batch larger than a message comes over a sampling stream.

        Args:
            wait_s: longest wait for something to sample.
            as_numpy: return numpy arrays instead of torch tensors; None takes the client's setting.
            as_jax: return JAX arrays, as :meth:`batches` does.
            options: what to draw: ``table``, ``batch_size``, ``horizon``, ``law``, ``seed``, ...; see
                :class:`~touchline.types.SampleOptions`.

        Returns:
            A :class:`~touchline.Batch` of writable arrays or tensors in host memory, which are the caller's: obs [H+1, B, ...],
            action [H, B, ...], reward and done [H, B, 1] ([H, B, agents] in lockstep), dtypes as stored, and each slice's origin [B].

        Raises:
            NotReadyError: nothing could be sampled within ``wait_s``; carries the counts.
            InvalidArgumentError: the server does not accept an argument.
            TouchlineError: any other error of the tree in :mod:`touchline.errors`.
        """
        convert = host_converter(as_numpy=as_numpy, as_jax=as_jax, default_numpy=self._as_numpy)
        request = sample_request(**self._of_table(options), wait_s=wait_s)
        return convert(self._sampler.sample(request, as_bodies=as_jax))

    def batches(
        self,
        *,
        prefetch: int = 4,
        device: Any = None,
        as_numpy: bool | None = None,
        as_jax: bool = False,
        timeout_s: float | None = None,
        transport: str = "auto",
        ring: bool = True,
        reuse: bool = False,
        **options: Unpack[SampleOptions],
    ) -> BatchStream:
        """Returns an endless iterator of batches that the server sends ahead of their use.

        The session opens with the first ``next`` and waits while nothing can be sampled. If the server goes away, for example to restart,
        the stream tries for 60 s to open another session; a stream with a seed then starts its sequence again. Batches are as
        :meth:`sample` returns them, and the caller's however long they are held, except with ``reuse``.

        Args:
            prefetch: batches that the server may have in flight. A ring keeps up to 14 small ones.
            device: None or ``"cpu"`` for host memory; ``"cuda"`` or ``"cuda:N"`` for tensors there, gathered or copied ahead on a side
                stream. Those of a batch share one allocation.
            as_numpy: return numpy arrays instead of torch tensors; None takes the client's setting.
            as_jax: return the columns, ``weight`` and ``valid`` as JAX arrays over the same memory, the origins as numpy arrays.
            timeout_s: longest wait for a batch. None waits without limit while nothing can be sampled, and 60 s while the server is away.
            transport: ``"auto"``, or the first way to try: ``"device"`` (gathered here from the server's memory), ``"ring"`` (by shared
                memory; both need the server's host, Linux on x86-64, /dev/shm and user), or ``"stream"`` (in messages). What is not
                possible gives way to the next one, and ``transport_reason`` says why.
            ring: False means ``transport="stream"``.
            reuse: True for batches in two bodies of a CUDA device in turn, whose addresses never change, as CUDA graphs need. A batch is
                then the caller's until the next one is asked for; work that the current stream was given by then reads it whole.
            options: what to draw, as for :meth:`sample`.

        Raises:
            InvalidArgumentError: an argument is out of range, the device does not exist, or ``reuse`` is set without a CUDA device.
        """
        whole_number("prefetch", prefetch, least=1)
        request = sample_request(**self._of_table(options))
        how: dict[str, Any] = {"prefetch": prefetch, "timeout_s": seconds_or_none("timeout_s", timeout_s), "reuse": reuse, "as_jax": as_jax}
        how |= {"transport": transport if ring else "stream", "as_numpy": as_numpy, "default_numpy": self._as_numpy}
        return open_stream(self._rpc, request, device=device, **how)

    def update_priorities(self, slices: Batch | tuple[Any, ...], priorities: Any, *, table: str | None = None) -> None:
        """Sets the priorities of a batch that was drawn by the law ``"prioritized"``, for later draws. Returns before they are sent.

        Args:
            slices: the batch, or its ``episode_id`` and ``start``, [B] each, as arrays or tensors on any device, and maybe its store
                generation (``batch.store_generations[0]``): then they count as evicted if ids have begun again since.
            priorities: [H, B]: priority of each transition, such as the absolute TD error; finite, at least 0. An array or a tensor on any
                device; copied before the call returns.
            table: table that they were drawn from; None takes the client's. A mixed batch names its tables itself.

        Raises:
            InvalidArgumentError: a shape, a dtype or a number is wrong, or the batch was drawn by another law.
            TouchlineError: an earlier update failed; this one was taken all the same.
        """
        self.priorities.update(slices, priorities, table=self._table_or_own(table))

    # Reading back.

    def episodes(
        self, *, skip_missing: bool = False, timeout_s: float | None = None, **selection: Unpack[EpisodeSelection]
    ) -> EpisodeStream:
        """Returns an iterator of stored episodes, each whole and bit for bit as it was added, in ascending order of their ids.

        It reads what is stored at the first ``next``; an episode that is evicted before its turn is left out. If the server goes away,
        reading resumes after the last whole episode; UnavailableError if one episode breaks off at least five times and for ``timeout_s``.

        Args:
            skip_missing: leave out ids that are not stored, instead of raising UnknownEpisodeError.
            timeout_s: longest wait for the next message, also while the server is away; None takes the client's.
            selection: what to read: ``table``, ``ids`` or ``first``, ``last``, ``actor`` and ``newest``, ``columns``; see
                :class:`~touchline.types.EpisodeSelection`.

        Raises:
            InvalidArgumentError: an argument is out of range, or arguments exclude each other.
        """
        request = episodes_request(**self._of_table(selection), skip_missing=skip_missing, max_frame_bytes=self._max_message_bytes)
        limit_s = seconds_or_none("timeout_s", timeout_s) or self.timeout_s
        nothing_asked = selection.get("ids") is not None and not request.episode_ids
        return EpisodeStream(EpisodeSource(self._rpc, request, timeout_s=limit_s, empty=nothing_asked))

    # Asking.

    def ready(self, *, table: str | None = None, horizon: int | None = None) -> bool:
        """Returns whether a batch can be sampled now; None takes the client's table and the server's horizon."""
        return self.ready_state(table=table, horizon=horizon).can_sample

    def ready_state(self, *, table: str | None = None, horizon: int | None = None) -> ReadyState:
        """Returns how far a table is from being sampled; None takes the client's table and the server's horizon."""
        return self._readiness(table).ask(horizon=horizon)

    def wait_until_ready(
        self, min_steps: int | None = None, timeout_s: float | None = None, *, table: str | None = None, horizon: int | None = None
    ) -> ReadyState:
        """Waits until batches can be sampled and enough is stored, also for a server that is not up yet or restarts.

        Args:
            min_steps: rows to wait for; None takes the server's ``min_history``, 1 waits for the first batch only. A full buffer always
                suffices, since whole episodes may never fill it to the last row.
            timeout_s: longest wait; None has no limit.
            table: table to wait for; None takes the client's.
            horizon: transitions in the slices to come; None takes the server's.

        Raises:
            NotReadyError: not ready in time; carries the counts.
            UnavailableError: no server answered in time.
        """
        return self._readiness(table).wait(min_steps, timeout_s, horizon)

    def counts(self, *, table: str | None = None) -> Counts:
        """Returns a table's counts; None takes the client's table."""
        return self.ready_state(table=table).counts

    @property
    def num_eps(self) -> int:
        """Episodes stored now in the client's table. Asks the server, as ``size`` and ``capacity`` do."""
        return self.counts().episodes_stored

    @property
    def size(self) -> int:
        """Rows stored now."""
        return self.counts().steps_stored

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self.info().capacity

    def info(self, *, table: str | None = None, timeout_s: float | None = None) -> ServerInfo:
        """Returns the server's version, the configuration in force, a table's schema, sizes and counts.

        Args:
            table: table to ask about; None takes the client's.
            timeout_s: deadline of the call, its retries included; None takes the client's.
        """
        request = pb.InfoRequest(table=self._table_or_own(table)).SerializeToString()
        return server_info_of(self._rpc.unary("Info", request, timeout_s=timeout_s))

    def clear(self, *, table: str | None = None) -> Counts:
        """Empties a table, its schema included, and returns the counts. Not retried: a second attempt could clear newer episodes.

        Args:
            table: table to empty; None takes the client's.

        Raises:
            UnavailableError, DeadlineError: the table may or may not have been cleared.
        """
        request = pb.ClearRequest(table=self._table_or_own(table)).SerializeToString()
        return counts_of(pb.ClearResponse.FromString(self._rpc.unary("Clear", request, retry=False)).counts)

    def close(self) -> None:
        """Closes the connection; calls and streams in progress end with an error. Closing again does nothing."""
        self.priorities.close()
        self._channel.close()

    def __enter__(self) -> ReplayClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Inside.

    def __reduce__(self) -> tuple[Callable[[], ReplayClient], tuple[()]]:
        if self._channel.closed:
            raise ClosedError(f"the client of {self.address} was closed, expected an open one to pickle or copy")
        options: dict[str, Any] = {"timeout_s": self.timeout_s, "client_id": self._identity.given_id, "actor": self.actor}
        options |= {"max_message_bytes": self._max_message_bytes, "as_numpy": self._as_numpy, "dtype": self.dtype, "table": self._table}
        return partial(type(self), self.address, **options, **self._channel.credentials.arguments), ()

    def _table_or_own(self, table: str | None) -> str:
        return self._table if table is None else check_table(table)

    def _of_table(self, options: Mapping[str, Any]) -> dict[str, Any]:
        table = options.get("table")
        if table is not None and options.get("mix") is not None:
            raise InvalidArgumentError(f"table: {table!r} and mix, expected one of them")
        return {**options, "table": self._table_or_own(table)}

    def _readiness(self, table: str | None) -> Readiness:
        return Readiness(self._rpc, table=self._table_or_own(table))
