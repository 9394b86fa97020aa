"""TD-MPC2's buffer, served by Touchline: ``from touchline.tdmpc2 import Buffer`` in the place of ``from common.buffer import Buffer``.

It keeps the constructor, properties, verbs, shapes and sampling law of ``common/buffer.py`` in the official code of TD-MPC2 (Hansen et
al. 2024), whose trainers and agents work with it unchanged.
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
from touchline._rpc.process_bound import ProcessBound
from touchline._tdmpc2.column_names import columns_of
from touchline._tdmpc2.single_run import Backend, SingleRun
from touchline.client import ReplayClient
from touchline.errors import ClosedError, InvalidArgumentError
from touchline_protos import Batch

LAW = "episode"
"""How TD-MPC2 draws: an episode uniformly, then a start within it uniformly. Sent with the request."""

Sampled = tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""obs, action, reward, terminated, task; see :meth:`Buffer.sample`."""


class Buffer(ProcessBound):
    """TD-MPC2's replay buffer on a Touchline server, or on a buffer in this process. Also a context manager that closes it.

    It is the buffer of one run: when it is made it asks the server for its figures, waits up to 60 s for one that is not there (and says so
    at once in the log), and warns of episodes of an earlier run and of a capacity that is not ``cfg``'s.

    Over the network the next batches are under way while the learner uses this one, so an episode that was added just now is first drawn
    from a few batches later. Other processes may add to and sample from the same server; ``num_eps`` counts their episodes too.

    One thread samples; the rest may be called from any.

    Args:
        cfg: TD-MPC2's, read by attribute: ``buffer_size``, ``steps``, ``batch_size``, ``horizon``; where they are there also
            ``replay_address`` (``"host:50051"``, else the environment's ``TOUCHLINE_ADDRESS``) and ``device`` (else CUDA where torch finds
            it, else the CPU).
        backend: instead of a server: ``touchline_server.ReplayBuffer(...)``, or a client that is already there. It stays the caller's.
        fresh: empties the server, for all who use it, before anything else; with tokens, the role is admin. None: only if
            ``TOUCHLINE_FRESH`` is 1.
        accept_eviction: lets ``load`` evict what it loaded before, when all of it does not fit; None: only if
            ``TOUCHLINE_ACCEPT_EVICTION`` is 1.
        timeout_s: the longest wait of ``sample`` over the network. None: as long as it takes while the server is there and nothing can be
            sampled, and 60 s while it is away.

    Raises:
        InvalidArgumentError: neither a server nor a backend was named, or the server's row convention is not TD-MPC2's.
        UnavailableError: no server answers there.
        AccessDeniedError: the token is not good for it; to empty the server it has to be an admin's.
    """

    _instead = "make one there, from the same cfg"

    def __init__(
        self,
        cfg: Any,
        backend: Backend | None = None,
        *,
        fresh: bool | None = None,
        accept_eviction: bool | None = None,
        timeout_s: float | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self._capacity = min(int(cfg.buffer_size), int(cfg.steps))
        self._batch_size = int(cfg.batch_size)
        self._horizon = int(cfg.horizon)
        self._device = _device(getattr(cfg, "device", None))
        self._timeout_s = timeout_s
        self._owned = ReplayClient(_address(cfg)) if backend is None else None
        self._backend: Backend = self._owned if self._owned is not None else backend  # type: ignore[assignment]
        self._stream: BatchStream | None = None
        self._closed = False
        try:
            self._run = SingleRun(self._backend, capacity=self._capacity, fresh=fresh, accept_eviction=accept_eviction)
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> int:
        """``min(cfg.buffer_size, cfg.steps)``. How many rows are kept is the server's configuration; a difference is logged."""
        return self._capacity

    @property
    def num_eps(self) -> int:
        """Episodes of this run: those that were stored when it began, and all that were added since, evicted ones included."""
        return self._run.episodes()

    def add(self, td: TensorDict) -> int:
        """Stores one episode and returns ``num_eps``.

        Args:
            td: [rows]: ``obs`` (or a TensorDict of several), ``action``, ``reward``, perhaps ``terminated`` and ``task``. Row 0 is the
                reset observation, with NaN as action, reward and terminated. Not changed.

        Raises:
            InvalidEpisodeError: malformed, or not of the schema (the error of the backend's own tree where one was given).
            touchline.TouchlineError: not stored, or not known to be.
        """
        self._backend.add(columns_of(td))
        return self.num_eps

    def load(self, td: TensorDict) -> int:
        """Stores many episodes and returns ``num_eps``.

        Args:
            td: [episodes, rows], as TD-MPC2's multi-task data sets have it; columns as in :meth:`add`. Not changed.

        Raises:
            TooLargeError: with what was loaded before it does not fit into the server's buffer; nothing of it is stored. See
                ``accept_eviction``.
            LoadError: some were refused; all others are stored. Further as :meth:`add`.
        """
        columns = columns_of(td)
        self._run.check_load(columns)
        self._backend.load(columns)
        return self.num_eps

    def sample(self) -> Sampled:
        """Returns a batch on the configured device; over the network, waits until there is something to sample (see ``timeout_s``).

        Returns:
            obs: [H+1, B, *obs_shape], as stored; a TensorDict [H+1, B] where observations are several.
            action: [H, B, A], as stored.
            reward: [H, B, 1], as stored.
            terminated: [H, B, 1], of a floating dtype; zeros where the episodes have none.
            task: [B], or None where the episodes have none.

        Raises:
            ClosedError: the buffer was closed.
            UnavailableError: the server was away for 60 s, or ``timeout_s``.
            NotReadyError: nothing could be sampled within ``timeout_s``, or in process now: the text says how long the longest episode is.
            touchline.TouchlineError: the server refused.
        """
        batch = self._next_batch()
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
            return backend.sample(batch_size=self._batch_size, horizon=self._horizon, law=LAW)
        self._check_process()
        if self._stream is None:
            self._stream = backend.batches(
                batch_size=self._batch_size,
                horizon=self._horizon,
                law=LAW,
                device=self._device if self._device.type == "cuda" else None,
                as_numpy=False,
                timeout_s=self._timeout_s,
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
        raise InvalidArgumentError("no server: set cfg.replay_address or TOUCHLINE_ADDRESS (host:50051), or give a backend")
    return str(address)


def _device(wanted: Any) -> torch.device:
    device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
