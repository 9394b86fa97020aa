"""TD-MPC2's buffer, served by Touchline: ``from touchline.tdmpc2 import Buffer`` instead of ``from common.buffer import Buffer``.

It keeps the constructor, properties, methods, shapes and sampling law of ``common/buffer.py`` in TD-MPC2's official code (Hansen et al.
2024), so its trainers and agents work unchanged.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

from touchline.installing import install_command

try:
    import torch
    from tensordict import TensorDict
except ImportError as error:
    raise ImportError(f"touchline.tdmpc2 needs torch and tensordict ({error}): {install_command('torch')}") from error

from touchline._learner.stream import BatchStream
from touchline._learner.torch_batch import check_one_agent
from touchline._rpc.convert import check_mix_argument
from touchline._rpc.process_bound import ProcessBound
from touchline._tdmpc2.column_names import check_one_reward, columns_of
from touchline._tdmpc2.single_run import Backend, SingleRun, check_row_convention
from touchline.client import ReplayClient
from touchline.errors import ClosedError, InvalidArgumentError
from touchline_protos import Batch
from touchline_protos.types.mix import Mix

LAW = "episode"
"""TD-MPC2's sampling law: an episode uniformly, then a start within it uniformly. Sent with each request, for every table of a mix."""

Sampled = tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""obs, action, reward, terminated, task; see :meth:`Buffer.sample`."""


class Buffer(ProcessBound):
    """TD-MPC2's replay buffer, kept by a Touchline server or by a buffer in this process. ::

        from types import SimpleNamespace

        import torch
        from tensordict import TensorDict

        from touchline.tdmpc2 import Buffer

        cfg = SimpleNamespace(buffer_size=100_000, steps=100_000, batch_size=256, horizon=3, replay_address="127.0.0.1:50051")
        with Buffer(cfg) as buffer:
            columns = {"obs": torch.randn(51, 24), "action": torch.randn(51, 6), "reward": torch.randn(51), "terminated": torch.zeros(51)}
            episode = TensorDict(columns, batch_size=[51])  # 50 transitions
            for name in ("action", "reward", "terminated"):
                episode[name][0] = torch.nan  # row 0 is the reset: it has only an observation
            buffer.add(episode)
            obs, action, reward, terminated, task = buffer.sample()  # [4, 256, 24], [3, 256, 6], [3, 256, 1], [3, 256, 1], None

    **One run.** The buffer belongs to one run. When it is made, it asks the server for its counts and waits up to 60 s for an absent one
    (and logs that immediately); it warns of episodes from an earlier run, and of a capacity that differs from ``cfg``'s.

    **Freshness.** Over the network, the next batches are in flight while the learner uses this one, so an episode added just now first
    appears a few batches later. Other processes may add to the same server and sample from it; ``num_eps`` counts their episodes, too.

    **Threads.** One thread samples; everything else is thread-safe. Also a context manager that closes the buffer.

    Args:
        cfg: TD-MPC2's configuration, read by attribute: ``buffer_size``, ``steps``, ``batch_size``, ``horizon``. Optional:
            ``replay_address`` (``"host:50051"``; default: the environment's ``TOUCHLINE_ADDRESS``), ``replay_table`` and ``device``
            (default: CUDA if torch finds it, else the CPU).
        backend: buffer to use instead of a server: ``touchline_server.ReplayBuffer(...)``, or a client. The caller closes it.
        table: table on the server; None takes ``cfg.replay_table`` or, without that, the default one. A backend brings its own:
            ``ReplayClient(address, table="demos")``, or ``buffer.tables["demos"]`` in process.
        fresh: whether to empty the server first, for all of its users; with tokens, this takes the role admin. None: only if
            ``TOUCHLINE_FRESH`` is 1.
        accept_eviction: whether ``load`` may evict what it loaded before, if not all of it fits. None: only if
            ``TOUCHLINE_ACCEPT_EVICTION`` is 1.
        mix: share of each table in a batch, ``{"online": 0.5, "demos": 0.5}``; None samples the backend's table, which ``add`` and ``load``
            add to in either case. The slices of a batch stand table by table. See :class:`~touchline.types.SampleOptions`.
        when_empty: rule for a table of the mix that has nothing to sample: ``"wait"`` for it, or give its share to the ``"others"``.
        timeout_s: longest wait of ``sample`` over the network. None waits without limit for something to sample, and 60 s for an absent
            server.

    Raises:
        InvalidArgumentError: neither a server nor a backend was named, ``table`` was named for a backend, the row convention is not
            TD-MPC2's, or ``mix`` is not a mix.
        UnknownTableError: the server does not have the table, or one of the mix (with a backend, the error of its own tree).
        UnavailableError: no server answers at that address.
        AccessDeniedError: the token lacks the role; emptying the server takes an admin's.
    """

    _instead = "make one there, from the same cfg"

    def __init__(
        self,
        cfg: Any,
        backend: Backend | None = None,
        *,
        table: str | None = None,
        fresh: bool | None = None,
        accept_eviction: bool | None = None,
        mix: Mix | None = None,
        when_empty: str = "wait",
        timeout_s: float | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self._capacity = min(int(cfg.buffer_size), int(cfg.steps))
        self._batch_size = int(cfg.batch_size)
        self._horizon = int(cfg.horizon)
        self._device = _device(getattr(cfg, "device", None))
        self._timeout_s = timeout_s
        if backend is not None and table is not None:
            raise InvalidArgumentError(f"table: {table!r} with a backend, expected a backend of that table, or table without one")
        table = getattr(cfg, "replay_table", None) or "" if table is None else table
        self._owned = ReplayClient(_address(cfg), table=table) if backend is None else None
        self._mixing: dict[str, Any] = {}
        if mix is not None:
            self._mixing = {"mix": dict(check_mix_argument(mix, when_empty)), "when_empty": when_empty}
        self._backend: Backend = self._owned if self._owned is not None else backend  # type: ignore[assignment]
        self._stream: BatchStream | None = None
        self._closed = False
        try:
            self._run = SingleRun(self._backend, capacity=self._capacity, fresh=fresh, accept_eviction=accept_eviction)
            for table in self._mixing.get("mix", ()):
                check_row_convention(self._backend, table)
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> int:
        """``min(cfg.buffer_size, cfg.steps)``. The server's own configuration decides how many rows it keeps; a difference is logged."""
        return self._capacity

    @property
    def num_eps(self) -> int:
        """Number of episodes: those stored when this run began, and all added since, including evicted ones."""
        return self._run.episodes()

    def add(self, td: TensorDict) -> int:
        """Stores one episode and returns ``num_eps``.

        Args:
            td: episode [rows] with ``obs`` (or a TensorDict of several observations), ``action``, ``reward``, and optionally ``terminated``
                and ``task``. Row 0 holds the reset's observation, with NaN as action, reward and terminated. Not modified.

        Raises:
            InvalidEpisodeError: the episode is malformed or does not fit the schema (with a backend, the error of its own tree).
            touchline.TouchlineError: the episode is not stored, or may not be.
        """
        columns = columns_of(td)
        check_one_reward(columns, leading=1)
        self._backend.add(columns)
        return self.num_eps

    def load(self, td: TensorDict) -> int:
        """Stores many episodes and returns ``num_eps``.

        Args:
            td: episodes [episodes, rows], as in TD-MPC2's multi-task data sets; columns as for :meth:`add`. Not modified.

        Raises:
            TooLargeError: together with what was loaded before, the episodes exceed the server's buffer; none is stored. See
                ``accept_eviction``.
            LoadError: some episodes were refused; all others are stored. Otherwise as :meth:`add`.
        """
        columns = columns_of(td)
        check_one_reward(columns, leading=2)
        self._run.check_load(columns)
        self._backend.load(columns)
        return self.num_eps

    def sample(self) -> Sampled:
        """Returns a batch on the configured device; over the network, waits until there is something to sample (see ``timeout_s``).

        The caller owns the tensors; nothing overwrites them.

        Returns:
            obs: [H+1, B, *obs_shape], as stored; a TensorDict [H+1, B] if there are several observations.
            action: [H, B, A], as stored.
            reward: [H, B, 1], as stored.
            terminated: [H, B, 1], of a floating dtype; zeros if the episodes have none.
            task: [B], as stored; None if the episodes have none.

        Raises:
            ClosedError: the buffer was closed.
            InvalidArgumentError: the server's episodes are matches in lockstep, with a reward per agent.
            ForkError: this is a forked child, and the buffer belongs to its parent.
            UnavailableError: the server was away for 60 s, or ``timeout_s``.
            NotReadyError: nothing could be sampled within ``timeout_s``; in process, nothing can be sampled now. The text says how long the
                longest episode is.
            touchline.TouchlineError: the server refused the request.
        """
        batch = self._next_batch()
        check_one_agent(batch, "TD-MPC2")
        obs = batch.obs
        if isinstance(obs, dict):
            obs = TensorDict(obs, batch_size=[self._horizon + 1, self._batch_size]).to(self._device, non_blocking=True).contiguous()
        else:
            obs = self._place(obs)
        terminated = self._place(batch.done)
        if not terminated.is_floating_point():
            terminated = terminated.float()
        task = None if batch.task is None else self._place(batch.task)
        return obs, self._place(batch.action), self._place(batch.reward), terminated, task

    def close(self) -> None:
        """Ends the sampling session, and the connection unless the backend was given. Closing again does nothing."""
        self._closed = True
        if self._stream is not None:
            self._stream.close()
        if self._owned is not None:
            self._owned.close()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _next_batch(self) -> Batch:
        if self._closed:
            raise ClosedError("the buffer was closed")
        backend = self._backend
        if not isinstance(backend, ReplayClient):
            return backend.sample(batch_size=self._batch_size, horizon=self._horizon, law=LAW, pad="none", **self._mixing)
        self._check_process()
        if self._stream is None:
            self._stream = backend.batches(
                batch_size=self._batch_size,
                horizon=self._horizon,
                law=LAW,
                pad="none",
                device=self._device if self._device.type == "cuda" else None,
                as_numpy=False,
                timeout_s=self._timeout_s,
                **self._mixing,
            )
        try:
            return next(self._stream)
        except StopIteration:
            raise ClosedError("the buffer was closed") from None

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True).contiguous()


def _address(cfg: Any) -> str:
    address = getattr(cfg, "replay_address", None) or os.environ.get("TOUCHLINE_ADDRESS")
    if not address:
        raise InvalidArgumentError("no server: set cfg.replay_address or TOUCHLINE_ADDRESS (host:50051), or pass a backend")
    return str(address)


def _device(name: Any) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
