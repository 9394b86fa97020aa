"""The client: the in-process buffer's verbs, over the network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from touchline._actor.keys import Identity
from touchline._actor.upload import MAX_LOAD_BYTES, EpisodeUploader, episodes_of, make_episode
from touchline._learner.episodes import EpisodeSource, EpisodeStream
from touchline._learner.readiness import Readiness
from touchline._learner.stream import BatchSource, BatchStream, StreamSource
from touchline._learner.torch_batch import load_torch, to_tensors
from touchline._rpc.calls import RpcClient
from touchline._rpc.channel import Transport, check_address
from touchline._rpc.convert import (
    check_actor,
    check_dtype,
    check_policy_version,
    counts_of,
    episodes_request,
    sample_request,
    seconds,
    server_info_of,
    whole_number,
)
from touchline._rpc.credentials import Credentials, TlsConfig
from touchline._rpc.outcomes import outcome_told
from touchline._rpc.waits import waiting
from touchline.errors import (
    ClosedError,
    EpisodeResult,
    InvalidArgumentError,
    InvalidEpisodeError,
    NotReadyError,
    ServerError,
    TooLargeError,
    TouchlineError,
)
from touchline.types import ReadyState, ServerInfo
from touchline_protos import DEFAULT_MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, Batch, Counts
from touchline_protos.codec import BatchDecoder, CodecError, Episode, EpisodeKey
from touchline_protos.v1 import replay_pb2 as pb

RECONNECT_S = 60.0
"""How long the server may be away before a stream of batches gives up."""


class ReplayClient:
    """A replay buffer on a server: episodes in, batches of slices out. Also a context manager that closes it.

    The channel opens with the first call, and opens anew in a forked child, which also becomes another sender of episodes. Every call has
    a deadline; all but ``clear`` may be repeated without harm (an episode carries a key) and are retried with backoff, within that
    deadline, while the server is unavailable or over a limit (then after the delay that it asks for). Episodes that are larger than a
    message travel in chunks by themselves.

    Safe to use from many threads. May be pickled and copied, as an argument of a spawned process is: address, settings and credentials (the
    token, and the paths of TLS files) travel, the copy opens a channel of its own and is another sender of episodes.

    Args:
        address: ``"host:50051"`` or ``"unix:/path"``.
        timeout_s: deadline of a call, its retries included, up to a year. What the server is asked to wait (``wait_s``), and a second for
            every 4 MiB that are sent, come on top.
        client_id: names the sender in the keys of episodes, 1 to 128 characters; None makes ``<hostname>-<random>``.
        actor: name of the actor for episodes that are given none, up to 128 characters.
        max_message_bytes: of one request or response, of a request 2 MiB at most; the server's own limit holds besides.
        as_numpy: batches as numpy arrays even where torch is installed.
        dtype: ``"float32"`` stores float64 columns of what is added, loaded and written as float32; None stores them as they are.
        table: of the server; empty is the default one.
        tls: how to speak TLS, ``TlsConfig(ca="ca.pem")``; True trusts the roots that gRPC brings along, False is plain. None: by the
            environment, where ``TOUCHLINE_TLS_CA`` (and ``_CERT``, ``_KEY``, ``_SERVER_NAME``) turn it on.
        token: that the server knows this client by; None takes ``TOUCHLINE_TOKEN`` of the environment, empty is none. Never logged.
        allow_plaintext: lets the token go to another machine without TLS; None: only if ``TOUCHLINE_ALLOW_PLAINTEXT`` is 1.

    Raises:
        InvalidArgumentError: an argument out of range, a file that cannot be read, or a token that would go out in the clear.
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
        seconds("timeout_s", timeout_s)
        whole_number("max_message_bytes", max_message_bytes, least=1 << 16)
        self.timeout_s = timeout_s
        self.actor = check_actor(actor)
        self.dtype = check_dtype(dtype)
        self._as_numpy = as_numpy
        self._max_message_bytes = max_message_bytes
        self._table = table
        self._identity = Identity(client_id)
        credentials = Credentials(check_address(address), tls=tls, token=token, allow_plaintext=allow_plaintext)
        self._transport = Transport(address, max_message_bytes=max_message_bytes, credentials=credentials)
        self._calls = RpcClient(self._transport, timeout_s=timeout_s)
        self._delivery = EpisodeUploader(self._calls, table=table, max_message_bytes=min(max_message_bytes, MAX_REQUEST_BYTES))
        self._readiness = Readiness(self._calls, table=table)
        self._decoders = threading.local()

    @property
    def address(self) -> str:
        """Of the server, as given."""
        return self._transport.address

    @property
    def client_id(self) -> str:
        """Names this sender in the keys of its episodes."""
        return self._identity.client_id

    @property
    def table(self) -> str:
        """Of the server, that episodes go to and batches come from; empty is the default one."""
        return self._table

    def next_key(self) -> EpisodeKey:
        """Returns a key that no episode of this client had before."""
        return self._identity.next_key()

    # Adding.

    def add(self, episode: Mapping[str, Any], *, actor: str | None = None, policy_version: int = 0, key: EpisodeKey | None = None) -> int:
        """Stores one episode and returns the number of episodes in the buffer.

        Args:
            episode: mapping or TensorDict of arrays or tensors ``[rows, ...]``: ``obs`` (or nested, or ``obs.<name>``), ``action`` and
                ``reward``, perhaps ``done``, ``task`` and others. Not changed; not needed afterwards. Nested observations come back in the
                order of the first episode's keys.
            actor: who played it; None takes the client's.
            policy_version: of the policy that acted; 0 where unknown.
            key: to send an episode again that was perhaps stored; None takes a fresh one.

        Raises:
            InvalidEpisodeError: malformed, or not of the schema. Nothing is stored.
            InvalidArgumentError: ``actor``, ``policy_version`` or ``key`` is none.
            KeyConflictError: the key was used before for another payload.
            TooLargeError: over the server's limit of an episode.
            UnavailableError, DeadlineError, ServerError: not known to be stored; add it again with the error's ``key``, and it is once.
            TouchlineError: another of the tree.
        """
        if key is not None and not isinstance(key, EpisodeKey):
            raise InvalidArgumentError(f"key: {key!r}, expected an EpisodeKey, such as next_key() gives")
        made = make_episode(
            episode,
            key=self.next_key() if key is None else key,
            actor=self.actor if actor is None else check_actor(actor),
            policy_version=check_policy_version(policy_version),
            dtype=self.dtype,
        )
        assert made.key is not None
        with outcome_told(made.key):
            return self._delivery.add(made)[1].episodes_stored

    def load(
        self,
        episodes: Mapping[str, Any] | Iterable[Mapping[str, Any]],
        *,
        actor: str | None = None,
        policy_version: int = 0,
        timeout_s: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Stores many episodes and returns the number of episodes in the buffer.

        They go in calls of up to 1,000 episodes or 256 MiB, each retried whole while the server is unavailable.

        Args:
            episodes: one mapping or TensorDict of arrays ``[num_episodes, episode_length, ...]``, or an iterable of episodes as ``add``
                takes them, of any lengths. Not changed; the arrays must stay as they are until this returns.
            actor: who played them; None takes the client's.
            policy_version: of the policy that acted.
            timeout_s: deadline of each call; None takes the client's.
            progress: called after each call with the number of episodes answered so far.

        Raises:
            LoadError: some were refused; all others are stored. Its ``results`` say what became of each.
            InvalidEpisodeError: the arrays of one mapping do not fit each other. Nothing is stored.
            UnavailableError, DeadlineError: a call failed; a note on the error says how many episodes were answered before.
        """
        name = self.actor if actor is None else check_actor(actor)
        version = check_policy_version(policy_version)
        if timeout_s is not None:
            seconds("timeout_s", timeout_s)

        def items() -> Iterator[tuple[EpisodeKey, Episode | TouchlineError]]:
            for episode in episodes_of(episodes):
                key = self.next_key()
                try:
                    yield key, make_episode(episode, key=key, actor=name, policy_version=version, dtype=self.dtype)
                except InvalidEpisodeError as error:
                    yield key, error

        counts = self._delivery.load(items(), timeout_s=timeout_s, progress=progress)
        return (self.counts() if counts is None else counts).episodes_stored

    def deliver(self, episode: Episode) -> None:
        """Stores an episode that already carries its key and everything else; what :class:`~touchline.EpisodeWriter` sends with.

        Raises:
            TouchlineError: as :meth:`add`.
        """
        self._delivery.add(episode)

    def deliver_all(
        self, episodes: Iterable[tuple[EpisodeKey, Episode | TouchlineError]], *, max_bytes: int = MAX_LOAD_BYTES
    ) -> Iterator[list[EpisodeResult]]:
        """Stores episodes that already carry their keys, and yields what became of them, call by call.

        Args:
            episodes: each with its key; an error stands for an episode that could not be made, and becomes its result. Taken as the
                calls need them, so that no more than one call's episodes are in memory.
            max_bytes: payload of a call, unless one episode alone has more.

        Raises:
            TouchlineError: a call failed. The episodes of the results that were yielded are answered; sending all again is harmless.
        """
        for results, _ in self._delivery.send(episodes, max_bytes=max_bytes):
            yield results

    # Sampling.

    def sample(
        self,
        *,
        batch_size: int | None = None,
        horizon: int | None = None,
        law: str | None = None,
        seed: int | None = None,
        wait_s: float = 0.0,
        as_numpy: bool | None = None,
    ) -> Batch:
        """Returns one batch: ``obs, action, reward, done = client.sample()``. To train, :meth:`batches` is faster.

        A batch that is over the message limit comes, by itself, over a sampling stream.

        Args:
            batch_size: slices; None takes the server's configuration, as for the next two.
            horizon: transitions of a slice.
            law: ``"episode"`` or ``"step"``.
            seed: the same seed, adds and draws give the same batches.
            wait_s: how long to wait until something can be sampled.
            as_numpy: numpy arrays or torch tensors; None takes the client's setting.

        Returns:
            Tensors, or writable arrays, that are the caller's; see :class:`~touchline.Batch`.

        Raises:
            NotReadyError: nothing can be sampled, also not after ``wait_s``; carries the counts.
            InvalidArgumentError: an argument that the server does not take.
            TouchlineError: another of the tree.
        """
        deliver = self._delivery_of_batches(as_numpy)
        request = sample_request(table=self._table, batch_size=batch_size, horizon=horizon, law=law, seed=seed, wait_s=wait_s)
        try:
            with waiting("sample()", self.address, lambda: self._readiness.explain(horizon)):
                message = self._calls.unary("Sample", request.SerializeToString(), wait_s=wait_s)
        except TooLargeError:
            timeout_s = self.timeout_s + wait_s
            source = StreamSource(self._calls, request, prefetch=1, timeout_s=timeout_s, reconnect_s=RECONNECT_S, ring=False)
            try:
                return deliver(source.take())
            finally:
                source.close()
        except NotReadyError as error:
            raise self._with_counts(error) from error.__cause__
        try:
            return deliver(self._decoder.sample_response(message))
        except CodecError as error:
            raise ServerError(f"{self.address}: a batch that is none: {error}") from error

    def batches(
        self,
        *,
        prefetch: int = 4,
        device: Any = None,
        batch_size: int | None = None,
        horizon: int | None = None,
        law: str | None = None,
        seed: int | None = None,
        as_numpy: bool | None = None,
        timeout_s: float | None = None,
        ring: bool = True,
    ) -> BatchStream:
        """Returns an endless iterator of batches that the server pushes ahead of their use.

        The session opens with the first ``next``. It waits while nothing can be sampled. If the server goes away (a restart, say), it is
        opened anew for 60 s; a stream with a seed then starts its sequence again.

        Args:
            prefetch: batches that the server may have under way. A ring keeps up to 14 small ones.
            device: None or ``"cpu"`` for host memory; ``"cuda"`` or ``"cuda:N"`` copies through pinned memory on a side stream, one batch
                ahead. All tensors of such a batch share one allocation on the device.
            batch_size: slices; None takes the server's configuration, as for the next two.
            horizon: transitions of a slice.
            law: ``"episode"`` or ``"step"``.
            seed: the same seed, adds and draws give the same batches.
            as_numpy: numpy arrays or torch tensors; None takes the client's setting.
            timeout_s: the longest wait for a batch, be it that the server is away or that nothing can be sampled; None: as long as it takes
                while the server is there, and 60 s while it is away.
            ring: on the server's own host (Linux on x86-64; containers need the same /dev/shm and user), batches come through a ring
                in shared memory, without a message for each; False takes messages there too. Where there is none, the stream's
                ``transport_reason`` says why.

        Raises:
            InvalidArgumentError: an argument out of range, or a device that is not there.
        """
        whole_number("prefetch", prefetch, least=1)
        if timeout_s is not None:
            seconds("timeout_s", timeout_s)
        request = sample_request(table=self._table, batch_size=batch_size, horizon=horizon, law=law, seed=seed)
        source: BatchSource = StreamSource(self._calls, request, prefetch=prefetch, timeout_s=timeout_s, reconnect_s=RECONNECT_S, ring=ring)
        if device is None or str(device) == "cpu":
            return BatchStream(source, self._delivery_of_batches(as_numpy))
        from touchline._learner.cuda import on_device

        return BatchStream(on_device(source, device, as_numpy=bool(as_numpy)), lambda batch: batch)

    # Reading back.

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
        timeout_s: float | None = None,
    ) -> EpisodeStream:
        """Returns an iterator of stored episodes, each whole and to the bit as it was added, in the order of their ids.

        What is stored when the server begins, at the first ``next``, is what is read; an episode that is evicted before its turn is left
        out. If the server goes away, reading goes on behind the last whole episode; a connection that keeps breaking off within one
        episode, for ``timeout_s`` and five times at least, ends it with an UnavailableError.

        Args:
            ids: these alone, in any order, each once; none of the next four with it. None: all, or what those leave.
            first: from this id on, itself included.
            last: up to this id, itself included.
            actor: of the actor of this name alone.
            newest: of those that the three above leave, so many of the newest.
            columns: these alone; ``obs`` stands for ``obs.*`` as well. None: all.
            skip_missing: leaves out ids that are not stored, instead of an InvalidArgumentError.
            timeout_s: the longest wait for the next piece, be it that the server is away; None takes the client's.

        Raises:
            InvalidArgumentError: an argument out of range, or some that do not go together.
        """
        if timeout_s is not None:
            seconds("timeout_s", timeout_s)
        request = episodes_request(
            table=self._table,
            ids=None if ids is None else tuple(ids),
            first=first,
            last=last,
            actor=actor,
            newest=newest,
            columns=columns,
            skip_missing=skip_missing,
            max_frame_bytes=self._max_message_bytes,
        )
        none = ids is not None and not request.episode_ids
        return EpisodeStream(EpisodeSource(self._calls, request, timeout_s=timeout_s or self.timeout_s, empty=none))

    # Asking.

    def ready(self, *, horizon: int | None = None) -> bool:
        """Returns whether batches can be sampled now; with this horizon, or if None the server's."""
        return self.ready_state(horizon=horizon).can_sample

    def ready_state(self, *, horizon: int | None = None) -> ReadyState:
        """Returns how far the table is from being sampled with this horizon; None takes the server's."""
        return self._readiness.ask(0, 0.0, self.timeout_s, horizon)

    def wait_until_ready(self, min_steps: int | None = None, timeout_s: float | None = None, *, horizon: int | None = None) -> ReadyState:
        """Waits until batches can be sampled and enough is stored; a server that is not there yet, or restarts, is waited for.

        Args:
            min_steps: rows to wait for; None takes the server's ``min_history``, 1 waits for the first batch only. A full buffer is
                always enough: whole episodes may never fill it to the last row.
            timeout_s: the longest wait; None has no limit.
            horizon: transitions of the slices to come; None takes the server's.

        Raises:
            NotReadyError: not ready in time; carries the counts.
            UnavailableError: no server in time.
        """
        return self._readiness.wait(min_steps, timeout_s, horizon)

    def counts(self) -> Counts:
        """Returns the table's figures."""
        return self.ready_state().counts

    @property
    def num_eps(self) -> int:
        """Episodes stored now. Asks the server, as the next two do."""
        return self.counts().episodes_stored

    @property
    def size(self) -> int:
        """Rows stored now."""
        return self.counts().steps_stored

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self.info().capacity

    def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Returns what the server says about itself: version, configuration in force, schema, sizes and counts.

        Args:
            timeout_s: the call's deadline, retries included; None takes the client's.
        """
        request = pb.InfoRequest(table=self._table).SerializeToString()
        return server_info_of(self._calls.unary("Info", request, timeout_s=timeout_s))

    def clear(self) -> Counts:
        """Empties the table, its schema included, and returns the counts. Not retried: a second attempt could clear newer episodes.

        Raises:
            UnavailableError, DeadlineError: not known whether it was done.
        """
        request = pb.ClearRequest(table=self._table).SerializeToString()
        return counts_of(pb.ClearResponse.FromString(self._calls.unary("Clear", request, retry=False)).counts)

    def close(self) -> None:
        """Closes the channel; calls and streams under way end with an error. Closing again does nothing."""
        self._transport.close()

    def __enter__(self) -> ReplayClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Inside.

    def __reduce__(self) -> tuple[Callable[[], ReplayClient], tuple[()]]:
        if self._transport.closed:
            raise ClosedError(f"the client of {self.address} was closed, expected an open one to pickle or copy")
        options: dict[str, Any] = {
            "timeout_s": self.timeout_s,
            "client_id": self._identity.given_id,
            "actor": self.actor,
            "max_message_bytes": self._max_message_bytes,
            "as_numpy": self._as_numpy,
            "dtype": self.dtype,
            "table": self._table,
        }
        return partial(type(self), self.address, **options, **self._transport.credentials.arguments), ()

    @property
    def _decoder(self) -> BatchDecoder:
        """One a thread, since a decoder is for one."""
        decoder: BatchDecoder | None = getattr(self._decoders, "decoder", None)
        if decoder is None:
            decoder = self._decoders.decoder = BatchDecoder()
        return decoder

    def _delivery_of_batches(self, as_numpy: bool | None) -> Callable[[Batch], Batch]:
        if self._as_numpy if as_numpy is None else as_numpy:
            return lambda batch: batch
        torch = load_torch()
        if torch is None:
            return lambda batch: batch
        return lambda batch: to_tensors(torch, batch)

    def _with_counts(self, error: NotReadyError) -> NotReadyError:
        try:
            return NotReadyError(str(error), self.counts())
        except TouchlineError:
            return error
