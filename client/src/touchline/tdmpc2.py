"""TD-MPC2's buffer, served by Touchline: ``from touchline.tdmpc2 import Buffer`` in the place of ``from common.buffer import Buffer``.

It keeps the constructor, properties, verbs, shapes and sampling law of ``common/buffer.py`` in the official code of TD-MPC2 (Hansen et
al. 2024), whose trainers and agents work with it unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from touchline_protos.log_lines import get_logger

try:
    import torch
    from tensordict import TensorDict
except ImportError as error:
    raise ImportError(f"touchline.tdmpc2 needs torch and tensordict ({error}): pip install 'touchline[torch]'") from error

from touchline.client import ReplayClient
from touchline.errors import ClosedError, InvalidArgumentError
from touchline.naming import columns_of
from touchline.stream import BatchStream
from touchline_protos import Batch, Counts

LAW = "episode"
"""How TD-MPC2 draws: an episode uniformly, then a start within it uniformly. Sent with the request."""

Sampled = tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""obs, action, reward, terminated, task; see :meth:`Buffer.sample`."""

logger = get_logger(__name__)


class Backend(Protocol):
    """The in-process buffer's verbs: what ``touchline_server.ReplayBuffer`` and :class:`~touchline.ReplayClient` have in common."""

    @property
    def capacity(self) -> int:
        """Rows that fit."""

    def add(self, episode: Mapping[str, Any], /) -> int:
        """Stores one episode."""

    def load(self, episodes: Mapping[str, Any], /) -> int:
        """Stores many episodes."""

    def sample(self, *, batch_size: int, horizon: int, law: str) -> Batch:
        """Draws one batch."""

    def counts(self) -> Counts:
        """Returns the figures of this moment."""


class Buffer:
    """TD-MPC2's replay buffer on a Touchline server, or on a buffer in this process. Also a context manager that closes it.

    Over the network the next batches are under way while the learner uses this one, so an episode that was added just now is first drawn
    from a few batches later. Other processes may add to and sample from the same server; ``num_eps`` counts their episodes too.

    One thread samples; the rest may be called from any.

    Args:
        cfg: TD-MPC2's, read by attribute: ``buffer_size``, ``steps``, ``batch_size``, ``horizon``; where they are there also
            ``replay_address`` (``"host:50051"``, else the environment's ``TOUCHLINE_ADDRESS``) and ``device`` (else CUDA where torch finds
            it, else the CPU).
        backend: instead of a server: ``touchline_server.ReplayBuffer(...)``, or a client that is already there. It stays the caller's.

    Raises:
        InvalidArgumentError: neither a server nor a backend was named.
    """

    def __init__(self, cfg: Any, backend: Backend | None = None) -> None:
        self.cfg = cfg
        self._capacity = min(int(cfg.buffer_size), int(cfg.steps))
        self._batch_size = int(cfg.batch_size)
        self._horizon = int(cfg.horizon)
        self._device = _device(getattr(cfg, "device", None))
        self._owned = None if backend is not None else ReplayClient(_address(cfg))
        self._backend: Backend = backend if backend is not None else self._client_of_its_own()
        self._stream: BatchStream | None = None
        self._checked = self._closed = False

    @property
    def capacity(self) -> int:
        """``min(cfg.buffer_size, cfg.steps)``. How many rows are kept is the server's configuration; a difference is logged."""
        return self._capacity

    @property
    def num_eps(self) -> int:
        """Episodes that were ever added."""
        return self._backend.counts().episodes_added

    def add(self, td: TensorDict) -> int:
        """Stores one episode and returns the number of episodes ever added.

        Args:
            td: [rows]: ``obs`` (or a TensorDict of several), ``action``, ``reward``, perhaps ``terminated`` and ``task``. Row 0 is the
                reset observation, with NaN as action, reward and terminated. Not changed.

        Raises:
            InvalidEpisodeError: malformed, or not of the schema (the error of the backend's own tree where one was given).
            touchline.TouchlineError: not stored, or not known to be.
        """
        columns = columns_of(td)
        self._check_backend()
        self._backend.add(columns)
        return self.num_eps

    def load(self, td: TensorDict) -> int:
        """Stores many episodes and returns the number of episodes ever added.

        Args:
            td: [episodes, rows], as TD-MPC2's multi-task data sets have it; columns as in :meth:`add`. Not changed.

        Raises:
            LoadError: some were refused; all others are stored. Further as :meth:`add`.
        """
        columns = columns_of(td)
        self._check_backend()
        self._backend.load(columns)
        return self.num_eps

    def sample(self) -> Sampled:
        """Returns a batch on the configured device; over the network, waits until there is something to sample.

        Returns:
            obs: [H+1, B, *obs_shape], as stored; a TensorDict [H+1, B] where observations are several.
            action: [H, B, A], as stored.
            reward: [H, B, 1], as stored.
            terminated: [H, B, 1], of a floating dtype; zeros where the episodes have none.
            task: [B], or None where the episodes have none.

        Raises:
            ClosedError: the buffer was closed.
            touchline.TouchlineError: the server refused, or was away for too long.
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

    def _client_of_its_own(self) -> ReplayClient:
        assert self._owned is not None
        return self._owned

    def _next_batch(self) -> Batch:
        if self._closed:
            raise ClosedError("the buffer was closed")
        backend = self._backend
        if not isinstance(backend, ReplayClient):
            self._check_backend()
            return backend.sample(batch_size=self._batch_size, horizon=self._horizon, law=LAW)
        if self._stream is None:
            if not self._checked:
                backend.wait_until_ready(min_steps=1)
                self._check_backend()
            device = self._device if self._device.type == "cuda" else None
            self._stream = backend.batches(batch_size=self._batch_size, horizon=self._horizon, law=LAW, device=device, as_numpy=False)
        try:
            return next(self._stream)
        except StopIteration:
            raise ClosedError("the buffer was closed") from None

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True).contiguous()

    def _check_backend(self) -> None:
        """Once, at the first use: nothing is opened before."""
        if self._checked:
            return
        convention = _row_convention(self._backend)
        if convention != "incoming":
            raise InvalidArgumentError(f"sampling.row_convention of the server: {convention!r}, expected 'incoming', which is TD-MPC2's")
        capacity = self._backend.capacity
        if capacity != self._capacity:
            logger.warning(
                "the server keeps %d rows (config.buffer_size), cfg asks for %d: min(cfg.buffer_size, cfg.steps)", capacity, self._capacity
            )
        self._checked = True


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


def _row_convention(backend: Any) -> str:
    if isinstance(backend, ReplayClient):
        return backend.info().row_convention
    return str(backend.config.sampling.row_convention)
