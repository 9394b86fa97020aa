"""Newt's buffers, served by Touchline: ``from touchline.newt import Buffer, EnsembleBuffer`` instead of ``from common.buffer import ...``.

Newt (Hansen et al. 2025) is the multi-task successor of TD-MPC2: one process for each GPU, and batches that are half demonstrations. The
constructors, verbs, shapes and sampling law are those of its ``common/buffer.py``. All ranks share one server, whose address is in
``TOUCHLINE_ADDRESS``; there the demonstrations and the online episodes are two tables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from touchline.installing import install_command

try:
    import torch
    import torch.distributed
    from tensordict import TensorDict
except ImportError as error:
    raise ImportError(f"touchline.newt needs torch and tensordict ({error}): {install_command('torch')}") from error

from touchline._learner.stream import BatchStream
from touchline._learner.torch_batch import as_tensor, check_one_agent
from touchline._tdmpc2.column_names import check_one_reward, columns_of
from touchline._tdmpc2.single_run import SingleRun
from touchline.client import ReplayClient
from touchline.errors import InvalidArgumentError, InvalidEpisodeError

ONLINE, DEMOS = "online", "demos"
"""Tables of the episodes that are played, and of the demonstrations that an :class:`EnsembleBuffer` draws half of each batch from."""
LAW = "episode"
"""Newt's sampling law, as TD-MPC2's: an episode uniformly, then a start within it uniformly."""

Sampled = tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""obs, action, reward, task; see :meth:`Buffer.sample`."""


class Buffer:
    """Newt's replay buffer, kept by a Touchline server in a table of its own.

    It can be pickled, as an argument of ``torch.multiprocessing.spawn``: each rank then has its own connection to the same table. If
    ``torch.distributed`` is initialised, the ranks draw distinct parts of global batches (see docs/several-learners.md); otherwise each
    process draws by itself. One thread samples; the rest is thread-safe.

    The table is made with ``capacity`` rows if the server does not have it, which takes a token of the role admin. Episodes of an earlier
    run are logged, and sampled too; ``TOUCHLINE_FRESH=1`` empties the table first, by the process that makes the buffer and, of ranks that
    each make one, by rank 0.

    Args:
        capacity: maximum number of rows.
        batch_size: slices of this process's batches.
        horizon: transitions in a slice.
        multiproc: ignored, as ``cache_values`` and ``compile``: the server is always shared.
        cache_values: ignored.
        compile: ignored.
        address: ``"host:50051"``; None takes ``TOUCHLINE_ADDRESS``.
        table: table on the server; None takes ``"online"``, or ``"demos"`` for the offline buffer of an :class:`EnsembleBuffer`.

    Raises:
        InvalidArgumentError: no address is given, a number is out of range, or the table's row convention is not ``incoming``.
        UnavailableError: no server answers.
    """

    def __init__(
        self,
        capacity: int = 1_000_000,
        batch_size: int = 1024,
        horizon: int = 3,
        multiproc: bool = False,
        cache_values: bool = False,
        compile: bool = False,
        *,
        address: str | None = None,
        table: str | None = None,
    ) -> None:
        address = address or os.environ.get("TOUCHLINE_ADDRESS")
        if not address:
            raise InvalidArgumentError("no server: set TOUCHLINE_ADDRESS (host:50051), or pass address=")
        for name, value in (("capacity", capacity), ("batch_size", batch_size), ("horizon", horizon)):
            if value < 1:
                raise InvalidArgumentError(f"{name}: {value}, expected at least 1")
        self._capacity, self._batch_size, self._horizon = int(capacity), int(batch_size), int(horizon)
        self._address = address
        self._table = table
        self._begun = False
        """Whether the run has begun: its table is there, and was emptied if that was asked for."""
        self._client: ReplayClient | None = None
        self._stream: BatchStream | None = None
        self._num_eps = 0
        self._num_demos = 0

    @property
    def capacity(self) -> int:
        """Maximum number of rows, as given."""
        return self._capacity

    @property
    def num_eps(self) -> int:
        """Number of episodes that this process has added, without demonstrations."""
        return self._num_eps

    def set_storage_device(self, device: Any) -> None:
        """Does nothing: where the rows are is the server's configuration, ``storage.device``."""

    def next_episode_id(self, world_size: int = 1, rank: int = 0) -> int:
        """Returns the number of the next episode that this rank adds, which no other rank has. The server's own ids are others."""
        return self._num_demos + self._num_eps * world_size + rank

    def load_demos(self, tds: TensorDict) -> int:
        """Stores demonstrations, and returns their number.

        Args:
            tds: rows [N] of all episodes, one behind the other, with ``obs``, ``action``, ``reward``, ``task`` and ``episode``, the number
                of each row's episode. Not modified.

        Raises:
            InvalidArgumentError: episodes were added or loaded before.
            InvalidEpisodeError: there is no column ``episode``, or rows of an episode do not follow each other.
            LoadError: some episodes were refused; all others are stored.
        """
        if self._num_eps or self._num_demos:
            raise InvalidArgumentError(f"load_demos: after {self._num_eps + self._num_demos} episodes, expected an empty buffer")
        episodes = list(_split(tds))
        self._connected().load(columns_of(episode) for episode in episodes)
        self._num_demos = len(episodes)
        return self._num_demos

    def add(self, td: TensorDict, world_size: int = 1, rank: int = 0) -> int:
        """Stores one episode, and returns ``num_eps``.

        Args:
            td: one episode [1, rows]; row 0 is the reset, with an observation and the task only. Not modified.
            world_size: number of ranks; see :meth:`next_episode_id`.
            rank: rank of this process.

        Raises:
            InvalidEpisodeError: it is not a single episode, is malformed, or does not fit the schema.
        """
        shape = tuple(td.shape)
        if len(shape) != 2 or shape[0] != 1:
            raise InvalidEpisodeError(f"td: shape {shape}, expected [1, rows]: one episode at a time")
        columns = columns_of(td[0])
        check_one_reward(columns, leading=1)
        self._connected().add(columns)
        self._num_eps += 1
        return self._num_eps

    def sample(self, device: Any) -> Sampled:
        """Returns a batch on a device; waits until there is something to sample. The tensors are the caller's.

        Returns:
            obs: [H+1, B, *obs_shape], as stored; a TensorDict [H+1, B] if there are several observations.
            action: [H, B, A], as stored.
            reward: [H, B, 1], as stored.
            task: [H, B], as stored: the task of each slice's episode; None if the episodes have none.
        """
        device = torch.device(device)
        if self._stream is None:
            self._stream = self._open(device)
        batch = next(self._stream)
        check_one_agent(batch, "Newt")
        obs, action, reward = batch.obs, batch.action, batch.reward
        if isinstance(obs, dict):
            obs = TensorDict(obs, batch_size=[self._horizon + 1, reward.shape[1]])
        task = batch.task
        if task is not None:
            task = task.expand(action.shape[:2]).contiguous().to(device, non_blocking=True)
        return obs.to(device, non_blocking=True), action.to(device, non_blocking=True), reward.to(device, non_blocking=True), task

    def save(self, path: Any) -> None:
        """Writes all stored episodes of the table to a file, as :meth:`load_demos` takes them: rows [N] with their ``episode``.

        Raises:
            InvalidArgumentError: nothing is stored.
        """
        rows: list[TensorDict] = []
        for number, episode in enumerate(self._connected().episodes()):
            steps = TensorDict({"episode": torch.full((episode.length,), number)}, batch_size=[episode.length])
            for name, column in episode.columns.items():
                steps[tuple("terminated" if part == "done" else part for part in name.split("."))] = as_tensor(torch, column)
            rows.append(steps)
        if not rows:
            raise InvalidArgumentError(f"save: table {self._name!r} is empty, expected at least one episode")
        torch.save(torch.cat(rows), path)

    def close(self) -> None:
        """Ends the sampling session and the connection. Closing again does nothing."""
        if self._stream is not None:
            self._stream.close()
        if self._client is not None:
            self._client.close()

    def __getstate__(self) -> dict[str, Any]:
        self._connected()  # the run begins here, so that no rank empties the table under another
        return {**self.__dict__, "_client": None, "_stream": None}

    @property
    def _name(self) -> str:
        return ONLINE if self._table is None else self._table

    def _connected(self) -> ReplayClient:
        if self._client is None:
            client = ReplayClient(self._address, table=self._name)
            if not self._begun:
                self._begin(client)
            self._client = client
        return self._client

    def _begin(self, client: ReplayClient) -> None:
        if self._name not in client.tables():
            client.create_table(self._name, buffer_size=self._capacity)
        backend: Any = client  # samples by other arguments than a backend of TD-MPC2's buffer
        SingleRun(backend, capacity=self._capacity, fresh=False if _rank().get("rank") else None)
        self._begun = True

    def _open(self, device: torch.device) -> BatchStream:
        client = self._connected()
        options: dict[str, Any] = {"device": device if device.type == "cuda" else None, "as_numpy": False, "pad": "none", "law": LAW}
        return client.batches(batch_size=self._batch_size, horizon=self._horizon, **options, **_rank())


class EnsembleBuffer(Buffer):
    """Newt's buffer of two: half of each batch is from an offline buffer, exactly, and stands first; the rest is from this one's table.

    Args:
        offline_buffer: buffer of the demonstrations. Its table becomes ``"demos"`` unless it was named.
        args: arguments of :class:`Buffer` for this one.
        kwargs: further ones; ``batch_size`` is that of both together, of which this buffer provides half.
    """

    def __init__(self, offline_buffer: Buffer, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._batch_size < 2:
            raise InvalidArgumentError(f"batch_size: {self._batch_size}, expected at least 2, a slice from each buffer")
        self._batch_size //= 2
        self._offline = offline_buffer
        if offline_buffer._table is None:
            offline_buffer._table = DEMOS
        if offline_buffer._name == self._name:
            raise InvalidArgumentError(f"table: {self._name!r} for the offline buffer too, expected two tables")

    def close(self) -> None:
        """Ends both buffers' sessions and connections."""
        super().close()
        self._offline.close()

    def _open(self, device: torch.device) -> BatchStream:
        client, offline = self._connected(), self._offline
        offline._connected()  # makes its table
        options: dict[str, Any] = {"device": device if device.type == "cuda" else None, "as_numpy": False, "pad": "none", "law": LAW}
        mix = {offline._name: offline._batch_size, self._name: self._batch_size}
        return client.batches(mix=mix, batch_size=sum(mix.values()), horizon=self._horizon, **options, **_rank())


def _rank() -> dict[str, Any]:
    """Returns this process's rank as arguments of :meth:`ReplayClient.batches`; nothing if it is the only one."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return {}
    return {"rank": distributed.get_rank(), "world_size": distributed.get_world_size(), "job": "newt"}


def _split(tds: TensorDict) -> Iterator[TensorDict]:
    """Yields the episodes of rows [N] with their numbers in ``episode``."""
    if "episode" not in tds.keys():  # noqa: SIM118  a TensorDict
        raise InvalidEpisodeError("tds: no column episode, expected the number of each row's episode")
    numbers = tds["episode"].reshape(-1)
    ends = [0, *(torch.nonzero(numbers[1:] != numbers[:-1]).reshape(-1) + 1).tolist(), len(numbers)]
    if len(ends) - 1 != len(torch.unique(numbers)):
        raise InvalidEpisodeError("episode: rows of an episode do not follow each other, expected each episode in one piece")
    for begin, end in pairwise(ends):
        yield tds[begin:end]
